"""The clock of every optimizer, and the speed of theta under every schedule of the learning rate."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler as schedules

from catode.decisions.motion import ThetaSpeed
from catode.prune.optimizers import Clock, Updates, check_optimizer, family_of, ode_time
from catode.prune.pruner import Pruner
from catode.train.models import DenseResNet


def weights(*sizes):
    return [nn.Parameter(torch.zeros(size)) for size in sizes or (3,)]


ONE_STEP = {
    "SGD": (lambda p: optim.SGD(p, 0.1), 0.1),
    "momentum": (lambda p: optim.SGD(p, 0.1, momentum=0.9), 1.0),
    "Nesterov": (lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True), 1.0),
    "dampening": (lambda p: optim.SGD(p, 0.1, momentum=0.9, dampening=0.5), 0.5),
    "Adam": (lambda p: optim.Adam(p, 0.1), 0.1),
    "AdamW": (lambda p: optim.AdamW(p, 0.1, betas=(0.5, 0.9)), 0.1),
    "RMSprop": (lambda p: optim.RMSprop(p, 0.1), 0.1),
    "RMSprop with momentum": (lambda p: optim.RMSprop(p, 0.1, momentum=0.5), 0.2),
    "Adagrad": (lambda p: optim.Adagrad(p, 0.1), 0.1),
    "unknown": (lambda p: optim.Rprop(p, 0.1), 0.1),
    "a learning rate that is a tensor": (lambda p: optim.AdamW(p, torch.tensor(0.1)), 0.1),
}


@pytest.mark.parametrize("name", ONE_STEP)
def test_ode_time_of_a_step(name):
    make, expected = ONE_STEP[name]
    optimizer = make(weights())
    check_optimizer(optimizer)
    assert ode_time(optimizer) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["momentum", "Nesterov", "dampening", "RMSprop with momentum"])
def test_ode_time_is_how_far_a_constant_gradient_moves_the_weights_in_the_end(name):
    (weight,) = parameters = weights(1)
    optimizer = ONE_STEP[name][0](parameters)
    for _ in range(3000):
        before = weight.detach().clone()
        weight.grad = torch.ones(1)
        optimizer.step()
    assert float((before - weight).detach()) == pytest.approx(ode_time(optimizer), rel=1e-3)


def test_the_clock_is_that_of_the_fastest_group_that_learns():
    one, two, three = weights(1, 2, 3)
    groups = [{"params": [one]}, {"params": [two], "lr": 0.4, "momentum": 0.5}, {"params": [three], "lr": 50.0}]
    optimizer = optim.SGD(groups, 0.1, momentum=0.9)
    three.requires_grad_(False)
    assert ode_time(optimizer) == pytest.approx(1.0)
    updates = Updates(optimizer)
    updates.read()
    assert updates.clock == pytest.approx(1.0) and updates.of(two).rate == pytest.approx(0.8)
    assert updates.learns(one) and not updates.learns(three) and not updates.learns(nn.Parameter(torch.zeros(1)))
    optimizer.param_groups[0]["lr"] = 0.0
    updates.read()
    assert updates.clock == pytest.approx(0.8) and not updates.learns(one) and updates.of(two).rate == 1.0


def test_an_optimizer_with_steps_of_its_own_is_not_taken_for_the_one_it_is_derived_from():
    class Own(optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    class Renamed(optim.AdamW):
        pass

    for _ in range(2):  # the first instance of a class wraps its step
        assert family_of(Own(weights())) is None
        assert family_of(Renamed(weights())) is family_of(optim.AdamW(weights())) is not None
    optimizer = optim.AdamW(weights())
    schedules.ConstantLR(optimizer)  # wraps the step of the instance
    assert family_of(optimizer) is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: optim.LBFGS(p), "`optimizer` must take one gradient a step; got LBFGS"),
        (lambda p: optim.Adafactor(p), "`optimizer` must have a state that can be cut; got Adafactor"),
        (lambda p: optim.SGD(p, 0.1, maximize=True), "`optimizer` must minimize the loss; got one with maximize"),
        (lambda p: "sgd", "`optimizer` must be a torch.optim.Optimizer; got str"),
        (lambda p: optim.SGD(p, 0.1, momentum=1.0), r"`optimizer` must have a momentum in \[0, 1\); got 1"),
    ],
)
def test_what_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_optimizer(make(weights()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_law_products_of_weights_that_move_are_as_low_as_is_told(momentum):
    """Stationary noise on a quadratic: mean products of a burst over the mean squared gradient, to first order in the step."""
    generator, size = np.random.default_rng(0), 20000
    learning_rate = 0.05 * (1.0 - momentum)
    weight, buffer = generator.normal(size=size) * np.sqrt(0.05 / 2.0), np.zeros(size)
    for _ in range(200):
        buffer = momentum * buffer + weight + generator.normal(size=size)
        weight = weight - learning_rate * buffer
    truth, products = [], []
    for _ in range(60):
        burst = []
        for _ in range(3):
            gradient = weight + generator.normal(size=size)
            burst.append((weight, gradient))
            buffer = momentum * buffer + gradient
            weight = weight - learning_rate * buffer
        truth.append(np.mean([w**2 for w, _ in burst]))
        products.append(np.mean([a[1] * b[1] for a, b in itertools.combinations(burst, 2)]))
    expected = 1.0 - 2.0 * (1.0 - momentum) * (3.0 + momentum) / 3.0
    assert np.mean(products) / np.mean(truth) == pytest.approx(expected, abs=0.15)


def test_the_clock_counts_steps_wherever_they_are():
    (weight,) = parameters = weights(1)
    optimizer = optim.SGD(parameters, 0.1, momentum=0.9)
    clock = Clock(optimizer)
    for lr in (0.1, 0.3):
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.ones(1)
        optimizer.step(lambda: None)
    assert clock.take() == (pytest.approx(4.0), False) and clock.take() == (0.0, True)
    assert clock.base == pytest.approx(3.0)


# --- the speed of theta --------------------------------------------------------------------------------------------

STEPS, LR = 400, 0.1
SCHEDULES = {
    "constant": lambda o: None,
    "LinearLR(start_factor=0.01)": lambda o: schedules.LinearLR(o, start_factor=0.01, total_iters=STEPS // 10),
    "LinearLR over half the steps": lambda o: schedules.LinearLR(o, start_factor=0.01, total_iters=STEPS // 2),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, max_lr=LR, total_steps=STEPS, cycle_momentum=False),
    "OneCycleLR, momentum too": lambda o: schedules.OneCycleLR(o, max_lr=LR, total_steps=STEPS),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, STEPS),
    "warm-up from 0 by LambdaLR": lambda o: schedules.LambdaLR(o, lambda t: min(t / 40, 1.0)),
    "warm-up, then cosine": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.01, total_iters=40), schedules.CosineAnnealingLR(o, STEPS - 40)], [40]
    ),
}


def crossings(make, schedule, first):
    """How often a useless theta could go from 1 to 0 within the deciding phase."""
    (weight,) = parameters = weights(1)
    optimizer = make(parameters)
    scheduler = schedule(optimizer) if first else None
    clock, speed = Clock(optimizer), ThetaSpeed(None, STEPS)
    scheduler = scheduler if first else schedule(optimizer)
    total = 0.0
    for step in range(1, STEPS + 1):
        weight.grad = torch.ones(1)
        optimizer.step()
        speed.see(clock.base, step)
        total += clock.take()[0] * speed.value
        if scheduler is not None:
            scheduler.step()
    return total


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("first", [True, False], ids=["schedule first", "pruner first"])
@pytest.mark.parametrize(
    "make", [lambda p: optim.SGD(p, LR, momentum=0.9), lambda p: optim.AdamW(p, LR)], ids=["SGD", "AdamW"]
)
def test_thetas_have_the_same_speed_under_every_schedule(name, first, make):
    """Ten crossings in the phase at a constant rate, and within 4 to 10 under every other schedule."""
    found = crossings(make, SCHEDULES[name], first)
    assert 4.0 <= found <= 10.0 + 1e-9
    if name == "constant" or name.startswith("LinearLR(start"):
        assert found == pytest.approx(10.0, rel=0.06)


def test_a_learning_rate_that_someone_sets_by_hand_from_0():
    """Nothing names the rate that it goes up to: the speed follows the largest so far."""
    found = crossings(lambda p: optim.SGD(p, 0.0), lambda o: schedules.LambdaLR(o, lambda t: 0.0), False)
    assert found == 0.0

    class Hand:
        def __init__(self, optimizer):
            self.optimizer, self.done = optimizer, 0

        def step(self):
            self.done += 1
            self.optimizer.param_groups[0]["lr"] = LR * min(self.done / 100, 1.0)

    assert crossings(lambda p: optim.SGD(p, 0.0), Hand, False) == pytest.approx(10.0, rel=0.01)


@pytest.mark.parametrize(
    "name", ["constant", "LinearLR(start_factor=0.01)", "OneCycleLR", "warm-up from 0 by LambdaLR"]
)
def test_a_pruner_under_a_schedule_moves_its_thetas_as_fast_as_without(name):
    """A structure without benefit needs a tenth of the steps at the base rate: neither 100 times more nor fewer."""
    torch.manual_seed(0)
    model = DenseResNet(6, 3, blocks=1, width=4, hidden=4)
    optimizer = optim.SGD(model.parameters(), LR)
    scheduler = SCHEDULES[name](optimizer)
    pruner = Pruner(model, torch.zeros(2, 6), optimizer=optimizer, nu=100.0, steps=STEPS, memory=10, check_every=STEPS)
    reached, time = None, 0.0
    for _ in range(STEPS - 1):
        time += optimizer.param_groups[0]["lr"]
        x, y = torch.randn(16, 6), torch.randint(3, (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
        if scheduler is not None:
            scheduler.step()
        if reached is None and pruner.keep_prob[1] == 0.0:
            reached = time / (LR * STEPS / 10)
    assert reached is not None and 0.8 < reached < 2.5


# --- in a pruner -----------------------------------------------------------------------------------------------------


def gated(make, **given):
    torch.manual_seed(0)
    model = DenseResNet(6, 3, blocks=2, width=6, hidden=5)
    optimizer = make(model.parameters())
    given = dict(nu=1.0, steps=200, memory=20, check_every=50, measure_every=2, initial_keep_prob=0.9) | given
    return model, optimizer, Pruner(model, torch.zeros(2, 6), optimizer=optimizer, **given)


def train(model, optimizer, pruner, first, last, early=False):
    """Some steps; with the pruner's step before the optimizer's."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for one in (pruner, optimizer) if early else (optimizer, pruner):
            one.step()


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: optim.AdamW(p, 3e-3),
        lambda p: optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
        lambda p: optim.Rprop(p, 1e-3),
    ],
    ids=["AdamW", "RMSprop", "unknown"],
)
def test_a_resumed_pruner_goes_on_bit_by_bit(make, early):
    places = set()
    for cut in (31, 32, 33, 34):  # within a burst, too
        one = gated(make)
        train(*one, 0, cut, early)
        state, moments = one[2].state_dict(), one[1].state_dict()
        state, moments = copy.deepcopy(state), copy.deepcopy(moments)
        places.add(len(state["pruner"]["products"]["burst"]))
        train(*one, cut, 80, early)
        other = gated(make)
        other[2].load_state_dict(state)
        other[1].load_state_dict(moments)
        train(*other, cut, 80, early)
        for a, b in zip(flat(one[2].state_dict()), flat(other[2].state_dict()), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert (
            one[2].state.time == other[2].state.time and one[2].state_dict()["clock"] == other[2].state_dict()["clock"]
        )
    assert len(places) > 1 or not one[2].state.products.pools.products_known


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_seen(fused):
    """Also the first one, and those of a fused optimizer, whose step() is called all the same."""
    ends = []
    for spoilt in ((), (0, 1, 7, 20)):
        model, optimizer, pruner = gated(lambda p: optim.AdamW(p, 1e-3, fused=fused))
        scaler, data = torch.amp.GradScaler("cpu", init_scale=1024.0), itertools.count()
        for number in range(40 + len(spoilt)):
            step = next(data) if number not in spoilt else 0
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator)
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x * (math.inf if number in spoilt else 1.0)), y)).backward()
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            pruner.step(grad_scale=scale)
        ends.append(pruner)
        assert np.isfinite(pruner.keep_prob).all() and pruner.state.done == 40 + len(spoilt)
        assert np.isfinite(pruner.state.evidence.benefit).all() and pruner.state.evidence.benefit.any()
    assert ends[0].state.time == pytest.approx(ends[1].state.time) == pytest.approx(40 * 1e-3)


def flat(packed):
    """Every tensor in a packed state."""
    if isinstance(packed, dict):
        return [tensor for key in packed for tensor in flat(packed[key])]
    if isinstance(packed, list):
        return [tensor for part in packed for tensor in flat(part)]
    return [packed] if isinstance(packed, torch.Tensor) else []


def test_what_begins_to_learn_right_before_a_check_is_not_decided_by_what_was_measured_frozen():
    model, optimizer, pruner = gated(lambda p: optim.SGD(p, 0.05, momentum=0.9), check_every=70)
    model.blocks[0].hidden.weight.requires_grad_(False)
    train(model, optimizer, pruner, 0, 69)
    pools, owned = pruner.state.products.pools, [0, *range(2, 7)]
    assert (pools.gain.count > 1).all() and pruner.state.done == 69
    model.blocks[0].hidden.weight.requires_grad_(True)  # the next burst begins after the check
    train(model, optimizer, pruner, 69, 70)
    assert not pools.gain.count[owned].any() and (np.delete(pools.gain.count, owned) > 1).all()


def test_one_of_two_optimizers_is_refused():
    """Weights that another one moves would count as frozen, and their growth as 0."""
    torch.manual_seed(0)
    model = DenseResNet(6, 3, blocks=2, width=6, hidden=5)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    optimizer = optim.AdamW([p for p in model.parameters() if p.dim() < 2], 1e-3)
    given = dict(optimizer=optimizer, nu=1.0, steps=200)
    with pytest.raises(
        ValueError, match=r"`optimizer` must hold every parameter of the blocks that learns; .* `blocks\.0\.hidden"
    ):
        Pruner(model, torch.zeros(2, 6), **given)
    for p in matrices:
        p.requires_grad_(False)
    Pruner(model, torch.zeros(2, 6), **given)


def test_an_optimizer_that_is_not_known_decides_by_displacement_alone():
    model, optimizer, pruner = gated(lambda p: optim.Rprop(p, 1e-3), initial_keep_prob=1.0, steps=400)
    train(model, optimizer, pruner, 0, 300)
    pools = pruner.state.products.pools
    assert not pools.products_known and not pools.gain.count.any() and (pools.displaced.count > 8).any()
    limits = pruner.limits()
    open_ = pruner.fate == "undecided"
    assert (
        np.isfinite(limits.gain[open_]).all()
        and (limits.drift >= limits.keep_prob * np.where(open_, limits.gain, 0)).all()
    )


# --- what shows only with the steps ---------------------------------------------------------------------------------------


class Factored(optim.Optimizer):
    """Keeps means of squares by row and by column, as Adafactor does."""

    def __init__(self, parameters, lr, listed=False):
        super().__init__(parameters, dict(lr=lr))
        self.listed = listed

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            rows, columns = (
                (parameter.grad.square().flatten(1).mean(d) for d in (1, 0)) if parameter.dim() > 1 else (None, None)
            )
            if rows is not None:
                self.state[parameter] |= (
                    {"factors": [rows, columns]} if self.listed else {"step": 1, "row": rows, "column": columns}
                )
            parameter -= self.param_groups[0]["lr"] * parameter.grad


def pruned(make, schedule=None, steps=60, each=lambda number, optimizer: None, **given):
    torch.manual_seed(0)
    model = DenseResNet(64, 10, blocks=2, width=16, hidden=8)
    optimizer = make(model)
    settings = dict(nu=1.0, steps=steps, epoch_steps=math.inf, memory=10) | given
    pruner = Pruner(model, torch.zeros(1, 1, 8, 8), optimizer=optimizer, **settings)
    rates = schedule(optimizer) if schedule else None
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        each(number, optimizer)
        x = torch.randn(64, 1, 8, 8, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x.flatten(1)[:, :10].argmax(1)).backward()
        optimizer.step()
        if rates:
            rates.step()
        pruner.step()
    return pruner


@pytest.mark.parametrize("listed", [False, True])
def test_an_optimizer_whose_state_cannot_be_cut_is_refused_at_its_first_step(listed):
    seen = []
    with pytest.raises(
        ValueError, match="`optimizer` must have a state that can be cut; got Factored, whose "
    ) as caught:
        pruned(lambda model: Factored(model.parameters(), 0.1, listed), each=lambda number, _: seen.append(number))
    assert seen == [0] and "\n" not in str(caught.value)


def test_with_layers_alone_no_state_is_cut_and_no_channel_dies():
    pruned(lambda model: Factored(model.parameters(), 0.01), steps=4, alpha=1.0, width_multiple=8)
    with pytest.raises(ValueError, match="state that can be cut"):
        pruned(lambda model: Factored(model.parameters(), 0.01), steps=4, alpha=0.5)


@pytest.mark.parametrize(
    "make", [optim.SGD, optim.Adam, optim.Adagrad, optim.RMSprop, optim.NAdam, optim.ASGD, optim.Rprop]
)
def test_states_of_the_usual_optimizers_can_be_cut(make):
    assert pruned(lambda model: make(model.parameters(), lr=0.01), steps=4).state.done == 4


def halves(model):
    every = list(model.parameters())
    middle = len(every) // 2
    return [{"params": every[:middle]}, {"params": every[middle:], "weight_decay": 0.0}]


def test_groups_of_equal_length_may_begin_and_end_at_a_learning_rate_of_0():
    pruner = pruned(
        lambda model: optim.AdamW(halves(model), lr=1e-2),
        lambda optimizer: schedules.LambdaLR(optimizer, lambda step: min(step / 20, max(0.0, (60 - step) / 40))),
        nu=0.1,
    )
    assert pruner.finished and pruner.state.time > 0


@pytest.mark.parametrize("number", range(16, 32))
def test_a_group_may_be_added_at_any_step(number):
    extra = nn.Parameter(torch.zeros(3))

    def each(now, optimizer):
        if now == number:
            optimizer.add_param_group({"params": [extra]})

    pruner = pruned(lambda model: optim.SGD(model.parameters(), 0.05, momentum=0.9), each=each, steps=40, nu=0.05)
    assert pruner.state.done == 40


SLOW = "thetas move slowly"


@pytest.mark.parametrize(
    ("make", "schedule", "given", "told"),
    [
        (lambda m: optim.Adam(m.parameters(), lr=1.0), lambda o: schedules.LambdaLR(o, lambda _: 1e-3), {}, True),
        (
            lambda m: optim.Adam(m.parameters(), lr=1.0),
            lambda o: schedules.LambdaLR(o, lambda _: 1e-3),
            {"rate_ratio": 9.0},
            False,
        ),
        (lambda m: optim.SGD(m.parameters(), lr=0.1), lambda o: schedules.CosineAnnealingLR(o, 100), {}, False),
        (
            lambda m: optim.SGD(m.parameters(), lr=0.1),
            lambda o: schedules.OneCycleLR(o, 0.1, total_steps=101),
            {},
            False,
        ),
        (lambda m: optim.SGD(m.parameters(), lr=0.1), lambda o: schedules.LinearLR(o, 0.01, total_iters=50), {}, False),
        (
            lambda m: optim.AdamW(m.parameters(), lr=0.1),
            lambda o: schedules.OneCycleLR(o, 0.1, total_steps=200),
            {},
            False,
        ),
        (
            lambda m: optim.AdamW(m.parameters(), lr=0.1),
            lambda o: schedules.OneCycleLR(o, 0.1, total_steps=400),
            {},
            False,
        ),
        (
            lambda m: optim.SGD([{"params": list(m.parameters()), "initial_lr": 0.1}], lr=0.001),
            lambda o: schedules.ConstantLR(o, factor=0.01, total_iters=1000, last_epoch=5),
            {},
            True,
        ),
    ],
    ids=[
        "rate as the factor",
        "speed given",
        "cosine",
        "one cycle",
        "warm-up",
        "half a cycle",
        "a quarter",
        "fine-tuned on",
    ],
)
def test_thetas_that_cannot_get_anywhere_are_told_of_in_time(make, schedule, given, told):
    found = []

    def each(number, _):
        found.append(number)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pruned(make, schedule, steps=100, each=each, nu=0.05, **given)
    lines = [str(warning.message) for warning in said if str(warning.message).startswith(SLOW)]
    assert len(lines) == told
    if told:
        rate = float(lines[0].partition("rate_ratio=")[2].partition(",")[0])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            pruner = pruned(make, schedule, steps=100, nu=0.05, rate_ratio=rate)
        assert pruner.state.time * rate == pytest.approx(10.0, rel=0.3), "so thetas could cross ten times"


def test_a_finished_run_that_goes_on_leaves_no_hooks():
    make = lambda model: optim.SGD(model.parameters(), 0.05, momentum=0.9)  # noqa: E731
    first = pruned(make, steps=30, nu=0.1)
    first.finish()
    assert first.finished
    torch.manual_seed(0)
    model = DenseResNet(64, 10, blocks=2, width=16, hidden=8)
    optimizer = make(model)
    given = dict(nu=0.1, steps=30, epoch_steps=math.inf, memory=10)
    again = Pruner(model, torch.zeros(1, 1, 8, 8), optimizer=optimizer, **given)
    again.load_state_dict(first.state_dict())
    assert again.finished
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not first.optimizer._optimizer_step_pre_hooks and not first.optimizer._optimizer_step_post_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

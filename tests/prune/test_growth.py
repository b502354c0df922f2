"""Growth of benefits against closed forms: what belongs to whom, and what every optimizer's steps make of a gradient."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

from catode.prune.gated.cut import keep_units
from catode.prune.gated.gates import Gates
from catode.prune.measure.growth import GradientProducts
from catode.prune.optimizers import Updates
from catode.structures.inventory import Inventory
from catode.train.models import BasicBlock, DenseResNet, build


def attached(model, window=1e6, optimizer=None, **given):
    inventory = Inventory(model.structures())
    updates = None if optimizer is None else Updates(optimizer)
    products = GradientProducts(inventory.size, window, updates=updates, **given)
    products.attach(model, inventory, np.ones(inventory.size, dtype=bool), inventory.units)
    return products, inventory.size


def give(model, gradients, parts=1):
    """Backward passes that leave these gradients by name; a parameter without one stays out of them."""
    model.zero_grad()
    for _ in range(parts):
        found = [(p * gradients[n]).sum() for n, p in model.named_parameters() if n in gradients and p.requires_grad]
        (sum(found) / parts).backward()


def follow(products, model, gradients, draw, weights=False, parts=1, grad_scale=1.0, between=None):
    """One step of a loop around the pruner's own."""
    products.listen(weights)
    give(model, gradients, parts)
    if between is not None:
        between()
    products.add(draw, grad_scale)


def same(model, value):
    return {n: torch.full_like(p, value) for n, p in model.named_parameters()}


class OneBlock(nn.Module):
    """A basic block between a stem and nothing: what belongs to whom can be listed by hand."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3)
        self.block = BasicBlock(3, 4, 3, 1)

    def structures(self):
        return [self.block.structure("block")]


def by_hand(block, value):
    """Sum of `value(parameter)` over what each structure of `OneBlock` owns: the layer, then the four units."""
    weights = {n: value(p) for n, p in block.named_parameters()}
    layer = sum(v.sum() for v in weights.values())
    units = [
        weights["conv1.weight"][i].sum()
        + weights["bn1.weight"][i]
        + weights["bn1.bias"][i]
        + weights["conv2.weight"][:, i].sum()
        for i in range(4)
    ]
    return torch.stack([layer, *units]).detach().numpy()


def named(model, values):
    """Values by name as a function of the parameter."""
    names = {id(p): n for n, p in model.named_parameters()}
    return lambda p: values[names[id(p)]]


# --- whose weights -----------------------------------------------------------------------------------------------


def test_ownership_of_every_single_weight():
    model = OneBlock().double()
    parameters = dict(model.block.named_parameters())
    for name, parameter in parameters.items():
        for place in range(parameter.numel()):
            products, size = attached(model)
            gradients = same(model, 0.0)
            gradients[f"block.{name}"].view(-1)[place] = 2.0
            for _ in range(3):
                follow(products, model, gradients, np.ones(size))
            index = np.unravel_index(place, parameter.shape)
            unit = {"conv1": index[0], "bn1": index[0], "conv2": index[-3] if len(index) == 4 else None}.get(
                name.split(".")[0]
            )
            expected = np.zeros(5)
            expected[0] = 4.0
            if unit is not None:
                expected[1 + unit] = 4.0
            assert products.pools.gain.mean.tolist() == expected.tolist(), (name, index)


def test_a_shortcut_that_stays_belongs_to_nobody(bottleneck_net):
    model = bottleneck_net()
    products, size = attached(model)
    gradients = {
        n: torch.ones_like(p) * ("shortcut" in n or not n.startswith("blocks")) for n, p in model.named_parameters()
    }
    for _ in range(3):
        follow(products, model, gradients, np.ones(size))
    assert not products.pools.gain.mean.any() and products.pools.gain.count.all()


def test_numbers_stay_the_original_ones_after_a_compaction():
    model = DenseResNet(6, 3, blocks=2, width=4, hidden=5)
    blocks = model.structures()
    keep_units(model, blocks[1].sites[0], [1, 4])
    products, inventory = GradientProducts(12, 1e6), Inventory(blocks)
    kept = np.isin(np.arange(12), [1, 8, 11])
    products.attach(model, inventory, kept, [np.array([], dtype=np.int64), np.array([8, 11])])
    gradients = same(model, 0.0)
    gradients["blocks.1.hidden.weight"][1] = 1.0  # now the second unit: number 11
    for _ in range(3):
        follow(products, model, gradients, np.ones(12))
    gain = products.pools.gain.mean
    assert gain.nonzero()[0].tolist() == [1, 11] and gain[11] == 4.0


def test_attaching_starts_a_new_burst():
    """A burst must not mix gradients of the network before and after a compaction."""
    model = build("resnet14", in_channels=1, classes=10)
    products, size = attached(model)
    for _ in range(2):
        follow(products, model, same(model, 1.0), np.ones(size))
    inventory = Inventory(model.structures())
    products.attach(model, inventory, np.ones(size, dtype=bool), inventory.units)
    follow(products, model, same(model, 1.0), np.ones(size))
    assert not products.pools.gain.count.any()


# --- products of gradients ---------------------------------------------------------------------------------------


def test_law_products_of_different_batches_are_unbiased_where_the_square_is_not():
    torch.manual_seed(0)
    model = OneBlock().double()
    products, size = attached(model)
    generator = torch.Generator().manual_seed(1)
    signal = {n: 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}
    noise, bursts = 0.5, 600
    for _ in range(3 * bursts):
        drawn = {n: s + noise * torch.randn(s.shape, generator=generator, dtype=s.dtype) for n, s in signal.items()}
        follow(products, model, drawn, np.ones(size))
    gain = products.pools.gain
    exact = by_hand(model.block, named(model, {n: s.square() for n, s in signal.items()}))
    dimension = by_hand(model.block, torch.ones_like)
    assert gain.count == pytest.approx(np.full(size, bursts), rel=1e-3)
    assert (np.abs(gain.mean - exact) <= 4 * gain.error).all()
    assert (noise**2 * dimension > 20 * gain.error).all(), "the square's bias is far outside the error"


def epoch_of_batches(model, count, seed):
    """Gradients of the batches of one epoch, and their mean: what all images together give."""
    generator = torch.Generator().manual_seed(seed)
    batches = [
        {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) + 0.3 for n, p in model.named_parameters()}
        for _ in range(count)
    ]
    return batches, {n: sum(batch[n] for batch in batches) / count for n in batches[0]}


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("draw", [1.0, 0.8])
@pytest.mark.parametrize("make", [None, lambda p: optim.SGD(p, 0.1, momentum=0.9)])
def test_law_batches_of_one_epoch_are_corrected_exactly(count, draw, make):
    """Over all orders of an epoch the corrected product is |G|^2 to rounding, the plain one lower by tr S / (nb - 1)."""
    torch.manual_seed(0)
    model = OneBlock().double()
    batches, whole = epoch_of_batches(model, count, seed=count)
    optimizer = None if make is None else make(model.parameters())
    products, size = attached(model, window=1e12, epoch_steps=count, optimizer=optimizer)
    for order in itertools.permutations(range(count), 3):
        for place in order:  # a gated weight's gradient carries the gate
            follow(products, model, {n: g * draw for n, g in batches[place].items()}, np.full(size, draw))
    exact = by_hand(model.block, named(model, {n: g.square() for n, g in whole.items()}))
    spread = sum(
        by_hand(model.block, named(model, {n: (batch[n] - whole[n]).square() for n in whole})) for batch in batches
    )
    np.testing.assert_allclose(products.pools.gain.mean, exact, rtol=1e-9)
    np.testing.assert_allclose(products.pools.gain_below.mean, exact - spread / count / (count - 1), rtol=1e-9)
    assert (products.pools.gain_below.mean < exact).all()


def test_law_the_truth_lies_between_where_batches_vary_for_other_reasons_too():
    """Noise of its own on every batch, as augmentation adds: from below and from above, both in expectation."""
    torch.manual_seed(0)
    model = OneBlock().double()
    count, generator = 6, torch.Generator().manual_seed(1)
    batches, whole = epoch_of_batches(model, count, seed=2)
    products, size = attached(model, window=1e12, epoch_steps=count)
    for _ in range(400):
        order = torch.randperm(count, generator=generator)[:3]
        for place in order.tolist():
            drawn = {n: g + torch.randn(g.shape, generator=generator, dtype=g.dtype) for n, g in batches[place].items()}
            follow(products, model, drawn, np.ones(size))
    exact = by_hand(model.block, named(model, {n: g.square() for n, g in whole.items()}))
    below, above = products.pools.gain_below, products.pools.gain
    assert (below.mean - 4 * below.error < exact).all() and (above.mean - 4 * above.error > exact).all()


@pytest.mark.parametrize("count", [6, 12])
def test_displacement_by_batches_of_the_same_epoch_is_corrected_too(count):
    """Stationary weights: the past gradients in the momentum are of the epoch that the step is of, or of the one before."""
    torch.manual_seed(0)
    model = OneBlock().double()
    optimizer = optim.SGD(model.parameters(), 1e-3, momentum=0.5)
    generator = torch.Generator().manual_seed(1)
    batches, whole = epoch_of_batches(model, count, seed=2)
    products, size = attached(model, window=1e12, epoch_steps=count, optimizer=optimizer)
    fixed = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(1800 // count):
        for number, place in enumerate(torch.randperm(count, generator=generator).tolist()):
            if number % 3 == 0:
                products.begin()
            follow(products, model, batches[place], np.ones(size), True, between=optimizer.step)
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p.copy_(fixed[n])
    exact = by_hand(model.block, named(model, {n: g.square() for n, g in whole.items()}))
    pools = products.pools
    error = 4 * pools.displaced.error
    assert (pools.displaced.mean + error < exact).all(), "as it is, it is low"
    found = pools.by_displacement(0.0)[0]
    assert (found > exact - error).all() and (found < 1.6 * exact).all()


def test_independent_batches_need_no_correction():
    model = OneBlock().double()
    products, size = attached(model)
    for _ in range(3):
        follow(products, model, same(model, 0.7), np.ones(size))
    assert products.pools.gain.mean.tolist() == products.pools.gain_below.mean.tolist()


@pytest.mark.parametrize("on", list(itertools.product([0.0, 1.0], repeat=3)))
def test_every_pair_of_steps_with_a_structure_on_counts(on):
    """The gradient behind a closed gate is 0, and the mean is over the pairs that have both gates on."""
    model = OneBlock().double()
    products, size = attached(model, epoch_steps=4)
    values = [1.0, 2.0, 4.0]
    for gate, value in zip(on, values, strict=True):
        draw = np.ones(size)
        draw[2] = gate
        gradients = same(model, value)
        for name, where in (("conv1.weight", [1]), ("bn1.weight", [1]), ("bn1.bias", [1])):
            gradients[f"block.{name}"][where] *= gate
        gradients["block.conv2.weight"][:, 1] *= gate
        follow(products, model, gradients, draw)
    pairs = [values[i] * values[j] for i, j in ((0, 1), (1, 2), (2, 0)) if on[i] * on[j]]
    squares = [v**2 for v, gate in zip(values, on, strict=True) if gate]
    weights = by_hand(model.block, torch.ones_like)[2]
    assert products.pools.gain.count.tolist() == [1, 1, bool(pairs), 1, 1]
    if pairs:
        product, square = np.mean(pairs) * weights, np.mean(squares) * weights
        assert products.pools.gain_below.mean[2] == pytest.approx(product)
        assert products.pools.gain.mean[2] == pytest.approx(product + (square - product) / 4)


def test_what_has_no_gradient_counts_0():
    """A frozen parameter, one that the loss does not reach, and one that the optimizer does not have."""
    for how in ("frozen", "not reached", "not stepped"):
        model = OneBlock().double()
        stepped = [p for n, p in model.named_parameters() if how != "not stepped" or n != "block.conv1.weight"]
        optimizer = optim.SGD(stepped, 0.1)
        model.block.conv1.weight.requires_grad_(how != "frozen")
        gradients = same(model, 2.0)
        if how != "not stepped":
            del gradients["block.conv1.weight"]
        products, size = attached(model, optimizer=optimizer)
        for _ in range(3):
            follow(products, model, gradients, np.ones(size), weights=True)
        expected = by_hand(model.block, lambda p, m=model: torch.full_like(p, 4.0 * (p is not m.block.conv1.weight)))
        assert products.pools.gain.mean.tolist() == expected.tolist(), how


def test_a_structure_whose_weights_begin_to_learn_is_measured_anew():
    model = OneBlock().double()
    optimizer = optim.SGD(model.parameters(), 0.1)
    model.block.bn1.weight.requires_grad_(False)
    products, size = attached(model, optimizer=optimizer)
    for _ in range(3):
        follow(products, model, same(model, 1.0), np.ones(size))
    assert products.pools.gain.count.tolist() == [1] * 5
    model.block.bn1.weight.requires_grad_(True)
    products.listen(False)
    assert not products.pools.gain.count.any()
    products.ignore()
    follow(products, model, same(model, 1.0), np.ones(size))
    model.block.bn2.weight.requires_grad_(False)
    follow(products, model, same(model, 1.0), np.ones(size))
    follow(products, model, same(model, 1.0), np.ones(size))
    before = products.pools.gain.count
    assert before.tolist() == [1] * 5
    model.block.bn2.weight.requires_grad_(True)  # of the layer alone
    products.listen(False)
    assert products.pools.gain.count.tolist() == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("clip", [1.0, 0.1, "value"])
def test_gradients_are_those_of_the_loss_whatever_is_clipped(clip):
    """The mean gain of the units is that without clipping, and so is the bound when clipping relaxes."""
    found = []
    for clipped in (False, True):
        torch.manual_seed(0)
        model = OneBlock().double()
        optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
        products, size = attached(model, optimizer=optimizer)
        products.pools.moving = False  # every step is undone
        generator, weights = torch.Generator().manual_seed(1), [p.detach().clone() for p in model.parameters()]

        def between(model=model, optimizer=optimizer, clipped=clipped, weights=weights):
            if clipped and clip == "value":
                nn.utils.clip_grad_value_(model.parameters(), 0.05)
            elif clipped:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            with torch.no_grad():
                for p, w in zip(model.parameters(), weights, strict=True):
                    p.copy_(w)

        for _ in range(120):
            drawn = {n: torch.randn(p.shape, generator=generator).double() for n, p in model.named_parameters()}
            follow(products, model, {n: g + 1.0 for n, g in drawn.items()}, np.ones(size), True, between=between)
        found.append((products.pools.gain.mean.copy(), products.pools.upper(0.0), products.pools.displaced.mean.copy()))
    (plain, limit, displaced), (clipped, clipped_limit, less) = found
    assert clipped.tolist() == plain.tolist() and (less < 0.6 * displaced).all()
    assert (clipped_limit >= plain).all() and clipped_limit == pytest.approx(limit, rel=0.1)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("grad_scale", [1.0, 1024.0])
def test_micro_batches_add_up_and_a_loss_scale_is_divided_out(parts, grad_scale):
    torch.manual_seed(0)
    model = OneBlock().double()
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    products, size = attached(model, optimizer=optimizer)
    generator, gradients = torch.Generator().manual_seed(1), []
    for _ in range(3):
        drawn = {n: torch.randn(p.shape, generator=generator).double() for n, p in model.named_parameters()}
        gradients.append(drawn)
        scaled = {n: g * grad_scale for n, g in drawn.items()}
        follow(products, model, scaled, np.ones(size), True, parts, torch.tensor(grad_scale))
    one, two, three = gradients
    pairs = {n: (one[n] * two[n] + two[n] * three[n] + one[n] * three[n]) / 3 for n in one}
    np.testing.assert_allclose(products.pools.gain.mean, by_hand(model.block, named(model, pairs)), rtol=1e-9)
    mean = {n: (one[n] + two[n] + three[n]) / 3 for n in one}
    pull = by_hand(model.block, lambda p: 0.01 * named(model, mean)(p) * p.detach())
    np.testing.assert_allclose(products.pools.pull.mean, pull, rtol=1e-5)


def test_weights_that_change_between_two_backward_passes_are_refused():
    model = OneBlock()
    optimizer = optim.SGD(model.parameters(), 0.1)
    products, size = attached(model, optimizer=optimizer)
    products.listen(False)
    give(model, same(model, 1.0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * p.grad)  # what a sharpness-aware optimizer does
    give(model, same(model, 1.0))
    with pytest.raises(RuntimeError, match="one gradient a step at the same weights"):
        products.add(np.ones(size))


# --- exact growth of every optimizer -----------------------------------------------------------------------------


class Stranger(optim.SGD):
    """SGD by steps of its own, which nobody knows."""

    def step(self, closure=None):
        return super().step(closure)


def groups(model):
    """Two groups: the consumers learn at a tenth of the rate, without decay."""
    slow = [p for n, p in model.named_parameters() if "conv2" in n]
    fast = [p for n, p in model.named_parameters() if "conv2" not in n]
    return [{"params": fast}, {"params": slow, "lr": 1e-4, "weight_decay": 0.0}]


OPTIMIZERS = {
    "sgd": lambda m: optim.SGD(m.parameters(), 1e-3),
    "momentum": lambda m: optim.SGD(m.parameters(), 1e-3, momentum=0.9),
    "nesterov": lambda m: optim.SGD(m.parameters(), 1e-3, momentum=0.8, nesterov=True),
    "dampening": lambda m: optim.SGD(m.parameters(), 1e-3, momentum=0.9, dampening=0.5),
    "decay": lambda m: optim.SGD(m.parameters(), 1e-3, momentum=0.9, weight_decay=0.3),
    "groups": lambda m: optim.SGD(groups(m), 1e-3, momentum=0.9, weight_decay=0.3),
    "adam": lambda m: optim.Adam(m.parameters(), 1e-3),
    "adam, decay": lambda m: optim.Adam(m.parameters(), 1e-3, weight_decay=0.3),
    "amsgrad": lambda m: optim.Adam(m.parameters(), 1e-3, betas=(0.9, 0.99), amsgrad=True),
    "adamw": lambda m: optim.AdamW(m.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.3),
    "adamw, groups": lambda m: optim.AdamW(groups(m), 1e-3, betas=(0.9, 0.99), weight_decay=0.3),
    "nadam": lambda m: optim.NAdam(m.parameters(), 1e-3, betas=(0.9, 0.99)),
    "radam": lambda m: optim.RAdam(m.parameters(), 1e-3, betas=(0.9, 0.99)),
    "adamax": lambda m: optim.Adamax(m.parameters(), 1e-3, betas=(0.9, 0.99)),
    "rmsprop": lambda m: optim.RMSprop(m.parameters(), 1e-3, weight_decay=0.3),
    "rmsprop, momentum": lambda m: optim.RMSprop(m.parameters(), 1e-3, momentum=0.9, centered=True),
    "adagrad": lambda m: optim.Adagrad(m.parameters(), 1e-3),
    "unknown": lambda m: Stranger(m.parameters(), 1e-3, momentum=0.9),
}


def exact_growth(make, keep_prob, steps=900, wait=250, noise=1.0, seed=1):
    """What is measured at fixed weights under gates, and the growth that the optimizer's steps really cause.

    The benefit is linear around the weights, so that ``-G . step`` is its growth exactly; the mean over many steps,
    from the same weights and an optimizer state that went on, is its derivative along the optimizer's mean path.

    Returns:
        What was measured; mean growth of each structure, nats/time; share of the steps with the gates on.
    """
    torch.manual_seed(0)
    model = OneBlock().double()
    optimizer = make(model)
    products, size = attached(model, optimizer=optimizer)
    generator = torch.Generator().manual_seed(seed)
    normal = lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype)  # noqa: E731
    truth = {n: normal(p) for n, p in model.named_parameters()}
    fixed = {n: p.detach().clone() for n, p in model.named_parameters()}
    parameters, clock = dict(model.named_parameters()), Updates(optimizer).step_time()
    moved, counted, opened = {n: torch.zeros_like(w) for n, w in fixed.items()}, 0, 0.0
    for step in range(steps):
        on = float(torch.rand((), generator=generator) < keep_prob)
        if step == wait:
            products.pools.clear(np.ones(size, dtype=bool))
        if step % 3 == 0:
            products.begin()
        products.listen(weights=True)
        give(model, {n: on * (g + noise * normal(g)) for n, g in truth.items()})
        optimizer.step()
        products.add(np.full(size, on))
        with torch.no_grad():
            for n, p in parameters.items():
                if step >= wait:
                    moved[n] += p - fixed[n]
                p.copy_(fixed[n])
        counted += step >= wait
        opened += on * (step >= wait)
    growth = by_hand(model.block, named(model, {n: -truth[n] * moved[n] / counted / clock for n in truth}))
    return products, growth, opened / counted


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("keep_prob", [1.0, 0.4])
def test_law_growth_is_the_derivative_along_the_mean_path(name, keep_prob):
    """Oracle: the growth that the optimizer's own steps cause. Decay is not growth: its part is measured apart."""
    products, growth, keep_prob = exact_growth(OPTIMIZERS[name], keep_prob)
    pools = products.pools
    gain, pull = pools.gain.mean, pools.pull.mean
    by_steps = pools.displaced.mean / np.where(pools.share.mean > 0, pools.share.mean, 1.0)
    if name == "unknown":
        assert (by_steps > growth / keep_prob * 0.98).all() and (by_steps < growth / keep_prob * 1.6).all()
        assert np.isinf(GradientProducts(5, 10.0, updates=products.updates).pools.upper(1.0)).all()
        return
    own = growth - pull  # what gradients cause
    room = 4 * (pools.gain.error + pools.pull.error / keep_prob) / np.abs(own / keep_prob)
    assert (np.abs(gain * keep_prob / own - 1.0) < 0.06 + room).all(), (gain * keep_prob / own, room)
    if pools.displaced.count.any():
        assert by_steps == pytest.approx(own / keep_prob, rel=0.12)
    else:
        assert name in ("sgd", "rmsprop", "adagrad")
    assert bool(pull.any()) == ("decay" in name or name in ("groups", "adamw", "adamw, groups", "rmsprop"))


MOVING = {
    "sgd": lambda m: optim.SGD(m.parameters(), 0.02),
    "momentum .5": lambda m: optim.SGD(m.parameters(), 0.01, momentum=0.5),
    "momentum .9": lambda m: optim.SGD(m.parameters(), 2e-3, momentum=0.9),
    "nesterov": lambda m: optim.SGD(m.parameters(), 2e-3, momentum=0.9, nesterov=True),
    "dampening": lambda m: optim.SGD(m.parameters(), 4e-3, momentum=0.9, dampening=0.5),
    "adamw": lambda m: optim.AdamW(m.parameters(), 0.02),
    "nadam": lambda m: optim.NAdam(m.parameters(), 0.02),
    "rmsprop": lambda m: optim.RMSprop(m.parameters(), 0.02),
    "rmsprop, momentum": lambda m: optim.RMSprop(m.parameters(), 4e-3, momentum=0.8),
}


@pytest.mark.parametrize(("clip", "after"), [(1.0, False), (0.2, True)])
@pytest.mark.parametrize("name", MOVING)
def test_law_products_with_the_answer_are_the_squared_gradient_where_weights_move(name, clip, after):
    """Stationary weights on a noisy quadratic: products alone are far too low, or negative, and with the answer they are right.

    Oracle: the squared gradient at the weights of every step, with the optimizer's own scale.
    """
    torch.manual_seed(0)
    model = OneBlock().double()
    optimizer = MOVING[name](model)
    products, size = attached(model, optimizer=optimizer)
    generator = torch.Generator().manual_seed(1)
    stiff = {p: 1.0 + torch.rand(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()}
    names, truth, counted = {p: n for n, p in model.named_parameters()}, 0.0, 0
    for step in range(2000):
        if step == 300:
            products.pools.clear(np.ones(size, dtype=bool))
        if step % 3 == 0:
            products.begin(answering=True)
        mean = {p: stiff[p] * p.detach() for p in stiff}
        noisy = {names[p]: g + torch.randn(g.shape, generator=generator, dtype=g.dtype) for p, g in mean.items()}

        def clipped():
            for p in model.parameters():
                p.grad *= clip
            optimizer.step()

        products.listen(weights=False)
        give(model, noisy)
        if step >= 300:
            updates = products.updates
            scaled = {
                p: g.square() if updates.of(p).second is None else g.square() / (updates.of(p).second ** 0.5 + 1e-8)
                for p, g in mean.items()
            }
            truth, counted = (
                truth + by_hand(model.block, named(model, {names[p]: v for p, v in scaled.items()})),
                counted + 1,
            )
        if not after:
            clipped()
        if products.answerable:
            products.answer(np.ones(size), lambda some, moves, stood: [stiff[p] * moves[p] for p in some])
        products.add(np.ones(size))
        if after:
            clipped()
    pools, truth = products.pools, truth / counted
    corrected, bare = pools.by_products(0.0), pools.gain.mean
    assert (pools.answer.count > 500).all() and (
        np.abs(corrected / truth - 1.0) < 0.2 + 3 * pools.gain.error / truth
    ).all()
    assert bare.sum() < (0.8 if clip == 1.0 else 0.97) * truth.sum()


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "adamax", "momentum"])
def test_law_growth_falls_with_theta_no_slower_than_its_square_root(name):
    """At most ``gain * (theta + law * theta_0)`` at every theta, the gain measured at theta_0."""
    first, _, at_first = exact_growth(OPTIMIZERS[name], 0.6)
    pools = first.pools
    for theta in (1.0, 0.3, 0.15):
        products, growth, theta = exact_growth(OPTIMIZERS[name], theta)
        bound = pools.gain.mean * (theta + pools.law * at_first)
        assert (growth - products.pools.pull.mean < bound * 1.1).all(), theta
        if name == "adamw":
            linear = pools.gain.mean * theta
            assert theta > at_first or (growth - products.pools.pull.mean > 1.1 * linear).all(), "not linear"


@pytest.mark.parametrize("name", ["momentum", "groups of a network", "adamw", "rmsprop"])
def test_growth_in_a_network_is_the_derivative_of_its_benefit(name):
    """A gated branch in training: the loss without it less the loss with it, differenced along the step with its gate on.

    Batches are all examples, so that the gate alone is random; weights move by 1e-5 in a step.
    """
    torch.manual_seed(0)
    model = DenseResNet(8, 3, blocks=2, width=8, hidden=6).double()
    x, y = torch.randn(256, 8).double(), torch.randint(3, (256,))
    inventory = Inventory(model.structures())
    parts = [
        {"params": [p for n, p in model.named_parameters() if "blocks.0" not in n], "lr": 1e-4},
        {"params": [p for n, p in model.named_parameters() if "blocks.0" in n], "lr": 2e-5},
    ]
    make = {
        "momentum": lambda: optim.SGD(model.parameters(), 1e-5, momentum=0.9),
        "groups of a network": lambda: optim.SGD(parts, momentum=0.5),
        "adamw": lambda: optim.AdamW(model.parameters(), 1e-5, betas=(0.9, 0.98), weight_decay=0.0),
        "rmsprop": lambda: optim.RMSprop(model.parameters(), 1e-5, alpha=0.98),
    }
    optimizer = make[name]()
    products, size = attached(model, optimizer=optimizer)
    gates = Gates(model, inventory)
    gates.install([True, False], [None] * len(inventory.places))
    ones = torch.ones(size)

    def loss(branch):
        gates.set(None, torch.where(torch.arange(size) == 0, branch, ones))
        return nn.functional.cross_entropy(model(x), y)

    own = [p for n, p in model.named_parameters() if n.startswith("blocks.0")]

    def benefit():
        with torch.no_grad():
            return float(loss(0.0) - loss(1.0))

    found, updates = [], Updates(optimizer)
    for step in range(600):
        on = float(torch.rand(()) < 0.5)
        if step % 3 == 0:
            products.begin()
        if step >= 300 and step % 6 == 0:
            updates.read()
            gradients = torch.autograd.grad(loss(1.0), own)
            along = [updates.of(p).scaled(g) * -updates.of(p).rate for p, g in zip(own, gradients, strict=True)]
            size_of = 1e-4 / float(sum(u.square().sum() for u in along).sqrt())
            ends = []
            for sign in (1.0, -2.0, 1.0):
                with torch.no_grad():
                    for p, u in zip(own, along, strict=True):
                        p.add_(sign * size_of * u)
                ends.append(benefit())
            found.append((ends[0] - ends[1]) / (2.0 * size_of))
        if step == 300:
            products.pools.clear(np.ones(size, dtype=bool))
        products.listen(weights=True)
        optimizer.zero_grad()
        loss(on).backward()
        optimizer.step()
        draw = np.ones(size)
        draw[0] = on
        products.add(draw)
    assert products.pools.gain.mean[0] == pytest.approx(np.mean(found), rel=0.05)
    if name != "rmsprop":
        assert products.pools.by_displacement(0.0)[0][0] == pytest.approx(np.mean(found), rel=0.1)


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1000), arch=st.sampled_from(["resnet14", "resnet50"]))
def test_law_homogeneity_is_no_assumption_here_but_exact(seed, arch):
    """Degree 1 in what makes a unit behind its norm and in what reads it: both have the same w . grad L.

    Source: docs/mathematics.md section 4.
    """
    torch.manual_seed(seed)
    model = build(arch, in_channels=3, classes=10, stem="cifar", hidden_scale=0.25).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    images, labels = torch.randn(4, 3, 8, 8).double(), torch.randint(10, (4,))
    nn.functional.cross_entropy(model(images), labels).backward()
    for site in (site for block in model.structures() for site in block.sites):
        norm = [m for m in map(model.get_submodule, site.producers) if isinstance(m, nn.BatchNorm2d)]
        made = sum((p * p.grad for m in norm for p in m.parameters()), torch.zeros(()))
        read = sum(
            (m.weight * m.weight.grad).transpose(0, 1).flatten(1).sum(1)
            for m in map(model.get_submodule, site.consumers)
        )
        assert made.detach().numpy() == pytest.approx(read.detach().numpy(), rel=1e-6, abs=1e-12)

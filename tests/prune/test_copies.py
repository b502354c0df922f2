"""Copies of a network that is pruned: averages follow every cut, and all others stand alone."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from catode.prune.gated.cut import restrict
from catode.prune.pruner import Pruner
from catode.structures.description import Block, Site
from catode.train.models import DenseResNet

EXAMPLE = torch.zeros(1, 1, 8, 8)
DECAY = 0.9


class ModelEma(nn.Module):
    """As timm's ModelEmaV2: holds a copy, and averages by both state dicts side by side."""

    def __init__(self, model, decay=DECAY):
        super().__init__()
        self.module, self.decay = copy.deepcopy(model).eval(), decay

    @torch.no_grad()
    def update(self, model):
        for ema, new in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            ema.copy_(self.decay * ema + (1.0 - self.decay) * new if ema.is_floating_point() else new)


def averaged(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)


def batch(generator, size=48):
    x = torch.randn(size, 1, 8, 8, generator=generator)
    return x, (x.flatten(1)[:, :10] + 0.3 * x.flatten(1)[:, 10:20]).argmax(1)


def dense():
    torch.manual_seed(0)
    return DenseResNet(64, 10, blocks=4, width=16, hidden=12)


def make(model, **changes):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    given = dict(nu=1.0, steps=60, warmup=5, memory=10, check_every=8, rate_ratio=0.2, probe_size=12, measure_every=1)
    given |= dict(layers_per_probe=4)
    return optimizer, Pruner(model, EXAMPLE, optimizer=optimizer, **given | changes)


def train(model, optimizer, pruner, steps, each=lambda step, check: None, clip=None, seed=1):
    """A user's loop; returns the number of structures removed."""
    generator, removed = torch.Generator().manual_seed(seed), 0
    model.train()
    for step in range(steps):
        x, y = batch(generator)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(clip, 5.0)
        optimizer.step()
        check = pruner.step()
        removed += check.removed if check else 0
        each(step, check)
    return removed


class ByHand:
    """An average of every entry of the whole network, by the names and numbers that it had at the start."""

    def __init__(self, model):
        self.values = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def update(self, model, present, inventory):
        whole = self.embedded(model.state_dict(), present, inventory)
        for name, (new, here) in whole.items():
            if new.is_floating_point():
                mixed = DECAY * self.values[name] + (1 - DECAY) * new
                self.values[name] = torch.where(here, mixed, self.values[name])
            else:
                self.values[name] = new

    def embedded(self, state, present, inventory):
        """Each tensor that is left at its place in the whole network, and where that is."""
        units, found = self.units(present, inventory), {}
        for name, tensor in state.items():
            new, here = torch.zeros_like(self.values[name]), torch.zeros(self.values[name].shape, dtype=torch.bool)
            dim, rows = units.get(name, (0, None))
            if rows is None:
                new, here = tensor, torch.ones_like(here)
            else:
                new.index_copy_(dim, rows, tensor)
                here.index_fill_(dim, rows, True)
            found[name] = new, here
        return found

    @staticmethod
    def units(present, inventory):
        """Dimension and places of the units that are left in each tensor that has some."""
        units = {}
        for place in inventory.places:
            rows = torch.from_numpy(present[place.number] - place.units[0])
            for name in place.site.producers:
                for tensor in ("weight", "bias", "running_mean", "running_var"):
                    units[f"{name}.{tensor}"] = 0, rows
            for name in place.site.consumers:
                units[f"{name}.weight"] = 1, rows
        return units

    def live(self, embedded, pruner):
        """The same without dead channels, whose weights are 0, and without counters, which an average truncates."""
        present = [units[pruner.kept[units]] for units in pruner.state.present]
        units = self.units(present, pruner.inventory)
        found = {}
        for name, (new, here) in embedded.items():
            if not name.endswith("num_batches_tracked"):
                dim, rows = units.get(name, (0, None))
                alive = here if rows is None else torch.zeros_like(here).index_fill_(dim, rows, True)
                found[name] = new, here & alive
        return found


KINDS = {
    "units and layers": {},
    "round widths": {"round_to": 4},
    "dead channels": {"width_multiple": 4},
    "a target": {"target_macs": 0.5},
    "layers alone": {"alpha": 1.0, "nu": 0.3},
    "units alone": {"alpha": 0.0},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ema", [averaged, ModelEma])
@pytest.mark.parametrize("first", ["average", "pruner"])
def test_an_average_is_the_average_of_what_is_left_at_any_moment(kind, ema, first):
    """Entry by entry, through every kind of cut; and in eval mode, it is the network of its weights with theta folded in."""
    model = dense()
    average = ema(model) if first == "average" else None
    optimizer, pruner = make(model, **KINDS[kind])
    average = average or ema(model)
    pruner.on_cut(average)
    hand, x = ByHand(model), batch(torch.Generator().manual_seed(9))[0]
    update = average.update_parameters if isinstance(average, AveragedModel) else average.update
    compared = []

    def each(step, check):
        if step == 0 and isinstance(average, AveragedModel):  # its first update is a copy
            hand.values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        else:
            hand.update(model, pruner.state.present, pruner.inventory)
        update(model)
        expected = hand.embedded(average.module.state_dict(), pruner.state.present, pruner.inventory)
        assert average.module.state_dict().keys() == model.state_dict().keys()
        if (
            not pruner.state.for_width.any()
        ):  # where a theta was folded in, earlier entries of the average were scaled too
            for name, (found, here) in hand.live(expected, pruner).items():
                torch.testing.assert_close(
                    found[here],
                    hand.values[name][here],
                    rtol=1e-5,
                    atol=1e-6,
                    msg=lambda text, name=name: f"{name}: {text}",
                )
        compared.append(check is not None and check.removed)
        if step % 7 == 0:
            assert_mean_field(average.module, pruner, x)

    removed = train(model, optimizer, pruner, 60, each)
    assert removed > 0 and any(compared[:-1])
    pruner.finish()
    assert {n: p.shape for n, p in average.module.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in average.modules())
    assert average.eval()(x).isfinite().all() if isinstance(average, AveragedModel) else True


def assert_mean_field(copied, pruner, x):
    """A copy that follows computes, in both modes, what a plain network of its own weights with theta folded in does."""
    plain = dense()
    whole = np.ones(pruner.inventory.size, dtype=bool)
    for place in pruner.inventory.standing(pruner.kept):
        whole[place.units] = np.isin(place.units, pruner.state.present[place.number])
    kept = np.where(pruner.is_layer, pruner.kept, whole)
    restrict(plain, plain.structures(), pruner.inventory.record(pruner.inventory.close(kept)))
    plain.load_state_dict(copied.state_dict())
    if not pruner.finished:
        theta = torch.from_numpy(pruner.keep_prob).float()
        with torch.no_grad():
            for number, block in enumerate(pruner.blocks):
                if pruner.kept[number]:
                    output = plain.get_submodule(block.output)
                    units = pruner.state.present[number]
                    output.weight *= torch.where(torch.from_numpy(pruner.kept[units]), theta[units], 0.0)
                    for p in output.parameters():
                        p *= theta[number]
    with torch.no_grad():
        torch.testing.assert_close(copied.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)


def test_a_theta_that_is_folded_in_is_folded_into_the_average_too():
    model = dense()
    optimizer, pruner = make(model, round_to=4)
    average = copy.deepcopy(model)  # never updated: only cut and folded
    pruner.on_cut(average)
    made = []
    pruner.on_cut(made.append)
    whole = average.state_dict()
    before = {name: tensor.clone() for name, tensor in whole.items()}
    train(model, optimizer, pruner, 60)
    folds = {part.site.name: part.fold for cut in made for part in cut.sites if part.fold is not None}
    assert folds, "this run folds a theta in"
    for number, block in enumerate(pruner.blocks):
        units = pruner.state.present[number]
        if not pruner.kept[number] or block.sites[0].name not in folds:
            continue
        weight = before[f"{block.name}.out.weight"][:, units - pruner.inventory.units[number][0]]
        ratio = average.get_submodule(block.output).weight / weight
        assert ((ratio <= 1 + 1e-5) & (ratio >= 0)).all() and (ratio < 0.999).any()
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=1e-5)  # one factor for each unit


def test_a_copy_that_follows_writes_nothing_into_the_original_and_reads_no_draw():
    model = dense()
    _, pruner = make(model, initial_keep_prob=0.6)
    pruner.on_cut(average := copy.deepcopy(model))
    x = batch(torch.Generator().manual_seed(3))[0]
    norms = [copy.deepcopy(m.running_mean) for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    one = average.train()(x)
    torch.testing.assert_close(average(x), one, rtol=0, atol=0)
    assert pruner.gates.draw.grad is None and not pruner._capture.calls
    for norm, before in zip((m for m in model.modules() if isinstance(m, nn.BatchNorm1d)), norms, strict=True):
        assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "torch.save of the average"])
def test_a_copy_made_at_any_moment_stands_alone(how):
    """It computes the same afterwards, whatever becomes of the original, and training it changes nothing there."""
    model = dense()
    optimizer, pruner = make(model)
    average = AveragedModel(model)
    pruner.on_cut(average)
    x, y = batch(torch.Generator().manual_seed(3))
    copies = []

    def duplicate():
        if how == "deepcopy":
            return copy.deepcopy(model)
        if how == "pickle":
            return pickle.loads(pickle.dumps(model))
        file = io.BytesIO()
        torch.save(average if "average" in how else model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    def each(step, check):
        if step % 9 == 0 or (check and check.removed):
            own, original = duplicate(), average if "average" in how else model
            with torch.no_grad():
                now = original.eval()(x)
                torch.testing.assert_close(own.eval()(x), now, rtol=0, atol=0)
                model.train()
            copies.append((own, now))

    assert train(model, optimizer, pruner, 60, each) > 0 and len(copies) > 7
    with torch.no_grad():
        for own, then in copies:
            torch.testing.assert_close(own.eval()(x), then, rtol=0, atol=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = len(pruner._capture.calls)
    for own, _ in copies[:2]:
        loss = F.cross_entropy(own.train()(x), y)
        loss.backward()
        torch.optim.SGD(own.parameters(), lr=0.1).step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert len(pruner._capture.calls) == calls


def test_training_a_copy_between_two_lines_changes_nothing_in_the_original():
    runs = []
    for disturbed in (False, True):
        model = dense()
        optimizer, pruner = make(model)

        def each(step, check, model=model, disturbed=disturbed):
            if disturbed:
                own, (x, y) = copy.deepcopy(model), batch(torch.Generator().manual_seed(step))
                F.cross_entropy(own.train()(x), y).backward()
                own.eval()(x)

        train(model, optimizer, pruner, 60, each)
        runs.append((pruner.keep_prob, model.state_dict()))
    assert np.array_equal(runs[0][0], runs[1][0])
    assert all(torch.equal(runs[0][1][name], tensor) for name, tensor in runs[1][1].items())


def test_a_list_of_the_parameters_taken_before_stays_right():
    model = dense()
    parameters = list(model.parameters())
    optimizer, pruner = make(model)

    def each(step, check):
        held = {id(p) for p in parameters}
        now = {id(p) for p in model.parameters()}
        assert now <= held, "none is missing"
        dead = [p for p in parameters if id(p) not in now]
        assert all(p.grad is None for p in dead), "what is gone has no gradient"
        assert all(p.grad is None or p.grad.shape == p.shape for p in parameters)
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == now
        lasting.append(len(dead))

    lasting = []
    assert train(model, optimizer, pruner, 60, each, clip=parameters) > 0
    assert lasting[-1] > 0, "a layer went"


def test_clipping_with_a_list_taken_before_is_clipping_with_a_fresh_one():
    ends = []
    for fresh in (False, True):
        model = dense()
        before = list(model.parameters())
        optimizer, pruner = make(model)

        class Fresh:
            def __iter__(self, model=model):
                return iter(model.parameters())

        train(model, optimizer, pruner, 60, clip=Fresh() if fresh else before)
        ends.append(model.state_dict())
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_old_graphs_that_live_on_do_not_break_the_next_backward():
    model = dense()
    optimizer, pruner = make(model)
    generator, kept, removed = torch.Generator().manual_seed(1), [], 0
    model.train()
    for _ in range(60):
        x, y = batch(generator)
        loss = F.cross_entropy(model(x), y)
        kept.append(loss)  # with its graph, as in a list of losses to be averaged later
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        optimizer.step()
        check = pruner.step()
        removed += check.removed if check else 0
    assert removed > 0 and torch.stack(kept).mean().isfinite()


class Tied(nn.Module):
    """``x + out(relu(first(x))) + again(relu(first(x)))`` where `again` has the weight of `out`."""

    def __init__(self, width=12, hidden=10):
        super().__init__()
        self.first, self.out = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.again = nn.Linear(hidden, width, bias=False)
        self.again.weight = self.out.weight
        self.last = nn.Linear(width, width)

    def forward(self, x):
        y = F.relu(self.first(x))
        return x + self.last(self.out(y) + self.again(y))

    def shortcut_only(self):
        return nn.Identity()


class TiedNet(nn.Sequential):
    def __init__(self, both=True):
        super().__init__(nn.Flatten(), nn.Linear(64, 12), Tied(), Tied(), nn.Linear(12, 10))
        self.both = both

    def structures(self):
        found = []
        for name in ("2", "3"):
            consumers = (f"{name}.out", f"{name}.again") if self.both else (f"{name}.out",)
            found.append(Block(name, f"{name}.last", (Site(f"{name}.first", 10, (f"{name}.first",), consumers),)))
        return found


def test_a_parameter_of_two_modules_is_cut_once_and_stays_tied():
    torch.manual_seed(0)
    model = TiedNet()
    optimizer, pruner = make(model, nu=0.5, alpha=0.0)
    assert train(model, optimizer, pruner, 60) > 0
    pruner.finish()
    blocks = [module for module in model if isinstance(module, Tied)]
    assert blocks and any(block.first.out_features < 10 for block in blocks)
    for block in blocks:
        assert block.again.weight is block.out.weight
        assert block.out.weight.shape[1] == block.first.out_features == block.again.in_features
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert model.eval()(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_a_parameter_of_two_modules_of_which_one_is_named_is_refused():
    with pytest.raises(ValueError, match=r"`2\.out\.weight` is `2\.again\.weight` too") as error:
        make(TiedNet(both=False))
    assert "\n" not in str(error.value)


def test_a_function_is_told_every_cut():
    model = dense()
    optimizer, pruner = make(model)
    twin, made = copy.deepcopy(dense()), []
    pruner.on_cut(made.append)
    removed = train(model, optimizer, pruner, 60)
    pruner.finish()
    assert removed > 0 and made
    for cut in made:
        cut.apply(twin)
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_what_cannot_follow_is_refused_in_one_line():
    model = dense()
    _, pruner = make(model)
    for wrong, kind, message in (
        (model, ValueError, "got the model itself"),
        (DenseResNet(64, 10, blocks=2), ValueError, "a copy of the model as it is now"),
        (3, TypeError, "got int"),
    ):
        with pytest.raises(kind, match=message) as error:
            pruner.on_cut(wrong)
        assert "\n" not in str(error.value)

"""Units that are slices of any tensors: the cut network is the gated one with its gates at 0, and everything follows."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sliced import (
    IMAGES,
    NETWORKS,
    VGG,
    Concatenated,
    Depth,
    Encoded,
    Foreign,
    MobileNet,
    ResNeXt,
    Transformer,
    Transposed,
    made,
    read,
)
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from catode.prune.describe import consistency
from catode.prune.describe.costs import Counts, count, describe, inference
from catode.prune.describe.executed import plain_attention
from catode.prune.describe.protocol import branch, slices, tensor_of
from catode.prune.gated.absent import outputs_of
from catode.prune.gated.cut import Change, drop_block, keep_units, keep_units_of_state, restrict
from catode.prune.gated.gates import Gates
from catode.prune.gated.remainder import trace, without
from catode.prune.measure.owned import Owned
from catode.prune.measure.probes import Probe
from catode.prune.pruner import Pruner
from catode.prune.selfcheck import check
from catode.structures import fates
from catode.structures.description import CONSUMER, PRODUCER, TIED, Attribute, Block, Site, Slice
from catode.structures.inventory import Inventory
from catode.structures.layout import Layout

EXACT = dict(rtol=1e-10, atol=1e-10)


def network(kind, seed=0):
    """A network in double precision, with random weights, affines and statistics, and its inventory."""
    torch.manual_seed(seed)
    model = kind().double()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and tensor.dim() == 1:
                tensor.copy_(
                    torch.rand_like(tensor) + 0.5 if name.endswith("weight") else 0.3 * torch.randn_like(tensor)
                )
    return model, Inventory(model.structures())


def vertex(inventory, seed, layers=0.7, units=0.6):
    random = np.random.default_rng(seed).random(inventory.size)
    return inventory.close(random < np.where(inventory.is_layer, layers, units))


def gated(model, inventory, kept):
    gates = Gates(model, inventory)
    gates.install([True] * inventory.layers, [torch.from_numpy(units) for units in inventory.units])
    values = torch.from_numpy(kept.astype(np.float32))
    gates.set(values, values)
    return gates


def train(model):
    model.train()
    for module in model.modules():
        if isinstance(module, Depth):
            module.eval()
    return model


def images(seed=0):
    return torch.randn(IMAGES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


networks = pytest.mark.parametrize("kind", NETWORKS.values(), ids=NETWORKS)


@settings(max_examples=8)
@networks
@given(seed=st.integers(0, 2**31), layers=st.floats(0, 1), units=st.floats(0.02, 1))
def test_law_the_cut_network_is_the_gated_one_and_is_counted_exactly(kind, seed, layers, units):
    model, inventory = network(kind, seed % 7)
    kept = vertex(inventory, seed, layers, units)
    complexity = describe(model, inventory.blocks, images())
    small = restrict(copy.deepcopy(model), inventory.blocks, inventory.record(kept))
    assert Counts(complexity.macs(kept.astype(float)), complexity.params(kept.astype(float))) == count(small, images())
    gated(model, inventory, kept)
    x = images(seed)
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(x), model.eval()(x), **EXACT)
        torch.testing.assert_close(train(small)(x), train(model)(x), **EXACT)
        torch.testing.assert_close(
            small.eval()(x), model.eval()(x), **EXACT
        )  # with the statistics that train mode moved


@networks
def test_counts_are_those_of_torch(kind):
    model, inventory = network(kind)
    norms, hooks = [], []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            hooks.append(
                module.register_forward_hook(lambda m, args, output: norms.append(output.numel() // len(output)))
            )
    with (
        inference(model),
        plain_attention(),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        model(images())
    for hook in hooks:
        hook.remove()
    ones = np.ones(inventory.size)
    found = describe(model, inventory.blocks, images())
    assert found.macs(ones) - sum(norms) == pytest.approx(counter.get_total_flops() / 2 / IMAGES[0], abs=1e-6)
    assert found.params(ones) == sum(p.numel() for p in model.parameters())
    assert count(model, images()) == Counts(round(found.macs(ones)), round(found.params(ones)))


@networks
def test_the_self_check_finds_nothing_wrong(kind):
    torch.manual_seed(0)
    assert check(kind(), torch.zeros(IMAGES)).difference < 1e-10


@networks
@pytest.mark.parametrize("seed", [0, 1])
def test_law_cuts_compose_and_names_classes_and_state_dicts_follow(kind, seed):
    one, inventory = network(kind)
    other, kept = copy.deepcopy(one), vertex(inventory, seed, 1.0, 0.5)
    whole = one.state_dict()
    layout, of_state = (Layout(place.site for place in inventory.places) for _ in range(2))
    first = kept | (np.random.default_rng(seed + 10).random(inventory.size) < 0.5)
    present = list(inventory.units)
    for number, block in enumerate(inventory.blocks):
        if not kept[number]:
            drop_block(one, block)
    whole = {name: whole[name] for name in one.state_dict()}
    standing = list(inventory.standing(kept))
    for stage in (first, kept):  # in two cuts, the second in the other order
        for place in standing if stage is first else standing[::-1]:
            here = present[place.number]
            left = np.flatnonzero(stage[here])
            if len(left) < len(here):
                keep_units(one, place.site, left.tolist(), layout=layout)
                keep_units_of_state(one, whole, place.site, left, of_state)
            present[place.number] = here[left]
    restrict(other, inventory.blocks, inventory.record(kept))
    assert [(n, type(m).__name__) for n, m in one.named_modules()] == [
        (n, type(m).__name__) for n, m in other.named_modules()
    ]
    for (name, a), (again, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == again and torch.equal(a, b) and torch.equal(whole[name], b)
    for a, b in zip(one.modules(), other.modules(), strict=True):
        numbers = [{k: v for k, v in vars(m).items() if isinstance(v, int)} for m in (a, b)]
        assert numbers[0] == numbers[1]


@networks
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_law_optimizer_follows_and_the_next_step_is_the_gated_networks(kind, optimizer):
    model, inventory = network(kind)
    made = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3),
    }[optimizer]
    own, y = made(model.parameters()), torch.tensor([1, 3])

    def step(model, optimizer, seed):
        optimizer.zero_grad()
        F.cross_entropy(train(model)(images(seed)), y).backward()
        optimizer.step()

    for seed in range(2):
        step(model, own, seed)
    kept = vertex(inventory, 3, 0.7, 0.5)
    small, other = copy.deepcopy((model, own))
    layout, change = Layout(place.site for place in inventory.places), Change()
    marks = {name: p.detach().clone() for name, p in small.named_parameters()}
    for name, p in small.named_parameters():  # state that tells which entry it belongs to
        key = "momentum_buffer" if optimizer == "sgd" else "exp_avg_sq"
        marks[name] = (p, key, other.state[p][key])
    for number, block in enumerate(inventory.blocks):
        if not kept[number]:
            drop_block(small, block, change)
    for place in inventory.standing(kept):
        left = np.flatnonzero(kept[place.units])
        if len(left) < len(place.units):
            keep_units(small, place.site, left.tolist(), change, layout)
    change.follow(other)
    names = dict(small.named_parameters())
    assert set(names.values()) == set(other.param_groups[0]["params"]) == set(other.state)
    for name, (p, key, _) in marks.items():
        assert (name in names) == (p in other.state)
        if name in names:
            assert names[name] is p and other.state[p][key].shape == p.shape
    gates = gated(model, inventory, kept)
    step(model, own, 7)
    step(small, other, 7)
    gates.remove()
    again = restrict(model, inventory.blocks, inventory.record(kept))  # the gated network's weights that are left
    for (name, a), (same, b) in zip(again.named_parameters(), small.named_parameters(), strict=True):
        assert name == same
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@networks
def test_law_every_gates_derivative_is_that_of_its_weights(kind):
    """dL/dxi at 1 is the sum of weight times gradient of the entries that the gate scales."""
    model, inventory = network(kind)
    gates = gated(model, inventory, np.ones(inventory.size, dtype=bool))
    F.cross_entropy(train(model)(images()), torch.tensor([1, 3])).backward()
    for place in inventory.places:
        expected = 0.0
        for part in slices(model, place.site):
            if part.role == CONSUMER:
                tensor = tensor_of(model, part.tensor)
                moved = (tensor * tensor.grad).movedim(part.dim, 0)[
                    part.offset : part.offset + part.each * place.site.width
                ]
                expected = expected + moved.reshape(place.site.width, -1).sum(1)
        torch.testing.assert_close(gates.draw.grad[place.units].double(), expected.detach(), rtol=1e-4, atol=1e-6)
    for number, block in enumerate(inventory.blocks):
        if block.removable:
            own = model.get_submodule(block.output)._parameters.values()
            expected = sum(float((p * p.grad).detach().sum()) for p in own if p is not None)
            assert float(gates.draw.grad[number]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@networks
@pytest.mark.parametrize("by_example", [False, True])
def test_law_gates_on_activations_are_gates_on_weights(kind, by_example):
    model, inventory = network(kind)
    kept = vertex(inventory, 5)
    gates = gated(model, inventory, kept)
    with torch.no_grad():
        expected = train(model)(images())
    if by_example:
        gates.rows = gates.draw.detach().expand(len(images()), -1)
        torch.testing.assert_close(train(model)(images()), expected, **EXACT)
        return
    with gates.tapped() as taps:
        output = train(model)(images())
        torch.testing.assert_close(output, expected, **EXACT)
        assert all(int(tap.structures.max()) < inventory.size for tap in taps)
        value = F.cross_entropy(output, torch.tensor([1, 3]))
        gradients = torch.autograd.grad(value, [tap.after for tap in taps], allow_unused=True)
    found = torch.zeros(inventory.size, dtype=torch.float64)
    for tap, gradient in zip(taps, gradients, strict=True):
        if gradient is not None:
            found.index_add_(0, tap.structures, tap.derivative(gradient).sum(0))
    F.cross_entropy(train(model)(images()), torch.tensor([1, 3])).backward()
    on = torch.from_numpy(kept)
    torch.testing.assert_close(found[on], gates.draw.grad.double()[on], rtol=1e-4, atol=1e-6)


@networks
def test_law_owned_sums_of_a_cut_network_are_the_whole_ones_of_what_is_left(kind):
    model, inventory = network(kind)
    kept = vertex(inventory, 4, 1.0, 0.7)
    small = restrict(copy.deepcopy(model), inventory.blocks, inventory.record(kept))
    owned = Owned(small, inventory, kept, inventory.left(kept))
    found = owned.of_flat(owned.flat({p: p.detach() ** 2 for p in small.parameters()}))
    for number, block in enumerate(inventory.blocks):
        expected = sum(float((p**2).sum()) for p in branch(small, block).values()) if kept[number] else 0.0
        assert float(found[number]) == pytest.approx(expected)
    masked = copy.deepcopy(model)  # all entries of removed units are 0
    with torch.no_grad():
        for place in inventory.places:
            for part in slices(model, place.site):
                tensor = tensor_of(masked, part.tensor)
                tensor.index_fill_(part.dim, torch.from_numpy(part.entries(np.flatnonzero(~kept[place.units]))), 0.0)
    for place in inventory.standing(kept):
        for unit in place.units[kept[place.units]]:
            expected = 0.0
            for part in slices(model, place.site):
                tensor = tensor_of(masked, part.tensor)
                if isinstance(tensor, nn.Parameter):
                    entries = torch.from_numpy(part.entries([unit - place.units[0]]))
                    expected += float((tensor.index_select(part.dim, entries) ** 2).sum())
            assert float(found[unit]) == pytest.approx(expected)
    assert not found[~torch.from_numpy(kept)].any()


@networks
def test_law_paired_differences_are_those_of_the_loss(kind):
    model, inventory = network(kind)
    kept = vertex(inventory, 6, 0.8, 0.8)
    gates = gated(model, inventory, kept)
    x, y = images(), torch.tensor([1, 3])

    def loss(model):
        return F.cross_entropy(model(x), y)

    train(model)
    found = Probe(model, gates, loss, len(x), torch.Generator()).paired(range(inventory.size))
    for number in range(inventory.size):
        values = []
        for value in (0.0, 1.0):
            draw = torch.from_numpy(kept.astype(np.float32))
            draw[number] = value
            gates.set(None, draw)
            with torch.no_grad():
                values.append(float(loss(model)))
        if inventory.removable[number]:
            assert float(found[number]) == pytest.approx(values[0] - values[1], abs=1e-5)


# branches


def test_a_remainder_keeps_classes_names_parameters_and_modes():
    model, inventory = network(Transformer)
    before, block = dict(model.named_parameters()), model.body[0]
    block.mlp.eval()
    drop_block(model, inventory.blocks[0])
    left = model.body[0]
    assert isinstance(left, fx.GraphModule) and type(left).__name__.startswith("Encoder")
    assert left.mlp is block.mlp and left.gamma is block.gamma and left.training and not left.mlp.training
    after = dict(model.named_parameters())
    gone = {n for n in before if n.startswith(("body.0.attn", "body.0.norm1", "body.0.scale1"))}
    assert set(after) == set(before) - gone and all(p is before[n] for n, p in after.items())
    with torch.no_grad(), inference(model):
        x = torch.randn(2, 9, 6, dtype=torch.float64)
        torch.testing.assert_close(left(x), x + block.gamma * block.mlp(block.norm2(x)), **EXACT)
        drop_block(model, inventory.blocks[1])
        assert torch.equal(model.body[0](x), x) and not list(model.body[0].parameters())
    assert [n for n, _ in model.body.named_children()] == ["0", "1"]


def test_nothing_of_a_branch_that_went_is_executed():
    model, inventory = network(MobileNet)
    ran = []
    for name, module in model.body[0].named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    drop_block(model, inventory.blocks[0])
    model(images())
    assert not ran


def test_copies_of_remainders_lose_further_branches():
    model, inventory = network(Transformer)
    drop_block(model, inventory.blocks[0])
    other = copy.deepcopy(model)
    for one in (model, other):
        drop_block(one, inventory.blocks[1])
        drop_block(one, inventory.blocks[3])
    x = images()
    torch.testing.assert_close(model.eval()(x), other.eval()(x), rtol=0, atol=0)


def test_a_module_that_cannot_be_traced_keeps_its_class_and_loses_its_branch():
    model, inventory = network(Foreign)
    before, layer = dict(model.named_parameters()), model.body[0]
    paths = [path for block in inventory.blocks for path, _ in block.absent]
    found = outputs_of(model, paths, lambda: model(images()))
    assert found == tuple(entry for block in inventory.blocks for entry in block.absent)
    assert not any(module._forward_hooks for module in model.modules())
    change = drop_block(model, inventory.blocks[1])
    after, x = dict(model.named_parameters()), torch.randn(2, 9, 6, dtype=torch.float64)
    gone = {n for n in before if n.startswith(("body.0.norm2", "body.0.mlp", "body.0.gamma"))}
    assert model.body[0] is layer and set(after) == set(before) - gone and change.removed == {before[n] for n in gone}
    assert all(p is before[n] for n, p in after.items())
    torch.testing.assert_close(layer(x), x + layer.attn(layer.norm1(x))[0], **EXACT)
    drop_block(model, inventory.blocks[0])
    assert torch.equal(layer(x), x) and not list(layer.parameters())
    assert torch.equal(copy.deepcopy(layer)(x), x)


def test_a_branch_that_returns_no_tensors_is_refused():
    class Odd(nn.Module):
        def forward(self, x):
            return {"x": x}

    model = nn.Sequential(Odd())
    with pytest.raises(ValueError, match="^a branch must return tensors to be taken out; `0` returns a dict"):
        outputs_of(model, ["0"], lambda: model(torch.zeros(1)))
    assert not model[0]._forward_hooks


class Functional(nn.Module):
    """Dropout as a function, in two branches."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(self, x):
        x = F.dropout(self.a(x), 0.5, self.training) + x
        return x + F.dropout(self.b(x + self.shift), 0.5, training=self.training)


def test_a_remainder_keeps_the_training_flag_and_buffers():
    torch.manual_seed(0)
    module = Functional()
    assert [node.name for node in trace(module).nodes if node.op == "call_module"] == ["a", "b"]
    left, x = without(module, "dropout"), torch.randn(3, 4)
    assert list(left.state_dict()) == ["b.weight", "b.bias"] and "training_flag" not in dict(module.named_modules())
    expected = x + module.b(x + 1)
    torch.testing.assert_close(left.eval()(x), expected)
    assert not torch.allclose(left.train()(x), expected)
    torch.manual_seed(3)
    first = left(x)
    torch.manual_seed(3)
    torch.testing.assert_close(x + F.dropout(module.b(x + 1), 0.5), first)
    with pytest.raises(ValueError, match=r"^`addend` must be the node of a Functional .* no node `c`"):
        without(module, "c")
    with pytest.raises(ValueError, match=r"^`addend` .* got `add`"):
        without(module, "add")


def test_a_module_that_branches_on_data_or_on_its_mode_is_refused():
    class Data(Functional):
        def forward(self, x):
            return x + self.a(x) if x.sum() > 0 else x

    class Mode(Functional):
        def forward(self, x):
            x = x + self.a(x)
            return x + self.b(x) if self.training else x - self.b(x)

    with pytest.raises(ValueError, match="^a Data must be traceable to lose a branch; got TraceError"):
        without(Data(), "a")
    with pytest.raises(ValueError, match="^a Mode must do the same in train and eval mode"):
        without(Mode(), "a")


class Plain(nn.Module):
    """Its addend is what a module without parameters returns."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False)

    def forward(self, x):
        return x + self.norm(self.a(x))


class PlainNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Sequential(Plain(), Plain()), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.body(x))

    def structures(self):
        return [
            Block(
                f"body.{i}",
                f"body.{i}.norm",
                (),
                module=f"body.{i}",
                addend="norm",
                branch=(f"body.{i}.a", f"body.{i}.norm"),
            )
            for i in range(2)
        ]


def test_the_gate_of_a_branch_without_an_affine_scales_what_its_last_module_returns():
    torch.manual_seed(0)
    assert check(PlainNet(), torch.zeros(4, 6)).difference < 1e-10
    model = PlainNet().double().eval()
    gates = gated(model, Inventory(model.structures()), np.array([True, True]))
    gates.set(torch.tensor([0.25, 1.0]), torch.tensor([1.0, 1.0]))
    x = torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad():
        inner = model.body[0].a(x)
        plain = inner / (1 + model.body[0].norm.eps) ** 0.5
        y = x + 0.25 * plain
        torch.testing.assert_close(model.body[0](x), y, **EXACT)
    assert gates.unfolded == [0, 1]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("theta", [(0.25, 0.75), (0.75, 0.25), (0.9, 0.5)])
def test_a_snapshot_rounds_branches_that_have_no_weights_to_fold_theta_into(theta):
    torch.manual_seed(0)
    model = PlainNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    own = dict(nu=1.0, steps=50, initial_keep_prob=0.9, memory=10, epoch_steps=math.inf)
    pruner = Pruner(model, torch.zeros(4, 6), optimizer=optimizer, **own)
    pruner.state.keep_prob[:] = theta
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, structure = pruner.snapshot()
    assert [structure[f"body.{i}"]["kept"] for i in range(2)] == [value >= 0.5 for value in theta]
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    small = restrict(PlainNet(), PlainNet().structures(), structure)
    small.load_state_dict(state)
    pruner.gates.set(torch.tensor([float(value >= 0.5) for value in theta]), pruner.gates.draw.detach())
    x = torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(x), model.eval()(x))
    assert pruner.kept.all() and set(model.state_dict()) == set(before)


@networks
def test_a_cut_network_travels(kind):
    model, inventory = network(kind)
    kept = vertex(inventory, 2, 0.5, 0.6)
    restrict(model, inventory.blocks, inventory.record(kept)).eval()
    fresh = restrict(kind().double(), inventory.blocks, inventory.record(kept)).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(images())
        travelled = [fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        if kind is not Foreign:  # which branches on its data
            travelled.append(torch.export.export(model, (images(),)).module())
        for one in travelled:
            torch.testing.assert_close(one(images()), expected, **EXACT)


# what is said about wrong descriptions


def changed(blocks, number=0, site=None, part=None, **changes):
    """A description with other fields of one block, its first site, or that site's first slice of a role."""
    block = blocks[number]
    if site or part:
        own = block.sites[0]
        if part:
            role, fields = part
            place = next(i for i, p in enumerate(own.parts) if p.role == role)
            parts = list(own.parts)
            parts[place] = dataclasses.replace(parts[place], **fields)
            own = dataclasses.replace(own, parts=tuple(parts))
        changes["sites"] = (dataclasses.replace(own, **(site or {})), *block.sites[1:])
    blocks[number] = dataclasses.replace(block, **changes)
    return blocks


WRONG = {
    "both forms": (VGG, dict(site={"producers": ("features.0",)}), r"^site `features\.0` must have `parts`, or"),
    "no consumer": (VGG, dict(site={"parts": made("features.0")}), r"must have a slice that reads its units"),
    "no tensor": (
        VGG,
        dict(part=(PRODUCER, {"tensor": "features.9.weight"})),
        r"`features\.9\.weight`, which is no parameter",
    ),
    "a role": (VGG, dict(part=(PRODUCER, {"role": "maker"})), r"of the roles producer, consumer, tied; got 'maker'"),
    "a dimension": (VGG, dict(part=(PRODUCER, {"dim": 4})), r"a dimension of `features\.0\.weight`, 4 of them; got 4"),
    "a range": (VGG, dict(part=(PRODUCER, {"offset": 1})), r"within the 6 entries .*; got 1 to 7, 6 units of 1"),
    "a width": (VGG, dict(site={"width": 7}), r"within the 6 entries .*; got 0 to 7, 7 units of 1"),
    "a depthwise reader": (
        MobileNet,
        dict(part=(CONSUMER, {"tensor": "body.0.depth.weight"})),
        r"read by plain convolutions; `body\.0\.depth` is a grouped one",
    ),
    "a reader of the wrong dimension": (
        Transposed,
        dict(part=(CONSUMER, {"dim": 1}), site={"width": 5}),
        r"read along dimension 0 of `body\.up\.weight`; got 1",
    ),
    "a bias that reads": (VGG, dict(part=(CONSUMER, {"tensor": "features.3.bias", "dim": 0})), r"by the weight of a"),
    "an overlap": (
        Concatenated,
        dict(part=(CONSUMER, {"offset": 2})),
        r"must have tensors of their own; both cut `one\.weight`|lie within",
    ),
    "an attribute": (
        Transformer,
        dict(site={"attributes": (Attribute("body.0.attn", "num_heads", 2),)}),
        r"^site `body\.0\.heads` must say what makes up `body\.0\.attn\.num_heads`; got \[0\] \+ 8 for 4",
    ),
    "no addend": (
        Transformer,
        dict(addend="depth3"),
        r"^block `body\.0\.attn` must be a branch of `body\.0`.*no node `depth3`",
    ),
    "a member that stays": (
        Transformer,
        dict(branch=("body.0.norm1", "body.0.attn", "body.0.scale1", "body.0.norm2")),
        r"^`branch` of block `body\.0\.attn` .*`body\.0\.norm2\.weight` stays",
    ),
    "a member that is forgotten": (
        Transformer,
        dict(branch=("body.0.attn", "body.0.scale1")),
        r"^`branch` of block `body\.0\.attn` .*`body\.0\.norm1\.weight` goes",
    ),
    "two ways to go": (
        Transformer,
        dict(absent=(("body.0.attn", 0),)),
        r"must have an `addend`, or name what is `absent`",
    ),
    "an absent module that stays": (
        Foreign,
        dict(branch=("body.0.attn",)),
        r"^block `body\.0\.attn` must name every module of `branch` in `absent`, .* got `body\.0\.norm1`",
    ),
    "no members": (Transformer, dict(branch=()), r"must name the modules and parameters that go in `branch`"),
    "a site elsewhere": (
        Transformer,
        dict(site={"parts": made("body.0.mlp.gate") + read("body.0.mlp.down"), "width": 8, "attributes": ()}),
        r"must lie in the branch of `body\.0\.attn` alone; got `body\.0\.mlp\.gate\.weight`",
    ),
    "a reader elsewhere": (
        Encoded,
        dict(reader="body.0.mlp"),
        r"^`reader` of block `body\.0\.attn` must be a module of the branch that holds `body\.0\.attn\.out_proj`",
    ),
    "nothing to hold": (VGG, dict(sites=()), r"^block `features\.0` must hold a site"),
}


@pytest.mark.parametrize(("kind", "change", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_description_is_refused_in_one_line(kind, change, message):
    model = kind()
    with pytest.raises(ValueError, match=message) as error:
        consistency.check(model, changed(model.structures(), **change))
    assert "\n" not in str(error.value)


def test_a_site_of_a_branch_that_goes_with_another_block_is_refused():
    model = Transformer()
    blocks = model.structures()
    held = Block("units", "", blocks[1].sites, removable=False)
    blocks[1] = dataclasses.replace(blocks[1], sites=())
    with pytest.raises(ValueError, match=r"^site `body\.0\.mlp\.gate` must not lie in the branch of another block"):
        consistency.check(model, [*blocks, held])


def test_a_remainder_whose_numbers_would_change_is_refused():
    model = Transformer()
    blocks = model.structures()
    model.body[0].width = 8
    site = dataclasses.replace(blocks[1].sites[0], attributes=(Attribute("body.0", "width"),))
    blocks[1] = dataclasses.replace(blocks[1], sites=(site,))
    with pytest.raises(ValueError, match=r"^block `body\.0\.attn` must leave .* got `body\.0\.width`"):
        consistency.check(model, blocks)


def test_a_norm_over_the_units_is_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    parts = (*made("0"), Slice("1.weight", 0, TIED), *read("2"))
    with pytest.raises(ValueError, match=r"must not pass `1`, a LayerNorm, which mixes the units"):
        consistency.check(model, [Block("all", "", (Site("0", 6, (), (), parts=parts),), removable=False)])


@pytest.mark.parametrize(
    ("kind", "lost", "message"),
    [
        (MobileNet, "bn2.running_mean", r"^site `body\.0\.expand` .*fails at `body\.0\.bn2`"),
        (MobileNet, "fc1.weight", r"^site `body\.0\.expand` .*fails at `body\.0\.fc1`"),
        (Transformer, "attn.table", r"^site `body\.0\.heads` .*fails at `body\.0\.attn`"),
    ],
)
def test_the_self_check_tells_which_slice_is_missing(kind, lost, message):
    torch.manual_seed(0)
    model = kind()
    blocks = model.structures()
    own = blocks[0].sites[0]
    parts = tuple(part for part in own.parts if not part.tensor.endswith(lost) or part.role == PRODUCER)
    with pytest.raises(ValueError, match=message) as error:
        check(model, torch.zeros(IMAGES), changed(blocks, site={"parts": parts}))
    assert "\n" not in str(error.value)


# the pruner


def labelled(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, *IMAGES[1:], generator=generator)
    return x, (x.mean((1, 2, 3)) * 40).long().clamp(-2, 2) + 2


def run(model, optimizer, pruner, first, last, each=None):
    model.train()
    for seed in range(first, last):
        torch.manual_seed(seed)
        x, y = labelled(seed)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
        if each is not None:
            each()


def pruned(kind, **changes):
    torch.manual_seed(0)
    model = kind()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    own = dict(nu=8.0, steps=50, warmup=4, check_every=4, memory=10, measure_every=1, probe_size=8, rate_ratio=0.2)
    return model, optimizer, Pruner(model, torch.zeros(IMAGES), optimizer=optimizer, **own | changes)


FIRM = {Transposed: dict(nu=0.003, alpha=0.0), Transformer: dict(nu=2.0)}


@networks
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sixty_steps_cut_resume_and_finish(kind):
    """Everything stays consistent while units and branches go, and a run resumed in the middle is the same run."""
    model, optimizer, pruner = pruned(kind, **FIRM.get(kind, {}))
    average, sizes = copy.deepcopy(model), []
    pruner.on_cut(average)

    def each():
        here = {name: p.shape for name, p in model.named_parameters()}
        assert here == {name: p.shape for name, p in average.named_parameters()}
        assert sum(p.numel() for p in model.parameters()) == pruner.counts().params
        sizes.append(pruner.counts().params)

    run(model, optimizer, pruner, 0, 30, each)
    state = copy.deepcopy((pruner.state_dict(), optimizer.state_dict()))
    compact, structure = pruner.snapshot()
    fresh = kind()
    restrict(fresh, fresh.structures(), structure).load_state_dict(compact)
    x = labelled(99)[0]
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    run(model, optimizer, pruner, 30, 60, each)
    assert sizes[-1] < sizes[0] and sizes == sorted(sizes, reverse=True)
    assert pruner.finished and set(pruner.fate) <= set(fates.FATES)
    done = pruner.finish()
    assert count(done, torch.zeros(IMAGES)) == pruner.counts()
    assert pruner.kept[~pruner.inventory.removable].all()
    for number in np.flatnonzero(pruner.inventory.least):
        assert pruner.kept[pruner.inventory.units[number]].any()

    again, other, resumed = pruned(kind, **FIRM.get(kind, {}))
    resumed.load_state_dict(state[0])
    other.load_state_dict(state[1])
    run(again, other, resumed, 30, 60)
    same = resumed.finish().state_dict()
    assert (resumed.fate == pruner.fate).all() and same.keys() == done.state_dict().keys()
    for name, tensor in done.state_dict().items():
        assert torch.equal(same[name], tensor), name


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", [VGG, Concatenated])
@pytest.mark.parametrize("round_to", [1, 2])
def test_a_site_that_must_last_keeps_its_best_unit(kind, round_to):
    model, optimizer, pruner = pruned(kind, nu=1e4, round_to=round_to, prior="flattening")
    run(model, optimizer, pruner, 0, 60)
    pruner.finish()
    last = pruner.fate == fates.KEPT_AS_LAST
    for number, units in enumerate(pruner.inventory.units):
        assert pruner.kept[units].any(), number
    assert last.any() and (pruner.kept[last]).all() and (pruner.keep_prob[last] == 1.0).all()
    assert count(model, torch.zeros(IMAGES)) == pruner.counts()
    assert pruner.layers_kept == 0 and not pruner.gated[: pruner.inventory.layers].any()


def test_layers_alone_of_a_model_without_branches_are_refused():
    with pytest.raises(
        ValueError, match="^`alpha` must be below 1 for a model of which no branch can go; got 1. Use 0."
    ):
        pruned(VGG, alpha=1.0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dead_channels_are_units_of_several_entries():
    model, optimizer, pruner = pruned(ResNeXt, width_multiple=4)
    run(model, optimizer, pruner, 0, 60)
    pruner.finish()
    assert count(model, torch.zeros(IMAGES)) == pruner.counts()
    assert count(model, torch.zeros(IMAGES)).params < count(ResNeXt(), torch.zeros(IMAGES)).params

"""Compaction: the compacted network is the gated one with its removed gates at 0, and the optimizer follows."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from catode.prune.describe.costs import count, describe
from catode.prune.gated.cut import Change, drop_block, keep_units, keep_units_of_state, restrict, silence_units
from catode.prune.gated.gates import Gates
from catode.structures.inventory import Inventory
from catode.train.models import Architecture, DenseResNet, ResNet, build

SHAPE = (1, 8, 8)
SMALL = {
    "projected": Architecture("basic", (1, 1), 8, "B", "cifar"),
    "bottlenecks": Architecture("bottleneck", (1, 2), 4, "B", "cifar"),
}
SHALLOW = ["resnet20", "dense", "bottleneck", *SMALL]
DEEP = ["resnet32", "resnet56", "resnet110"]


def network(name, bottleneck_net=None):
    if name == "dense":
        return DenseResNet(64, 10, blocks=3, width=12, hidden=9)
    if name in SMALL:
        return ResNet(SMALL[name], 1, 10)
    return bottleneck_net() if name == "bottleneck" else build(name, in_channels=1, classes=10)


def randomise(model, seed):
    """Random weights, affines and running statistics, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.copy_(0.5 + torch.rand(module.weight.shape, generator=generator))
                module.bias.copy_(0.5 * torch.randn(module.bias.shape, generator=generator))
                module.running_mean.copy_(0.3 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
            elif isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / fan_in**0.5)
                if module.bias is not None:
                    module.bias.copy_(0.3 * torch.randn(module.bias.shape, generator=generator))
    return model


def vertex(complexity, layers, seed, share_layers, share_units):
    """A random vertex closed under removal with the block; most of the time several layers and units survive."""
    random = np.random.default_rng(seed)
    share = np.where(np.arange(complexity.size) < layers, share_layers, share_units)
    return complexity.inventory.close(random.random(complexity.size) < share)


def record(blocks, kept):
    found, start = {}, len(blocks)
    for number, block in enumerate(blocks):
        sites = {}
        for site in block.sites:
            sites[site.name] = np.flatnonzero(kept[start : start + site.width]).tolist()
            start += site.width
        found[block.name] = {"kept": bool(kept[number]), "sites": sites}
    return found


def gated(model, kept):
    """A copy of the whole network with every gate installed at 0 or 1."""
    model = copy.deepcopy(model)
    blocks = model.structures()
    gates = Gates(model, Inventory(blocks))
    start, sites = len(blocks), []
    for block in blocks:
        for site in block.sites:
            sites.append(torch.arange(start, start + site.width))
            start += site.width
    gates.install([True] * len(blocks), sites)
    values = torch.from_numpy(kept.astype(np.float32))
    gates.set(values, values)
    return model, gates


def agree(one, other):
    """To 1e-5, relative to the largest logit where that exceeds 1."""
    scale = max(1.0, other.abs().max().item())
    assert torch.isfinite(other).all()
    assert (one - other).abs().max().item() <= 1e-5 * scale


def check_agreement(name, seed, share_layers, share_units, bottleneck_net):
    model = randomise(network(name, bottleneck_net), seed)
    blocks = model.structures()
    complexity = describe(model, blocks, torch.zeros(1, *SHAPE))
    kept = vertex(complexity, len(blocks), seed, share_layers, share_units)
    small = restrict(copy.deepcopy(model), blocks, record(blocks, kept))
    big, _ = gated(model, kept)
    assert count(small, torch.zeros(1, *SHAPE)).macs == complexity.macs(kept.astype(float))
    x = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        agree(small.eval()(x), big.eval()(x))
        agree(small.train()(x), big.train()(x))
        agree(small.eval()(x), big.eval()(x))  # and with the running statistics that train mode has moved


keep_shares = dict(seed=st.integers(0, 2**31), share_layers=st.floats(0.0, 1.0), share_units=st.floats(0.05, 1.0))


@settings(max_examples=15)
@pytest.mark.parametrize("name", SHALLOW)
@given(**keep_shares)
def test_law_compacted_and_gated_networks_agree(name, seed, share_layers, share_units, bottleneck_net):
    check_agreement(name, seed, share_layers, share_units, bottleneck_net)


@settings(max_examples=4)
@pytest.mark.parametrize("name", DEEP)
@given(**keep_shares)
def test_law_compacted_and_gated_networks_agree_when_deep(name, seed, share_layers, share_units):
    check_agreement(name, seed, share_layers, share_units, None)


@pytest.mark.parametrize("name", SHALLOW)
@pytest.mark.parametrize(("share_layers", "share_units"), [(1.0, 1.0), (0.0, 1.0), (0.7, 0.3)])
def test_agreement_at_the_ends(name, share_layers, share_units, bottleneck_net):
    check_agreement(name, 3, share_layers, share_units, bottleneck_net)


def trained(model, momentum=0.9):
    """The model with an SGD optimizer whose momentum buffers are filled."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum, weight_decay=5e-3)
    for seed in range(2):
        one_step(model, optimizer, seed)
    return optimizer


def one_step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, *SHAPE, generator=generator), torch.randint(10, (8,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(model.train()(x), y).backward()
    optimizer.step()


def compact(model, optimizer, kept):
    """Compact in place as the pruner does, all changes in one record."""
    blocks, change, start = model.structures(), Change(), None
    start = len(blocks)
    for number, block in enumerate(blocks):
        if not kept[number]:
            drop_block(model, block, change)
        for i, site in enumerate(block.sites):
            units = np.flatnonzero(kept[start : start + site.width]).tolist()
            start += site.width
            if kept[number] and len(units) < site.width:
                keep_units(model, block.sites[i], units, change)
    change.follow(optimizer)
    return change


def slices(blocks, kept):
    """For each parameter's name: which rows and columns of it survive (None: all), or False if it is gone."""
    rows, columns, gone, start = {}, {}, [], len(blocks)
    for number, block in enumerate(blocks):
        for site in block.sites:
            units = torch.from_numpy(np.flatnonzero(kept[start : start + site.width]))
            start += site.width
            for name in site.producers:
                rows[f"{name}.weight"] = rows[f"{name}.bias"] = units
            for name in site.consumers:
                columns[f"{name}.weight"] = units
        if not kept[number]:
            gone.append((block.name, block.fixed))

    def cut(name, tensor):
        for root, fixed in gone:
            if name.startswith(root + ".") and not any(name.startswith(f + ".") for f in fixed):
                return None
        if name in rows:
            tensor = tensor[rows[name]]
        return tensor[:, columns[name]] if name in columns else tensor

    return cut


@pytest.mark.parametrize("name", SHALLOW)
@pytest.mark.parametrize("seed", [0, 1])
def test_law_optimizer_follows_and_the_next_step_is_the_gated_networks_restricted(name, seed, bottleneck_net):
    model = randomise(network(name, bottleneck_net), seed)
    optimizer = trained(model)
    blocks = model.structures()
    complexity = describe(model, blocks, torch.zeros(1, *SHAPE))
    kept = vertex(complexity, len(blocks), seed, 0.7, 0.5)
    kept[0] = True  # at least one block of each kind
    kept[1] = False
    kept[len(blocks)] = True
    kept = complexity.inventory.close(kept)

    small, other = copy.deepcopy((model, optimizer))
    names = {p: n for n, p in small.named_parameters()}
    old = {n: (p.detach().clone(), other.state[p]["momentum_buffer"].clone()) for p, n in names.items()}
    change = compact(small, other, kept)
    cut = slices(blocks, kept)
    origin = {names[p]: p for p in names}

    survivors = {n: p for n, p in origin.items() if cut(n, old[n][0]) is not None}
    assert change.removed == {origin[n] for n in origin if n not in survivors}
    assert set(small.parameters()) == set(survivors.values())
    assert [id(p) for p in other.param_groups[0]["params"]] == [
        id(survivors[n]) for n in names.values() if n in survivors
    ]
    assert set(other.state) == set(survivors.values())
    for n, p in survivors.items():
        assert p.is_leaf and p.requires_grad
        torch.testing.assert_close(p.detach(), cut(n, old[n][0]), rtol=0, atol=0)
        torch.testing.assert_close(other.state[p]["momentum_buffer"], cut(n, old[n][1]), rtol=0, atol=0)

    big, big_optimizer = copy.deepcopy((model, optimizer))
    gates = Gates(big, Inventory(blocks))
    start, sites = len(blocks), []
    for site in (s for b in blocks for s in b.sites):
        sites.append(torch.arange(start, start + site.width))
        start += site.width
    originals = dict(big.named_parameters())
    gates.install([True] * len(blocks), sites)
    gates.set(torch.from_numpy(kept.astype(np.float32)), torch.from_numpy(kept.astype(np.float32)))
    one_step(big, big_optimizer, 7)
    one_step(small, other, 7)
    for n, p in survivors.items():
        torch.testing.assert_close(p.detach(), cut(n, originals[n].detach()), rtol=1e-4, atol=1e-6)


def test_adam_state_follows_and_its_step_count_survives():
    model = network("dense")
    optimizer = torch.optim.Adam(model.parameters())
    one_step(model, optimizer, 0)
    block = model.structures()[1]
    before = optimizer.state[model.blocks[1].out.weight]["exp_avg_sq"].clone()
    keep_units(model, block.sites[0], [0, 4, 5]).follow(optimizer)
    state = optimizer.state[model.blocks[1].out.weight]
    assert torch.equal(state["exp_avg_sq"], before[:, [0, 4, 5]]) and state["step"] == 1
    one_step(model, optimizer, 1)
    assert optimizer.state[model.blocks[1].out.weight]["step"] == 2


def test_two_compactions_compose():
    one, two = copy.deepcopy([randomise(network("resnet14"), 0)] * 2)[0], randomise(network("resnet14"), 0)
    block = one.structures()[3]
    change = keep_units(one, block.sites[0], [1, 3, 5, 7, 9])
    assert keep_units(one, block.sites[0], [0, 2, 4], change) is change
    keep_units(two, block.sites[0], [1, 5, 9])
    for (name, a), (other, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)


@settings(max_examples=6)
@pytest.mark.parametrize("name", SHALLOW)
@given(seed=st.integers(0, 2**16), share=st.floats(0.1, 0.9))
def test_law_silenced_units_stay_dead_in_training_and_are_as_good_as_gone(name, seed, share, bottleneck_net):
    model = randomise(network(name, bottleneck_net), seed)
    optimizer = trained(model)
    small, other = copy.deepcopy((model, optimizer))
    block = model.structures()[0]
    width = block.sites[0].width
    dead = sorted(np.random.default_rng(seed).permutation(width)[: int(share * (width - 1))].tolist())
    live = [u for u in range(width) if u not in dead]
    change = Change()
    silence_units(model, block.sites[0], dead, change)
    change.follow(optimizer)
    keep_units(small, block.sites[0], live).follow(other)
    for step in range(3):
        one_step(model, optimizer, step)
        one_step(small, other, step)
    for name in block.sites[0].producers:
        assert not any(p[dead].any() for p in model.get_submodule(name).parameters())
    for name in block.sites[0].consumers:
        assert not model.get_submodule(name).weight[:, dead].any()
    state = model.state_dict()
    keep_units_of_state(model, state, block.sites[0], np.array(live))
    for key, value in small.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)


def test_shapes_and_widths_after_compaction():
    model = network("resnet14")
    block = model.structures()[2]
    kept = model.layer2[0]
    statistics = kept.bn1.running_mean.clone()
    statistics.copy_(torch.arange(32.0))
    kept.bn1.running_mean.copy_(statistics)
    keep_units(model, block.sites[0], [5, 30])
    assert (kept.conv1.weight.shape, kept.conv1.out_channels) == ((2, 16, 3, 3), 2)
    assert (kept.conv2.weight.shape, kept.conv2.in_channels, kept.conv2.out_channels) == ((32, 2, 3, 3), 2, 32)
    assert (kept.bn1.weight.shape, kept.bn1.bias.shape, kept.bn1.num_features) == ((2,), (2,), 2)
    assert kept.bn1.running_mean.tolist() == [5, 30] and kept.bn1.running_var.shape == (2,)
    assert kept.bn2.num_features == 32
    drop_block(model, model.structures()[2])
    assert model.layer2[0](torch.randn(2, 16, 8, 8)).shape == (2, 32, 4, 4)


def test_memory_format_and_training_flag_survive():
    model = network("resnet14").to(memory_format=torch.channels_last).eval()
    keep_units(model, model.structures()[0].sites[0], [0, 1, 2])
    assert model.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    drop_block(model, model.structures()[1])
    assert not any(m.training for m in model.modules())


def test_a_dropped_block_is_its_shortcut(bottleneck_net):
    model = randomise(network("bottleneck", bottleneck_net), 0)
    shortcut, x = model.blocks[1].shortcut, torch.randn(2, 8, 5, 5)
    change = drop_block(model, model.structures()[1])
    assert torch.equal(model.blocks[1](x), F.relu(shortcut(x)))
    assert not change.removed & set(shortcut.parameters())


def test_a_dropped_block_with_a_projection_keeps_it_by_its_name():
    model = randomise(network("bottlenecks"), 0)
    before, x = model.layer2[0].downsample, torch.rand(2, 16, 5, 5)
    change = drop_block(model, model.structures()[1])
    assert torch.equal(model.layer2[0](x), F.relu(before(x)))
    assert not change.removed & set(before.parameters()) and len(change.removed) == 9
    names = [name for name in model.state_dict() if name.startswith("layer2.0.")]
    assert names and all(name.startswith("layer2.0.downsample.") for name in names)
    assert [block.name for block in model.structures()] == ["layer1.0", "layer2.1"]


def test_an_emptied_site_is_refused():
    model = network("resnet14")
    with pytest.raises(ValueError, match=r"`layer1.0.conv1` must keep at least one unit; got none"):
        keep_units(model, model.structures()[0].sites[0], [])


def misfit(change):
    model = network("resnet14")
    structure = record(model.structures(), np.ones(6 + 2 * (16 + 32 + 64), dtype=bool))
    change(structure)
    return model, structure


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("layer1.0"),
        lambda s: s.update({"layer4.0": {"kept": False, "sites": {}}}),
        lambda s: s["layer1.0"]["sites"].update({"layer1.0.conv1": [0, 16]}),
        lambda s: s["layer1.0"]["sites"].update({"layer1.0.conv1": [-1, 3]}),
        lambda s: s["layer1.0"]["sites"].update({"layer1.0.conv1": []}),
        lambda s: s["layer1.0"]["sites"].update({"layer1.0.conv1": [3, 3, 4]}),
        lambda s: s["layer1.0"].update(sites={}),
        lambda s: s["layer1.0"]["sites"].update({"layer1.0.conv7": [1]}),
    ],
    ids=["block missing", "block unknown", "beyond", "negative", "empty", "twice", "site missing", "site unknown"],
)
def test_restrict_refuses_misfits(change):
    model, structure = misfit(change)
    with pytest.raises(ValueError, match=r"structure\.json"):
        restrict(model, model.structures(), structure)


def test_restrict_to_everything_changes_nothing():
    model, structure = misfit(lambda s: None)
    before = {id(p) for p in model.parameters()}
    assert {id(p) for p in restrict(model, model.structures(), structure).parameters()} == before

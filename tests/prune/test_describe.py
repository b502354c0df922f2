"""Counts: published figures, an independent counter, and the polynomial at vertices."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from catode.prune.describe.costs import Counts, count, describe, inference
from catode.prune.describe.protocol import Prunable
from catode.prune.gated.cut import restrict
from catode.structures.description import Block, Site
from catode.train.models import ARCHITECTURES, Architecture, DenseResNet, ResNet, build


def cifar(blocks):
    """MACs and parameters of a CIFAR ResNet with 3 channels, 32x32, 10 classes, from its architecture alone."""
    conv_macs, norm_macs = 3 * 16 * 9 * 32**2, 16 * 32**2
    params = 3 * 16 * 9 + 2 * 16
    before = 16
    for width, side in ((16, 32), (32, 16), (64, 8)):
        for _ in range(blocks):
            pairs = before * width + width * width
            conv_macs += 9 * pairs * side**2
            norm_macs += 2 * width * side**2
            params += 9 * pairs + 2 * 2 * width
            before = width
    return conv_macs + 64 * 10, norm_macs, params + 64 * 10 + 10


PUBLISHED_PARAMS = {"resnet20": 0.27e6, "resnet32": 0.46e6, "resnet44": 0.66e6, "resnet56": 0.85e6, "resnet110": 1.7e6}
PUBLISHED_MACS = {"resnet20": 40.6e6, "resnet32": 68.9e6, "resnet44": 97.2e6, "resnet56": 125.5e6, "resnet110": 253e6}


@pytest.mark.parametrize("arch", PUBLISHED_PARAMS)
def test_published_counts(arch):
    counted = count(build(arch, in_channels=3, classes=10), torch.zeros(1, 3, 32, 32))
    conv, norm, params = cifar(ARCHITECTURES[arch].blocks[0])
    assert counted == Counts(conv + norm, params)
    assert conv == pytest.approx(PUBLISHED_MACS[arch], rel=0.005)
    assert params == pytest.approx(PUBLISHED_PARAMS[arch], rel=0.02)


def test_resnet20_in_figures():
    assert cifar(3) == (40_551_040, 188_416, 269_722)


@functools.cache
def weightless(arch, shortcut=None, stem=None, classes=10):
    """A network on the meta device, quickly made."""
    with torch.device("meta"):
        return build(arch, in_channels=3, classes=classes, shortcut=shortcut, stem=stem)


def arbitrary(model):
    """A copy on the CPU whose weights are whatever the memory holds, for counting."""
    return copy.deepcopy(model).to_empty(device="cpu")


@pytest.mark.parametrize(
    ("arch", "params", "gmacs"),
    [
        ("resnet18", 11_689_512, 1.81),
        ("resnet34", 21_797_672, 3.66),
        ("resnet50", 25_557_032, 4.09),
        ("resnet101", 44_549_160, 7.80),
    ],
)
def test_published_counts_of_the_imagenet_networks(arch, params, gmacs):
    """As torchvision states them, for 1000 classes and 224 pixels; its MACs are those of convolutions and linear layers."""
    model, example = arbitrary(weightless(arch, classes=1000)), torch.zeros(1, 3, 224, 224)
    counted = count(model, example)
    assert counted.params == params
    assert round((counted.macs - norm_elements(model, example)) / 1e9, 2) == gmacs


def test_published_counts_of_resnet18_with_a_stem_for_small_images():
    """11.17 M parameters and 0.56 GMACs for 10 classes at 32 pixels, the usual variant for CIFAR."""
    model, example = arbitrary(weightless("resnet18", stem="cifar")), torch.zeros(1, 3, 32, 32)
    counted = count(model, example)
    assert counted.params == 11_173_962
    assert round((counted.macs - norm_elements(model, example)) / 1e9, 2) == 0.56


def test_a_projection_costs_its_weights():
    """ResNet-20: 1x1 convolutions and batch norms from 16 to 32 and from 32 to 64 channels, at 16 and 8 pixels."""
    example = torch.zeros(1, 3, 32, 32)
    plain, projected = (count(arbitrary(weightless("resnet20", option)), example) for option in "AB")
    more = 16 * 32, 32 * 64
    assert projected.params - plain.params == sum(more) + 2 * (32 + 64)
    assert projected.macs - plain.macs == more[0] * 16**2 + more[1] * 8**2 + 32 * 16**2 + 64 * 8**2


def names_and_shapes():
    """The stored list, by network."""
    found = {}
    for line in (Path(__file__).parent / "torchvision.txt").read_text().splitlines()[1:]:
        if line.startswith("["):
            shapes = found.setdefault(line.strip("[]"), {})
        else:
            name, *shape = line.split()
            shapes[name] = tuple(map(int, shape))
    return found


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_names_and_shapes_are_torchvisions(arch):
    own = {name: tuple(tensor.shape) for name, tensor in weightless(arch, classes=1000).state_dict().items()}
    assert list(own.items()) == list(names_and_shapes()[arch].items())


def test_unknown_names_are_refused():
    for wrong in ({"arch": "resnet21"}, {"shortcut": "C"}, {"stem": "large"}):
        (name,) = wrong
        with pytest.raises(ValueError, match=rf"^`{name}` must be one of"):
            build(**{"arch": "resnet20", "in_channels": 1, "classes": 2, **wrong})


@pytest.mark.parametrize("example", [torch.zeros(1, 3, 32, 32), torch.ones(5, 3, 32, 32)])
def test_counts_are_per_example(example):
    assert count(build("resnet20", in_channels=3, classes=10), example) == Counts(40_551_040 + 188_416, 269_722)


def network(name, bottleneck_net):
    """A network and the shape of its images."""
    return {
        "resnet14": lambda: (build("resnet14", in_channels=1, classes=10), (1, 8, 8)),
        "resnet20": lambda: (build("resnet20", in_channels=3, classes=7), (3, 12, 16)),
        "narrow": lambda: (build("resnet20", in_channels=3, classes=7, hidden_scale=0.58), (3, 8, 8)),
        "dense": lambda: (DenseResNet(64, 10, blocks=3, width=8, hidden=6), (1, 8, 8)),
        "bottleneck": lambda: (bottleneck_net(), (1, 6, 6)),
        "projected": lambda: (ResNet(Architecture("basic", (1, 1), 8, "B", "cifar"), 1, 10), (1, 9, 8)),
        "small50": lambda: (ResNet(Architecture("bottleneck", (1, 2), 4, "B", "imagenet"), 1, 10), (1, 17, 20)),
    }[name]()


NAMES = ["resnet14", "resnet20", "narrow", "dense", "bottleneck", "projected", "small50"]


def norm_elements(model, example):
    """Normalised elements per example, seen from outside through the norms' own outputs."""
    total, hooks = 0, []

    def add(module, args, output):
        nonlocal total
        total += output[0].numel()

    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            hooks.append(module.register_forward_hook(add))
    with inference(model):
        model(example)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_flop_counter_of_torch(name, bottleneck_net):
    model, shape = network(name, bottleneck_net)
    example = torch.randn(2, *shape)
    with inference(model), FlopCounterMode(display=False) as counter:
        model(example)
    flops = counter.get_total_flops()
    counted = count(model, example)
    assert flops % 4 == 0 and counted.macs - norm_elements(model, example) == flops // 4  # 2 FLOPs a MAC, 2 examples
    assert counted.params == sum(p.numel() for p in model.parameters())


VARIANTS = [(arch, None, None) for arch in ARCHITECTURES]
VARIANTS += [
    ("resnet20", "B", None),
    ("resnet56", "B", "imagenet"),
    ("resnet18", "A", "cifar"),
    ("resnet50", "A", None),
]


def compacted(arch, shortcut, stem, seed, example):
    """A random compact network of an architecture, and the counts that the polynomial promises for it."""
    whole = weightless(arch, shortcut, stem)
    blocks = whole.structures()
    complexity = describe(arbitrary(whole), blocks, example)
    random = np.random.default_rng(seed)
    share = np.where(np.arange(complexity.size) < len(blocks), 0.7, 0.4)
    kept = complexity.inventory.close(random.random(complexity.size) < share)
    small = arbitrary(restrict(copy.deepcopy(whole), blocks, record(blocks, complexity, kept)))
    theta = kept.astype(float)
    return small, Counts(complexity.macs(theta), complexity.params(theta))


@pytest.mark.parametrize(("arch", "shortcut", "stem"), VARIANTS)
def test_a_compact_network_is_counted_alike_by_the_polynomial_and_independently(arch, shortcut, stem):
    example = torch.zeros(1, 3, 32, 32)
    small, promised = compacted(arch, shortcut, stem, 0, example)
    counted = count(small, example)
    assert counted == promised != count(arbitrary(weightless(arch, shortcut, stem)), example)
    with inference(small), FlopCounterMode(display=False) as counter:
        small(example)
    assert counted.macs - norm_elements(small, example) == counter.get_total_flops() / 2
    assert counted.params == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize(
    ("arch", "shortcut"), [("resnet20", "A"), ("resnet56", "B"), ("resnet34", "B"), ("resnet50", "B")]
)
def test_a_compact_network_is_counted_alike_by_fvcore(arch, shortcut):
    """Which counts convolutions and linear layers as we do, and two operations for a normalised element where we count one."""
    fvcore = pytest.importorskip("fvcore.nn")
    example = torch.zeros(1, 3, 32, 32)
    small, _ = compacted(arch, shortcut, None, 1, example)
    analysis = fvcore.FlopCountAnalysis(small.eval(), example)
    found = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_operator()
    assert count(small, example) == Counts(
        found["conv"] + found["linear"] + found["batch_norm"] // 2, fvcore.parameter_count(small)[""]
    )


def record(blocks, complexity, kept):
    """structure.json's record of a vertex."""
    found, start = {}, len(blocks)
    for number, block in enumerate(blocks):
        sites = {}
        for site in block.sites:
            sites[site.name] = np.flatnonzero(kept[start : start + site.width]).tolist()
            start += site.width
        found[block.name] = {"kept": bool(kept[number]), "sites": sites}
    return found


@settings(max_examples=12)
@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**31), layers=st.floats(0, 1), units=st.floats(0.02, 1))
def test_law_polynomial_at_a_vertex_counts_the_compacted_network_exactly(name, seed, layers, units, bottleneck_net):
    model, shape = network(name, bottleneck_net)
    example = torch.zeros(1, *shape)
    blocks = model.structures()
    complexity = describe(model, blocks, example)
    random = np.random.default_rng(seed)
    share = np.where(np.arange(complexity.size) < len(blocks), layers, units)
    kept = complexity.inventory.close(random.random(complexity.size) < share)
    restrict(model, blocks, record(blocks, complexity, kept))
    theta = kept.astype(float)
    assert Counts(complexity.macs(theta), complexity.params(theta)) == count(model, example)


@pytest.mark.parametrize("name", NAMES)
def test_dense_vertex_numbering_and_fixed_part(name, bottleneck_net):
    model, shape = network(name, bottleneck_net)
    example, blocks = torch.zeros(1, *shape), model.structures()
    complexity = describe(model, blocks, example)
    assert isinstance(model, Prunable)
    assert complexity.size == len(blocks) + sum(s.width for b in blocks for s in b.sites)
    dense = count(model, example)
    ones = np.ones(complexity.size)
    assert Counts(complexity.macs(ones), complexity.params(ones)) == dense
    branches = sum(
        p.numel()
        for b in blocks
        for key, p in model.get_submodule(b.name).named_parameters(prefix=b.name)
        if not any(key.startswith(f + ".") for f in b.fixed)
    )
    assert complexity.removable_params == branches and complexity.params(0 * ones) == dense.params - branches


@pytest.mark.parametrize("name", NAMES)
def test_counting_leaves_the_network_alone(name, bottleneck_net):
    model, shape = network(name, bottleneck_net)
    model.train()
    next(m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)).eval()
    flags = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    describe(model, model.structures(), torch.randn(3, *shape))
    count(model, torch.randn(3, *shape))
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def changed(blocks, **changes):
    site = dataclasses.replace(blocks[0].sites[0], **changes)
    return [dataclasses.replace(blocks[0], sites=(site,)), *blocks[1:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"producers": ("layer1.0.conv1", "layer1.0.norm1")}, "`layer1.0.norm1`"),
        ({"consumers": ("layer1.0.conv9",)}, "`layer1.0.conv9`"),
        ({"width": 15}, "must have the width of `layer1.0.conv1`; got 15 and 16"),
        ({"producers": ("layer2.0.conv1",)}, "must have the width of `layer2.0.conv1`; got 16 and 32"),
        ({"consumers": ("fc",)}, "must have the width of `fc`; got 16 and 64"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(changes, message):
    model = build("resnet14", in_channels=1, classes=10)
    with pytest.raises(ValueError, match=message):
        describe(model, changed(model.structures(), **changes), torch.zeros(1, 1, 8, 8))


class MixedNorm(nn.Module):
    """One block whose hidden norm computes its statistics across the units."""

    def __init__(self, norm):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 6), norm, nn.ReLU(), nn.Linear(6, 4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x + self.branch(x))


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6)], ids=["layer", "group"])
def test_a_site_whose_norm_mixes_units_is_refused(norm):
    """Removing a unit would change the others' statistics, so a gate at 0 is not its removal."""
    model = MixedNorm(norm)
    block = Block("branch", "branch.3", (Site("hidden", 6, ("branch.0", "branch.1"), ("branch.3",)),))
    with pytest.raises((ValueError, TypeError), match=r"branch\.1"):
        describe(model, [block], torch.zeros(1, 4))


def test_parameters_without_products_count_themselves():
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(4))
    assert count(model, torch.zeros(1, 4)) == Counts(16, 16 + 4 + 4)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_weight_that_is_used_functionally_is_counted():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.scale = nn.Linear(8, 16), nn.Parameter(torch.ones(8))

        def forward(self, x):
            return F.linear(self.scale * x, self.a.weight)

    assert count(Functional(), torch.zeros(3, 5, 8)) == Counts(5 * 8 * 16, 8 * 16 + 16 + 8)


def test_products_of_activations_are_counted_as_torch_does():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    example = torch.randn(2, 5, 8)
    with inference(model), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        torch.backends.mha.set_fastpath_enabled(False)
        model(example)
        torch.backends.mha.set_fastpath_enabled(True)
    assert count(model, example).macs - 2 * 5 * 8 == counter.get_total_flops() // 4
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_module_that_raises_leaves_no_hooks():
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU())
    with pytest.raises(RuntimeError):
        count(model, torch.zeros(1, 5))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Positions(nn.Module):
    """Tokens with positions from a table, and a residual branch."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.branch = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x):
        x = x + self.table(torch.arange(5))
        return x + self.branch(x)


def test_an_embedding_counts_its_table_and_no_macs():
    model, example = Positions(), torch.zeros(2, 5, 4)
    layers = 5 * (4 * 6 + 6 * 4), 4 * 6 + 6 + 6 * 4 + 4
    assert count(model, example) == Counts(layers[0], layers[1] + 5 * 4)
    block = Block("branch", "branch.2", (Site("hidden", 6, ("branch.0",), ("branch.2",)),))
    complexity = describe(model, [block], example)
    assert (complexity.params(np.ones(7)), complexity.params(np.zeros(7))) == (layers[1] + 20, 20)
    assert (complexity.macs(np.ones(7)), complexity.macs(np.zeros(7))) == (layers[0], 0)


def test_a_site_made_by_an_embedding_is_refused():
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 5))
    block = Block("1", "1", (Site("hidden", 6, ("0",), ("1",)),))
    with pytest.raises(ValueError, match="site `hidden` must be made by a convolution, .* `0` is an Embedding"):
        describe(model, [block], torch.zeros(2, 3, dtype=torch.int64))

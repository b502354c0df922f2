"""Models that a pruner took, or refused, for the wrong reason once; each stands for its kind, with the right value.

| once | now |
|---|---|
| a depthwise or grouped layer that makes units was taken, the run died at its first cut | groups are units; trained, cut, counted |
| grouped with `round_to`: logits changed by a third in silence | the logits are those of the gated network |
| `BatchNorm(affine=False)`: StopIteration | its statistics are cut along |
| ConvTranspose gated along its outputs (its weight is in x out) | dimension 0 reads, dimension 1 makes |
| a module used twice | one site of both uses, each counted |
| weights used functionally: 640 of 4,736 MACs | all products are counted |
| Swin: 108 of 637 million MACs | attention is counted, equal to torch's own counter |
| concatenation: "must have the width ... 16 and 24" | ranges of one input; by hand the way out is named |
| nested branches: both taken | the inner ones go, the outer one is refused with the reason |
| FrozenBatchNorm: no parameters, so not cut | its buffers are cut along |

The tests below are in this order. More of each kind: `tests/prune/trace`, `test_slices.py`, `test_describe.py`.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import catode
from benchmarks.prunability.models import declare_operators
from catode.prune.describe import consistency
from catode.prune.describe.costs import count
from catode.prune.describe.costs import describe as complexity
from catode.prune.describe.trial import difference
from catode.prune.gated.cut import keep_units, restrict
from catode.prune.gated.gates import Gates
from catode.prune.selfcheck import check
from catode.structures.description import CONSUMER, PRODUCER, TIED, Block, Site
from catode.structures.inventory import Inventory
from catode.structures.layout import units_in

IMAGES = torch.zeros(2, 3, 6, 6)


class Between(nn.Module):
    """A layer, what is between, and a layer that reads it; pooled and classified."""

    def __init__(self, first: nn.Module, between: nn.Module, last: nn.Module, out: int = 6):
        super().__init__()
        self.first, self.between, self.last, self.head = first, between, last, nn.Linear(out, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(F.relu(self.between(self.first(x)))).mean((2, 3)))


def site_of(blocks, name: str) -> Site:
    return next(site for block in blocks for site in block.sites if site.name == name)


def torch_macs(model: nn.Module, example: torch.Tensor) -> float:
    """MACs per example by torch's own counter, without norms; it knows no fused attention of CPUs."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(example)
    return counter.get_total_flops() / 2 / len(example)


def compare(model: nn.Module, blocks, kept: np.ndarray, x: torch.Tensor) -> float:
    """Largest relative difference of the logits between closed gates and a cut."""
    inventory, gated = Inventory(blocks), copy.deepcopy(model).eval()
    gates = Gates(gated, inventory)
    gates.install([True] * len(blocks), [torch.from_numpy(units) for units in inventory.units])
    values = torch.from_numpy(kept.astype(np.float32))
    gates.set(values, values)
    small = restrict(copy.deepcopy(model), blocks, inventory.record(kept)).eval()
    with torch.no_grad():
        return difference([small(x)], [gated(x)])


GROUPED = {
    "depthwise": (lambda: nn.Conv2d(3, 12, 3, padding=1, groups=3), 3, 4),
    "grouped": (lambda: nn.Conv2d(3, 12, 3, padding=1, groups=3, bias=False), 3, 4),
    "behind": (lambda: nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, 1, 1, groups=4)), 4, 3),
    "depthwise behind": (lambda: nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=12)), 12, 1),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", GROUPED)
def test_grouped_and_depthwise_producers_are_trained_cut_and_counted(kind):
    """A group of the first layer reads channels of the image, which stay: what it makes is free. Behind another layer groups go."""
    torch.manual_seed(0)
    make, _, _ = GROUPED[kind]
    model = Between(make(), nn.BatchNorm2d(12), nn.Conv2d(12, 6, 3, padding=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    own = dict(nu=1e4, steps=60, warmup=5, memory=10, epoch_steps=math.inf, alpha=0.0)
    pruner = catode.Pruner(model, IMAGES, optimizer=optimizer, **own)
    before = pruner.counts()
    for step in range(100):  # it once died at the first cut, in step 79
        x = torch.randn(16, *IMAGES.shape[1:], generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), x.mean((1, 2, 3)).gt(0).long()).backward()
        optimizer.step()
        pruner.step()
    model = pruner.finish()
    assert pruner.counts().macs < before.macs and count(model, IMAGES) == pruner.counts()


@pytest.mark.parametrize(
    ("kind", "units", "each"), [(k, units, each) for k, (_, units, each) in GROUPED.items() if "behind" in k]
)
def test_a_round_width_of_groups_leaves_the_logits_of_the_gated_network(kind, units, each):
    torch.manual_seed(1)
    model = Between(GROUPED[kind][0](), nn.BatchNorm2d(12), nn.Conv2d(12, 6, 3, padding=1)).double()
    blocks = catode.describe(model, IMAGES.double())
    site = site_of(blocks, "first.0")
    assert site.width == units and {p.each for p in site.parts if p.role == PRODUCER} == {each}
    inventory = Inventory(blocks)
    group = units_in(6, site)  # units of a width of 6 entries
    assert group * each % 6 == 0
    kept = np.ones(inventory.size, dtype=bool)
    kept[next(p for p in inventory.places if p.site == site).units[: units - group]] = False
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    small = restrict(copy.deepcopy(model), blocks, inventory.record(kept))
    assert small.first[2].out_channels == small.last.in_channels == group * each
    assert small.first[2].groups == group and small.first[2].weight.shape[1] == 12 // GROUPED[kind][0]()[2].groups
    assert compare(model, blocks, kept, x) < 1e-12


def test_a_norm_without_affine_is_cut_along():
    model = Between(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 6, 1))
    blocks = catode.describe(model, IMAGES)
    check(model, IMAGES, blocks)
    keep_units(model, site_of(blocks, "first"), [0, 5, 6])
    assert model.between.running_mean.shape == (3,) and model.between.num_features == 3
    by_hand = [Block("held", "", (Site("first", 3, ("first", "between"), ("last",), True),), removable=False)]
    consistency.check(model, by_hand)
    check(model, IMAGES, by_hand)


def test_a_transposed_convolution_reads_along_its_first_dimension():
    up = nn.ConvTranspose2d(8, 6, 2, stride=2)
    model = Between(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Sequential(up, nn.ReLU(), nn.Conv2d(6, 6, 1)))
    blocks = catode.describe(model, IMAGES)
    reads = [(p.tensor, p.dim) for p in site_of(blocks, "first").parts if p.role == CONSUMER]
    makes = [(p.tensor, p.dim) for p in site_of(blocks, "last.0").parts if p.role == PRODUCER]
    assert reads == [("last.0.weight", 0)] and ("last.0.weight", 1) in makes
    check(model, IMAGES, blocks)


def test_a_module_that_runs_twice_is_one_site_and_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.shared = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.shared(F.relu(self.a(x))) * self.shared(F.relu(self.b(x)))

    model, x = Twice(), torch.zeros(2, 5)
    blocks = catode.describe(model, x)
    (site,) = blocks[0].sites
    assert {p.tensor for p in site.parts if p.role == CONSUMER} == {"shared.weight"} and site.width == 8
    costs = complexity(model, blocks, x)
    assert costs.macs(np.ones(9)) == 2 * 5 * 8 + 2 * 8 * 3 == torch_macs(model, x)
    kept = np.array([1, 1, 0, 0, 1, 0, 0, 0, 1], dtype=bool)
    small = restrict(copy.deepcopy(model), blocks, Inventory(blocks).record(kept))
    assert costs.macs(kept.astype(float)) == 2 * 5 * 3 + 2 * 3 * 3 == torch_macs(small, x)
    with pytest.raises(
        ValueError, match=r"^block `held` must run each of its modules once; `shared` runs 2 times\."
    ) as told:
        by_hand = Site("a", 8, ("a", "b"), ("shared",))
        check(model, x, [Block("held", "", (by_hand,), removable=False)])
    assert "\n" not in str(told.value)


def test_weights_used_by_functions_are_counted():
    """16 x 40 by the layer, 64 x 64 by the function that reads the other one's weight: 640 MACs were counted of 4,736."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(16, 40)

        def forward(self, x):
            return F.linear(x, self.a.weight).sum() + self.b(x[:, :16])

    model, x = Functional(), torch.zeros(3, 64)
    assert count(model, x).macs == 4736 == torch_macs(model, x)
    assert count(model, x).params == 64 * 65 + 40 * 17


def test_swin_is_counted_as_torch_does():
    declare_operators()
    models = pytest.importorskip("torchvision.models")
    model, x = models.swin_t().eval(), torch.zeros(1, 3, 64, 64)
    elements = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda m, args, output: elements.append(output.numel()))
    macs = torch_macs(model, x)
    found = count(model, x)
    assert found.macs == macs + sum(elements) // 2  # the hooks saw both passes
    assert found.params == sum(p.numel() for p in model.parameters()) == 28_288_354


def test_a_concatenation_is_cut_by_ranges_and_by_hand_named():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 16, 1), nn.Conv2d(24, 6, 1)

        def forward(self, x):
            return self.c(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)).mean((2, 3))

    model = Joined()
    blocks = catode.describe(model, IMAGES)
    at = {name: [(p.offset, p.dim) for p in site_of(blocks, name).parts if p.role == CONSUMER] for name in "ab"}
    assert at == {"a": [(0, 1)], "b": [(8, 1)]}
    check(model, IMAGES, blocks)
    by_hand = [Block("held", "", (Site("b", 16, ("b",), ("c",)),), removable=False)]
    with pytest.raises(
        ValueError, match="^site `b` must have the width of `c`; got 16 and 24. Give its `parts` where"
    ) as told:
        check(model, IMAGES, by_hand)
    assert "\n" not in str(told.value)


def test_nested_branches_are_told_apart():
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return x + self.inner(x)

    inner = Around(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)))
    model = nn.Sequential(nn.Linear(3, 6), Around(nn.Sequential(nn.Linear(6, 6), inner)), nn.Linear(6, 2))
    blocks = catode.describe(model, torch.zeros(2, 3))
    assert [block.module for block in blocks if block.removable] == ["1.inner.1"]
    assert [r.name for r in blocks.refused if "holds the branch that is added in `1.inner.1`" in r.reason] == ["1"]
    check(model, torch.zeros(2, 3), blocks)


def test_a_frozen_batch_norm_is_cut_along():
    declare_operators()
    ops = pytest.importorskip("torchvision.ops")
    model = Between(nn.Conv2d(3, 8, 3, padding=1), ops.FrozenBatchNorm2d(8), nn.Conv2d(8, 6, 1))
    blocks = catode.describe(model, IMAGES)
    site = site_of(blocks, "first")
    tied = {p.tensor for p in site.parts if p.role == TIED}
    assert tied == {f"between.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    check(model, IMAGES, blocks)
    keep_units(model, site, [1, 2])
    assert {len(buffer) for buffer in model.between.buffers()} == {2}
    assert model(torch.randn(2, 3, 6, 6)).shape == (2, 4)
    costs = complexity(
        Between(nn.Conv2d(3, 8, 3, padding=1), ops.FrozenBatchNorm2d(8), nn.Conv2d(8, 6, 1)), blocks, IMAGES
    )
    kept = np.ones(costs.size)
    kept[3:9] = 0
    assert costs.params(kept) == sum(p.numel() for p in model.parameters())

"""Drawn architectures under the pruner's own gates: at random vertices cut is gated, counts are torch's own.

`test_random_networks` compares cuts with weights that are zeroed by hand and knows the widths to expect. Here the gates are those
of `catode.prune.gated.gates`, costs are compared with `torch.utils.flop_counter`, and further kinds of parts are drawn.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_random_networks import KINDS, WIDTH, Network
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from catode.prune.describe.costs import describe as complexity
from catode.prune.describe.trace import describe
from catode.prune.describe.trial import difference, evaluating, floats, randomise, training
from catode.prune.gated.cut import restrict
from catode.prune.gated.gates import Gates
from catode.structures.inventory import Inventory

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


class Chain(nn.Module):
    """Convolutions one after the other, without a shortcut."""

    def __init__(self, hidden: int, kind: int):
        super().__init__()
        norm = (nn.BatchNorm2d(hidden), nn.Identity(), nn.GroupNorm(2, hidden))[kind]
        self.first, self.norm = nn.Conv2d(WIDTH, hidden, 3, padding=1), norm
        self.second, self.third = nn.Conv2d(hidden, 7, 3, padding=1), nn.Conv2d(7, WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.norm(self.first(x)))
        return self.third(F.softplus(F.avg_pool2d(self.second(x), 3, 1, 1)))


class Dense(nn.Module):
    """Each layer reads everything before it, as in DenseNet; a transition leads back."""

    def __init__(self, hidden: int, kind: int):
        super().__init__()
        widths = [WIDTH, WIDTH + hidden, WIDTH + 2 * hidden]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.convs = nn.ModuleList(nn.Conv2d(width, hidden, 3, padding=1, bias=kind > 0) for width in widths[:2])
        self.transition = nn.Conv2d(widths[2], WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return self.transition(F.relu(self.norms[2](x)))


class Projected(nn.Module):
    """A bottleneck whose shortcut has weights; the first or the middle convolution in groups."""

    def __init__(self, hidden: int, kind: int):
        super().__init__()
        self.a = nn.Conv2d(WIDTH, hidden, 1, groups=2 if kind == 1 else 1)
        self.b = nn.Conv2d(hidden, hidden, 3, padding=1, groups=2 if kind == 2 else 1)
        self.bn, self.c = nn.BatchNorm2d(hidden, affine=kind > 0), nn.Conv2d(hidden, WIDTH, 1)
        self.shortcut = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.c(F.relu(self.bn(self.b(F.relu(self.a(x)))))) + self.shortcut(x))


class Pair(nn.Module):
    """A gated linear unit of two layers, and a scale behind the branch."""

    def __init__(self, hidden: int, kind: int):
        super().__init__()
        self.norm, self.gate = nn.GroupNorm(1, WIDTH), nn.Conv2d(WIDTH, hidden, 1, bias=kind == 0)
        self.up, self.down = nn.Conv2d(WIDTH, hidden, 1, bias=False), nn.Conv2d(hidden, WIDTH, 1, bias=kind == 1)
        self.scale = nn.Parameter(torch.full((WIDTH, 1, 1), 1e-6)) if kind else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        y = self.down(F.silu(self.gate(y)) * self.up(y))
        return x + (y if self.scale is None else self.scale * y)


class Crossed(nn.Module):
    """Attention with queries, keys and values of layers of their own, and an MLP behind it; two branches in one module."""

    def __init__(self, hidden: int, kind: int):
        super().__init__()
        self.heads, self.size, self.kind = 2, 3, kind
        self.q, self.k, self.v = (nn.Linear(WIDTH, 6, bias=kind != 1) for _ in range(3))
        self.out, self.norm = nn.Linear(6, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        q, k, v = (f(y).view(b, h * w, self.heads, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = y + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.kind == 2).transpose(1, 2).flatten(2))
        y = y + self.down(F.gelu(self.up(self.norm(y))))
        return y.transpose(1, 2).reshape(b, c, h, w)


MORE = (*KINDS, Chain, Dense, Projected, Pair, Crossed)
ALONE = (Chain, Dense, KINDS[2])
"""Parts without a branch."""


def flops(model: nn.Module, x: torch.Tensor) -> float:
    """MACs per example by torch's own counter, and an element of a norm for one."""
    elements = []
    hooks = [
        module.register_forward_hook(lambda m, args, output: elements.append(output.numel()))
        for module in model.modules()
        if isinstance(module, NORMS)
    ]
    # torch's counter knows no fused attention of CPUs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return (counter.get_total_flops() / 2 + sum(elements)) / len(x)


def outputs(model: nn.Module, x: torch.Tensor, mode) -> list[torch.Tensor]:
    """What a copy returns, so that running statistics stay."""
    mode(model)
    with torch.no_grad():
        return floats(copy.deepcopy(model)(x) if mode is training else model(x))


@settings(max_examples=20)
@example([(MORE.index(Crossed), 2, 0)] * 4, False, 0)  # a branch goes that shares its module's numbers with another one
@given(
    st.lists(
        st.tuples(st.integers(0, len(MORE) - 1), st.sampled_from((2, 4, 6)), st.integers(0, 2)), min_size=1, max_size=4
    ),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_law_cut_is_gated_and_counts_are_what_is_executed(drawn, flat, seed):
    torch.manual_seed(seed)
    model = Network([MORE[kind](hidden, which) for kind, hidden, which in drawn], flat)
    blocks = describe(model, torch.zeros(1, 3, 6, 6))
    branches = sum((2 if MORE[kind] is Crossed else 1) for kind, _, _ in drawn if MORE[kind] not in ALONE)
    assert sum(block.removable for block in blocks) == branches
    assert all(any(f"blocks.{number}." in site.name for block in blocks for site in block.sites)
               for number in range(len(drawn))), "something of every part can go"  # fmt: skip
    inventory, costs = Inventory(blocks), complexity(model, blocks, torch.zeros(2, 3, 6, 6))
    model = model.double()
    randomise(model, seed)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    every = np.ones(inventory.size)
    assert costs.macs(every) == flops(model, x) and costs.params(every) == sum(p.numel() for p in model.parameters())
    for number in np.flatnonzero(
        inventory.removable[: inventory.layers]
    ):  # the price of a layer is all that goes with it
        left = every.copy()
        left[number] = 0.0
        saved = costs.gradient(every, 0.0)[number] * costs.removable_macs
        left = inventory.close(left > 0).astype(float)
        assert abs(saved - (costs.macs(every) - costs.macs(left))) < 1e-6 * costs.macs(every)
    rng = np.random.default_rng(seed)
    for share in (0.5, 0.8):
        kept = inventory.close(rng.random(inventory.size) < share)
        small = restrict(copy.deepcopy(model), blocks, inventory.record(kept))
        gated = copy.deepcopy(model)
        gates = Gates(gated, inventory)
        gates.draw = gates.keep_prob
        gates.install([True] * len(blocks), [torch.from_numpy(units) for units in inventory.units])
        values = torch.from_numpy(kept.astype(np.float32))
        gates.set(values, values)
        expected = []
        for mode in (evaluating, training):
            mode(gated)
            before = {name: buffer.clone() for name, buffer in gated.named_buffers()}
            with torch.no_grad():
                expected.append([tensor.clone() for tensor in floats(gated(x))])
                for name, buffer in gated.named_buffers():
                    buffer.copy_(before[name])
            assert difference(outputs(small, x, mode), expected[-1]) < 1e-5
        gates.remove()
        assert type(small) is type(model) and set(small.state_dict()) <= set(model.state_dict())
        left = kept.astype(float)
        assert costs.params(left) == sum(p.numel() for p in small.parameters())
        assert abs(costs.macs(left) - flops(small, x)) < 1e-6 * costs.macs(every)

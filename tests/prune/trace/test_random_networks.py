"""Random networks: residual, concatenated, gated by squeeze and excitation, grouped, attending; cut is gated to 1e-8."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from catode.prune.describe.costs import count
from catode.prune.describe.costs import describe as complexity
from catode.prune.describe.trace import describe
from catode.prune.describe.trace.verifying import cut_copy, verify, vertices
from catode.structures.inventory import Inventory

WIDTH = 8


class Plain(nn.Module):
    """``x + bn(conv(act(bn(conv(x)))))``, in place or by a function."""

    def __init__(self, hidden: int, kind: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(WIDTH, hidden, 3, padding=1), nn.BatchNorm2d(hidden, affine=kind != 1)
        self.act = (nn.SiLU(inplace=True), nn.GELU(), nn.PReLU(hidden))[kind]
        self.conv2, self.bn2 = nn.Conv2d(hidden, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        out += x
        return F.relu(out)


class Inverted(nn.Module):
    """Depthwise or grouped, with squeeze and excitation."""

    def __init__(self, hidden: int, kind: int):
        super().__init__()
        groups = (hidden, 2, hidden // 2)[kind]
        self.expand, self.bn = nn.Conv2d(WIDTH, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.deep = nn.Conv2d(hidden, hidden, 3, padding=1, groups=groups)
        self.squeeze, self.excite = nn.Conv2d(hidden, 3, 1), nn.Conv2d(3, hidden, 1)
        self.project = nn.Conv2d(hidden, WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.hardswish(self.deep(F.silu(self.bn(self.expand(x)))))
        scale = torch.sigmoid(self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return x + self.project(y * scale)


class Inception(nn.Module):
    """Two paths behind each other, joined by a third layer; no branch."""

    def __init__(self, hidden: int, kind: int):
        super().__init__()
        self.a, self.b = nn.Conv2d(WIDTH, hidden, 1), nn.Conv2d(WIDTH, hidden + 1, 3, padding=1)
        self.c = nn.ConvTranspose2d(2 * hidden + 1, WIDTH, 1) if kind else nn.Conv2d(2 * hidden + 1, WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.cat([F.elu(self.a(x)), F.silu(self.b(x))], 1))


class Gated(nn.Module):
    """A gated linear unit over channels, by a chunk or by two layers."""

    def __init__(self, hidden: int, kind: int):
        super().__init__()
        self.norm, self.kind = nn.LayerNorm(WIDTH), kind
        self.up, self.down = nn.Linear(WIDTH, 2 * hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.norm(x.permute(0, 2, 3, 1)))
        if self.kind == 0:
            y = F.glu(y, -1)
        else:
            a, b = y.chunk(2, -1)
            y = F.silu(a) * b
        return x + self.down(y).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Heads from a fused or from separate projections, their number in an attribute."""

    def __init__(self, hidden: int, kind: int):
        super().__init__()
        self.num_heads, self.size, self.kind = 4, 3, kind
        self.norm, inner = nn.LayerNorm(WIDTH), 12
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * inner, bias=kind == 0), nn.Linear(inner, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        y = self.qkv(self.norm(x.flatten(2).transpose(1, 2)))
        q, k, v = y.view(b, h * w, 3, self.num_heads, self.size).permute(2, 0, 3, 1, 4)
        if self.kind == 2:
            y = (q @ k.transpose(-2, -1) / self.size**0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.transpose(1, 2).flatten(2)).transpose(1, 2).view(b, c, h, w)


KINDS = (Plain, Inverted, Inception, Gated, Attention)


class Network(nn.Module):
    """Drawn blocks between a stem and a classifier, which reads channels or everything."""

    def __init__(self, blocks: list[nn.Module], flat: bool):
        super().__init__()
        self.stem, self.blocks, self.flat = nn.Conv2d(3, WIDTH, 3, 2, 1), nn.Sequential(*blocks), flat
        self.last = nn.Conv2d(WIDTH, 5, 1)
        self.head = nn.Linear(5 * 9 if flat else 5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.last(self.blocks(self.stem(x))))
        return self.head(torch.flatten(y, 1) if self.flat else y.mean((2, 3)))


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from((2, 4, 6)), st.integers(0, 2)), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_cut_is_gated(drawn, flat, seed):
    model = Network([KINDS[kind](hidden, which) for kind, hidden, which in drawn], flat)
    example = torch.zeros(1, 3, 6, 6)
    blocks = describe(model, example)
    residual = [number for number, (kind, _, _) in enumerate(drawn) if kind != 2]
    assert [block.module for block in blocks if block.removable] == [f"blocks.{number}" for number in residual]
    names = {site.name: site.width for block in blocks for site in block.sites}
    expected = {"last": 5}
    for number, (kind, hidden, which) in enumerate(drawn):
        name = f"blocks.{number}."
        groups = (hidden, 2, hidden // 2)[which]
        if kind == 0:
            expected[name + "conv1"] = hidden
        elif kind == 1:
            # units are groups, one of which alone is none
            expected[name + "expand"] = groups if groups > 1 else hidden
            expected[name + "squeeze"] = 3
        elif kind == 2:
            expected |= {name + "a": hidden, name + "b": hidden + 1}
        elif kind == 3:
            expected[name + "up"] = hidden
        else:
            expected[name + "qkv"] = 4
    assert {name: names.get(name) for name in expected} == expected
    verdict = verify(model, blocks, example, seed=seed)
    assert verdict.deviation < 1e-8, verdict
    assert not verdict.idle
    inventory, costs = Inventory(blocks), complexity(model, blocks, example)
    for _, kept in vertices(inventory, 3, np.random.default_rng(seed)):
        counts = count(cut_copy(model, inventory, kept), example)
        assert counts.params == round(costs.params(kept.astype(float)))
        assert counts.macs == round(costs.macs(kept.astype(float)))

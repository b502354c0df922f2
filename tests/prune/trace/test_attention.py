"""Heads and branches of attention that nobody here wrote: torch's own modules, grouped queries, layers that cannot be traced."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import catode
from benchmarks.prunability.models import declare_operators
from catode.prune.describe.costs import count
from catode.prune.describe.costs import describe as complexity
from catode.prune.describe.trace import describe
from catode.prune.describe.trace.verifying import verify
from catode.prune.gated.cut import restrict
from catode.prune.gated.heads import FewerHeads, adopt, convert, release
from catode.structures.inventory import Inventory

WIDTH, HEADS = 16, 4


class Encoder(nn.Module):
    """torch's encoder between two linear layers."""

    def __init__(self, norm_first: bool = True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.up, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.up(x)).mean(1))


class GroupedAttention(nn.Module):
    """Four query heads, of which two share a key and a value head each."""

    def __init__(self, size: int = 4):
        super().__init__()
        self.size, self.groups = size, 2
        self.q, self.out = nn.Linear(WIDTH, 4 * size), nn.Linear(4 * size, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, 2 * size), nn.Linear(WIDTH, 2 * size)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        q, k, v = (f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (part[:, :, None].expand(-1, -1, self.groups, -1, -1).flatten(1, 2) for part in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


class Layer(nn.Module):
    """A layer that no graph can be made of: it looks at its arguments, and its parts return tuples."""

    def __init__(self, style: str):
        super().__init__()
        self.style = style
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = GroupedAttention()
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor, **options) -> torch.Tensor:
        for _ in [part for part in x.shape if part < 0]:  # cannot be iterated symbolically
            raise AssertionError
        attended, *_ = self.attention(self.norm1(x))
        if self.style == "in place":
            attended += x
            x = attended
        elif self.style == "parameter":
            x = x + self.scale * attended
        else:
            x = attended + x
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Layers(nn.Module):
    def __init__(self, style: str = "plain"):
        super().__init__()
        self.embed, self.layers = nn.Linear(6, WIDTH), nn.ModuleList(Layer(style) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, cache=None)
        return self.head(x.mean(1))


TOKENS = torch.zeros(2, 5, 6)


def exactly(model: nn.Module, example: torch.Tensor = TOKENS) -> list:
    """The description of a model, which is true of it in outputs, MACs and parameters."""
    blocks = describe(model, example)
    verdict = verify(model, blocks, example)
    assert verdict.deviation < 1e-12 and not verdict.idle
    adopt(model, blocks)
    inventory = Inventory(blocks)
    costs = complexity(model, blocks, example)
    kept = inventory.close((torch.arange(inventory.size) % 3 != 1).numpy())
    small = restrict(copy.deepcopy(model), blocks, inventory.record(kept))
    found = count(small, example)
    assert (found.macs, found.params) == (costs.macs(kept.astype(float)), costs.params(kept.astype(float)))
    return blocks


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", ["", "padding", "causal", "both", "of every head"])
def test_attention_that_can_lose_heads_computes_what_torchs_does(batch_first, need_weights, masked):
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, dtype=torch.float64)
    small = copy.deepcopy(whole)
    convert(small)
    assert type(small) is FewerHeads and isinstance(small, nn.MultiheadAttention)
    q, kv = torch.randn(2, 5, WIDTH, dtype=torch.float64), torch.randn(2, 7, WIDTH, dtype=torch.float64)
    padding = torch.arange(7).expand(2, 7) >= torch.tensor([[5], [7]])
    masks = {
        "padding": dict(key_padding_mask=padding),
        "causal": dict(attn_mask=torch.arange(7) > torch.arange(5)[:, None]),
        "both": dict(attn_mask=torch.randn(5, 7, dtype=torch.float64), key_padding_mask=padding),
        "of every head": dict(attn_mask=torch.randn(2 * HEADS, 5, 7, dtype=torch.float64)),
    }
    if not batch_first:
        q, kv = q.transpose(0, 1), kv.transpose(0, 1)
    given = dict(need_weights=need_weights, **masks.get(masked, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # masks of two types
        one, other = whole(q, kv, kv, **given), small(q, kv, kv, **given)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    release(small)
    assert type(small) is nn.MultiheadAttention


def test_unbatched_attention():
    whole = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64)
    small, x = copy.deepcopy(whole), torch.randn(5, WIDTH, dtype=torch.float64)
    convert(small)
    torch.testing.assert_close(whole(x, x, x), small(x, x, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("other", [dict(add_bias_kv=True), dict(add_zero_attn=True), dict(kdim=8, vdim=8)])
def test_attention_of_other_forms_stays_as_it_is(other):
    module = nn.MultiheadAttention(WIDTH, HEADS, **other)
    convert(module)
    assert type(module) is nn.MultiheadAttention


def test_a_mask_of_every_head_is_refused_when_heads_have_gone():
    module = nn.MultiheadAttention(WIDTH, HEADS)
    convert(module)
    module.num_heads, x = 3, torch.zeros(5, 2, WIDTH)
    module.in_proj_weight = nn.Parameter(module.in_proj_weight[:36])
    module.in_proj_bias = nn.Parameter(module.in_proj_bias[:36])
    with pytest.raises(ValueError, match=r"^`attn_mask` must have the shape \(targets, sources\) once heads have gone"):
        module(x, x, x, attn_mask=torch.zeros(8, 5, 5))


@pytest.mark.parametrize("norm_first", [True, False])
def test_heads_widths_and_branches_of_torchs_encoder(norm_first):
    blocks = exactly(Encoder(norm_first))
    assert [(block.removable, [site.width for site in block.sites]) for block in blocks] == [
        (True, [HEADS]),
        (True, [24]),
    ] * 2


def test_torchs_encoder_runs_without_any_of_its_branches_in_eval_mode():
    model = Encoder().eval()
    for _ in range(2):  # without gradients torch takes a fused kernel where it can
        blocks = describe(model, TOKENS)
        gone = [n for n, block in enumerate(blocks) if block.removable][-1:]
        inventory = Inventory(blocks)
        kept = torch.ones(inventory.size).numpy() > 0
        kept[gone] = False
        small = restrict(copy.deepcopy(model), blocks, inventory.record(inventory.close(kept)))
        with torch.no_grad():
            inside = small(TOKENS + 1)
        torch.testing.assert_close(inside, small(TOKENS + 1).detach())


@pytest.mark.parametrize("style", ["plain", "parameter"])
def test_grouped_queries_and_branches_of_layers_that_cannot_be_traced(style):
    blocks = exactly(Layers(style))
    assert [(block.name, [site.width for site in block.sites]) for block in blocks] == [
        ("layers.0.attention", [2]),
        ("layers.0.down", [20]),
        ("layers.1.attention", [2]),
        ("layers.1.down", [20]),
    ]
    site = blocks[0].sites[0]
    assert {part.tensor.split(".")[-2]: part.each for part in site.parts} == {"q": 8, "k": 4, "v": 4, "out": 8}
    assert dict(blocks[0].absent) == {"layers.0.norm1": 0, "layers.0.attention": 2}


def test_a_branch_that_is_added_in_place_to_what_it_returns_stays_and_says_why():
    found = describe(Layers("in place"), TOKENS)
    assert [block.name for block in found if block.removable] == ["layers.0", "layers.1"]  # the second branch of each
    reasons = [str(refusal) for refusal in found.refused if refusal.kind == "branch"]
    assert len(reasons) == 2
    assert all("a Layer must be traceable to lose a branch" in reason and "fails" in reason for reason in reasons)


@pytest.mark.parametrize("make", [Encoder, Layers])
def test_training_prunes_it_and_the_compact_model_is_exact(make):
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a short run
        pruner = catode.Pruner(
            model, TOKENS, optimizer=optimizer, target_macs=0.5, nu=1.0, steps=80, warmup=8, epoch_steps=math.inf
        )
    average = copy.deepcopy(model)
    pruner.on_cut(average)
    for _ in range(80):
        x = torch.randn(32, 5, 6)
        loss = F.cross_entropy(model(x), (x.sum((1, 2)) > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
    whole = pruner.complexity.macs(torch.ones(pruner.inventory.size).double().numpy())
    small = pruner.finish().eval()
    assert type(small) is make
    assert count(small, TOKENS).macs < 0.55 * whole
    assert {n: p.shape for n, p in average.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    x = torch.randn(4, 5, 6)
    again = restrict(make(), describe(make(), TOKENS), pruner.inventory.record(pruner.kept)).eval()
    again.load_state_dict(small.state_dict())
    for other in (again, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(other(x), small(x))


class BiasedAttention(nn.Module):
    """Attention that is called with the biases of its heads."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(((q @ k.transpose(-2, -1) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Biased(nn.Module):
    """Two attention layers whose heads one table of biases ties together."""

    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleList(BiasedAttention() for _ in range(2))
        self.bias, self.embed, self.head = nn.Embedding(5, HEADS), nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, bias = self.embed(x), self.bias(torch.arange(5)).t()[None, :, None]
        for attention in self.attention:
            x = torch.tanh(attention(x, bias))
        return self.head(x.mean(1))


def test_heads_that_a_shared_table_ties_together_go_together_and_are_counted():
    site = next(site for block in exactly(Biased()) for site in block.sites if "q" in site.name)
    assert site.width == HEADS
    assert {part.tensor for part in site.parts} >= {"bias.weight", "attention.0.o.weight", "attention.1.o.weight"}


@pytest.mark.parametrize("kind", ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])
@pytest.mark.parametrize("size", [(7, 7), (8, 10), (14, 21), (5, 3)])
def test_windows_that_can_lose_heads_compute_what_torchvision_s_do(kind, size):
    declare_operators()
    swin = pytest.importorskip("torchvision.models.swin_transformer", reason="needs the extra `models`")
    for shift in ([0, 0], [3, 3]):
        for bias in (True, False):
            whole = getattr(swin, kind)(12, [7, 7], shift, 3, qkv_bias=bias).double()
            for parameter in whole.parameters():
                nn.init.normal_(parameter)
            small, x = copy.deepcopy(whole), torch.randn(2, *size, 12, dtype=torch.float64)
            convert(small)
            assert type(small) is not type(whole)
            torch.testing.assert_close(small(x), whole(x), rtol=1e-12, atol=1e-12)
            release(small)
            assert type(small) is type(whole)


@pytest.mark.parametrize("version", ["swin", "swin_v2"])
def test_heads_of_torchvision_s_swin(version):
    declare_operators()
    swin = pytest.importorskip("torchvision.models.swin_transformer", reason="needs the extra `models`")
    block = swin.SwinTransformerBlock if version == "swin" else swin.SwinTransformerBlockV2
    merging = swin.PatchMerging if version == "swin" else swin.PatchMergingV2
    model = swin.SwinTransformer(
        [2, 2],
        12,
        [1, 2],
        [2, 4],
        [3, 3],
        num_classes=4,
        block=block,
        downsample_layer=merging,
        stochastic_depth_prob=0.0,
    )
    blocks = exactly(model, torch.zeros(2, 3, 16, 16))
    heads = [site.width for block in blocks for site in block.sites if site.name.endswith("attn.qkv")]
    assert heads == [2, 4, 4]
    assert sum(block.removable for block in blocks) == 6
    model.train()
    first = blocks[0]
    inventory = Inventory(blocks)
    kept = torch.ones(inventory.size).numpy() > 0
    kept[inventory.places[0].units[0]] = False
    small = restrict(copy.deepcopy(model), blocks, inventory.record(kept))
    x = torch.randn(2, 3, 16, 16)
    again = pickle.loads(pickle.dumps(small)).eval()
    assert torch.equal(again(x), small.eval()(x)) and first.removable

"""Models and examples that cannot be pruned, or only in part: one line that names the operation, the module and the way out.

More: `tests/prune/trace/test_traps.py` (operations between widths, patterns), `test_slices.py` and `test_selfcheck.py`
(descriptions by hand), `test_losses.py` (losses and batches), `test_optimizers.py`.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import catode
from catode.prune.describe.costs import count
from catode.structures.inventory import Inventory


class Wrapped(nn.Module):
    """A model whose inner module does something odd with what it computes."""

    def __init__(self, odd):
        super().__init__()
        self.inner, self.odd, self.head = nn.Linear(3, 4), [odd], nn.Linear(4, 2)
        self.inner.register_forward_hook(lambda m, args, output: self.odd[0](output))

    def forward(self, x):
        return self.head(F.relu(self.inner(x)))


def plain(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), *more, nn.Linear(8, 2))


def behind(norm) -> nn.Sequential:
    """A computed weight that reads the only width."""
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), norm(nn.Linear(8, 2)))


def beside(norm) -> nn.Sequential:
    """A computed weight, and a width that it has nothing to do with."""
    return nn.Sequential(
        nn.Linear(3, 8), nn.ReLU(), norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)
    )


def pruner(model: nn.Module, example) -> catode.Pruner:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return catode.Pruner(model, example, optimizer=optimizer, nu=1.0, steps=5000, epoch_steps=math.inf)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))


X = torch.zeros(2, 3)
NUMBERS = r"^`model` must not depend on the numbers that it computes; `inner` "
WAY = r"\. Take that out of forward\(\), or describe the network by hand in structures\(\)\.$"
NOT_RUN = r"^`example` must be an input that the network runs on; `0` fails: RuntimeError: .*"
NONE = r"^`model` must have a branch or a width that can go; Sequential has none: "
BY_HAND = r"\. Describe it by hand in structures\(\), see catode\.prune\.describe\.protocol\.$"

TABLE = {
    "branches on a number": (lambda: Wrapped(lambda y: y if y.sum() > 0 else -y), X,
        NUMBERS + r"asks for one .*_local_scalar_dense.*" + WAY),
    "takes an item": (lambda: Wrapped(lambda y: y * y.max().item()), X, NUMBERS + "asks for one .*" + WAY),
    "a shape from numbers": (lambda: Wrapped(lambda y: y[y[:, 0] > 0]), X,
        NUMBERS + r"computes a shape from them .*nonzero.*" + WAY),
    "through numpy": (lambda: Wrapped(lambda y: y + torch.from_numpy(y.detach().numpy())), X,
        NUMBERS + "hands them to NumPy .*" + WAY),
    "weight norm": (lambda: behind(parametrizations.weight_norm), X,
        NONE + r"width `0` \(8\): a weight norm over it in `2\.parametrizations.*" + BY_HAND),
    "spectral norm": (lambda: behind(parametrizations.spectral_norm), X,
        NONE + r"width `0` \(8\): .* in `2\.parametrizations.*" + BY_HAND),
    "old spectral norm": (lambda: behind(spectral_norm), X,
        NONE + r"width `0` \(8\): a product of two parameters over it.*" + BY_HAND),
    "old weight norm": (lambda: behind(weight_norm), X,
        r"^`model` must be one that can be copied; .*old weight_norm.* Use torch\.nn\.utils\.parametrizations\.$"),
    "nothing between": (lambda: nn.Sequential(nn.Linear(3, 2)), X,
        NONE + "no weight reads what another one makes" + BY_HAND),
    "a norm over it": (lambda: nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)), X,
        NONE + r"width `0` \(8\): a layer norm over it in `1`" + BY_HAND),
    "features": (plain, torch.zeros(2, 4), NOT_RUN + r"\[2, 4\] X \[3, 8\]\. Give a batch as in training\.$"),
    "rank": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)), X,
        NOT_RUN + r"size: \[2, 3\]\. Give a batch as in training\.$"),
    "whole numbers": (plain, torch.zeros(2, 3, dtype=torch.long),
        NOT_RUN + "same dtype.*Give a batch as in training, of its type and on its device"),
    "double numbers": (plain, X.double(),
        NOT_RUN + "same dtype.*Give a batch as in training, of its type and on its device"),
    "half model, other example": (lambda: plain().half(), X,
        NOT_RUN + "same dtype, but got Float and Half.*Give a batch"),
    "no examples": (plain, torch.zeros(0, 3), r"^`example` must hold at least one example; .*Give one batch\.$"),
    "no tensor": (plain, None, r"^`example` must hold a tensor; got .*NoneType.*Give one input batch\.$"),
    "example on another device": (plain, torch.zeros(2, 3, device="meta"),
        r"^`example` must be on the network's device cpu; got .*meta.*Move one of them\.$"),
    "model without numbers": (lambda: plain().to("meta"), torch.zeros(2, 3, device="meta"),
        r"^`model` must hold numbers; got .*`0\.weight` on the device meta.*to_empty"),
    "lazy": (lazy, X,
        r"^`model` must have all its parameters; got .*0\.weight without a shape.*Call it once with the example\.$"),
    "scripted": (lambda: torch.jit.script(plain()), X,
        r"^`model` must be a plain nn\.Module; got .*Describe the module that was scripted\.$"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", TABLE)
def test_what_cannot_be_pruned_is_refused_in_one_line(case):
    make, example, words = TABLE[case]
    model = make()
    before = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    with pytest.raises(ValueError, match=words) as refused:
        if case in ("lazy", "scripted"):  # no optimizer takes the first
            catode.describe(model, example)
        else:
            pruner(model, example)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
    assert before == [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, spectral_norm])
def test_what_a_computed_weight_has_nothing_to_do_with_goes(norm):
    """Spectral norms go on with their iteration in train mode, which the self-check must not take for a difference."""
    made = pruner(beside(norm), X)
    assert [site.name for block in made.blocks for site in block.sites] == ["4"]
    assert made.self_check.difference < 1e-8 and not made.self_check.notes


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_is_described_checked_trained_and_stays_one(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4)
    )
    model, example = model.to(dtype), torch.zeros(2, 3, 6, 6, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    own = dict(nu=1e3, steps=40, memory=10, warmup=5, epoch_steps=math.inf)
    made = catode.Pruner(model, example, optimizer=optimizer, **own)
    assert made.self_check.difference < 1e-8
    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 3, 6, 6, generator=generator).to(dtype), torch.randint(4, (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        made.step()
    assert {p.dtype for p in made.finish().parameters()} == {dtype}
    assert made.counts() == count(model, example) and not made.kept.all()


class Text(nn.Module):
    """Tokens, an MLP branch, an output tied to the embedding, whose width is the residual stream."""

    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens)
        return self.head(x + self.down(F.gelu(self.up(x))))


def token_loss(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def pruner_of_tokens(model, tokens):
    optimizer = torch.optim.AdamW(model.parameters())
    return catode.Pruner(model, tokens, optimizer=optimizer, loss=token_loss, nu=1.0, steps=5000, epoch_steps=math.inf)


def test_a_tied_embedding_stays_tied_and_counts_once():
    model, tokens = Text(), torch.zeros(2, 5, dtype=torch.long)
    made = pruner_of_tokens(model, tokens)
    every = np.ones(made.complexity.size)
    assert (
        made.complexity.params(every) == 11 * 8 + 8 * 12 + 12 + 12 * 8 + 8 == sum(p.numel() for p in model.parameters())
    )
    assert made.complexity.macs(every) == 5 * (11 * 8 + 2 * 8 * 12)
    site = made.blocks[0].sites[0]
    catode.prune.gated.cut.keep_units(model, site, [0, 3])
    assert model.head.weight is model.table.weight and model.head.weight.shape == (11, 8)
    kept = np.ones(made.complexity.size, dtype=bool)
    kept[Inventory(made.blocks).units[0][2:]] = False
    assert made.complexity.params(kept.astype(float)) == sum(p.numel() for p in model.parameters())

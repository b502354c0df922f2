"""The pruner on models that say nothing of themselves: what is found goes, what cannot is left out or refused in one line."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import catode
from catode.prune.describe.costs import count


class Grouped(nn.Module):
    """A group norm between two convolutions: its groups are the units."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.second, self.head = nn.Conv2d(16, 8, 3), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x)).relu()).mean((2, 3)))


class Forking(nn.Module):
    """Which function it is depends on the numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(16, 32), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.first(x).relu()) if x.sum() > 0 else self.head(self.first(x))


def weight_norm():
    """Of its widths the last one alone is made and read by weights that are no functions of others."""
    computed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 32))
    return nn.Sequential(
        nn.Linear(16, 64), nn.GELU(), computed, nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10)
    )


def pruner_of(model, x, **given):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = dict(nu=0.5, steps=60, warmup=10, memory=10, epoch_steps=math.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a short run
        return optimizer, catode.Pruner(model, x, optimizer=optimizer, **settings | given)


@pytest.mark.parametrize(
    ("make", "shape", "widths"),
    [(Grouped, (3, 8, 8), {"first": 4, "second": 8}), (weight_norm, (16,), {"4": 24})],
)
def test_a_model_without_structures_is_trained_and_cut(make, shape, widths):
    torch.manual_seed(0)
    model = make()
    whole, names = sum(p.numel() for p in model.parameters()), list(model.state_dict())
    optimizer, pruner = pruner_of(model, torch.zeros(2, *shape))
    assert {site.name: site.width for block in pruner.blocks for site in block.sites} == widths
    for _ in range(62):
        x, y = torch.randn(16, *shape), torch.randint(10, (16,))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner.step()
    compact = pruner.finish()
    assert compact is model and list(model.state_dict()) == names
    assert pruner.counts().params == sum(p.numel() for p in model.parameters()) < whole
    assert pruner.complexity.params(pruner.kept.astype(float)) == pruner.counts().params
    structure = pruner.inventory.record(pruner.kept)
    again = make()
    catode.prune.gated.cut.restrict(again, catode.describe(again, torch.zeros(2, *shape)), structure)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))
    assert count(model, x[:1]).params == pruner.counts().params and np.all(pruner.kept[pruner.is_layer])


@pytest.mark.parametrize(
    ("make", "x", "message"),
    [
        (Forking, torch.zeros(2, 16), "`model` must not depend on the numbers that it computes; `Forking`"),
        (lambda: nn.Linear(4, 3), torch.zeros(2, 4), "`model` must have a branch or a width that can go; Linear has none"),
        (Grouped, torch.zeros(2, 4, 8, 8), "`example` must be an input that the network runs on; `first` fails"),
    ],
)  # fmt: skip
def test_what_cannot_be_described_is_refused_in_one_line(make, x, message):
    with pytest.raises(ValueError) as refused:
        pruner_of(make(), x)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_what_is_protected_stays():
    model, x = Grouped(), torch.zeros(2, 3, 8, 8)
    _, pruner = pruner_of(model, x, blocks=catode.describe(model, x, keep=["he*"]))
    assert [site.name for block in pruner.blocks for site in block.sites] == ["first"]  # the head reads the other one

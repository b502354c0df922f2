"""Norms of the blocks' weights and the Lipschitz assumption, as measured, and the projection that bounds the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from catode.prune.describe.protocol import branch
from catode.prune.measure.bounds import norms, project
from catode.prune.pruner import Pruner
from catode.train.models import DenseResNet

EXAMPLE = torch.zeros(1, 1, 8, 8)


def make(**settings):
    torch.manual_seed(0)
    model = DenseResNet(64, 10, blocks=3, width=16, hidden=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    given = dict(nu=0.2, steps=120, warmup=10, memory=10, check_every=10, rate_ratio=0.1)
    return model, optimizer, Pruner(model, EXAMPLE, optimizer=optimizer, **given | settings)


def train(model, optimizer, pruner, steps, each=lambda check: None):
    generator = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(steps):
        x = torch.randn(64, 1, 8, 8, generator=generator)
        loss = F.cross_entropy(model(x), x.flatten(1)[:, :10].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        each(pruner.step())


def by_hand(model, name):
    block = model.get_submodule(name)
    return sum(p.double().square().sum().item() for p in block.parameters()) ** 0.5


def test_the_largest_norms_are_those_of_the_checks_and_never_fall():
    model, optimizer, pruner = make()
    most, before = np.zeros(3), []

    def each(check):
        if check is not None and not pruner.finished:
            for number, block in enumerate(pruner.blocks):
                if pruner.kept[number]:  # a removal in the check only makes it smaller
                    most[number] = max(most[number], by_hand(model, block.name))
        before.append(pruner.largest_norms.copy())

    train(model, optimizer, pruner, 120, each)
    assert (np.diff(before, axis=0) >= 0).all() and (most > 0).all()
    assert (pruner.largest_norms >= most * (1 - 1e-5)).all()
    assert (pruner.largest_norms <= 1.5 * most).all()


def test_the_assumption_is_held_against_the_limits_of_each_check(monkeypatch):
    model, optimizer, pruner = make(
        alpha=1.0, nu=0.01, layers_per_probe=3, measure_every=1, memory=60, estimator="paired"
    )
    expected, own = np.zeros(3), pruner._checking.settle

    def settle(state, limits, *args, **kwargs):
        for number, block in enumerate(pruner.blocks):
            if pruner.kept[number] and np.isfinite(limits.gain[number]):
                allowed = by_hand(model, block.name) * limits.gain[number] ** 0.5
                expected[number] = max(expected[number], limits.benefit_lower[number] / allowed)
        return own(state, limits, *args, **kwargs)

    monkeypatch.setattr(pruner._checking, "settle", settle)
    train(model, optimizer, pruner, 120)
    np.testing.assert_allclose(pruner.largest_violations, expected, rtol=1e-4)
    assert (expected > 0).any()


def test_the_projection_is_the_nearest_point_of_the_ball():
    model, _, pruner = make()
    blocks, kept = pruner.blocks, np.array([True, True, False] + [True] * 36)
    sizes = [by_hand(model, block.name) for block in blocks]
    most = (sizes[0] + min(sizes[1], sizes[0])) / 2 * 0.8
    before = [[p.detach().clone() for p in branch(model, block).values()] for block in blocks]
    project(model, blocks, kept, most)
    for block, size, old, stands in zip(blocks, sizes, before, kept, strict=False):
        factor = min(1.0, most / size) if stands else 1.0
        for p, was in zip(branch(model, block).values(), old, strict=True):
            torch.testing.assert_close(p.detach(), factor * was)
    assert all(float(norm) <= most * (1 + 1e-6) for norm in norms(model, blocks, kept))


def test_a_bound_holds_after_every_step():
    model, optimizer, pruner = make(max_norm=4.0)
    seen = []

    def each(check):
        seen.extend(by_hand(model, block.name) for n, block in enumerate(pruner.blocks) if pruner.kept[n])

    train(model, optimizer, pruner, 100, each)
    assert max(seen) <= 4.0 * (1 + 1e-5) and max(seen) > 3.9
    free = make()
    train(*free, 100)
    assert free[2].largest_norms.max() > 4.1, "without a bound they would have grown beyond it"
    assert pruner.largest_norms.max() <= 4.0 * (1 + 1e-5)


def test_a_bound_must_be_positive():
    with pytest.raises(ValueError, match=r"^`max_norm`"):
        make(max_norm=0.0)

"""Runs under the rival priors: thetas rest inside, and settings that make no sense are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from catode.decisions.priors import PRIORS
from catode.prune.pruner import Pruner
from catode.structures import fates
from catode.train.models import DenseResNet


def train(steps, **changes):
    torch.manual_seed(0)
    model = DenseResNet(64, 10, blocks=2, width=32, hidden=12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    options = dict(nu=4.0, rate_ratio=0.05, steps=120, warmup=20, check_every=10, probe_size=16, memory=50)
    pruner = Pruner(model, torch.zeros(1, 1, 8, 8), optimizer=optimizer, **options | changes)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(32, 1, 8, 8, generator=generator)
        loss = F.cross_entropy(model.train()(x), (x.mean((1, 2, 3)) > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
    return pruner


@pytest.mark.parametrize("prior", ["bernoulli", "concrete"])
def test_under_the_rivals_thetas_come_to_rest_inside(prior):
    pruner = train(120, prior=prior, tolerance=0.01, images=1438, initial_keep_prob=0.9, nu=0.1)
    assert pruner.finished and set(PRIORS) == {"flattening", "bernoulli", "concrete"}
    assert not np.isin(pruner.fate, [fates.COMMITTED, fates.PRUNED_ZERO]).any()
    assert pruner.decisions().keys() == {fates.KEPT_OUT_OF_TIME, fates.REMOVED_OUT_OF_TIME}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prior="flat"), "`prior` must be one of"),
        (dict(prior="bernoulli"), "`prior` must be flattening without a fixed tolerance"),
        (
            dict(prior="bernoulli", tolerance=0.1, target_macs=0.5),
            "`prior` must be flattening without a fixed tolerance, with a",
        ),
        (dict(prior="bernoulli", tolerance=0.1), "`images` must be given"),
        (dict(prior="concrete", tolerance=0.1), "`initial_keep_prob` must be below 1"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError) as caught:
        train(0, **change)
    assert message in str(caught.value)

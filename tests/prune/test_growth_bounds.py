"""Measured growth bounds the change of benefits that is then observed, with AdamW."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import ndtri

from benchmarks.vit.comparison import exceeded
from benchmarks.vit.model import DigitsViT
from catode.prune.pruner import Pruner
from catode.prune.selfcheck import check
from catode.train import data

RISK = 0.05
Z = float(ndtri(1.0 - RISK))


def row(time, benefit, keep_prob=1.0, error=0.0, **changes):
    values = dict(gain=0.0, drift=0.0, decay=0.0, benefit_noise=0.0, memory=1.0, time=time, benefit=benefit)
    values |= dict(kind="unit", block="b", site="s", index=0, keep_prob=keep_prob)
    return values | dict(benefit_upper=benefit + Z * error, benefit_lower=benefit - Z * error) | changes


@pytest.mark.parametrize(
    ("rows", "growth", "bound"),
    [
        ([row(0, 1.0, gain=0.5), row(4, 2.9)], 1.9, 2.0),  # q theta t
        ([row(0, 1.0, drift=0.5), row(4, 3.1)], 2.1, 2.0),
        ([row(0, 1.0, drift=0.5, decay=0.25), row(4, 1.5)], 0.5, 1.0),  # a takes a quarter of the benefit a time
        ([row(0, 1.0, keep_prob=0.5, gain=0.5), row(4, 2.0, keep_prob=0.5)], 1.0, 1.0),
        # the pool's memory is short, so theta counts from the moment that it fell
        ([row(0, 1.0, gain=0.5, memory=1e-3), row(2, 1.0, 0.0, memory=1e-3), row(4, 1.4, 0.0, memory=1e-3)], 0.4, 0.5),
    ],
)
def test_bounds_by_hand(rows, growth, bound):
    found = exceeded(rows, 4.0 / rows[0]["memory"], RISK)
    assert found["growth"] == pytest.approx([growth]) and found["bound"] == pytest.approx([bound])
    assert found["exceeded"].tolist() == [growth > bound] and not found["layer"].any()


def test_noise_is_that_of_the_difference_of_two_overlapping_pools():
    """By simulation of a pool with the memory in the rows, at a benefit that stands still."""
    draws, window, every = np.random.default_rng(0), 50, 25
    values, last = [], None
    pool = np.zeros(4000)
    for step in range(10 * window + every):
        pool += (draws.normal(size=4000) - pool) / window
        if step == 10 * window - 1:
            last = pool.copy()
    values = pool - last
    error = 1.0 / math.sqrt(2 * window - 1)
    rows = [row(0.0, 0.0, error=error, memory=float(window)), row(float(every), 0.1, error=error, memory=float(window))]
    assert exceeded(rows, every / window, RISK)["error"] == pytest.approx([values.std()], rel=0.05)


def test_intervals_do_not_overlap_and_stay_within_a_structure_of_a_run():
    rows = [row(time, 0.1 * time, index=index, seed=seed) for seed in (0, 1) for index in (0, 1) for time in range(7)]
    rows += [row(math.nan, 0.0), row(9.0, 9.0, gain=math.inf)]
    assert exceeded(rows, 3.0, RISK)["growth"] == pytest.approx([0.3] * 8)
    assert exceeded(rows[:1], 3.0, RISK)["growth"].shape == (0,)


@pytest.mark.filterwarnings("ignore::catode.prune.checking.PruningWarning")
def test_observed_growth_of_benefits_stays_below_measured_growth_with_adamw():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, images = DigitsViT(16, 1), data.load("digits")
    assert check(model, torch.zeros(2, 1, 8, 8)).notes == ()
    batches = data.Batches(images.train_images, images.train_labels, 32, images.mean, images.std)
    optimizer, epochs, rows = torch.optim.AdamW(model.parameters(), lr=3e-3), 7, []
    pruner = Pruner(
        model,
        torch.zeros(2, 1, 8, 8),
        optimizer=optimizer,
        nu=0.3,
        steps=epochs * len(batches) + 1,
        warmup=len(batches),
        epoch_steps=len(batches),
        memory=30,
        self_check=False,
    )
    for epoch in range(epochs):
        for x, y in batches.epoch(epoch, 0):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            done = pruner.step()
            rows += done.rows if done else []
    found = exceeded(rows, 1.0, RISK)
    grew = found["growth"] > Z * found["error"]
    assert len(found["growth"]) > 100
    assert grew.mean() > 2 * RISK  # benefits do grow, so that a bound of nothing would be exceeded
    assert found["exceeded"].mean() <= RISK

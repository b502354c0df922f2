"""Shadow runs: nothing is removed before theta is 0, and the record survives a checkpoint."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from catode.decisions import shadow
from catode.prune.pruner import Pruner
from catode.structures.fates import PRUNED_TOLERANCE, PRUNED_ZERO
from catode.train.data import load
from catode.train.models import DenseResNet

STEPS, AFTER = 180, 40


def train(steps, **changes):
    torch.manual_seed(0)
    model = DenseResNet(64, 10, blocks=3, width=32, hidden=24)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    options = dict(nu=4.0, rate_ratio=0.015, steps=STEPS, warmup=20, check_every=2, probe_size=16, memory=50)
    pruner = Pruner(model, torch.zeros(1, 1, 8, 8), optimizer=optimizer, **options | changes)
    images = load("digits")
    x = (images.train_images.float() / 255 - images.mean[0]) / images.std[0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        part = torch.randint(len(x), (64,), generator=generator)
        loss = F.cross_entropy(model.train()(x[part]), images.train_labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
    return pruner


@pytest.fixture(scope="module")
def watched():
    return train(STEPS + AFTER, shadow=STEPS + AFTER)


def test_nothing_is_removed_before_its_theta_is_0(watched):
    assert watched.finished
    assert not (watched.fate == PRUNED_TOLERANCE).any()
    rows = watched.shadow.rows(watched.inventory.names())
    derived = [row for row in rows if row["rule"] == shadow.DERIVED]
    assert len(derived) >= 5 and all(0.0 < row["keep_prob"] <= row["tolerance"] for row in derived)
    assert all(row["benefit_upper"] < row["price"] and row["escape"] <= watched.settings.risk for row in derived)
    zero = [(row["block"], row["index"]) for row in rows if row["rule"] == shadow.ZERO]
    names = watched.inventory.names()
    assert sorted(zero, key=str) == sorted(
        [(names[s]["block"], names[s]["index"]) for s in np.flatnonzero(watched.fate == PRUNED_ZERO)], key=str
    )
    confirmed = {(row["block"], row["index"]) for row in derived if row["outcome"] == "confirmed"}
    assert confirmed and confirmed <= set(zero)


def test_a_higher_risk_decides_no_later(watched):
    steps = {rule: watched.shadow.step[i].astype(float) for i, rule in enumerate(shadow.RULES)}
    for value in steps.values():
        value[value == 0] = np.inf
    order = [f"derived@{risk:g}" for risk in sorted(shadow.RISKS, reverse=True)]
    assert all((steps[a] <= steps[b]).all() for a, b in pairwise(order))


def test_what_is_open_at_the_end_of_deciding_is_watched_on():
    pruner = train(STEPS, shadow=STEPS + AFTER)
    open_ = pruner.fate == "undecided"
    assert open_.any() and not pruner.finished
    assert (open_ <= pruner.shadow.watching()).all()


def test_decisions_end_with_the_deciding_phase(watched):
    rows = watched.shadow.rows(watched.inventory.names())
    assert max(row["step"] for row in rows if row["rule"] != shadow.ZERO) <= STEPS < max(row["step"] for row in rows)


def test_the_record_survives_a_checkpoint():
    first = train(100, shadow=STEPS)
    state = first.state_dict()
    second = train(0, shadow=STEPS)
    second.load_state_dict(state)
    told = [
        [{k: str(v) for k, v in row.items()} for row in p.shadow.rows(p.inventory.names())] for p in (first, second)
    ]
    assert told[0] and told[0] == told[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(shadow=STEPS - 1), "`shadow` must be an integer of at least 180; got shadow=179"),
        (dict(shadow=STEPS, target_macs=0.5), "`shadow` must be None with a target"),
        (dict(alpha=5e-324), "`nu` must give every gated structure a price"),
        (dict(shadow=STEPS, round_to=8), "`shadow` must be None with a target"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError) as caught:
        train(0, **change)
    assert message in str(caught.value)

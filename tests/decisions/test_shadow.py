"""Shadow runs: decisions by the rules' definitions, outcomes by first passage, nothing removed before theta is 0."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from catode.decisions import shadow
from catode.decisions.shadow import Shadow
from catode.prune.pruner import Pruner
from catode.structures.fates import PRUNED_TOLERANCE, PRUNED_ZERO
from catode.train.data import load
from catode.train.models import DenseResNet

STEPS, AFTER = 180, 40


def found(theta):
    """What is measured of structures whose benefit is a tenth of their price."""
    n = len(theta)
    values = dict(
        benefit=0.01, benefit_upper=0.02, benefit_lower=0.0, price=0.1, gain=0.5, decay=0.05, rate_ratio=1.0, noise=0.02
    )
    values |= dict(benefit_noise=0.0, drift=0.0, step_time=0.01)
    return {"keep_prob": np.array(theta), **{name: np.full(n, value) for name, value in values.items()}}


@settings(max_examples=60)
@given(data=st.data(), every=st.integers(1, 4), n=st.integers(1, 3))
def test_law_decisions_and_outcomes_are_those_of_the_definition(data, every, n):
    levels = st.sampled_from([0.0, 0.0005, 0.04, 0.3, 0.5, 0.51, 0.9, 1.0])
    paths = np.array(data.draw(st.lists(st.lists(levels, min_size=12, max_size=12), min_size=n, max_size=n)))
    watch, gone = Shadow(n), np.zeros(n, dtype=bool)
    sizes = {name: np.full(n, np.inf) for name in (shadow.FILTER, shadow.SCALE)}
    for step in range(1, 13):
        theta = np.where(gone, 0.0, paths[:, step - 1])
        watch.passed(step, float(step), theta, ~gone)
        gone |= theta == 0.0
        if step % every == 0:
            watch.decide(
                step,
                float(step),
                found(theta),
                ~gone,
                safe=~gone & (theta <= 0.1),
                tolerance_values=np.full(n, 0.1),
                memory=np.zeros(n),
                sizes=sizes,
            )
    rows = watch.rows([dict(kind="unit", block="b", site="s", index=i) for i in range(n)])
    for rule, limit in ((shadow.DERIVED, 0.1), *((f"fixed {t:g}", t) for t in shadow.FIXED)):
        for s in range(n):
            zeros = np.flatnonzero(paths[s] == 0.0)
            life = zeros[0] if len(zeros) else 12
            checks = [k for k in range(every - 1, life, every) if 0.0 < paths[s, k] <= limit]
            own = [row for row in rows if row["rule"] == rule and row["index"] == s]
            assert [row["step"] for row in own] == [k + 1 for k in checks[:1]]
            if own:
                ends = [k for k in range(checks[0] + 1, 12) if paths[s, k] in (0.0, 1.0)][:1]
                expected = {0.0: "confirmed", 1.0: "regret"}[paths[s, ends[0]]] if ends else "undecided"
                assert own[0]["outcome"] == expected
                assert own[0]["outcome_step"] == (ends[0] + 1 if ends else "")


def test_rules_by_size_take_as_many_units_as_the_derived_one():
    watch, sizes = Shadow(4), np.array([3.0, 1.0, 2.0, np.inf])
    watch.decide(
        5,
        0.5,
        found([0.01, 1.0, 1.0, 0.01]),
        np.ones(4, dtype=bool),
        safe=np.array([True, False, False, True]),  # one unit, and one that is none
        tolerance_values=np.full(4, 0.1),
        memory=np.zeros(4),
        sizes={shadow.FILTER: sizes, shadow.SCALE: -sizes},
    )
    chosen = {
        rule: np.flatnonzero(watch.step[shadow.RULES.index(rule)]).tolist() for rule in (shadow.FILTER, shadow.SCALE)
    }
    assert chosen[shadow.FILTER] == [1]
    assert len(chosen[shadow.SCALE]) == 1


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
    assert not (watched.state == PRUNED_TOLERANCE).any()
    rows = watched.shadow.rows(watched.names())
    derived = [row for row in rows if row["rule"] == shadow.DERIVED]
    assert len(derived) >= 5 and all(0.0 < row["keep_prob"] <= row["tolerance"] for row in derived)
    assert all(row["benefit_upper"] < row["price"] and row["escape"] <= watched.risk for row in derived)
    zero = [(row["block"], row["index"]) for row in rows if row["rule"] == shadow.ZERO]
    names = watched.names()
    assert sorted(zero, key=str) == sorted(
        [(names[s]["block"], names[s]["index"]) for s in np.flatnonzero(watched.state == PRUNED_ZERO)], key=str
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
    open_ = pruner.state == "undecided"
    assert open_.any() and not pruner.finished
    assert (open_ <= pruner.shadow.watching()).all()


def test_decisions_end_with_the_deciding_phase(watched):
    rows = watched.shadow.rows(watched.names())
    assert max(row["step"] for row in rows if row["rule"] != shadow.ZERO) <= STEPS < max(row["step"] for row in rows)


def test_the_record_survives_a_checkpoint():
    first = train(100, shadow=STEPS)
    state = first.state_dict()
    second = train(0, shadow=STEPS)
    second.load_state_dict(state)
    told = [[{k: str(v) for k, v in row.items()} for row in p.shadow.rows(p.names())] for p in (first, second)]
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

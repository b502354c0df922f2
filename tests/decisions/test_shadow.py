"""The record of a shadow run: decisions by the rules' definitions, outcomes by first passage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import limits, mask

from catode.decisions import shadow
from catode.decisions.shadow import Shadow
from catode.theory.tolerance import derive, escape_probability


def found(theta):
    """What is measured of structures whose benefit is a tenth of their price."""
    return limits(len(theta), keep_prob=theta, benefit_noise=0.0, drift=0.0, memory=0.0)


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
                sizes=sizes,
            )
    rows = watch.rows([dict(kind="unit", block="b", site="s", index=i) for i in range(n)])
    tolerances = ((f"tol {t}", t) for t in (0.05, 0.5, 0.9))
    for rule, limit in ((shadow.DERIVED, 0.1), *((f"fixed {t:g}", t) for t in shadow.FIXED), *tolerances):
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
        sizes={shadow.FILTER: sizes, shadow.SCALE: -sizes},
    )
    chosen = {
        rule: np.flatnonzero(watch.step[shadow.RULES.index(rule)]).tolist() for rule in (shadow.FILTER, shadow.SCALE)
    }
    assert chosen[shadow.FILTER] == [1]
    assert len(chosen[shadow.SCALE]) == 1


def test_the_rules_that_are_watched():
    risks = ("derived@0.4", "derived@0.3", "derived@0.2", "derived@0.1", "derived@0.02", "derived@0.005")
    fixed = ("fixed 0.001", "fixed 0.05", "fixed 0.5")
    tolerances = ("tol 0.05", "tol 0.5", "tol 0.9")
    assert list(shadow.RULES) == ["derived", *risks, *fixed, *tolerances, "filter norm", "norm scale", "zero"]


def chosen(watch):
    return {rule: np.flatnonzero(watch.step[k]).tolist() for k, rule in enumerate(shadow.RULES)}


def decide(watch, limits, known, *, safe=(), step=5, tolerance=0.1, sizes=None):
    n = len(limits.keep_prob)
    sizes = {name: np.full(n, np.inf) for name in (shadow.FILTER, shadow.SCALE)} if sizes is None else sizes
    common = dict(tolerance_values=np.full(n, tolerance), sizes=sizes)
    watch.decide(step, step / 10, limits, mask(n, *known), safe=mask(n, *safe), **common)


def test_each_rule_decides_by_its_own_condition():
    # thetas beside the tolerance at each risk; the last two cannot be told to pay, the very last is not known
    common = dict(
        benefit=0.01, pooled=0.01, price=0.1, gain=0.5, decay=0.05, rate_ratio=1.0, noise=0.02, benefit_noise=0.001,
        drift=0.001, step_time=0.01, memory=0.5,
    )  # fmt: skip
    edges = {risk: float(derive(**common, risk=risk).values) for risk in (0.4, 0.3, 0.2, 0.1, 0.02, 0.005)}
    levels = sorted(edges.values())
    assert 0.05 < levels[0] < levels[-1] < 0.5
    theta = np.array([*levels, levels[-1] * 1.0001, 0.0005, 0.0005, 0.5, 0.0004])
    n = len(theta)
    upper = np.where(mask(n, 8), 0.1, 0.01)  # at the price
    found = limits(n, keep_prob=theta, benefit=0.01, benefit_upper=upper, benefit_lower=0.0)
    watch = Shadow(n)
    decide(watch, found, range(n - 1), safe=[0, 7])
    rules = chosen(watch)
    for risk, edge in edges.items():
        below = [s for s in range(n - 1) if theta[s] <= edge and s != 8]
        assert rules[f"derived@{risk:g}"] == below and set(below) >= {0, 7}
    assert len({tuple(rules[f"derived@{risk:g}"]) for risk in edges}) == 6
    assert rules["derived"] == [0, 7] and rules["fixed 0.001"] == rules["fixed 0.05"] == [7, 8]
    assert rules["fixed 0.5"] == list(range(n - 1)) and not rules["zero"]
    assert rules["tol 0.05"] == [7] and rules["tol 0.5"] == rules["tol 0.9"] == [s for s in range(n - 1) if s != 8]
    rows = watch.rows([{"index": s} for s in range(n)])
    for row in rows:
        s = row["index"]
        assert (row["step"], row["time"], row["keep_prob"]) == (5, 0.5, theta[s])
        assert (row["benefit"], row["benefit_upper"], row["price"]) == (0.01, upper[s], 0.1)
        limit = {"derived": 0.1, "fixed 0.001": 0.001, "fixed 0.05": 0.05, "fixed 0.5": 0.5}.get(row["rule"])
        limit = {f"tol {t}": t for t in (0.05, 0.5, 0.9)}.get(row["rule"], limit)
        assert row["tolerance"] == (limit or edges.get(float(row["rule"].rpartition("@")[2] or 0)))
        where = dict(common) | ({"benefit": 0.1, "price": 0.1 - 0.09} if s == 8 else {})
        assert row["escape"] == pytest.approx(float(escape_probability(keep_prob=theta[s], **where)), rel=1e-12)
        assert (row["outcome"], row["outcome_step"], row["outcome_time"]) == ("undecided", "", "")


def test_a_decision_is_the_first_one():
    watch, theta = Shadow(1), [0.01]
    for step in (5, 6):
        decide(watch, found(theta), [0], safe=[0], step=step)
    assert (watch.step[:-3] == np.where(np.array(shadow.RULES[:-3]) == "fixed 0.001", 0, 5)[:, None]).all()


def test_rules_by_size_take_what_is_there_and_count_what_is_new():
    sizes = np.array([4.0, 3.0, 2.0, 1.0, np.inf])
    both = {shadow.FILTER: sizes, shadow.SCALE: np.where(sizes < 3, np.inf, sizes)}
    watch = Shadow(5)
    decide(watch, found([0.01] * 5), range(5), safe=[0], sizes=both)
    assert (chosen(watch)[shadow.FILTER], chosen(watch)[shadow.SCALE]) == ([3], [1])
    decide(watch, found([0.01] * 5), range(5), safe=[0, 1], sizes=both, step=6)  # one more, not two
    assert (chosen(watch)[shadow.FILTER], chosen(watch)[shadow.SCALE]) == ([2, 3], [0, 1])
    decide(watch, found([0.01] * 5), [0, 1, 4], safe=[0, 1, 4], sizes=both, step=7)
    assert chosen(watch)[shadow.FILTER] == [2, 3], "the fifth is no unit"
    few = Shadow(5)
    decide(few, found([0.01] * 5), range(5), safe=[0, 1, 2], sizes=both)
    assert (chosen(few)[shadow.FILTER], chosen(few)[shadow.SCALE]) == ([1, 2, 3], [0, 1])
    unknown = Shadow(5)
    decide(unknown, found([0.01] * 5), [0, 1], safe=[0], sizes=both)
    assert chosen(unknown)[shadow.FILTER] == [1], "of what is known"


def test_nothing_known_decides_nothing_and_needs_no_sizes():
    watch = Shadow(2)
    decide(watch, limits(2, gain=np.inf), [], sizes={})
    assert not watch.step.any()


def test_first_passages_end_what_is_open_once():
    watch = Shadow(4)
    decide(watch, found([0.01] * 4), range(4), safe=range(4))
    watch.passed(6, 0.6, np.array([0.0, 0.0, 1.0, 0.5]), np.array([True, False, True, True]))
    outcomes = [shadow.OUTCOMES[k] for k in watch.outcome[0]]
    assert outcomes == [shadow.CONFIRMED, shadow.OPEN, shadow.REGRET, shadow.OPEN]
    assert chosen(watch)[shadow.ZERO] == [0] and watch.numbers[:, -1, 0][:2].tolist() == [0.6, 0.0]
    assert np.isnan(watch.numbers[2:, -1]).all() and np.isnan(watch.numbers[:, -1, 1:]).all()
    watch.passed(7, 0.7, np.array([0.0, 1.0, 0.0, 1.0]), np.array([True, True, True, False]))
    assert [shadow.OUTCOMES[k] for k in watch.outcome[0]] == [
        shadow.CONFIRMED, shadow.REGRET, shadow.REGRET, shadow.OPEN,
    ]  # fmt: skip
    assert watch.outcome_step[0].tolist() == [6, 7, 6, 0]
    assert watch.outcome_time[0][:3].tolist() == [0.6, 0.7, 0.6] and np.isnan(watch.outcome_time[0, 3])
    assert watch.step[-1].tolist() == [6, 0, 7, 0] and watch.numbers[0, -1, 0] == 0.6
    rows = {row["index"]: row for row in watch.rows([{"index": s} for s in range(4)]) if row["rule"] == "derived"}
    assert (rows[1]["outcome"], rows[1]["outcome_step"], rows[1]["outcome_time"]) == ("regret", 7, 0.7)
    zero = [row for row in watch.rows([{"index": s} for s in range(4)]) if row["rule"] == "zero"]
    assert [(row["index"], row["outcome"], row["time"]) for row in zero] == [
        (0, "confirmed", 0.6),
        (2, "confirmed", 0.7),
    ]


def test_rules_by_size_alone_are_not_waited_for():
    watch = Shadow(3)
    watch.step[shadow.RULES.index(shadow.FILTER), 0] = watch.step[shadow.RULES.index(shadow.SCALE), 1] = 3
    watch.step[shadow.RULES.index("fixed 0.5"), 2] = 1
    assert watch.watching().tolist() == [False, False, True]
    watch.end(shadow.REMOVED_WITH_BLOCK, np.ones(3, dtype=bool), 4, 0.4)
    assert not watch.watching().any() and (watch.outcome > 0).sum() == 3

"""The record of a shadow run: decisions by the rules' definitions, outcomes by first passage."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from made import limits

from catode.decisions import shadow
from catode.decisions.shadow import Shadow


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
        sizes={shadow.FILTER: sizes, shadow.SCALE: -sizes},
    )
    chosen = {
        rule: np.flatnonzero(watch.step[shadow.RULES.index(rule)]).tolist() for rule in (shadow.FILTER, shadow.SCALE)
    }
    assert chosen[shadow.FILTER] == [1]
    assert len(chosen[shadow.SCALE]) == 1

"""One check: which rules apply when, and what a shadow run leaves to the future."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made import limits, mask, network

from catode.decisions import rules, shadow
from catode.decisions.check import Checks, Moment
from catode.decisions.outcomes import Outcomes
from catode.decisions.shadow import Shadow
from catode.structures.fates import (
    COMMITTED,
    KEPT_OUT_OF_TIME,
    PRUNED_TOLERANCE,
    PRUNED_ZERO,
    REMOVED_OUT_OF_TIME,
    REMOVED_WITH_BLOCK,
    UNDECIDED,
)

SMALL = network((8,), (4,))  # layers 0 and 1; units 2 to 9 and 10 to 13
N = SMALL.size
# the units of the first block are useless, everything else is worth ten times its price
USELESS = mask(N, *range(2, 10))
FOUND = limits(
    N,
    keep_prob=np.where(USELESS, 0.01, 1.0),
    benefit=np.where(USELESS, np.linspace(0.001, 0.014, N), 1.0),
    benefit_upper=np.where(USELESS, np.linspace(0.002, 0.015, N), 1.1),
    benefit_lower=np.where(USELESS, 0.0, 0.9),
    noise=1e-3,
)
NOW = Moment(
    fate=np.full(N, UNDECIDED, dtype="<U32"),
    kept=np.ones(N, dtype=bool),
    zero=np.zeros(N, dtype=bool),
    enough=np.ones(N, dtype=bool),
    slope=(np.zeros(N), np.zeros(N)),
    done=60,
    time=1.5,
    step_time=0.025,
    progress=0.4,
    steps_left=90,
    final=False,
    watching=False,
)
CHECKS = Checks(Outcomes(SMALL), risk=0.05)
SIZES = {name: np.where(USELESS, 1.0, np.inf) for name in (shadow.FILTER, shadow.SCALE)}


def numbers(verdict, fate):
    return np.flatnonzero(verdict.outcome.fate == fate).tolist()


def test_a_check_removes_a_quarter_of_a_site_and_reports_what_it_went_by():
    verdict = CHECKS.settle(FOUND, NOW)
    assert numbers(verdict, PRUNED_TOLERANCE) == [2, 3] and len(numbers(verdict, UNDECIDED)) == N - 2
    separatrix, tolerance = rules.tolerances(FOUND, np.ones(N, dtype=bool), risk=0.05)
    assert (verdict.separatrix == separatrix).all() and (verdict.tolerance == tolerance).all()
    assert (FOUND.keep_prob[USELESS] <= tolerance[USELESS]).all() and not verdict.decided.any()


def test_the_last_check_removes_all_that_is_safe():
    verdict = CHECKS.settle(
        replace(FOUND, keep_prob=np.where(mask(N, 9), 1.0, FOUND.keep_prob)), replace(NOW, final=True)
    )
    assert numbers(verdict, PRUNED_TOLERANCE) == [2, 3, 4, 5, 6, 7, 8]
    assert numbers(verdict, KEPT_OUT_OF_TIME) == [0, 1, 9, 10, 11, 12, 13]


def test_rationing_counts_the_units_that_are_left_and_keeps_whole_groups():
    kept = ~mask(N, 5, 6, 7, 8)
    fate = np.where(kept, UNDECIDED, PRUNED_ZERO).astype("<U32")
    assert numbers(CHECKS.settle(FOUND, replace(NOW, kept=kept, fate=fate)), PRUNED_TOLERANCE) == [2]
    groups = Checks(Outcomes(SMALL, round_to=4), risk=0.05)
    assert numbers(groups.settle(FOUND, NOW), PRUNED_TOLERANCE) == [2, 3, 4, 5]


def test_nothing_is_decided_without_evidence_enough():
    enough = ~USELESS & ~mask(N, 1)
    verdict = CHECKS.settle(FOUND, replace(NOW, enough=enough, progress=0.9))
    assert not numbers(verdict, PRUNED_TOLERANCE) and numbers(verdict, COMMITTED) == [0, 10, 11, 12, 13]
    assert np.isnan(verdict.separatrix).tolist() == np.isnan(verdict.tolerance).tolist() == (~enough).tolist()


def test_what_is_decided_is_left_alone():
    fate = np.where(USELESS, COMMITTED, UNDECIDED).astype("<U32")
    verdict = CHECKS.settle(FOUND, replace(NOW, fate=fate))
    assert numbers(verdict, COMMITTED) == np.flatnonzero(USELESS).tolist() and not numbers(verdict, PRUNED_TOLERANCE)
    assert np.isnan(verdict.tolerance[USELESS]).all()
    gone = replace(NOW, fate=fate, zero=USELESS)
    assert not numbers(CHECKS.settle(FOUND, gone), PRUNED_ZERO)


def test_what_reached_zero_goes_as_such_with_or_without_evidence():
    for enough in (True, False):
        now = replace(NOW, zero=mask(N, 3, 4, 5, 6), enough=np.full(N, enough))
        verdict = CHECKS.settle(FOUND, now)
        assert numbers(verdict, PRUNED_ZERO) == [3, 4, 5, 6]
        assert numbers(verdict, PRUNED_TOLERANCE) == ([2, 7] if enough else [])  # a quarter of the site beside them


def test_the_risk_and_a_fixed_tolerance_are_the_runs_own():
    careful = Checks(Outcomes(SMALL), risk=0.01).settle(FOUND, NOW)
    assert (careful.tolerance < CHECKS.settle(FOUND, NOW).tolerance)[USELESS].all()
    for fixed, gone in ((0.0099, []), (0.01, [2, 3])):
        verdict = Checks(Outcomes(SMALL), risk=0.05, tolerance=fixed).settle(FOUND, NOW)
        assert numbers(verdict, PRUNED_TOLERANCE) == gone and (verdict.tolerance == fixed).all()


@pytest.mark.parametrize(
    ("now", "commits", "expected"),
    [
        ({"progress": 0.5}, True, True),
        ({"progress": 0.49}, True, False),
        ({"progress": 0.5}, False, False),
        # the lower limit 0.9 falls below the price 0.1 within 3 of time, at more than 0.7324 a unit of time
        ({"progress": 0.5, "slope": -0.70, "steps_left": 120}, True, True),
        ({"progress": 0.5, "slope": -0.75, "steps_left": 120}, True, False),
        ({"progress": 0.5, "slope": -0.75, "steps_left": 60}, True, True),
        ({"progress": 0.5, "slope": -0.75, "steps_left": 120, "step_time": 0.0125}, True, True),
        ({"progress": 1.0, "slope": -80.0, "steps_left": 0}, True, True),  # one step is left at the end
        ({"progress": 1.0, "slope": -95.0, "steps_left": 0}, True, False),
        ({"progress": 1.0, "slope": -95.0, "steps_left": -40}, True, False),
    ],
)
def test_what_is_certain_to_stay_is_committed(now, commits, expected):
    now = dict(now)
    slope = np.full(N, now.pop("slope", 0.0)), np.zeros(N)
    verdict = replace(CHECKS, commits=commits).settle(FOUND, replace(NOW, slope=slope, **now))
    assert numbers(verdict, COMMITTED) == ([0, 1, 10, 11, 12, 13] if expected else [])
    assert (verdict.outcome.certain == np.isin(np.arange(N), numbers(verdict, COMMITTED))).all()


def test_the_risk_of_a_false_commitment_is_the_runs_own():
    # Page's bound is 90 * exp(-2 * 0.8 / noise^2): at this noise 0.03
    found = replace(FOUND, noise=np.full(N, np.sqrt(1.6 / np.log(90 / 0.03))), gain=np.full(N, 1e-9))
    for risk, expected in ((0.05, True), (0.01, False)):
        verdict = Checks(Outcomes(SMALL), risk=risk).settle(found, replace(NOW, progress=0.6))
        assert bool(numbers(verdict, COMMITTED)) == expected


def test_a_shadow_run_notes_what_it_would_remove_and_removes_nothing():
    record = Shadow(N)
    verdict = CHECKS.settle(FOUND, replace(NOW, zero=mask(N, 4)), record, SIZES)
    assert not numbers(verdict, PRUNED_TOLERANCE) and numbers(verdict, PRUNED_ZERO) == [4]
    expected = USELESS & ~mask(N, 4)
    assert (verdict.decided == expected).all(), "all of them: nothing is rationed where nothing goes"
    rows = {rule: np.flatnonzero(record.step[shadow.RULES.index(rule)]).tolist() for rule in shadow.RULES}
    assert rows[shadow.DERIVED] == rows["fixed 0.05"] == np.flatnonzero(expected).tolist()
    assert record.step.max() == 60 and len(rows[shadow.FILTER]) == 7
    derived = [row for row in record.rows(SMALL.inventory.names()) if row["rule"] == shadow.DERIVED]
    assert [(row["time"], row["tolerance"]) for row in derived] == [
        (1.5, t) for t in verdict.tolerance[expected].tolist()
    ]


@pytest.mark.parametrize("tolerance", shadow.TOLERANCES)
def test_a_fixed_tolerance_is_watched_as_a_run_with_it_decides(tolerance):
    derived, fixed = Shadow(N), Shadow(N)
    found = replace(FOUND, keep_prob=np.resize([0.01, 0.04, 0.3, 0.7, 0.95], N))
    CHECKS.settle(found, replace(NOW, zero=mask(N, 4)), derived, SIZES)
    replace(CHECKS, tolerance=tolerance).settle(found, replace(NOW, zero=mask(N, 4)), fixed, SIZES)
    rule = shadow.RULES.index(f"tol {tolerance:g}")
    own = shadow.RULES.index(shadow.DERIVED)
    assert derived.step[rule].any() and (derived.step[rule] == fixed.step[own]).all()
    assert (fixed.step[rule] == fixed.step[own]).all()


def test_a_shadow_run_notes_nothing_of_what_is_decided_or_has_too_little_evidence():
    record, fate = Shadow(N), np.where(mask(N, 3), COMMITTED, UNDECIDED).astype("<U32")
    CHECKS.settle(FOUND, replace(NOW, fate=fate, enough=~mask(N, 5)), record, SIZES)
    noted = (record.step > 0).any(0)
    assert np.flatnonzero(noted).tolist() == [2, 4, 6, 7, 8, 9]


def test_a_run_without_a_record_watches_nothing():
    verdict = CHECKS.settle(FOUND, replace(NOW, watching=True, final=True))
    assert not verdict.outcome.watched.any()


@pytest.mark.parametrize(("steps_left", "notes"), [(1, True), (0, True), (-1, False)])
def test_a_shadow_run_notes_nothing_beyond_the_deciding_phase(steps_left, notes):
    record = Shadow(N)
    CHECKS.settle(FOUND, replace(NOW, steps_left=steps_left), record, SIZES)
    assert (record.step > 0).any() == notes


def test_without_sizes_a_shadow_run_needs_none_beyond_the_deciding_phase():
    verdict = CHECKS.settle(FOUND, replace(NOW, steps_left=-1), Shadow(N))
    assert (verdict.outcome.fate == UNDECIDED).all()


@pytest.mark.parametrize(("watching", "expected"), [(True, UNDECIDED), (False, REMOVED_OUT_OF_TIME)])
def test_what_is_watched_stays_open_at_the_end(watching, expected):
    verdict = CHECKS.settle(FOUND, replace(NOW, final=True, watching=watching, zero=mask(N, 9)), Shadow(N), SIZES)
    assert set(verdict.outcome.fate[2:9]) == {expected} and verdict.outcome.watched.any() == watching


def test_a_commitment_is_a_regret_of_the_shadow_run_and_a_block_takes_its_units_along():
    record = Shadow(N)
    CHECKS.settle(FOUND, NOW, record, SIZES)
    worth = replace(
        FOUND, **{name: np.where(mask(N, 2), 1.0, getattr(FOUND, name)) for name in ("benefit", "benefit_lower")},
        keep_prob=np.where(mask(N, 2), 1.0, FOUND.keep_prob),
    )  # fmt: skip
    CHECKS.settle(worth, replace(NOW, progress=0.6, done=80, time=2.0), record, SIZES)
    ends = [shadow.OUTCOMES[k] for k in record.outcome[0]]
    assert ends[2] == shadow.REGRET and set(ends[3:]) == {shadow.OPEN}
    assert (record.outcome_step[0, 2], record.outcome_time[0, 2]) == (80, 2.0)
    gone = replace(NOW, zero=mask(N, 0), done=90, time=2.25)
    CHECKS.settle(FOUND, gone, record, SIZES)
    ends = [shadow.OUTCOMES[k] for k in record.outcome[0]]
    assert ends[2] == shadow.REGRET and set(ends[3:10]) == {REMOVED_WITH_BLOCK} and set(ends[10:]) == {shadow.OPEN}
    assert (record.outcome_step[0, 3:10] == 90).all()

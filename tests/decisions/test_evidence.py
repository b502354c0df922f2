"""Pooled evidence: against weighted sums over the whole history, and against simulated series whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from catode.decisions.evidence import LEAST_EVIDENCE, Evidence, Pool

ALL = slice(None)


def weighted(values, window):
    """Weights of a history, the last being 1, its mean, and the unbiased variance of one observation."""
    weights = np.array([(1.0 - 1.0 / window) ** k for k in range(len(values))][::-1])
    if not len(values):
        return weights, 0.0, math.inf
    mean = float(np.average(values, weights=weights))
    count = weights.sum() ** 2 / (weights**2).sum()
    if count <= 1.5:
        return weights, mean, math.inf
    return weights, mean, float(np.average((values - mean) ** 2, weights=weights)) / (1.0 - 1.0 / count)


@st.composite
def histories(draw, most=25):
    """Windows of n quantities, and what was seen of each at every step."""
    n, steps = draw(st.integers(1, 4)), draw(st.integers(0, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    windows = rng.choice([1.0, 2.0, 5.0, 30.0, 1000.0], n)
    return windows, rng.normal(0.3, 1.0, (steps, n)), rng.random((steps, n)) < draw(st.sampled_from([0.3, 0.8, 1.0]))


@settings(max_examples=60)
@given(histories())
def test_law_a_pool_is_the_weighted_history_of_what_was_seen(case):
    windows, values, seen = case
    pool = Pool(len(windows), windows)
    for row, look in zip(values, seen, strict=True):
        pool.add(row, look)
    for i, window in enumerate(windows):
        own = values[seen[:, i], i]
        weights, mean, variance = weighted(own, window)
        count = weights.sum() ** 2 / (weights**2).sum() if len(own) else 0.0
        assert pool.weight[i] == pytest.approx(weights.sum()) and pool.count[i] == pytest.approx(count)
        assert pool.mean[i] == pytest.approx(mean, abs=1e-12)
        assert pool.variance[i] == pytest.approx(variance, rel=1e-9)
        error = math.sqrt(variance / count) if count else math.inf
        assert pool.error[i] == pytest.approx(error, rel=1e-9)


def test_a_pool_by_hand():
    pool = Pool(2, 2.0)  # weights 1, 1/2, 1/4, ...
    for value in (4.0, 2.0, 1.0):
        pool.add(np.array([value, 9.0]), np.array([True, False]))
    assert pool.weight.tolist() == [1.75, 0.0] and pool.weight_squares.tolist() == [1.3125, 0.0]
    assert pool.count.tolist() == [1.75**2 / 1.3125, 0.0] and pool.mean.tolist() == [3.0 / 1.75, 0.0]
    assert np.isinf(pool.variance).tolist() == np.isinf(pool.error).tolist() == [False, True]
    once = Pool(1, 2.0)
    once.add(np.ones(1), np.ones(1, bool))
    assert (once.count[0], once.mean[0], once.variance[0], once.error[0]) == (1.0, 1.0, math.inf, math.inf)


def test_a_variance_is_known_from_the_second_observation_on():
    pool = Pool(1, 100.0)
    known = []
    for value in (1.0, 3.0, 1.0):
        pool.add(np.array([value]), np.ones(1, bool))
        known.append(float(pool.variance[0]))
    assert (
        np.isinf(known[0]) and known[1] == pytest.approx(2.0, rel=1e-3) and known[2] == pytest.approx(4 / 3, rel=0.02)
    )


def test_equal_observations_have_no_variance_though_rounding_may_say_less():
    values = np.random.default_rng(0).random(500)
    pool = Pool(500, 7.0)
    for _ in range(40):
        pool.add(values, np.ones(500, bool))
    assert ((pool.variance >= 0.0) & (pool.variance < 1e-14)).all()


def test_one_and_a_half_observations_are_not_two():
    pool = Pool(2, 7.0)
    pool.weight[:], pool.weight_squares[:] = 1.5, [1.5, 1.499]
    assert pool.count[0] == 1.5 and np.isinf(pool.variance).tolist() == [True, False]


def test_in_the_end_a_pool_weighs_its_window_and_counts_about_twice_that():
    pool = Pool(1, 20.0)
    for _ in range(2000):
        pool.add(np.zeros(1), np.ones(1, bool))
    assert pool.weight[0] == pytest.approx(20.0) and pool.count[0] == pytest.approx(39.0)


def test_variance_and_error_are_those_of_simulated_observations():
    rng, pool = np.random.default_rng(0), Pool(20_000, 6.0)
    for _ in range(40):
        pool.add(1.0 + 3.0 * rng.standard_normal(20_000), np.ones(20_000, bool))
    assert pool.variance.mean() == pytest.approx(9.0, rel=0.02)
    assert (pool.error**2).mean() == pytest.approx(pool.mean.var(), rel=0.04)


def evidence(n, window, *, risk=0.05, curvature_window=1e9, corrected=False):
    return Evidence(np.full(n, float(window)), curvature_window, np.full(n, corrected), risk)


def fill(found, series, elapsed=1.0):
    """Estimates at every `elapsed`; `series` has shape (steps, n)."""
    n = series.shape[1]
    for step, row in enumerate(series, start=1):
        found.add(row, np.ones(n, bool), step * elapsed, np.full(n, elapsed))
    return found


@pytest.mark.parametrize("risk", [0.2, 0.05, 0.01])
def test_z_leaves_the_risk_above_it(risk):
    assert 0.5 * math.erfc(evidence(1, 9.0, risk=risk).z / math.sqrt(2)) == pytest.approx(risk)


@settings(max_examples=60)
@given(histories(), st.sampled_from([0.2, 0.05]), st.booleans())
def test_law_evidence_is_the_weighted_history_of_the_estimates(case, risk, corrected):
    windows, values, seen = case
    n = len(windows)
    found = Evidence(windows, 10.0, np.full(n, corrected), risk)
    curvature = Pool(n, 10.0)
    rng, last, times = np.random.default_rng(len(values)), np.zeros(n), []
    gaps, before, products = [[] for _ in range(n)], np.full(n, np.nan), [[] for _ in range(n)]
    for step, (row, look) in enumerate(zip(values, seen, strict=True)):
        time = 0.5 * step**1.5 + 1.0
        times.append(time)
        found.add(row, look, time, time - last)
        probe = rng.normal(size=n)
        found.curvature.add(probe, np.ones(n, bool))
        curvature.add(probe, np.ones(n, bool))
        for i in np.flatnonzero(look):
            gaps[i].append(time - last[i])
            if not np.isnan(before[i]):
                products[i].append(before[i] * row[i])
        last, before = np.where(look, time, last), np.where(look, row, before)
    z = norm.isf(risk)
    lower, upper = found.limits()
    slope, slope_error = found.slope()
    for i, window in enumerate(windows):
        own, when = values[seen[:, i], i], np.array(times)[seen[:, i]]
        weights, mean, variance = weighted(own, window)
        count = weights.sum() ** 2 / (weights**2).sum() if len(own) else 0.0
        gap = weighted(np.array(gaps[i]), window)[1]
        close = dict(rel=1e-7, abs=1e-7)
        assert found.enough[i] == (count >= 8.0)
        assert found.benefit[i] == pytest.approx(-mean, **close)
        assert found.step_time[i] == pytest.approx(gap, **close)
        assert found.memory()[i] == pytest.approx(weights.sum() * gap, **close)
        assert found.variance()[i] == pytest.approx(variance * (1 + z * math.sqrt(2 / max(count, 1.0))), **close)
        error = math.hypot(
            math.sqrt(variance / count) if count else math.inf, corrected * 0.5 * min(curvature.error[i], 1e99)
        )
        if math.isfinite(error) and len(values) > 1:
            assert (lower[i], upper[i]) == pytest.approx((-mean - z * error, -mean + z * error), **close)
        else:
            assert (lower[i], upper[i]) == (-math.inf, math.inf)
        if len(products[i]) > 1 and math.isfinite(variance):
            w, product, spread = weighted(np.array(products[i]), window)
            if math.isfinite(spread):
                wander = product - mean**2 + z * math.sqrt(spread / (w.sum() ** 2 / (w**2).sum()))
                diffusion = found.benefit_noise()[i] ** 2 * (weights.sum() * gap) / 2.0
                assert diffusion == pytest.approx(max(wander, 0.0), **close)
        slow, slow_mean, slow_variance = weighted(own, 3 * window)
        if len(own) > 1 and math.isfinite(variance + slow_variance):
            span = np.average(when, weights=weights) - np.average(when, weights=slow)
            total = variance / count + slow_variance / (slow.sum() ** 2 / (slow**2).sum())
            assert slope[i] * span == pytest.approx(slow_mean - mean, **close)
            assert (slope_error[i] * span) ** 2 == pytest.approx(total, **close)


def test_nothing_seen_says_nothing():
    found = evidence(2, 10.0, corrected=True)
    assert not found.enough.any() and not found.benefit.any() and not found.memory().any()
    assert [v.tolist() for v in found.limits()] == [[-math.inf] * 2, [math.inf] * 2]
    assert np.isinf(found.variance()).all() and np.isinf(found.benefit_noise()).all()
    assert [v.tolist() for v in found.slope()] == [[0.0] * 2, [math.inf] * 2]


def test_eight_observations_are_enough_to_act_on():
    found = evidence(2, math.inf)
    enough = []
    for step in range(9):
        enough.append(found.enough.tolist())
        found.add(np.ones(2), np.array([True, False]), float(step), np.ones(2))
    assert [first for first, _ in enough] == [False] * 8 + [True] and not any(second for _, second in enough)
    assert LEAST_EVIDENCE == 8.0


@pytest.mark.parametrize("risk", [0.2, 0.05])
def test_the_limits_of_a_benefit_miss_it_as_often_as_stated(risk):
    n = 4000
    series = -0.7 + 2.0 * np.random.default_rng(1).standard_normal((200, n))  # the benefit is +0.7
    lower, upper = fill(evidence(n, 60, risk=risk), series).limits()
    spread = 4 * math.sqrt(risk * (1 - risk) / n)
    assert (upper < 0.7).mean() == pytest.approx(risk, abs=spread)
    assert (lower > 0.7).mean() == pytest.approx(risk, abs=spread)


def test_the_limits_of_corrected_estimates_allow_for_the_curvature_in_them():
    n, rng, curvature = 4000, np.random.default_rng(2), 3.0
    missed = {}
    for corrected in (True, False):
        found = evidence(n, 60, curvature_window=12, corrected=corrected)
        for _ in range(50):
            found.curvature.add(curvature + 4.0 * rng.standard_normal(n), np.ones(n, bool))
        wrong = 0.5 * (found.curvature.mean - curvature)  # enters every estimate alike
        fill(found, -0.7 + wrong + 2.0 * rng.standard_normal((200, n)))
        missed[corrected] = (found.limits()[1] < 0.7).mean()
    assert missed[True] == pytest.approx(0.05, abs=0.02) and missed[False] > 0.2


def test_the_limit_of_the_variance_is_rarely_below_it():
    n = 4000  # a variance's own distribution is skewed, so that the normal quantile misses it a little more often
    found = fill(evidence(n, 60), 1.5 * np.random.default_rng(3).standard_normal((200, n)))
    assert 0.91 < (found.variance() > 2.25).mean() < 0.95
    assert np.median(found.variance()) < 2.25 * 1.5


def walk(diffusion, n=1500, steps=600, elapsed=0.5, noise=0.4):
    """Estimates of benefits that wander from 0.2 on, seen through independent noise."""
    rng = np.random.default_rng(4)
    benefit = 0.2 + diffusion * math.sqrt(elapsed) * rng.standard_normal((steps, n)).cumsum(0)
    return -benefit + noise * rng.standard_normal((steps, n))


def test_the_benefits_own_noise_is_that_of_a_simulated_walk_and_the_limit_lies_above_it():
    series = walk(0.3)
    found = fill(evidence(series.shape[1], 40, risk=0.5 - 1e-9), series, elapsed=0.5)
    assert math.sqrt(np.mean(found.benefit_noise() ** 2)) == pytest.approx(0.3, rel=0.1)
    limit = fill(evidence(series.shape[1], 40), series, elapsed=0.5).benefit_noise()
    assert (limit > 0.3).mean() > 0.6 and (limit > found.benefit_noise()).all()


def test_estimates_without_time_between_them_are_not_divided_by_it():
    with np.errstate(all="raise"):
        found = fill(evidence(1, 10.0), np.array([[1.0], [2.0], [3.0], [2.0]]), elapsed=0.0)
        assert 0.0 < found.benefit_noise()[0] < np.inf and found.slope()[1][0] == np.inf


def test_noise_of_the_draws_is_not_taken_for_noise_of_the_benefit():
    series = walk(0.0)
    found = fill(evidence(series.shape[1], 40, risk=0.5 - 1e-9), series, elapsed=0.5)
    # a walk that explained the draws' whole variance would have 0.4 * sqrt(2 / 20) = 0.126
    assert math.sqrt(np.mean(found.benefit_noise() ** 2)) < 0.05


def test_the_slope_of_a_benefit_that_grows_evenly_is_exact_and_its_error_covers_noise():
    steps, n = 300, 2000
    line = -(0.5 + 0.02 * 0.25 * np.arange(1, steps + 1)[:, None])
    slope, _ = fill(evidence(1, 30), line, elapsed=0.25).slope()
    assert slope[0] == pytest.approx(0.02, rel=1e-9)
    noise = np.random.default_rng(5).standard_normal((steps, n))
    slope, error = fill(evidence(n, 30), line + noise, elapsed=0.25).slope()
    assert slope.mean() == pytest.approx(0.02, abs=4 * slope.std() / math.sqrt(n))
    assert slope.std() < error.mean() < 2.5 * slope.std()  # as if both pools had draws of their own


def test_structures_that_are_not_seen_keep_their_evidence():
    found = fill(evidence(2, 10.0), np.random.default_rng(6).normal(size=(20, 2)))
    before = [
        np.copy(v) for v in (found.benefit, *found.limits(), found.memory(), found.benefit_noise(), *found.slope())
    ]
    found.add(np.array([5.0, np.nan]), np.array([True, False]), 21.0, np.ones(2))
    after = (found.benefit, *found.limits(), found.memory(), found.benefit_noise(), *found.slope())
    for old, new in zip(before, after, strict=True):
        assert old[1] == new[1] and old[0] != new[0]

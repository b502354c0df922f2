"""Pools against direct formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catode.decisions.evidence import Pool

values = st.floats(-100, 100)


@settings(max_examples=80)
@given(st.lists(values, min_size=1, max_size=30), st.floats(1.0, 50.0))
def test_law_pool_agrees_with_the_weighted_formulas(observed, window):
    pool = Pool(1, window)
    for value in observed:
        pool.add(np.array([value]), np.array([True]))
    x = np.array(observed)
    w = (1 - 1 / window) ** np.arange(len(x))[::-1]
    w[-1] = 1.0
    mean, count = w @ x / w.sum(), w.sum() ** 2 / (w @ w)
    assert pool.mean[0] == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert pool.count[0] == pytest.approx(count, rel=1e-9)
    assert count <= len(x) + 1e-9 and pool.count[0] <= 2 * window - 1 + 1e-9
    if count > 1.5:
        unbiased = w @ (x - mean) ** 2 / w.sum() * count / (count - 1)
        assert pool.variance[0] == pytest.approx(unbiased, rel=1e-6, abs=1e-6)
        assert pool.error[0] == pytest.approx(math.sqrt(pool.variance[0] / count))
    else:
        assert pool.variance[0] == pool.error[0] == math.inf


def test_a_pool_without_forgetting_is_the_sample():
    pool, x = Pool(1, 1e12), np.random.default_rng(0).normal(3, 2, 200)
    for value in x:
        pool.add(np.array([value]), np.array([True]))
    assert pool.count[0] == pytest.approx(200)
    assert pool.mean[0] == pytest.approx(x.mean())
    assert pool.variance[0] == pytest.approx(x.var(ddof=1), rel=1e-6)


def test_nothing_seen_is_nothing_known():
    pool = Pool(2, 10.0)
    pool.add(np.array([5.0, np.nan]), np.array([True, False]))
    assert pool.count.tolist() == [1, 0] and pool.mean.tolist() == [5, 0]
    assert np.isinf(pool.variance).all() and np.isinf(pool.error).all()


@settings(max_examples=40)
@given(st.lists(st.tuples(values, values, st.booleans(), st.booleans()), max_size=25))
def test_law_quantities_are_pooled_independently(rows):
    both, single = Pool(2, np.array([5.0, 9.0])), (Pool(1, 5.0), Pool(1, 9.0))
    for a, b, seen_a, seen_b in rows:
        both.add(np.array([a, b]), np.array([seen_a, seen_b]))
        for pool, value, seen in zip(single, (a, b), (seen_a, seen_b), strict=True):
            pool.add(np.array([value]), np.array([seen]))
    for name in ("count", "mean", "variance", "error"):
        alone = np.concatenate([getattr(p, name) for p in single])
        np.testing.assert_allclose(getattr(both, name), alone, rtol=1e-12)


@pytest.mark.parametrize("window", [2.0, 7.5, 100.0])
def test_the_effective_count_saturates_at_twice_the_window(window):
    pool = Pool(1, window)
    for _ in range(int(30 * window)):
        pool.add(np.ones(1), np.array([True]))
    assert pool.count[0] == pytest.approx(2 * window - 1)
    assert pool.mean[0] == pytest.approx(1.0) and pool.variance[0] == pytest.approx(0.0, abs=1e-9)


def test_a_pool_follows_what_changes():
    pool = Pool(1, 10.0)
    for value in [0.0] * 200 + [1.0] * 50:
        pool.add(np.array([value]), np.array([True]))
    assert pool.mean[0] == pytest.approx(1 - 0.9**50)

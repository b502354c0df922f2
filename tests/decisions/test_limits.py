"""What a decision knows of each structure, against raw series whose truth is known."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import MEASURED, limits

from catode.decisions.evidence import Evidence
from catode.decisions.growth import GrowthPools
from catode.decisions.limits import QUANTITIES, Limits, measure
from catode.theory.tolerance import derive

CENTRE = 0.5 - 1e-9  # at this risk limits are the estimates themselves


def pools(
    estimates, gains, pulls, *, gains_below=None, window=60.0, elapsed=0.5, risk=0.05, law=0.0, weight_decay=0.03
):
    """Evidence and pools filled with series of shape (steps, n)."""
    n = estimates.shape[1]
    everything = np.ones(n, bool)
    evidence = Evidence(np.full(n, window), 10.0, np.zeros(n, bool), risk)
    growth = GrowthPools(n, window, law, moving=False)
    series = estimates, gains, gains if gains_below is None else gains_below, pulls
    for step, (estimate, norm, below, pull) in enumerate(zip(*series, strict=True), start=1):
        evidence.add(estimate, everything, step * elapsed, np.full(n, elapsed))
        growth.gain.add(norm, everything)
        growth.gain_below.add(below, everything)
        growth.pull.add(weight_decay * pull, everything)
    return evidence, growth


def measured(estimates, gains, pulls, *, keep_prob=0.5, price=0.1, rate_ratio=2.0, **how) -> Limits:
    n = estimates.shape[1]
    full = {"keep_prob": keep_prob, "price": price, "rate_ratio": rate_ratio}
    return measure(
        *pools(estimates, gains, pulls, **how),
        **{name: np.full(n, value) for name, value in full.items()},
    )


def noisy(truth, sd, n=3000, steps=200, seed=0):
    return truth + sd * np.random.default_rng(seed).standard_normal((steps, n))


def constant(value, n=1, steps=200):
    return np.full((steps, n), float(value))


def test_what_is_given_and_what_the_evidence_says_goes_through():
    estimates = noisy(-0.3, 1.0, n=4)
    found = measured(estimates, noisy(2.0, 1.0, n=4, seed=1), noisy(-1.0, 1.0, n=4, seed=2))
    evidence = pools(estimates, estimates, estimates)[0]
    lower, upper = evidence.limits()
    assert (found.keep_prob == 0.5).all() and (found.price == 0.1).all() and (found.rate_ratio == 2.0).all()
    assert (found.benefit == evidence.benefit).all() and found.benefit == pytest.approx(0.5 * (lower + upper))
    assert (found.benefit_lower == lower).all() and (found.benefit_upper == upper).all()
    assert (found.benefit_lower < found.benefit).all() and (found.benefit < found.benefit_upper).all()
    assert found.step_time == pytest.approx(0.5) and found.memory == pytest.approx(0.5 * 60.0, rel=0.05)
    assert (found.benefit_noise == evidence.benefit_noise()).all()
    assert found.known.all()


def test_the_gain_is_an_upper_limit_that_misses_as_often_as_stated():
    found = measured(constant(0.0, 3000), noisy(2.0, 3.0), constant(0.0, 3000))
    assert (found.gain < 2.0).mean() == pytest.approx(0.05, abs=0.02)
    assert measured(constant(0.0), constant(2.0), constant(0.0)).gain == pytest.approx([2.0])


def test_a_gain_that_was_measured_below_zero_counts_as_zero_plus_its_margin():
    sd, n = 3.0, 3000
    found = measured(constant(0.0, n), noisy(-50.0, sd), constant(0.0, n))
    margin = 1.645 * sd / math.sqrt(2 * 60)  # of a mean over twice the window
    assert (found.gain > 0.0).all() and found.gain.mean() == pytest.approx(margin, rel=0.05)


@pytest.mark.parametrize(("keep_prob", "expected"), [(0.0, 0.04), (0.5, 0.03), (1.0, 0.02)])
def test_drift_is_the_growth_that_the_own_gain_does_not_explain(keep_prob, expected):
    line = -0.04 * 0.5 * np.arange(1, 201)[:, None]  # the benefit grows by 0.04 in a unit of time
    found = measured(line, constant(0.02), constant(0.0), keep_prob=keep_prob, risk=CENTRE)
    assert found.drift == pytest.approx([expected], rel=1e-6)


def test_drift_is_never_negative_and_a_negative_gain_explains_nothing():
    line = 0.04 * 0.5 * np.arange(1, 201)[:, None]
    assert measured(line, constant(0.02), constant(0.0), risk=CENTRE).drift == [0.0]
    assert measured(-line, constant(-0.02), constant(0.0), risk=CENTRE).drift == pytest.approx([0.04], rel=1e-6)


def test_drift_is_an_upper_limit_from_the_lower_limit_of_the_gain():
    n, steps = 3000, 200
    line = -0.04 * 0.5 * np.arange(1, steps + 1)[:, None]
    # the slow pool shares its draws with the fast one, so that the stated error of the slope is too large
    found = measured(line + noisy(0.0, 0.3), noisy(0.02, 0.01, seed=1), constant(0.0, n), keep_prob=1.0)
    assert (found.drift < 0.02).mean() < 0.05
    sure = measured(line + noisy(0.0, 0.3), constant(0.02, n), constant(0.0, n), keep_prob=1.0)
    assert (found.drift > sure.drift).mean() > 0.9, "a gain in doubt explains less"
    # without noise in the benefit, only the doubt about the gain is left
    doubt = found.drift - sure.drift
    assert doubt[found.drift > 0].mean() == pytest.approx(1.645 * 0.01 / math.sqrt(2 * 60), rel=0.2)


def test_a_gain_seen_once_explains_nothing_of_a_growth():
    evidence, _ = pools(-0.02 * np.arange(1, 201)[:, None], constant(1.0), constant(0.0))
    once = GrowthPools(1, 60.0, moving=False)
    for pool in (once.gain, once.gain_below):
        pool.add(np.ones(1), np.ones(1, bool))
    found = measure(evidence, once, keep_prob=np.ones(1), price=np.full(1, 0.1), rate_ratio=np.ones(1))
    assert np.isinf(found.gain).all() and 0.04 < found.drift[0] < np.inf and not found.known.any()


def test_a_gain_between_two_bounds_counts_from_above_and_explains_from_below():
    line = -0.02 * np.arange(1, 201)[:, None]  # a benefit that grows by 0.04 nats a time
    given = dict(keep_prob=1.0, gains_below=constant(0.01))
    found = measured(line, constant(0.03), constant(0.0), **given)
    same = measured(line, constant(0.01), constant(0.0), keep_prob=1.0)
    assert found.gain == pytest.approx(0.03) and same.gain == pytest.approx(0.01)
    assert found.drift == same.drift and found.drift[0] > 0.02


def test_decay_is_what_weight_decay_takes_from_the_benefit():
    # weights against gradients of -0.4 nats: weight decay of 0.03 takes 0.012 nats a time, of a benefit of 0.8 or a price
    found = measured(constant(-0.8), constant(0.0), constant(-0.4))
    assert found.decay * 0.8 == pytest.approx(0.012)
    found = measured(constant(-0.8), constant(0.0), constant(-0.4), price=1.5)
    assert found.decay * 1.5 == pytest.approx(0.012)
    assert measured(constant(-0.8), constant(0.0), constant(0.4)).decay == [0.0]


def test_decay_is_a_lower_limit():
    n, truth = 3000, 0.03 * 0.4 / 0.8
    assert (measured(noisy(-0.8, 0.1), constant(0.0, n), noisy(-0.4, 1.0, seed=1)).decay > truth).mean() < 0.05
    # with the benefit known exactly, the doubt is that of the weights' products alone
    found = measured(constant(-0.8, n), constant(0.0, n), noisy(-0.4, 1.0, seed=1))
    assert (found.decay > truth).mean() == pytest.approx(0.05, abs=0.02)
    # with the products known, that of the benefit
    found = measured(noisy(-0.8, 0.5, seed=2), constant(0.0, n), constant(-0.4, n), price=1e-3, keep_prob=0.0)
    sure = 0.03 * 0.4 / found.benefit_upper
    assert np.isin(found.decay, [0.0]).mean() + np.isclose(found.decay, sure, rtol=1e-12).mean() == pytest.approx(1.0)


@pytest.mark.parametrize(("slope", "expected"), [(0.0119, True), (0.0121, False)])
def test_a_decay_that_the_drift_outweighs_counts_as_none(slope, expected):
    # decay * price is 0.012 here because the benefit's upper limit stays below the price
    line = -slope * 0.5 * np.arange(1, 201)[:, None]
    found = measured(line, constant(0.0), constant(-0.4), price=10.0, risk=CENTRE)
    assert (found.decay > 0.0).all() == expected and found.drift == pytest.approx([slope], rel=1e-6)
    if expected:
        assert found.decay == pytest.approx([0.0012])


@pytest.mark.parametrize(("growth", "expected"), [(0.2499, 0.25), (0.25, 0.0)])
def test_a_drift_as_large_as_the_decay_counts(growth, expected):
    one = np.ones(1)
    known = SimpleNamespace(
        z=1.0, limits=lambda: (0.0 * one, 0.5 * one), slope=lambda: (growth * one, 0.0 * one), benefit=0.25 * one,
        step_time=one, variance=lambda: one, benefit_noise=lambda: one, memory=lambda: one,
    )  # fmt: skip
    filled = GrowthPools(1, 8.0, moving=False)
    for _ in range(3):
        filled.gain.add(0.0 * one, np.ones(1, bool))
        filled.gain_below.add(0.0 * one, np.ones(1, bool))
        filled.pull.add(-0.25 * one, np.ones(1, bool))
    found = measure(known, filled, keep_prob=one, price=one, rate_ratio=one)
    assert found.drift == [growth] and found.decay == [expected]


def test_noise_is_how_thetas_spread_that_move_by_such_draws():
    rho, tau, sd, steps, n = 2.0, 0.5, 0.7, 400, 2000
    draws = noisy(0.0, sd, n, steps)
    spread = (rho * tau * draws.sum(0)).std() / math.sqrt(steps * tau)
    found = measured(draws, constant(0.0, n, steps), constant(0.0, n, steps), rate_ratio=rho, risk=CENTRE)
    assert math.sqrt(np.mean(found.noise**2)) == pytest.approx(spread, rel=0.05)
    limit = measured(draws, constant(0.0, n, steps), constant(0.0, n, steps), rate_ratio=rho)
    assert (limit.noise > spread).mean() > 0.9


SERIES = [noisy(-0.3, 1.0, n=40), noisy(2.0, 1.0, n=40, seed=1), noisy(-1.0, 1.0, n=40, seed=2)]


@settings(max_examples=10)
@given(st.floats(0.001, 0.4), st.floats(0.001, 0.4))
def test_law_less_risk_makes_every_limit_wider(one, other):
    low, high = sorted((one, other))
    careful, bold = (measured(*SERIES, risk=risk) for risk in (low, high))
    for name in ("benefit_upper", "gain", "noise", "benefit_noise", "drift"):
        assert (getattr(careful, name) >= getattr(bold, name)).all(), name
    for name in ("benefit_lower", "decay"):
        assert (getattr(careful, name) <= getattr(bold, name)).all(), name
    for name in ("keep_prob", "benefit", "price", "rate_ratio", "step_time", "memory"):
        assert (getattr(careful, name) == getattr(bold, name)).all(), name


def test_of_structures_never_seen_nothing_is_known_and_nothing_is_nan():
    nothing = np.zeros((0, 3))
    found = measured(nothing, nothing, nothing)
    assert not found.known.any() and not any(np.isnan(values).any() for values in found.columns().values())
    assert np.isinf(found.noise).all() and np.isinf(found.gain).all() and not found.decay.any()


def test_columns_are_all_quantities_by_name():
    found = limits(2, gain=[0.25, 0.75])
    assert tuple(found.columns()) == QUANTITIES == tuple(MEASURED)
    assert all(found.columns()[name] is getattr(found, name) for name in QUANTITIES)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", QUANTITIES)
def test_known_is_what_has_every_number(name, bad):
    found = limits(3)
    assert found.known.all()
    assert replace(found, **{name: np.array([0.5, bad, 0.5])}).known.tolist() == [True, False, True]


def test_arguments_of_the_tolerance_are_those_of_the_structures_asked_for():
    values = {name: np.array([1.0, 2.0, 3.0]) + 10.0 * k for k, name in enumerate(MEASURED)}
    found = limits(3, **values | {"benefit_upper": np.array([11.5, 12.5, 99.0]), "price": np.array([5.0, 0.25, 9.0])})
    known = found.tolerance_arguments(np.array([True, True, False]))
    upper, margin = np.array([11.5, 12.5]), np.array([0.5, 0.5])
    assert (known.pop("benefit") == upper).all() and (known.pop("pooled") == upper - margin).all()
    assert known.pop("price") == pytest.approx([4.5, 1e-12])  # theta rests where the pool is the price less the margin
    assert sorted(known) == sorted(
        ["gain", "decay", "rate_ratio", "noise", "benefit_noise", "drift", "step_time", "memory"]
    )
    assert all((known[name] == values[name][:2]).all() for name in known)


def grown(products=(), displaced=(), share=(), **how):
    """Pools of one structure filled with series."""
    growth, one = GrowthPools(1, 1e6, moving=False, **how), np.ones(1, bool)
    for pools, series in (
        ((growth.gain, growth.gain_below), products),
        ((growth.displaced,), displaced),
        ((growth.share,), share),
    ):
        for value in series:
            for pool in pools:
                pool.add(np.array([value]), one)
    return growth


def test_the_gain_is_the_larger_of_products_and_displacement():
    products, displaced, share = [1.0, 2.0] * 10, [0.5, 1.5] * 10, [0.25] * 20
    alone, both = grown(products), grown(products, displaced, share)
    error = 0.5 * math.sqrt(20 / 19) / math.sqrt(20)
    assert alone.upper(2.0) == pytest.approx(1.5 + 2.0 * error, rel=1e-3)
    assert both.upper(2.0) == pytest.approx((1.0 + 2.0 * error) / 0.25, rel=1e-3), "sums are divided by sums"
    assert grown(products, [0.1] * 20, share).upper(2.0) == alone.upper(2.0)
    assert grown(products, displaced[:4], share[:4]).upper(2.0) == alone.upper(2.0), "too few to count"
    assert both.lower(0.0) == pytest.approx(1.5)


def test_without_products_the_displacement_alone_counts_and_explains_nothing():
    assert np.isinf(grown([], [1.0] * 4, [0.5] * 4, products_known=False).upper(1.0))
    found = grown([], [1.0] * 20, [0.5] * 20, products_known=False)
    assert found.upper(1.0) == pytest.approx(2.0) and found.lower(1.0) == 0.0
    assert found.count == pytest.approx(20, rel=1e-3)


@pytest.mark.parametrize(("law", "least"), [(0.0, 1.0), (0.25, 0.5), (1.0, 0.0)])
def test_law_the_tangent_bounds_every_power_of_theta_that_it_stands_for(law, least):
    """``theta^p theta_0^(1-p) <= theta + law theta_0`` for every p from `least` to 1, and no smaller law does."""
    theta = np.geomspace(1e-12, 1.0, 2001)
    for first in (1e-3, 0.1, 1.0):
        for power in np.linspace(least, 1.0, 21):
            assert (theta**power * first ** (1.0 - power) <= theta + law * first + 1e-15).all()
        excess = (theta**least * first ** (1.0 - least) - theta).max() / first
        assert excess == pytest.approx(law, abs=1e-3) or first == 1e-3


def test_law_four_fifths_of_the_linear_tolerance_are_left_to_an_optimizer_that_scales():
    """a = 0 without noise: theta_0 is safe up to .8 of the tolerance, .806 with the tangent at theta_0 / 3."""
    common = dict(
        benefit=0.02, price=0.1, gain=0.5, decay=0.0, rate_ratio=0.01, noise=0.0, benefit_noise=0.0, step_time=0.0
    )
    linear = float(derive(**common, drift=0.0))
    for share, slope, tangent in ((0.8, 1.0, 0.25), (0.806, 0.75**0.5, 0.5 / 3**0.5)):
        for theta, safe in ((share * linear * 0.999, True), (share * linear * 1.002, False)):
            given = common | {"gain": slope * 0.5, "drift": tangent * 0.5 * theta}
            assert (theta <= float(derive(**given))) == safe


def test_an_optimizer_that_scales_adds_its_tangent_to_the_drift():
    given = dict(keep_prob=0.4, risk=CENTRE)
    plain = measured(constant(0.0), constant(2.0), constant(0.0), **given)
    scaled = measured(constant(0.0), constant(2.0), constant(0.0), law=0.25, **given)
    assert scaled.gain == plain.gain and scaled.drift == pytest.approx(plain.drift + 0.25 * 2.0 * 0.4)


def test_pools_are_cleared_where_weights_begin_to_learn():
    growth, both = GrowthPools(2, 10.0, moving=False), np.ones(2, bool)
    for _ in range(20):
        growth.gain.add(np.array([1.0, 2.0]), both)
        growth.gain_below.add(np.array([1.0, 2.0]), both)
    growth.clear(np.array([True, False]))
    assert growth.count.tolist() == [0.0, growth.count[1]] and growth.count[1] > 8.0
    assert np.isinf(growth.upper(1.0)).tolist() == [True, False] and growth.lower(1.0).tolist() == [0.0, 2.0]


def test_products_of_weights_that_move_count_with_the_answer_or_not_at_all():
    """A product of 1 whose second gradient has answered 3 per unit of time over 0.5: 2.5 at the same weights."""
    growth, one = GrowthPools(1, 1e6), np.ones(1, bool)
    for k in range(40):
        sign = (-1.0) ** k
        growth.gain.add(np.array([1.0 + 0.2 * sign]), one)
        growth.gain_below.add(np.array([1.0 + 0.2 * sign]), one)
        growth.reach.add(np.array([0.5]), one)
        if k == 20:
            assert np.isinf(growth.by_products(1.0)).all() and growth.count == [0.0]
        if k >= 30:
            growth.answer.add(np.array([3.0 + 0.4 * sign]), one)
    assert growth.by_products(0.0) == pytest.approx(2.5) and growth.lower(0.0) == pytest.approx(1.0)
    error = math.hypot(0.2 / math.sqrt(39.0), 0.5 * 0.4 / math.sqrt(9.0))
    assert growth.by_products(2.0) == pytest.approx(2.5 + 2.0 * error) and growth.count == pytest.approx(20.0)
    growth.clear(one)
    assert np.isinf(growth.by_products(1.0)).all()

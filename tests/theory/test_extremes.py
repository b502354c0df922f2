"""The tolerance at the ends of the range of floats, held against 60-digit arithmetic, and where drift equals the decay."""

from __future__ import annotations

import warnings

import mpmath
import numpy as np
import pytest

from catode.theory import BenefitSystem, LayerSystem, UnitSystem, commit_alarm, derive, escape_probability
from catode.theory.systems.planar import growth_rate

BASE = {
    "benefit": 0.0,
    "price": 0.1,
    "gain": 0.5,
    "decay": 0.05,
    "rate_ratio": 1.0,
    "noise": 0.01,
    "benefit_noise": 0.0,
    "drift": 0.0,
    "step_time": 0.01,
}


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def exact(memory=0.0, **given):
    """Separatrix, spread and mu of docs/mathematics.md sections 4.3 and 5, with 60 digits and no limits of range."""
    with mpmath.workdps(60):
        g, q, a, rho, sigma, noisy, delta, tau = (
            mpmath.mpf(given[name])
            for name in ("price", "gain", "decay", "rate_ratio", "noise", "benefit_noise", "drift", "step_time")
        )
        t = mpmath.mpf(memory)
        mu = 2 * rho * q / (a + mpmath.sqrt(a * a + 4 * rho * q))
        for _ in range(400 if memory else 0):
            value = mu * (mu + a) * (1 + t * mu) - rho * q
            mu -= value / ((2 * mu + a) * (1 + t * mu) + t * mu * (mu + a))
        b = max(mpmath.mpf(given["benefit"]), 0)
        separatrix = (mu * (g - b) + (mu + a) * t * mu * (g - b) + a * g - delta) / q
        spread = (sigma / (1 + t * mu) + mu * noisy / q) / mpmath.sqrt(mu * (2 + tau * mu))
        return separatrix, spread, mu


SMALL = [
    {"gain": 1e-200, "rate_ratio": 1e-200},
    {"gain": 1e-200, "rate_ratio": 1e-200, "decay": 0.0, "noise": 1e-200},
    {"gain": 1e-200, "rate_ratio": 1e-200, "decay": 0.0, "noise": 1e-110, "benefit_noise": 1e-110},
    {"gain": 1e-300, "rate_ratio": 1e-12, "decay": 0.0, "noise": 1e-160},
    {"gain": 1e200, "rate_ratio": 1e200, "noise": 1e99},
    {"gain": 1e170, "rate_ratio": 1e180, "decay": 1e200, "noise": 1e-3, "step_time": 0.0},
    {"gain": 1e-200, "rate_ratio": 1e-200, "decay": 0.0, "noise": 1e-200, "memory": 3e199},
    {"gain": 1e-310, "rate_ratio": 1e-310},
]


@pytest.mark.parametrize("change", SMALL)
def test_no_size_of_gain_and_rate_ratio_is_lost_to_the_range_of_floats(change):
    given = {**BASE, **change}
    separatrix, spread, _ = exact(**given)
    with mpmath.workdps(30):
        value = separatrix - mpmath.mpf("1.6448536269514722") * spread
        right = float(min(value, 1))
        risk = float(mpmath.ncdf(max(min(-(separatrix - mpmath.mpf("0.03")) / spread, 40), -40)))
    loose = 1e-4 if change["gain"] < 1e-307 else 1e-12  # a gain below 2.2e-308 has few digits left
    tolerance = derive(**given)
    assert float(tolerance) == pytest.approx(right, rel=loose)
    assert float(tolerance.separatrix) == pytest.approx(float(separatrix), rel=loose)
    assert float(escape_probability(keep_prob=0.03, **given)) == pytest.approx(risk, rel=1e-3, abs=1e-300)
    assert tolerance.reason()


def test_ordinary_and_extreme_structures_share_one_call_bit_by_bit():
    gains, rates = np.array([0.5, 1e-200, 0.3]), np.array([1.0, 1e-200, 2.0])
    together = derive(**{**BASE, "gain": gains, "rate_ratio": rates})
    for i in range(3):
        alone = derive(**{**BASE, "gain": gains[i], "rate_ratio": rates[i]})
        assert float(alone) == together.values[i]


def test_growth_rates_of_the_systems_at_both_ends():
    assert float(growth_rate(0.0, 1e-200, 1e-200)) == pytest.approx(1e-200, rel=1e-14)
    assert float(growth_rate(0.0, 1e-200, 1e-200, 1e200)) == pytest.approx(
        float(mpmath.findroot(lambda m: m * m * (1 + m) - 1, 0.7)) * 1e-200, rel=1e-14
    )
    layer = LayerSystem(price=0.1, weight_decay=0.0, rate_ratio=1e200, grad_bound=1e160, benefit_slope=1e40)
    assert layer.growth_rate == pytest.approx(1e200, rel=1e-12)
    unit = UnitSystem(price=1e-200, weight_decay=0.1, rate_ratio=2e-200, benefit_slope=1.0)
    assert unit.growth_rate == pytest.approx(2e-200, rel=1e-12)


@pytest.mark.parametrize(("drift", "decay", "price"), [(0.005, 0.05, 0.1), (0.03, 0.1, 0.3), (0.06, 0.2, 0.3)])
def test_a_drift_of_exactly_decay_times_price_leaves_nothing_safe(drift, decay, price):
    given = {**BASE, "drift": drift, "decay": decay, "price": price, "noise": 0.0}
    tolerance = derive(**given)
    assert float(tolerance) == -np.inf
    assert tolerance.reason().startswith("Not safe: the drift")
    assert float(escape_probability(keep_prob=0.0, **given)) == 1.0
    assert BenefitSystem(price=price, gain=0.5, rate_ratio=1.0, decay=decay, drift=drift).empty
    less = {**given, "drift": drift * (1 - 1e-12)}
    assert float(derive(**less)) > 0.0
    assert not BenefitSystem(price=price, gain=0.5, rate_ratio=1.0, decay=decay, drift=less["drift"]).empty


def test_without_drift_a_product_that_underflows_is_not_reached():
    given = {**BASE, "price": 1e-200, "decay": 1e-200, "noise": 0.0, "gain": 1e-3}
    assert float(derive(**given)) == pytest.approx(float(exact(**given)[0]), rel=1e-12)


def test_a_drift_that_equals_the_growth_leaves_no_tolerance_without_decay():
    """Without decay the separatrix at benefit 0 is (mu g - delta) / q: 0 where the drift is mu g, rounding included."""
    given = {**BASE, "gain": 0.01, "decay": 0.0, "drift": 0.03, "price": 0.3, "noise": 0.0}  # mu = 0.1
    assert float(derive(**given)) <= 0.0


def test_the_alarm_does_not_lose_small_numbers():
    given = {"benefit": 1e-100, "price": 5e-101, "step_time": 0.01, "steps_left": 100.0}
    alarm = commit_alarm(rate_ratio=1e-300, noise=1e-200, **given)  # exponent -1, 100 steps left
    assert float(alarm) == 1.0
    few = commit_alarm(rate_ratio=2e-300, noise=1e-200, **{**given, "steps_left": 1.0})  # exponent -2
    assert float(few) == pytest.approx(np.exp(-2.0), rel=1e-12)

"""The stochastic iterates: closed forms, their order, their ODE limit, and noise of other shapes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from catode.theory import BenefitSystem, UnitSystem
from catode.theory.flow.stochastic import NORMAL, Noise, iterate, ode_error, skewed, student_t
from catode.theory.systems.box import BoxSystem

SYSTEM = BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0, decay=0.05)
STEP = {"step_time": 0.01, "noise": 0.1}
UNCOUPLED = BenefitSystem(price=0.1, gain=1e-12, rate_ratio=1.0)
NOISES = [NORMAL, student_t(5.0), skewed(0.2), skewed(0.2, -1)]


def numbers(low, high):
    return st.floats(low, high, allow_nan=False)


def replicas(state, n):
    return np.tile(state, (n, 1))


# The iterates


def test_without_noise_the_iterates_are_powers_of_a_matrix():
    tau, steps = 0.05, 40
    run = iterate(SYSTEM, [[0.2, 0.3], [0.15, 0.2]], step_time=tau, steps=steps, every=8)
    saddle = np.array(SYSTEM.saddle)
    power = np.linalg.matrix_power(np.eye(2) + tau * SYSTEM.jacobian(saddle), 8)
    assert np.allclose(run.times, 0.4 * np.arange(6))
    for before, after in zip(run.states[:-1], run.states[1:], strict=True):
        assert np.allclose(after - saddle, (before - saddle) @ power.T, rtol=1e-12)
    assert run.status == "complete"
    assert "0 of 2 replicas were absorbed" in run.message


def test_one_step_moves_theta_by_tau_rho_times_the_deviation_of_the_estimate():
    tau, rho, deviation, n = 0.04, 3.0, 0.2, 40_000
    system = BenefitSystem(price=0.1, gain=0.5, rate_ratio=rho)
    run = iterate(system, replicas([0.1, 0.5], n), step_time=tau, steps=1, noise=np.sqrt(tau) * rho * deviation)
    assert np.std(run.end[:, 1]) == pytest.approx(tau * rho * deviation, rel=4.0 / np.sqrt(2.0 * n))


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.name)
@pytest.mark.parametrize("correlation", [-0.5, 0.0, 1.0])
def test_mean_and_covariance_are_those_of_the_linear_recursion(noise, correlation):
    tau, steps, n, scale = 0.05, 30, 12_000, np.array([0.01, 0.03])
    start = np.array([0.2, 0.4])
    run = iterate(
        SYSTEM, replicas(start, n), step_time=tau, steps=steps, noise=scale[1], benefit_noise=scale[0],
        correlation=correlation, distribution=noise,
    )  # fmt: skip
    step = np.eye(2) + tau * SYSTEM.jacobian(start)
    kick = tau * np.outer(scale, scale) * np.array([[1.0, correlation], [correlation, 1.0]])
    mean, covariance = start - SYSTEM.saddle, np.zeros((2, 2))
    for _ in range(steps):
        mean, covariance = step @ mean, step @ covariance @ step.T + kick
    error = np.sqrt(np.diag(covariance) / n)
    assert np.all(np.abs(run.end.mean(axis=0) - SYSTEM.saddle - mean) <= 4.0 * error)
    size = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert np.all(np.abs(np.cov(run.end.T) - covariance) <= 0.06 * size)


def test_absorption_has_the_law_of_first_passage():
    start, sigma, speed, tau, n = 0.3, 0.15, 0.1, 0.01, 8000
    run = iterate(UNCOUPLED, replicas([0.0, start], n), step_time=tau, steps=600, noise=sigma, every=600)
    x = start + 0.5826 * sigma * np.sqrt(tau)  # Siegmund's correction for looking at whole steps only
    for time in (1.5, 3.0, 6.0):
        spread = sigma * np.sqrt(time)
        exact = norm.cdf((speed * time - x) / spread)
        exact += np.exp(2.0 * speed * x / sigma**2) * norm.cdf(-(x + speed * time) / spread)
        assert np.mean(run.absorbed_at <= time + 1e-9) == pytest.approx(exact, abs=4.0 * np.sqrt(0.25 / n))


def test_a_reflecting_theta_settles_at_variance_over_twice_the_speed():
    sigma, speed, tau, n = 0.1, 0.1, 0.01, 1500
    run = iterate(
        UNCOUPLED, replicas([0.0, 0.05], n), step_time=tau, steps=3000, noise=sigma, absorbing=False, every=300
    )
    mean = sigma**2 / (2.0 * speed) - 0.5826 * sigma * np.sqrt(tau)
    assert run.states[4:, :, 1].mean() == pytest.approx(mean, rel=0.04)
    assert np.all(np.isinf(run.absorbed_at))


def test_an_absorbed_replica_stays_as_it_is_and_the_seed_decides_all():
    options = {"step_time": 0.01, "steps": 300, "noise": 0.1, "benefit_noise": 0.02, "every": 50}
    run = iterate(SYSTEM, replicas([0.0, 0.05], 200), **options)
    for time, states in zip(run.times, run.states, strict=True):
        gone = run.absorbed_at <= time
        assert np.array_equal(states[gone], run.end[gone])
        assert np.array_equal(states[:, 1] == 0.0, gone)
    assert 0 < np.isinf(run.absorbed_at).sum() < 200
    assert np.array_equal(iterate(SYSTEM, replicas([0.0, 0.05], 200), **options).states, run.states)
    other = iterate(SYSTEM, replicas([0.0, 0.05], 200), **options, seed=1)
    assert not np.array_equal(other.states, run.states)
    assert iterate(SYSTEM, [[0.0, 0.0]], step_time=0.1, steps=2).absorbed_at.tolist() == [0.0]


def test_only_theta_is_clipped_unless_the_sizes_are_floored():
    options = {"step_time": 0.01, "steps": 50, "noise": 0.1, "benefit_noise": 0.1, "absorbing": False, "every": 1}
    free, floored = (iterate(SYSTEM, replicas([0.01, 0.05], 200), floor=f, **options).states for f in (False, True))
    assert free[..., 0].min() < 0.0 == floored[..., 0].min()
    for states in (free, floored):
        assert states[..., 1].min() == 0.0
        assert states[..., 1].max() <= 1.0


@settings(max_examples=20)
@given(
    st.tuples(numbers(0.0, 0.5), numbers(0.0, 1.0)),
    st.tuples(numbers(0.0, 0.5), numbers(0.0, 1.0)),
    numbers(0.0, 0.3),
    st.booleans(),
    st.integers(0, 1000),
)
def test_iterates_with_the_same_noise_keep_their_order(one, rise, noise, floor, seed):
    # The clipped step is monotone for step * K <= 1 (docs/mathematics.md section 4); with floor, by a reflecting boundary.
    low = np.array(one)
    high = np.minimum(low + rise, [np.inf, 1.0])
    options = {"step_time": 0.1, "steps": 40, "noise": noise, "benefit_noise": noise, "floor": floor, "every": 1}
    a, b = (
        iterate(SYSTEM, replicas(s, 3), absorbing=False, seed=seed, distribution=student_t(3.0), **options)
        for s in (low, high)
    )
    assert np.all(a.states <= b.states + 1e-12 * (1.0 + np.abs(b.states)))


def test_overflow_is_a_status():
    wild = BoxSystem.from_expressions("x, theta", "x**3 - x**2, 1 - theta", lower=(-np.inf, 0.0), upper=(np.inf, 1.0))
    run = iterate(wild, [[2.0, 0.5], [0.5, 0.5]], step_time=0.5, steps=60)
    assert run.status == "failed"
    assert run.message == "1 of 2 replicas left the range of floats."
    unit = UnitSystem(price=0.1, weight_decay=0.1, rate_ratio=1.0, benefit_slope=30.0)
    assert iterate(unit, [[1.0, 1.0]], step_time=0.1, steps=900).end.max() == np.finfo(float).max  # capped


# The ODE limit

UNIT = UnitSystem(price=0.1, weight_decay=0.1, rate_ratio=1.0, benefit_slope=0.5)
LIMITS = [(SYSTEM, [0.05, 0.05]), (SYSTEM, [0.05, 0.6]), (UNIT, [0.3, 0.6]), (UNIT, [0.1, 0.1])]
"""Paths that reach theta = 0, theta = 1, theta = 1 and theta = 0."""


@pytest.mark.parametrize(("system", "start"), LIMITS)
def test_without_noise_the_error_is_of_order_tau(system, start):
    result = ode_error(system, start, horizon=3.0)
    assert result.status == "complete"
    assert result.order == pytest.approx(1.0, abs=0.06)
    assert np.all(np.diff(result.errors) < 0.0)
    assert result.order_error == 0.0


@pytest.mark.parametrize(
    ("system", "start", "scale"), [(*LIMITS[0], (0.1, 0.0)), *((*limit, (0.1, 0.05)) for limit in LIMITS)]
)
def test_with_noise_the_error_is_of_order_sqrt_tau(system, start, scale):
    result = ode_error(
        system, start, horizon=3.0, deviation=scale[0], benefit_deviation=scale[1], steps=(128, 512, 2048)
    )
    assert result.status == "complete"
    assert abs(result.order - 0.5) <= 0.04 + 4.0 * result.order_error
    assert result.order_error < 0.04
    assert result.errors[-1] > 5.0 * ode_error(system, start, horizon=3.0, steps=(1024, 2048)).errors[-1]


def test_the_error_of_a_free_path_is_known():
    # Theta alone: a straight line plus a random walk; its root mean square at the end, at most, of the largest distance.
    deviation, horizon = 0.3, 1.0
    result = ode_error(UNCOUPLED, [0.0, 0.5], horizon=horizon, deviation=deviation, steps=(64, 256), replicas=2000)
    end = deviation * np.sqrt(result.step_times * horizon)
    assert np.all(result.errors >= 0.98 * end)  # the distance at the end is one of those compared
    assert np.all(result.errors <= 2.0 * end)  # Doob's inequality


def test_an_equilibrium_has_no_order():
    result = ode_error(SYSTEM, [0.0, 0.0], horizon=1.0)
    assert result.status == "failed"
    assert np.isnan(result.order)
    assert "equilibrium" in result.message


# Noise that is not normal


@pytest.mark.parametrize("noise", [*NOISES, skewed(0.01), student_t(4.5).clipped(50.0)], ids=lambda noise: noise.name)
def test_noise_is_standardised(noise):
    draws = noise.sample(np.random.default_rng(3), (400, 500))
    assert draws.shape == (400, 500)
    fourth = np.mean(draws**4)
    assert abs(draws.mean()) <= 4.0 / np.sqrt(draws.size)
    assert draws.var() == pytest.approx(1.0, abs=5.0 * np.sqrt(fourth / draws.size))


def test_clipping_shifts_the_mean_of_skewed_noise_only():
    rng, p, limit = np.random.default_rng(0), 0.01, 3.0
    symmetric, up = student_t(3.0).clipped(limit), skewed(p).clipped(limit)
    a, b = (noise.sample(rng, (200_000,)) for noise in (symmetric, up))
    assert np.abs(a).max() == limit == b.max()
    assert abs(a.mean()) <= 4.0 / np.sqrt(a.size)
    assert a.var() < 1.0
    shift = p * limit - (1.0 - p) * np.sqrt(p / (1.0 - p))
    assert b.mean() == pytest.approx(shift, abs=4.0 * np.sqrt(b.var() / b.size))
    assert shift < -0.05
    assert (symmetric.name, up.name) == ("t(3) clipped at 3", "jumps up, p=0.01 clipped at 3")


# Bad inputs


def run(**change):
    return iterate(SYSTEM, **{"starts": [[0.0, 0.1]], "step_time": 0.1, "steps": 2, **change})


def order(**change):
    return ode_error(SYSTEM, **{"start": [0.0, 0.1], "horizon": 1.0, **change})


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
        (run, {"starts": [0.0, 0.1]}, r"`starts` must have shape \(n, d\)"),
        (run, {"starts": np.zeros((0, 2))}, r"`starts` must have shape \(n, d\)"),
        (run, {"starts": [[0.0]]}, r"`starts` must have shape \(n, d\)"),
        (run, {"starts": [[0.0, np.nan]]}, r"`starts` must be finite; got starts\[0, 1\]=nan"),
        (run, {"starts": [[0.0, 1.5]]}, r"`theta of starts` must lie in \[0, 1\]"),
        (run, {"step_time": 0.0}, "`step_time` must be positive"),
        (run, {"steps": 0}, "`steps` must be an integer of at least 1"),
        (run, {"steps": 10.0}, "`steps` must be an integer"),
        (run, {"noise": -0.1}, "`noise` must be non-negative"),
        (run, {"benefit_noise": np.inf}, "`benefit_noise` must be non-negative and finite"),
        (run, {"correlation": 1.1}, r"`correlation` must lie in \[-1, 1\]"),
        (run, {"absorbing": 1}, "`absorbing` must be True or False"),
        (run, {"floor": None}, "`floor` must be True or False"),
        (run, {"every": 0}, "`every` must be an integer of at least 1"),
        (run, {"seed": None}, "`seed` must be an integer"),
        (
            run,
            {"distribution": "normal"},
            "`distribution` must be a Noise; got distribution='normal'. Choose e.g. NORMAL",
        ),
        (order, {"horizon": -1.0}, "`horizon` must be positive"),
        (order, {"steps": (64,)}, "`steps` must hold at least two different multiples of 16"),
        (order, {"steps": (64, 100)}, "multiples of 16"),
        (order, {"steps": (64, 8)}, "`steps` must be an integer of at least 16"),
        (order, {"deviation": -1.0}, "`deviation` must be non-negative"),
        (order, {"deviation": 1.0, "replicas": 1}, "`replicas` must be an integer of at least 2"),
        (order, {"start": [0.0, 2.0]}, r"keep probability in \[0, 1\]"),
        (student_t, {"degrees": 2.0}, r"`degrees` must lie in \(2, inf\); got degrees=2.0. The variance"),
        (skewed, {"probability": 1.0}, r"`probability` must lie in \(0, 1\)"),
        (skewed, {"probability": 0.1, "side": 0}, "`side` must be one of 1, -1"),
        (NORMAL.clipped, {"limit": 0.0}, "`limit` must be positive"),
    ],
)
def test_bad_inputs_are_refused(call, change, message):
    with pytest.raises(ValueError, match=message):
        call(**change)


def test_a_noise_of_ones_own_is_used_as_given():
    still = Noise("none", lambda rng, shape: np.zeros(shape))
    plain = iterate(SYSTEM, [[0.0, 0.05]], step_time=0.01, steps=30)
    assert np.array_equal(
        iterate(SYSTEM, [[0.0, 0.05]], step_time=0.01, steps=30, noise=1.0, distribution=still).end, plain.end
    )

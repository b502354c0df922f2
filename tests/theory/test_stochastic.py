"""The stochastic iterates: closed forms, their ODE limit, escape against its bound, and what breaks the bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from catode.theory import BenefitSystem, LayerSystem, UnitSystem, derive, escape_probability
from catode.theory.box import BoxSystem
from catode.theory.stochastic import (
    NORMAL,
    Noise,
    cantelli_risk,
    escape_bounds,
    escape_frequency,
    heavy_tails,
    iterate,
    large_steps,
    ode_error,
    skewed,
    student_t,
)

SYSTEM = BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0, decay=0.05)
STEP = {"step_time": 0.01, "noise": 0.1}
UNCOUPLED = BenefitSystem(price=0.1, gain=1e-12, rate_ratio=1.0)
NOISES = [NORMAL, student_t(5.0), skewed(0.2), skewed(0.2, -1)]
FAMILY_ERROR = 1e-3  # probability that a law that holds fails by chance, over all its examples together


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
    # The clipped step is monotone for step * K <= 1 (THEORY section 4); with floor a reflecting boundary keeps it so.
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
    with pytest.raises(FloatingPointError, match="left the range"):
        escape_frequency(wild, [2.0, 0.5], step_time=0.5, noise=0.0, horizon=30.0, replicas=2)
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


# Escape

CHECK = [(0.02, 0.021), (0.05, 0.068), (0.08, 0.131), (0.10, 0.205)]


@pytest.mark.parametrize(("theta", "measured"), CHECK)
def test_the_check_of_the_theory(theta, measured):
    escape = escape_frequency(SYSTEM, [0.0, theta], **STEP, replicas=8000, confidence=0.9999)
    assert escape.frequency == pytest.approx(measured, abs=4.0 * np.sqrt(measured * (1.0 - measured) / 8000) + 5e-4)
    assert escape.upper < escape.bound
    assert escape.bound == pytest.approx({0.02: 0.070, 0.05: 0.130, 0.08: 0.219, 0.10: 0.293}[theta], abs=1.5e-3)
    assert escape.horizon == pytest.approx(10.0 / SYSTEM.growth_rate, abs=0.01)


def test_a_longer_horizon_changes_next_to_nothing():
    short, long = (
        escape_frequency(SYSTEM, [0.0, 0.1], **STEP, replicas=1000, horizon=h)
        for h in (10.0 / SYSTEM.growth_rate, 30.0)
    )
    assert 0 <= short.escaped - long.escaped <= 1  # the same replicas: those undecided at the shorter horizon


escapes = st.fixed_dictionaries(
    {
        "price": numbers(0.02, 1.0),
        "gain": numbers(0.05, 2.0),
        "rate_ratio": numbers(0.1, 5.0),
        "decay": st.one_of(st.just(0.0), numbers(0.01, 2.0)),
        "drift": numbers(0.0, 0.8),
        "benefit": numbers(-0.2, 0.8),
        "theta": numbers(0.02, 0.98),
        "distance": numbers(0.2, 2.5),
        "share": st.one_of(st.just(1.0), numbers(0.0, 1.0)),
        "correlation": st.one_of(st.just(1.0), numbers(-1.0, 1.0)),
        "step": numbers(0.02, 0.3),
        "seed": st.integers(0, 10**6),
    }
)
EXAMPLES = 30


def scene(draw):
    """A system, a start in its domain and noises whose bound is Phi(-distance), from dimensionless draws."""
    keys = ("price", "gain", "rate_ratio")
    decay = draw["decay"] * BenefitSystem(**{k: draw[k] for k in keys}).growth_rate
    system = BenefitSystem(**{k: draw[k] for k in keys}, decay=decay, drift=draw["drift"] * decay * draw["price"])
    mu, gain = system.growth_rate, system.gain
    start = [draw["benefit"] * system.price, 0.0]
    edge = float(system.separatrix(start[0]))
    start[1] = draw["theta"] * min(edge, 1.0)
    tau = draw["step"] / mu
    total = gain * (edge - start[1]) * np.sqrt(mu * (2.0 + tau * mu)) / draw["distance"]
    noises = {"noise": draw["share"] * total / gain, "benefit_noise": (1.0 - draw["share"]) * total / mu}
    return system, start, {"step_time": tau, **noises}


@settings(max_examples=EXAMPLES)
@given(escapes)
def test_no_more_escapes_than_the_bound(draw):
    system, start, scale = scene(draw)
    escape = escape_frequency(
        system, start, **scale, correlation=draw["correlation"], replicas=2000, seed=draw["seed"],
        confidence=1.0 - 2.0 * FAMILY_ERROR / EXAMPLES,
    )  # fmt: skip
    assert escape.bound == pytest.approx(norm.cdf(-draw["distance"]), rel=1e-6)
    assert escape.lower <= escape.bound


@settings(max_examples=EXAMPLES)
@given(escapes, st.sampled_from([student_t(2.2), student_t(3.0), skewed(0.02), skewed(0.3), skewed(0.02, -1)]))
def test_no_more_escapes_than_cantelli_whatever_the_noise(draw, noise):
    system, start, scale = scene(draw)
    escape = escape_frequency(
        system, start, **scale, correlation=draw["correlation"], distribution=noise, replicas=1000, seed=draw["seed"],
        confidence=1.0 - 2.0 * FAMILY_ERROR / EXAMPLES,
    )  # fmt: skip
    assert escape.cantelli == pytest.approx(1.0 / (1.0 + draw["distance"] ** 2), rel=1e-6)
    assert escape.lower <= escape.cantelli


def test_the_bound_is_close_enough_to_be_broken_by_half_the_noise():
    start = [0.0, 0.13]
    escape = escape_frequency(SYSTEM, start, step_time=0.01, noise=0.02, replicas=4000, confidence=0.9999)
    assert escape.lower > escape_bounds(SYSTEM, start, step_time=0.01, noise=0.01)[0]


def test_a_noisy_benefit_clipped_at_zero_breaks_the_bound_and_a_free_one_does_not():
    scale = {"step_time": 0.02, "noise": 0.0, "benefit_noise": 0.1, "replicas": 3000, "confidence": 0.9999}
    free, floored = (escape_frequency(SYSTEM, [0.0, 0.08], floor=f, **scale) for f in (False, True))
    assert free.upper < free.bound == floored.bound < floored.lower


@settings(max_examples=50)
@given(escapes, st.sampled_from([1e-3, 0.01, 0.05, 0.3]))
def test_the_bounds_are_those_of_the_tolerance(draw, risk):
    system, start, scale = scene(draw)
    inputs = {name: getattr(system, name) for name in ("price", "gain", "decay", "rate_ratio", "drift")}
    phi, cantelli = escape_bounds(system, start, **scale)
    assert phi == escape_probability(keep_prob=start[1], benefit=start[0], **inputs, **scale)
    assert phi <= cantelli
    careful = derive(benefit=start[0], risk=cantelli_risk(risk), **inputs, **scale)
    if 0.0 < careful.values < 1.0:
        assert escape_bounds(system, [start[0], float(careful)], **scale)[1] == pytest.approx(risk, rel=1e-6)


def test_the_bounds_in_the_corners():
    assert escape_bounds(SYSTEM, [0.1, 0.01], **STEP) == (1.0, 1.0)  # no claim at the price
    assert escape_bounds(SYSTEM, [0.0, 0.01], step_time=0.01, noise=0.0) == (0.0, 0.0)
    assert escape_bounds(SYSTEM, [0.0, 0.5], step_time=0.01, noise=0.0) == (1.0, 1.0)
    assert escape_bounds(SYSTEM, [0.0, 0.5], **STEP)[1] == 1.0
    far = escape_bounds(SYSTEM, [0.0, 0.01], step_time=0.01, noise=1e-6)
    assert far == (0.0, 1.0 / (1.0 + 37.0**2))


def test_the_interval_is_that_of_clopper_and_pearson():
    none = escape_frequency(SYSTEM, [0.0, 0.01], step_time=0.01, noise=0.001, replicas=50, confidence=0.9)
    assert (none.escaped, none.lower) == (0, 0.0)
    assert none.upper == pytest.approx(1.0 - 0.05 ** (1.0 / 50.0), rel=1e-12)
    every = escape_frequency(SYSTEM, [0.2, 0.9], step_time=0.01, noise=0.001, replicas=50, confidence=0.9)
    assert (every.frequency, every.upper) == (1.0, 1.0)
    assert every.lower == pytest.approx(0.05 ** (1.0 / 50.0), rel=1e-12)
    some = escape_frequency(SYSTEM, [0.0, 0.1], **STEP, replicas=300, confidence=0.9)
    assert binom.sf(some.escaped - 1, 300, some.lower) == pytest.approx(0.05, rel=1e-9)
    assert binom.cdf(some.escaped, 300, some.upper) == pytest.approx(0.05, rel=1e-9)


def test_a_layer_is_a_benefit_system_in_other_units():
    slope, bound = 0.5, 2.0
    layer = LayerSystem(price=0.1, weight_decay=0.05, rate_ratio=1.0, grad_bound=bound, benefit_slope=slope)
    twin = BenefitSystem(price=0.1, gain=slope * bound, rate_ratio=1.0, decay=0.05)
    options = {"step_time": 0.02, "noise": 0.1, "replicas": 500, "correlation": 1.0}
    one = escape_frequency(layer, [0.02 / slope, 0.08], benefit_noise=0.02 / slope, **options)
    other = escape_frequency(twin, [0.02, 0.08], benefit_noise=0.02, **options)
    assert (one.escaped, one.horizon) == (other.escaped, pytest.approx(other.horizon))
    assert 0 < one.escaped < 500
    assert (one.bound, one.cantelli) == (None, None)


def test_a_system_of_ones_own_escapes_alike():
    box = BoxSystem.from_expressions("b, theta", "theta/2 - b/20, b - 1/10", lower=(0.0, 0.0), upper=(np.inf, 1.0))
    options = {**STEP, "replicas": 400, "horizon": 8.0}
    assert (
        escape_frequency(box, [0.0, 0.08], **options).escaped
        == escape_frequency(SYSTEM, [0.0, 0.08], **options).escaped
    )


# Noise that is not normal, and large steps


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


def test_rare_jumps_break_the_normal_tolerance_and_neither_cantellis_nor_clipped_draws():
    jumps = skewed(0.001)
    noises = [NORMAL, jumps, jumps.clipped(4.0), skewed(0.002, -1)]
    table = heavy_tails(SYSTEM, step_time=0.01, noise=0.02, distributions=noises, replicas=2500, confidence=0.999)
    assert [(case.rule, case.escape.distribution) for case in table] == [
        (rule, noise.name) for noise in noises for rule in ("normal", "cantelli")
    ]
    holds = {(case.rule, case.escape.distribution): case.holds for case in table}
    assert not holds.pop(("normal", jumps.name))
    assert all(holds.values())
    assert all(case.escape.cantelli == pytest.approx(0.05, rel=1e-6) for case in table if case.rule == "cantelli")
    broken = next(case for case in table if not case.holds)
    assert broken.escape.bound == pytest.approx(broken.risk, rel=1e-6)
    assert broken.escape.frequency > 1.5 * broken.risk


def test_heavy_tails_break_the_tolerance_at_a_small_risk_and_clipping_mends_it():
    tails = student_t(2.5)
    table = heavy_tails(
        SYSTEM, step_time=0.03, noise=0.005, risk=1e-3, distributions=[tails, tails.clipped(4.0)], replicas=15_000,
        confidence=0.99,
    )  # fmt: skip
    rows = {(case.rule, case.escape.distribution): case for case in table}
    assert not rows["normal", tails.name].holds
    assert all(case.holds for key, case in rows.items() if key != ("normal", tails.name))
    assert rows["cantelli", tails.name].tolerance < 0.1 * rows["normal", tails.name].tolerance


def test_at_a_moderate_risk_symmetric_heavy_tails_do_no_harm():
    table = heavy_tails(
        SYSTEM, step_time=0.02, noise=0.02, distributions=[student_t(2.2), student_t(3.0)], replicas=2000
    )
    assert all(case.holds for case in table)


def test_large_steps_cost_the_tolerance_and_keeping_a_small_steps_tolerance_costs_more():
    taus = (0.01, 0.04, 0.1, 0.4)
    table = large_steps(SYSTEM, step_times=taus[::-1], deviation=0.3, replicas=2000, confidence=0.999)
    own, kept = ([case for case in table if case.rule == rule] for rule in ("derived", "kept"))
    assert len(own) == len(kept) == 4
    values = [case.tolerance for case in own]
    assert np.all(np.diff(values) < 0.0)
    assert values[2] > 0.0 > values[3]
    assert own[3].escape is None
    assert all(case.holds for case in own)
    assert [case.holds for case in kept] == [True, False, False, False]
    assert kept[0].escape == own[0].escape
    mu, z = SYSTEM.growth_rate, norm.ppf(0.95)
    for tau, case in zip(taus, own, strict=True):
        spread = 0.3 * np.sqrt(tau) / np.sqrt(mu * (2.0 + tau * mu))
        assert case.tolerance == pytest.approx(0.1 * (mu + 0.05) / 0.5 - z * spread, rel=1e-9)
    assert [case.escape.step_time for case in kept] == list(taus)
    assert {case.tolerance for case in kept} == {values[0]}
    assert all(case.escape.lower <= case.escape.bound for case in table if case.escape)


# Bad inputs


def run(**change):
    return iterate(SYSTEM, **{"starts": [[0.0, 0.1]], "step_time": 0.1, "steps": 2, **change})


def escape(**change):
    return escape_frequency(**{"system": SYSTEM, "start": [0.0, 0.1], "step_time": 0.1, "noise": 0.1, **change})


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
        (escape, {"start": [[0.0, 0.1]]}, r"`start` must have shape \(d,\)"),
        (escape, {"start": [0.0, -0.1]}, r"must lie in \[0, 1\]"),
        (escape, {"horizon": 0.0}, "`horizon` must be positive"),
        (escape, {"replicas": 0}, "`replicas` must be an integer of at least 1"),
        (escape, {"confidence": 1.0}, r"`confidence` must lie in \(0, 1\)"),
        (
            escape,
            {"system": BoxSystem.from_expressions("b, h", "h, b", lower=(0, 0), upper=(1, 1))},
            "`horizon` must be given for a system without a growth rate",
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
        (cantelli_risk, {"risk": 1e-4}, r"`risk` must lie in \[0.001, 0.5\)"),
        (large_steps, {"system": SYSTEM, "step_times": [], "deviation": 1.0}, "`step_times` must hold at least one"),
        (escape_bounds, {"system": SYSTEM, "start": [0.1], **STEP}, r"`start` must have shape \(2,\)"),
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

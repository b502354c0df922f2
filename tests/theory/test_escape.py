"""Escape against its bound, and what breaks the bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm
from test_stochastic import STEP, SYSTEM, numbers

from catode.theory import BenefitSystem, LayerSystem, derive, escape_probability
from catode.theory.flow.stochastic import NORMAL, skewed, student_t
from catode.theory.systems.box import BoxSystem
from catode.theory.tolerance.escape import cantelli_risk, escape_bounds, escape_frequency, heavy_tails, large_steps

FAMILY_ERROR = 1e-3  # probability that a law that holds fails by chance, over all its examples together
CHECK = [(0.02, 0.021), (0.05, 0.068), (0.08, 0.131), (0.10, 0.192)]


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


def test_overflow_is_an_error():
    wild = BoxSystem.from_expressions("x, theta", "x**3 - x**2, 1 - theta", lower=(-np.inf, 0.0), upper=(np.inf, 1.0))
    with pytest.raises(FloatingPointError, match="left the range"):
        escape_frequency(wild, [2.0, 0.5], step_time=0.5, noise=0.0, horizon=30.0, replicas=2)


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


def escape(**change):
    return escape_frequency(**{"system": SYSTEM, "start": [0.0, 0.1], "step_time": 0.1, "noise": 0.1, **change})


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
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
        (cantelli_risk, {"risk": 1e-4}, r"`risk` must lie in \[0.001, 0.5\)"),
        (large_steps, {"system": SYSTEM, "step_times": [], "deviation": 1.0}, "`step_times` must hold at least one"),
        (escape_bounds, {"system": SYSTEM, "start": [0.1], **STEP}, r"`start` must have shape \(2,\)"),
    ],
)
def test_bad_inputs_are_refused(call, change, message):
    with pytest.raises(ValueError, match=message):
        call(**change)

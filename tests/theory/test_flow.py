"""The projected flow against closed forms, and the domains against the flow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.linalg import expm
from test_systems import benefits, layers, numbers, units

from catode.theory import BenefitSystem, LayerSystem, UnitSystem, integrate, trace_separatrix

SLOW = settings(max_examples=20, deadline=None, derandomize=True)
EVERY = pytest.mark.parametrize("systems", [layers, units, benefits], ids=["layer", "unit", "benefit"])
LAYER = LayerSystem(price=0.1, weight_decay=0.1, rate_ratio=1.0, grad_bound=1.0, benefit_slope=0.5)
UNIT = UnitSystem(price=0.1, weight_decay=0.1, rate_ratio=1.0, benefit_slope=0.5)
BENEFIT = BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0, decay=0.05)


def horizon(system):
    return 1e4 / system.growth_rate


@EVERY
def test_just_below_the_separatrix_is_pruned_and_just_above_kept(systems):
    @SLOW
    @given(systems, numbers(0.1, 1.9))
    def law(system, fraction):
        assume(0.0 <= system.saddle[1] <= 1.0 and not getattr(system, "empty", False))
        size = fraction * system.saddle[0]
        theta, step = float(system.separatrix(size)), 1e-4
        if 0.0 <= theta - step <= 1.0:
            assert integrate(system, [size, theta - step], horizon(system)).status == "pruned"
        if 0.0 <= theta + step <= 1.0:
            result = integrate(system, [size, theta + step], horizon(system))
            if getattr(system, "drift", 0.0) == 0.0:
                assert result.status == "kept"

    law()


@EVERY
def test_a_start_in_the_domain_goes_to_zero_and_a_mirror_start_never_does(systems):
    @SLOW
    @given(systems, numbers(0.0, 2.0), numbers(0.0, 1.0))
    def law(system, fraction, theta):
        state = [fraction * system.saddle[0], theta]
        assume(abs(theta - system.separatrix(state[0])) > 1e-5)
        if system.contains(state) or system.in_basin(state):
            result = integrate(system, state, horizon(system))
            assert result.status == "pruned"
            if isinstance(system, BenefitSystem) and system.contains(state):
                assert result.times[-1] <= system.time_to_zero(state) * (1 + 1e-6) + 1e-9
        elif system.contains_mirror(state):
            assert integrate(system, state, horizon(system)).status != "pruned"

    law()


def test_a_start_in_the_mirror_domain_of_the_lower_bounds_never_reaches_zero():
    seen = []

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(benefits, numbers(0.3, 1.0), numbers(1.0, 2.0), numbers(0.0, 2.0), numbers(0.0, 1.0))
    def law(system, weaker, stronger, fraction, theta):
        system = BenefitSystem(
            price=system.price,
            gain=system.gain,
            rate_ratio=system.rate_ratio,
            decay=system.decay,
            drift=system.drift,
            gain_lower=weaker * system.gain,
            decay_upper=stronger * system.decay,
        )
        state = [fraction * system.price, theta]
        if system.contains_mirror(state):
            seen.append(state)
            result = integrate(system, state, horizon(system))
            assert result.status == "kept"
            crossed = np.flatnonzero(result.states[:, 0] >= system.price)
            assert np.all(np.diff(result.keep_prob[crossed[0] :]) >= -1e-9)

    law()
    assert len(seen) >= 10


@EVERY
def test_projection_keeps_the_keep_probability_in_its_interval(systems):
    @SLOW
    @given(systems, numbers(0.0, 3.0), numbers(0.0, 1.0), st.booleans())
    def law(system, fraction, theta, events):
        result = integrate(system, [fraction * system.saddle[0], theta], 20.0 / system.growth_rate, events=events)
        if result.status == "failed":  # a unit grows exponentially at theta = 1
            assert "range of floats" in result.message
            return
        assert np.all((result.keep_prob >= 0.0) & (result.keep_prob <= 1.0))
        assert np.all(np.diff(result.times) > 0.0)
        assert result.times.shape == result.states.shape[:1]
        assert np.all(result.states[:, 0] >= 0.0)
        if not events:
            assert result.times[-1] == 20.0 / system.growth_rate

    law()


@pytest.mark.parametrize("system", [LAYER, BENEFIT], ids=["layer", "benefit"])
def test_inside_the_interval_the_flow_is_the_matrix_exponential(system):
    start, saddle = np.array([0.5, 0.3]) * system.saddle[0] + [0.0, 0.1], np.array(system.saddle)
    result = integrate(system, start, 1.0, events=False)
    exact = [saddle + expm(t * system.jacobian(start)) @ (start - saddle) for t in result.times]
    assert result.status == "horizon"
    assert np.allclose(result.states, exact, atol=1e-8)


def test_the_path_along_a_face_is_the_closed_form():
    result = integrate(BENEFIT, [0.3, 1.0], 10.0, events=False)
    exact = 10.0 + (0.3 - 10.0) * np.exp(-0.05 * result.times)
    assert result.status == "kept"
    assert np.allclose(result.states[:, 0], exact, rtol=1e-7)
    assert np.all(result.keep_prob == 1.0)


def test_theta_leaves_a_face_when_its_speed_turns():
    system = BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0, drift=0.01)
    result = integrate(system, [0.02, 0.0], 20.0, events=False)
    leave = (0.1 - 0.02) / 0.01
    on_face = result.times <= leave
    assert np.all(result.keep_prob[on_face] <= 1e-12)
    assert np.all(result.keep_prob[result.times > leave + 1e-6] > 0.0)
    rate = np.sqrt(0.5)
    early = (result.times > leave) & (result.keep_prob < 1.0) & (result.times < leave + 2.0)
    exact = 0.01 / 0.5 * (np.cosh(rate * (result.times[early] - leave)) - 1.0)  # theta'' = q theta + delta
    assert early.sum() > 4
    assert np.allclose(result.keep_prob[early], exact, atol=1e-7)


def test_an_upper_face_is_left_where_nothing_can_be_kept():
    system = BenefitSystem(price=1.0, gain=0.3, rate_ratio=1.0, decay=0.5)  # theta* = 5 / 3
    assert system.in_basin([1.5, 1.0])
    result = integrate(system, [1.5, 1.0], 200.0)
    leave = np.log((1.5 - 0.6) / (1.0 - 0.6)) / 0.5
    assert result.status == "pruned"
    assert np.all(result.keep_prob[result.times <= leave] >= 1.0 - 1e-12)
    assert np.all(result.keep_prob[result.times > leave + 1e-3] < 1.0)


def test_a_dip_below_zero_within_one_step_is_caught():
    system = BenefitSystem(price=0.1, gain=1e-3, rate_ratio=1.0, drift=1.0)  # b = g at t ~ 0.1, theta turns there
    touching = 0.1**2 / 2.0  # theta falls by (g - b)^2 / (2 delta) and rises again
    for theta, expected in ((0.999 * touching, "pruned"), (0.5 * touching, "pruned"), (1.01 * touching, "kept")):
        result = integrate(system, [0.0, theta], 50.0)
        assert result.status == expected
        if expected == "pruned":
            assert np.isclose(result.times[-1], 0.1 - np.sqrt(0.1**2 - 2.0 * theta), rtol=1e-2)
            assert result.end[-1] == 0.0


@pytest.mark.parametrize(
    ("system", "start"),
    [(LAYER, [0.1, 0.3]), (LAYER, [0.3, 0.0]), (UNIT, [0.5, 0.1]), (BENEFIT, [0.0, 0.2]), (BENEFIT, [0.2, 0.0])],
)
def test_the_flow_agrees_with_small_euler_steps_of_the_projected_field(system, start):
    result = integrate(system, start, 8.0, events=False)
    state, steps = np.array(start, dtype=float), 2000
    for _ in range(steps):
        state = system.project(state + 8.0 / steps * system.projected_field(state))
    assert np.allclose(result.end, state, atol=5e-2 * (1.0 + np.abs(state).max()))


def test_equilibria_stay():
    for system in (LAYER, UNIT):
        result = integrate(system, system.saddle, 5.0)
        if result.times.size == 2:
            assert result.status == "horizon"
            assert np.array_equal(result.end, system.saddle)


def test_an_equilibrium_to_rounding_error_stays():
    system = BenefitSystem(price=1.0, gain=2.7, rate_ratio=2.1, decay=2e-106, drift=1e-179)
    result = integrate(system, [1.0, 3e-252], 8.0)
    assert result.status == "horizon"
    assert np.array_equal(result.end, [1.0, 3e-252])


def test_a_blow_up_is_a_status_and_never_an_exception():
    class Explosion:
        saddle = (1.0, 0.5)

        def field(self, state):
            state = np.asarray(state, dtype=float)
            return np.stack([np.square(state[..., 0]), 0.01 * np.ones_like(state[..., 0])], axis=-1)

        def jacobian(self, state):
            return np.array([[2.0 * state[0], 0.0], [0.0, 0.0]])

        def project(self, state):
            return np.asarray(state, dtype=float)

        def rest(self, state):
            return np.inf

    result = integrate(Explosion(), [1.0, 0.5], 10.0)
    assert result.status == "failed"
    assert "stopped at time" in result.message
    assert np.all(np.isfinite(result.states))


def test_growth_beyond_the_range_of_floats_is_a_status():
    system = UnitSystem(price=0.01, weight_decay=0.0, rate_ratio=0.1, benefit_slope=2.7)
    result = integrate(system, [0.3, 0.3], 300.0, events=False)
    assert result.status == "failed"
    assert "beyond the range of floats" in result.message
    assert np.all(np.isfinite(result.states))
    assert integrate(system, [0.3, 0.3], 300.0).status == "kept"


class Field:
    """A flow of one's own, theta last, by its velocity alone."""

    def __init__(self, velocity):
        self.velocity = velocity

    def field(self, state):
        return self.velocity(np.asarray(state, dtype=float))

    def jacobian(self, state):
        return np.zeros((2, 2))

    def project(self, state):
        return np.asarray(state, dtype=float)

    def rest(self, state):
        return np.asarray(state)[..., :-1]


def hole(undefined, value=np.nan):
    """A speed of 0.1 in both coordinates, `value` where a condition on the state holds."""
    return Field(lambda y: np.where(undefined(y)[..., None], value, 0.1) * np.ones(2))


@pytest.mark.parametrize(
    ("system", "time"),
    [
        (hole(lambda y: y[..., 0] < 2.0), 0.0),
        (hole(lambda y: y[..., 0] < 2.0, np.inf), 0.0),
        (hole(lambda y: y[..., 0] > 0.7), 2.0),
        (hole(lambda y: y[..., 1] >= 1.0), 5.0),
    ],
    ids=["nan at the start", "inf at the start", "nan on the way", "nan on a face"],
)
@pytest.mark.parametrize("events", [True, False])
def test_a_field_that_is_not_finite_is_a_status_and_never_a_silent_nan(system, time, events):
    result = integrate(system, [0.5, 0.5], 20.0, events=events)
    assert result.status == "failed" and f"at time {time:g}" in result.message
    assert np.isfinite(result.states).all() and np.isclose(result.times[-1], time, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"system": Field(lambda y: y[..., 0])},
            r"`system.field\(start\)` must have shape \(2,\), that of `start`; got",
        ),
        ({"system": Field(lambda y: np.zeros(3))}, r"`system.field\(start\)` must have shape \(2,\)"),
        ({"system": np.negative}, "`system` must have the methods field, jacobian, project and rest; got .* BoxSystem"),
        ({"start": [0.1, 1.5]}, r"`start` must have a keep probability in \[0, 1\]; got start\[1\]=1.5"),
        ({"start": [0.1]}, "`start` must have shape"),
        ({"start": [[0.1, 0.2]]}, "`start` must have shape"),
        ({"start": [np.nan, 0.2]}, "`start` must be finite"),
        *[({"horizon": time}, "`horizon` must be positive") for time in (0.0, -1.0, np.nan, np.inf)],
        ({"rtol": 0.5}, r"`rtol` must lie in \(0, 0.1\]"),
        ({"atol": -1.0}, "`atol` must be positive"),
    ],
)
def test_bad_inputs_are_refused(change, message):
    arguments = {"system": LAYER, "start": [0.1, 0.5], "horizon": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        integrate(**arguments)


@pytest.mark.parametrize(
    ("change", "message"), [({"low": 1.0}, "`low`"), ({"high": 1.0}, "`high`"), ({"low": -1}, "`low`")]
)
def test_bad_ranges_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        trace_separatrix(LAYER, **change)

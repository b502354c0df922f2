"""Single trajectories in boxes of the user's: every face met exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_systems import numbers

from catode.theory import UnitSystem, integrate
from catode.theory.systems.box import BoxSystem

FEW = settings(max_examples=15, deadline=None, derandomize=True)
ROTATION = BoxSystem.from_expressions("x, y", "y, -x", lower=(-1, -1), upper=(1, 1))


def kinds(trajectory):
    return [(event.coordinate, event.kind) for event in trajectory.events]


def test_a_rotation_arrives_slides_and_leaves_where_the_formula_says():
    """From radius sqrt(1.17) it meets x = 1, slides down with speed -1, leaves at (1, 0), and grazes from then on."""
    start = np.array([0.6, 0.9])
    radius, angle = np.hypot(*start), np.arctan2(*start[::-1])
    arrival = angle - np.arccos(1.0 / radius)
    height = np.sqrt(radius**2 - 1.0)
    found = integrate(ROTATION, start, arrival + height + 1.0, rtol=1e-11, atol=1e-12)
    assert kinds(found) == [(0, "arrive"), (0, "leave")]
    assert [event.time for event in found.events] == pytest.approx([arrival, arrival + height], abs=1e-8)
    assert found.status == "horizon" and found.end == pytest.approx([np.cos(1.0), -np.sin(1.0)], abs=1e-8)
    sliding = (found.times >= found.events[0].time) & (found.times <= found.events[1].time)
    assert sliding.sum() > 2 and (found.states[sliding, 0] == 1.0).all()


def test_two_coordinates_arrive_at_once_and_leave_one_by_one():
    """x and y meet their faces at time 1; then t, the third coordinate, turns x back at time 2 while y is held."""
    system = BoxSystem.from_expressions("x, y, t", "2 - t, 1 + 0*x, 1", lower=(0, 0, 0), upper=(1.5, 1, 9))
    found = integrate(system, [0.0, 0.0, 0.0], 3.0)
    assert sorted(kinds(found)[:2]) == [(0, "arrive"), (1, "arrive")] and kinds(found)[2:] == [(0, "leave")]
    assert [event.time for event in found.events] == pytest.approx([1.0, 1.0, 2.0], abs=1e-9)
    assert found.end == pytest.approx([1.0, 1.0, 3.0], abs=1e-9)


def test_many_grazing_turns_keep_to_the_circle():
    found = integrate(ROTATION, [1.0, 0.0], 20.0, rtol=1e-11, atol=1e-12)
    assert found.status == "horizon" and found.end == pytest.approx([np.cos(20.0), -np.sin(20.0)], abs=1e-5)


@FEW
@given(st.lists(numbers(-2.0, 2.0), min_size=1, max_size=5), st.data())
def test_law_constant_speeds_run_into_their_corner_one_face_after_the_other(speeds, data):
    speed, d = np.array(speeds), len(speeds)
    start = np.array([data.draw(numbers(0.0, 1.0)) for _ in speeds])
    system = BoxSystem(velocity=lambda s: np.broadcast_to(speed, np.shape(s)), lower=[0.0] * d, upper=[1.0] * d)
    found = integrate(system, start, 3.0)
    np.testing.assert_allclose(found.end, np.clip(start + 3.0 * speed, 0.0, 1.0), atol=1e-9)
    assert all(event.kind == "arrive" for event in found.events)
    way = np.where(speed > 0, 1.0 - start, start)
    due = {i: way[i] / abs(speed[i]) for i in range(d) if 1e-6 < way[i] < 2.999 * abs(speed[i])}
    assert {e.coordinate: e.time for e in found.events if e.coordinate in due} == pytest.approx(due, abs=1e-9)


@FEW
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_law_agrees_with_small_projected_steps(seed, d):
    """Random cubic fields: as near to x <- project(x + h f(x)) as that is to itself with twice the step."""
    random = np.random.default_rng(seed)
    (a, b), c = random.normal(size=(2, d, d)) / np.sqrt(d), random.normal(size=d)
    system = BoxSystem(velocity=lambda s: c + s @ a.T - (s @ b.T) ** 3, lower=[-1.0] * d, upper=[1.0] * d)
    start, horizon = random.uniform(-1, 1, d), 2.0
    found = integrate(system, start, horizon)
    assert found.status == "horizon", found.message
    assert (np.abs(found.states) <= 1.0).all() and (np.diff(found.times) > 0).all()

    def small_steps(n):
        x = start
        for _ in range(n):
            x = np.clip(x + horizon / n * system.velocity(x), -1.0, 1.0)
        return x

    coarse, fine = small_steps(1000), small_steps(2000)
    assert np.abs(found.end - fine).max() <= 3.0 * np.abs(fine - coarse).max() + 1e-6


@FEW
@given(numbers(0.02, 0.5), numbers(0.02, 0.5), numbers(0.1, 3.0), numbers(0.0, 1.0), numbers(0.0, 1.0))
def test_law_agrees_with_the_planar_integration(price, decay, rate, size, theta):
    unit = UnitSystem(price=price, weight_decay=decay, rate_ratio=rate, benefit_slope=0.5)
    box = BoxSystem(velocity=unit.field, derivative=unit.jacobian, lower=[0.0, 0.0], upper=[np.inf, 1.0])
    one = integrate(unit, [size, theta], 20.0, events=False)
    other = integrate(box, [size, theta], 20.0)
    assert one.status != "failed" and other.status == "horizon"
    np.testing.assert_allclose(one.end, other.end, rtol=1e-5, atol=1e-7)
    assert [e.kind for e in one.events] == [e.kind for e in other.events if e.coordinate == 1]


def test_an_excursion_within_one_step_is_seen():
    """A slow parabola over the face: y rises to 1.0001 and falls again while x moves on, which one large step may span."""
    system = BoxSystem.from_expressions("x, y", "1, -x/50", lower=(-9, -9), upper=(9, 1))
    found = integrate(system, [-1.0, 0.9901], 2.0)
    assert kinds(found) == [(1, "arrive"), (1, "leave")]
    assert found.events[0].time == pytest.approx(0.9, abs=1e-6) and found.events[1].time == pytest.approx(1.0, abs=1e-6)
    assert found.end == pytest.approx([1.0, 0.99], abs=1e-9)


def test_at_rest_at_once_and_blow_up_and_undefined():
    still = integrate(BoxSystem.from_expressions("x", "-x", lower=(0,), upper=(1,)), [0.0], 5.0)
    assert "at rest" in still.message and still.times[-1] == 5.0 and still.status == "horizon"
    corner = integrate(BoxSystem.from_expressions("x, y", "x, y", lower=(0, 0), upper=(1, 1)), [1.0, 1.0], 5.0)
    assert "at rest" in corner.message and corner.events == ()
    explosion = integrate(BoxSystem.from_expressions("x", "x**2", lower=(0,), upper=(np.inf,)), [1.0], 5.0)
    assert explosion.status == "failed" and explosion.times[-1] == pytest.approx(1.0, abs=1e-2)
    hole = BoxSystem(velocity=lambda s: np.where(s > 0.95, np.nan, 1.0), lower=[0.0], upper=[1.0])
    found = integrate(hole, [0.1], 5.0)
    assert (
        found.status == "failed" and np.isfinite(found.states).all() and found.end[0] == pytest.approx(0.95, abs=1e-2)
    )


def test_growth_beyond_the_range_of_floats_is_a_status_and_what_is_kept_is_finite():
    system = BoxSystem.from_expressions("x, y", "x, 1 - y", lower=(0, 0), upper=(np.inf, 2))
    found = integrate(system, [1.0, 0.0], 2000.0)
    assert found.status == "failed" and "stopped at time 7" in found.message
    assert np.isfinite(found.states).all() and 700.0 < found.times[-1] < 710.0  # e^709.8 is the largest float
    assert np.log(found.end[0]) == pytest.approx(found.times[-1], rel=1e-6)


@pytest.mark.parametrize("start", [0.97, 1.0], ids=["inside", "on a face"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_field_undefined_at_the_start_is_a_status(start, value):
    hole = BoxSystem(velocity=lambda s: np.where(s > 0.95, value, 1.0), lower=[0.0], upper=[1.0])
    found = integrate(hole, [start], 5.0)
    assert found.status == "failed" and "not finite at time 0" in found.message and found.end.tolist() == [start]


@pytest.mark.parametrize(
    ("start", "words"),
    [([2.0, 0.0], "lie in the box"), ([0.0], "shape"), ([np.nan, 0.0], "finite"), ([[0.0, 0.0]], "shape")],
)
def test_bad_starts_are_refused(start, words):
    with pytest.raises(ValueError, match=words):
        integrate(ROTATION, start, 1.0)

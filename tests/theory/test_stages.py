"""Turns within one step, fields that jump, and events on the start of a step, by every way to integrate."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import sympy

from catode.theory import BoxSystem, UnitSystem, integrate, integrate_batch
from catode.theory.basins import basins_of_attraction
from catode.theory.flow._stage import Budget, solve_stage

X, Y = sympy.symbols("x y")


class Flow:
    """x' = 1, theta' = the given polynomial of x, as a user's own flow."""

    def __init__(self, speed):
        self.speed, self.slope = np.polynomial.Polynomial(speed), np.polynomial.Polynomial(speed).deriv()

    def field(self, state):
        x = np.asarray(state, dtype=float)[..., 0]
        return np.stack([np.ones_like(x), self.speed(x)], axis=-1)

    def jacobian(self, state):
        x = np.asarray(state, dtype=float)[..., 0]
        matrix = np.zeros((*x.shape, 2, 2))
        matrix[..., 1, 0] = self.slope(x)
        return matrix

    def project(self, state):
        state = np.asarray(state, dtype=float)
        return np.stack([state[..., 0], np.clip(state[..., 1], 0.0, 1.0)], axis=-1)

    def rest(self, state):
        return np.full(np.shape(state)[:-1], np.inf)


def by_every_way(speed, start, horizon, **tolerances):
    """Final theta through the planar flow, the box, and the batch in both of its forms."""
    flow = Flow(speed)
    box = BoxSystem(velocity=flow.field, derivative=flow.jacobian, lower=(0.0, 0.0), upper=(1e5, 1.0))
    text = BoxSystem.from_expressions(
        [X, Y], [1, sum(c * X**i for i, c in enumerate(speed))], lower=(0.0, 0.0), upper=(1e5, 1.0)
    )
    yield "planar", integrate(flow, start, horizon, events=False, **tolerances).states[-1, 1]
    yield "box", integrate(box, start, horizon, **tolerances).states[-1, 1]
    yield "compiled", integrate_batch(text, [start], horizon, **tolerances).ends[0, 1]
    yield "numpy", integrate_batch(box, [start], horizon, **tolerances).ends[0, 1]


def exact(speed, turns, theta, horizon):
    """Theta of the projected flow: monotone between the turns of its speed, so clipping at each of them is exact."""
    primitive = np.polynomial.Polynomial(speed).integ()
    cuts = [0.0, *(t for t in turns if t < horizon), horizon]
    for left, right in itertools.pairwise(cuts):
        theta = min(max(theta + primitive(right) - primitive(left), 0.0), 1.0)
    return theta


@pytest.mark.parametrize("rtol", [1e-8, 1e-4])
@pytest.mark.parametrize("a", [0.05, 0.3, 2.0, 20.0, 200.0])
def test_two_turns_within_a_step_are_found(a, rtol):
    """theta' = c (x - a) (x - 4 a); its first excursion from 0.1 is the given share of the interval."""
    for share in (-0.101, -0.11, -0.2, -0.5, 0.3, 0.901, 0.95, 1.2, 3.0):
        c = share / (a**3 * 11.0 / 6.0)
        speed = [4.0 * a * a * c, -5.0 * a * c, c]
        for horizon in (4.5 * a, 20.0 * a):
            right = exact(speed, [a, 4.0 * a], 0.1, horizon)
            for way, theta in by_every_way(speed, [0.0, 0.1], horizon, rtol=rtol):
                assert theta == pytest.approx(right, abs=2e-4), (way, share, horizon)


@pytest.mark.parametrize("start", [0.02, 0.5, 0.98])
def test_three_turns_and_a_start_near_either_face(start):
    for sign in (1.0, -1.0):
        c = 0.3 * sign
        speed = (np.polynomial.Polynomial([-1.0, 1.0]) * [-2.0, 1.0] * [-4.0, 1.0] * c).coef.tolist()
        right = exact(speed, [1.0, 2.0, 4.0], start, 5.0)
        for way, theta in by_every_way(speed, [0.0, start], 5.0):
            assert theta == pytest.approx(right, abs=2e-4), (way, sign)


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_a_release_and_a_return_within_a_step_are_found(scale):
    """Held at 0 by theta' = c (x - 2) (5 - x) until 2, freed, and back before a long horizon."""
    speed = [-10.0 / scale, 7.0 / scale, -1.0 / scale]
    right = exact(speed, [2.0, 5.0], 0.0, 6.0)
    assert right > 0.0
    for way, theta in by_every_way(speed, [0.0, 0.0], 6.0):
        assert theta == pytest.approx(right, abs=2e-4), way


class Jumping(Flow):
    def __init__(self):
        super().__init__([0.0])

    def field(self, state):
        state = np.asarray(state, dtype=float)
        return np.stack([-np.sign(state[..., 0] - 0.5), 0.3 - state[..., 1]], axis=-1)


JUMPS = {
    "a step function": BoxSystem(velocity=lambda y: np.where(y < 1.0, 2.0, -1.0), lower=(0,), upper=(3,)),
    "a sign": BoxSystem.from_expressions("x, y", "-sign(x - 1/2), -(y - 3/10)", lower=(0, 0), upper=(1, 1)),
    "cases": BoxSystem.from_expressions("x", "Piecewise((1, x < 1/3), (-3, True))", lower=(0,), upper=(1,)),
    "a planar flow": Jumping(),
}


@pytest.mark.parametrize("name", JUMPS)
def test_a_field_that_jumps_ends_in_a_status(name):
    system = JUMPS[name]
    began = time.perf_counter()
    path = integrate(system, [0.2] * getattr(system, "dimension", 2), 100.0)
    assert path.status == "failed" and "out of reach" in path.message and path.times[-1] < 100.0
    if isinstance(system, BoxSystem):
        starts = np.random.default_rng(0).uniform(0.05, 0.95, (121, system.dimension))
        batch = integrate_batch(system, starts, 100.0)
        assert set(batch.statuses) == {"failed"} and batch.steps.max() <= 5000
    assert time.perf_counter() - began < 60.0


def test_a_grid_of_a_field_that_jumps_is_undecided():
    line = np.linspace(0.05, 0.95, 11)
    with pytest.warns(UserWarning, match="all are undecided"):
        basins = basins_of_attraction(JUMPS["a sign"], (line, line), 100.0)
    assert basins.failed == 121


def test_the_budget_ends_a_trajectory_and_is_shared_by_its_stages():
    circle = BoxSystem.from_expressions("x, y", "-y, x", lower=(-2, -2), upper=(2, 2))
    path = integrate(circle, [1.0, 0.0], 1e4, max_evaluations=5000)
    assert path.status == "failed" and "the budget of 5000 evaluations of the field was used up" in path.message
    assert np.hypot(*path.states[-1]) == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="`max_evaluations` must be an integer"):
        integrate(circle, [1.0, 0.0], 1.0, max_evaluations=0)


def test_a_smooth_field_is_not_given_up():
    stiff = BoxSystem.from_expressions("x, y", "300*(cos(y) - x), 1", lower=(-2, 0), upper=(2, 100))
    assert integrate(stiff, [0.0, 0.0], 50.0).status == "horizon"
    assert integrate_batch(stiff, [[0.0, 0.0]], 50.0).statuses.tolist() == ["horizon"]


def test_an_event_on_the_start_of_a_step_adds_no_empty_step():
    def event(t, y):
        return y[0]

    event.direction = 1.0
    stage = solve_stage(lambda t, y: np.ones(1), (0.0, 1.0), np.zeros(1), [event], Budget(), rtol=1e-8, atol=1e-10)
    assert stage.status == 1 and stage.t.tolist() == [0.0] and stage.sol(0.0).tolist() == [0.0]
    assert stage.sol(np.zeros(3)).shape == (1, 3)
    later = solve_stage(lambda t, y: np.ones(1), (0.0, 1.0), -np.ones(1), [event], Budget(), rtol=1e-8, atol=1e-10)
    assert later.t[-1] == pytest.approx(1.0, abs=1e-12) and np.all(np.diff(later.t) > 0.0)


@pytest.mark.parametrize(
    ("start", "status"), [([1.5, 1.0], "kept"), ([1.5, 0.0], "pruned"), ([1.5, 0.2], "pruned"), ([1.5, 0.9], "kept")]
)
@pytest.mark.parametrize("events", [True, False])
def test_starts_where_theta_turns_at_once(start, status, events):
    """At u = 2 g / kappa theta stands still, and what u does next decides: an event on the very start of a stage."""
    for slope in (1.0, 0.5):
        unit = UnitSystem(price=0.75 * slope, weight_decay=0.5 * slope, rate_ratio=1.25, benefit_slope=slope)
        path = integrate(unit, start, 30.0, events=events)
        assert path.status == status and np.all(np.diff(path.times) > 0.0)
    assert math.isfinite(path.states[-1, 0])

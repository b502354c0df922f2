"""Integration of the projected ODE, with its faces treated exactly.

The projected field jumps where theta meets 0 or 1, so a solver that steps across loses its order. Here a trajectory is
cut into stages on which everything is smooth: theta monotone inside the interval, or frozen on a face while the rest of
the state moves. A stage ends at an event (theta reaches a face, its speed changes sign), located to rounding error.
Where theta turns twice within one step of the solver, the step's interpolant shows it (`_stage.first_crossing`).

Source: docs/mathematics.md section 3.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from catode._validate import check_int, check_interval, check_positive, check_real, check_shape, fail
from catode.theory.flow._stage import MAX_EVALUATIONS, Budget, first_crossing, solve_stage
from catode.theory.flow.faces import ActiveSetRun
from catode.theory.flow.trajectory import FaceEvent, Trajectory
from catode.theory.systems.box import BoxSystem

__all__ = ["Flow", "Separatrix", "integrate", "trace_separatrix"]

# scipy.integrate and scipy.optimize take most of a second to import, so the functions that need them import them.
_REFINE = 4  # points returned per solver step
_MAX_STAGES = 1000


class Flow(Protocol):
    """What `integrate` needs of a system: states of shape (..., d) whose last coordinate is theta."""

    def field(self, state: Any) -> np.ndarray:
        """Raw velocity, shape (..., d)."""

    def jacobian(self, state: Any) -> np.ndarray:
        """Derivative of the raw velocity, shape (..., d, d)."""

    def project(self, state: Any) -> np.ndarray:
        """Nearest admissible state, shape (..., d)."""

    def rest(self, state: Any) -> np.ndarray:
        """Limit of the other coordinates while theta is frozen, monotone on the way, shape (..., d - 1) or (...)."""


def integrate(
    system: Flow | BoxSystem,
    start: Any,
    horizon: float,
    *,
    events: bool = True,
    rtol: float = 1e-8,
    atol: float = 1e-10,
    max_evaluations: int = MAX_EVALUATIONS,
) -> Trajectory:
    """Solve the projected ODE from one state.

    Source: docs/mathematics.md section 3.

    Args:
        system: One of the systems of `catode.theory.systems`, anything with the same four methods, or a `BoxSystem`, in
            which every coordinate may have faces.
        start: Initial state, theta last and in [0, 1], shape (d,); a negative benefit counts as 0. In the box of a
            `BoxSystem`.
        horizon: Time at which to stop, in ODE time.
        events: Stop at the first decisive event: theta at 0 and pushed down (the trainer removes the structure
            there), or theta at 1 for ever. Otherwise follow the faces up to the horizon and judge the last state, for
            which "pruned" then means at 0 for ever. A `BoxSystem` has no theta and is always followed to the horizon.
        rtol: Relative tolerance of the solver.
        atol: Absolute tolerance of the solver.
        max_evaluations: Evaluations of the field after which the trajectory counts as failed. A field that jumps is given
            up before that, once its steps are so small that the horizon is out of reach.

    Returns:
        The trajectory. A numerical failure is a status, never an exception.

    Raises:
        ValueError: if `start` is not a finite state with theta in [0, 1], or in the box, a number is out of range, or
            `system` lacks a method or returns velocities of another shape than the states'.
    """
    horizon = check_positive("horizon", horizon)
    rtol = check_interval("rtol", rtol, 0.0, 0.1, True)
    atol = check_positive("atol", atol)
    options = {"rtol": rtol, "atol": atol}
    budget = Budget(check_int("max_evaluations", max_evaluations, low=1))
    if isinstance(system, BoxSystem):
        start = system.check_inside("start", start)
        check_shape("start", start, f"({system.dimension},)", start.ndim == 1)
        with np.errstate(all="ignore"):
            return ActiveSetRun(system, np.array(start), horizon, options, budget).solve()
    start = check_real("start", start, array=True)
    check_shape("start", start, "(d,) with d >= 2", start.ndim == 1 and start.size >= 2)
    if not 0.0 <= start[-1] <= 1.0:
        fail("start", "have a keep probability in [0, 1]", float(start[-1]), index=(start.size - 1,))
    if not all(callable(getattr(system, name, None)) for name in ("field", "jacobian", "project", "rest")):
        fail("system", "have the methods field, jacobian, project and rest", system, hint="Or make it a BoxSystem.")
    start = np.array(system.project(start), dtype=np.float64)
    with np.errstate(all="ignore"):
        speed = np.asarray(system.field(start))
        check_shape("system.field(start)", speed, f"({start.size},), that of `start`", speed.shape == start.shape)
        return _Run(system, horizon, options, budget, start).solve(events)


class _Run:
    """State of one integration: time, state, direction of theta, and the pieces collected so far."""

    def __init__(
        self, system: Flow, horizon: float, options: dict[str, Any], budget: Budget, start: np.ndarray
    ) -> None:
        self.budget = budget
        self.system = system
        self.horizon = horizon
        self.options = options
        self.events: list[FaceEvent] = []
        self.t = 0.0
        self.y = start
        self.times = [np.zeros(1)]
        self.states = [start[None].copy()]
        self.turned = self.overflow = False

    def solve(self, events: bool) -> Trajectory:
        if not self._defined():
            return self._undefined()
        direction = self._direction()
        if direction == 0:
            return self._finish("horizon", "The state is an equilibrium.", still=True)
        stalls = 0
        for _ in range(_MAX_STAGES):
            face = 0.0 if direction < 0 else 1.0
            on_face = self.y[-1] == face
            if on_face and events:
                if face == 0.0:
                    return self._finish("pruned", f"theta reached 0 at time {self.t:.6g}.")
                if face == 1.0 and self._stays(face):
                    return self._finish("kept", f"theta reached 1 at time {self.t:.6g} and stays there.")
            if self.t >= self.horizon:
                return self._judge()
            if not self._defined():
                return self._undefined()
            before = self.t
            failure = self._slide(direction) if on_face else self._move(direction, face)
            if failure:
                return self._finish("failed", failure)
            if self.turned:
                direction = -direction
                stalls = stalls + 1 if self.t == before else 0
                if stalls == 3:  # theta turns both ways without any time passing
                    return self._finish("horizon", "The state is an equilibrium to rounding error.", still=True)
        return self._finish("failed", f"theta changed direction {_MAX_STAGES} times before time {self.t:.6g}.")

    def _defined(self) -> bool:
        """Whether the field is finite here: from a velocity of NaN the solver would not return."""
        return bool(np.isfinite(self.system.field(self.y)).all())

    def _undefined(self) -> Trajectory:
        return self._finish("failed", f"The field is not finite at time {self.t:.6g}, state {self.y.tolist()}.")

    def _speed(self) -> float:
        return float(self.system.field(self.y)[-1])

    def _direction(self) -> int:
        """Sign of the first derivative of theta that is not zero; 0 at an equilibrium."""
        velocity = np.asarray(self.system.field(self.y))
        if velocity[-1] != 0.0:
            return int(np.sign(velocity[-1]))
        return int(np.sign(np.asarray(self.system.jacobian(self.y))[-1] @ velocity))

    def _stays(self, face: float) -> bool:
        """Whether theta's speed points out of the face now and, with theta frozen there, for ever."""
        sign = 1.0 if face == 1.0 else -1.0
        limit = np.append(np.atleast_1d(self.system.rest(self.y)), face)
        pushed = sign * self._speed() > 0.0 or (self._speed() == 0.0 and self._direction() == sign)
        return pushed and sign * float(self.system.field(limit)[-1]) >= 0.0

    def _move(self, direction: int, face: float) -> str | None:
        """Integrate inside the interval until theta reaches `face`, its speed changes sign, or time is up."""

        from scipy.optimize import brentq

        def field(t: float, y: np.ndarray) -> np.ndarray:
            return self.system.field(y)

        def arrive(t: float, y: np.ndarray) -> float:
            return y[-1] - face

        def turn(t: float, y: np.ndarray) -> float:
            return self.system.field(y)[-1]

        arrive.direction, turn.direction = direction, -direction
        span, began = (self.t, self.horizon), self.t
        solution = solve_stage(field, span, self.y, (arrive, turn), self.budget, **self.options)
        arrived, self.turned = solution.t_events[0].size > 0, solution.t_events[1].size > 0
        end, theta = solution.t[-1], solution.y[-1, -1]
        if not arrived and direction * (theta - face) >= 0.0 and end > self.t:
            # Out of the interval and back within one step: theta is monotone up to the turn, so it crossed once.
            arrived, self.turned = True, False
            if direction * (solution.sol(self.t)[-1] - face) < 0.0 < direction * (theta - face):
                end = brentq(lambda t: solution.sol(t)[-1] - face, self.t, end, xtol=1e-15, rtol=1e-14)
        elif arrived:
            self.turned = False
        slack = 1e-2 * self.options["atol"]
        crossed = first_crossing(solution, lambda y: direction * (y[-1] - face), end, slack)
        if crossed is not None and crossed > began:  # theta turned twice within a step, beyond the face
            arrived, self.turned, end = True, False, crossed
        crossed = first_crossing(solution, lambda y: direction * (1.0 - face - y[-1]), end, slack)
        if crossed is not None and crossed > began:  # likewise, beyond the other face: it is on its way from there
            arrived, self.turned, end, face = True, True, crossed, 1.0 - face
        self._append(solution, end, (), face if arrived else None)
        if arrived:
            self.events.append(FaceEvent(self.t, self.y.size - 1, "arrive"))
        return self._failure(solution)

    def _slide(self, direction: int) -> str | None:
        """Integrate the other coordinates with theta frozen, until its speed points inwards or time is up."""
        theta = self.y[-1]

        def field(t: float, x: np.ndarray) -> np.ndarray:
            return self.system.field(np.append(x, theta))[:-1]

        def turn(t: float, x: np.ndarray) -> float:
            return self.system.field(np.append(x, theta))[-1]

        def inward(x: np.ndarray) -> np.ndarray:
            states = np.vstack([x, np.full(x.shape[1], theta)]).T
            return -direction * np.asarray(self.system.field(states))[:, -1]

        turn.direction = -direction
        began = self.t
        span = (began, self.horizon)
        solution = solve_stage(field, span, self.y[:-1], (turn,), self.budget, **self.options)
        self.turned, end = solution.t_events[0].size > 0, solution.t[-1]
        if end > began:
            paces = np.abs(inward(solution.y)).max(initial=0.0)
            crossed = first_crossing(solution, inward, end, 1e-12 * paces)
            if crossed is not None and crossed > began:  # its speed turned inwards and back within a step
                self.turned, end = True, crossed
        self._append(solution, end, (theta,), None)
        if self.turned:
            self.events.append(FaceEvent(self.t, self.y.size - 1, "leave"))
        return self._failure(solution)

    def _append(self, solution: Any, end: float, suffix: tuple[float, ...], face: float | None) -> None:
        """Collect the stage up to time `end`, with theta exactly on `face` at its end where it arrived there."""
        grid = solution.t[solution.t < end]
        grid = np.append(grid, end)
        fractions = np.arange(1, _REFINE + 1) / _REFINE
        times = (grid[:-1, None] + np.diff(grid)[:, None] * fractions).ravel()
        if not times.size:
            times = np.array([end])
        times[-1] = end
        states = solution.sol(times).T
        if end == solution.t[-1]:
            states[-1] = solution.y[:, -1]
        if suffix:
            states = np.column_stack([states, np.broadcast_to(suffix, (len(states), len(suffix)))])
        finite = np.logical_and.accumulate(np.isfinite(states).all(axis=1))
        self.overflow = not finite[-1]
        if self.overflow:
            times, states = times[finite], states[finite]
            if not times.size:
                return
            end = times[-1]
        states = np.array(self.system.project(states))  # errors of the order of the tolerances, near a boundary
        if face is not None and not self.overflow:
            states[-1, -1] = face
        fresh = times > self.t
        self.t, self.y = float(end), states[-1].copy()
        if fresh.any():
            self.times.append(times[fresh])
            self.states.append(states[fresh])
        else:  # an event at the very start of the stage
            self.states[-1][-1] = self.y

    def _failure(self, solution: Any) -> str | None:
        if self.overflow:
            return f"The solver stopped at time {self.t:.6g}: the state grew beyond the range of floats."
        if solution.status < 0:
            return f"The solver stopped at time {self.t:.6g}: {solution.message}"
        return None

    def _judge(self) -> Trajectory:
        """Status of the state at the horizon."""
        for face, status in ((0.0, "pruned"), (1.0, "kept")):
            if self.y[-1] == face and self._stays(face):
                return self._finish(status, f"theta is {face:.0f} at the horizon {self.t:.6g} and stays there.")
        return self._finish("horizon", f"Undecided at the horizon {self.t:.6g}: theta is {self.y[-1]:.6g}.")

    def _finish(self, status: str, message: str, *, still: bool = False) -> Trajectory:
        if still:
            self.times.append(np.array([self.horizon]))
            self.states.append(self.y[None])
        times, states = np.concatenate(self.times), np.concatenate(self.states)
        return Trajectory(times, states, status, message, tuple(self.events))


class Separatrix(np.ndarray):
    """Points that `trace_separatrix` found, shape (n, 2), and how the tracing ended.

    Attributes:
        status: "complete" (both ends were reached), "horizon" (time was up before) or "failed" (a numerical failure, or
            the budget was used up; the points up to there are valid).
        message: One sentence that says the same, with numbers.
    """

    status: str = "complete"
    message: str = ""

    def __array_finalize__(self, source: Any) -> None:
        self.status, self.message = getattr(source, "status", "complete"), getattr(source, "message", "")

    def __reduce__(self) -> tuple[Any, ...]:
        make, arguments, state = super().__reduce__()
        return make, arguments, (state, self.status, self.message)

    def __setstate__(self, state: tuple[Any, str, str]) -> None:
        super().__setstate__(state[0])
        self.status, self.message = state[1:]


def trace_separatrix(
    system: Any,
    *,
    low: float = 0.01,
    high: float = 3.0,
    rtol: float = 1e-10,
    atol: float = 1e-12,
    max_evaluations: int = MAX_EVALUATIONS,
) -> Separatrix:
    """Follow the stable manifold of the saddle backwards in time, along the raw field.

    It needs no closed form: the start lies on the stable eigenvector, a distance of 1e-6 from the saddle, and backward
    integration contracts the error towards the manifold.

    Args:
        system: A system with a `saddle`, a `field` and a `jacobian`.
        low: Where to stop on the left, as a multiple of the saddle's first coordinate.
        high: Where to stop on the right, likewise.
        rtol: Relative tolerance of the solver.
        atol: Absolute tolerance of the solver.
        max_evaluations: Evaluations of the field after which each of the two branches ends.

    Returns:
        Points (size, theta) with increasing size, the saddle among them, shape (n, 2); theta may leave [0, 1]. A
        numerical failure is its `status`, never an exception.

    Raises:
        ValueError: if `low` or `high` lies on the wrong side of 1, or the equilibrium is not a saddle.
    """
    low = check_interval("low", low, 0.0, 1.0, False, True)
    high = check_interval("high", high, 1.0, np.inf, True, True)
    rtol, atol = check_interval("rtol", rtol, 0.0, 0.1, True), check_positive("atol", atol)
    max_evaluations = check_int("max_evaluations", max_evaluations, low=1)
    saddle = np.asarray(system.saddle)
    values, vectors = np.linalg.eig(system.jacobian(saddle))
    if np.iscomplexobj(values) or not values.min() < 0.0 < values.max():
        fail("system", "have a saddle with one stable direction", tuple(values.tolist()))
    rate, stable = -values.min(), vectors[:, values.argmin()]
    stable = stable / stable[0] * saddle[0]

    def field(t: float, y: np.ndarray) -> np.ndarray:
        return -np.asarray(system.field(y))

    branches, status, message = [], "complete", f"From {low:g} to {high:g} times the saddle's first coordinate."
    for sign, limit in ((-1.0, low), (1.0, high)):
        start, bound = saddle + sign * 1e-6 * stable, limit * saddle[0]

        def reach(t: float, y: np.ndarray, bound: float = bound) -> float:
            return y[0] - bound

        reach.direction = 0.0
        budget, span = Budget(max_evaluations), (0.0, 1e3 / rate)
        with np.errstate(all="ignore"):
            stage = solve_stage(field, span, start, (reach,), budget, rtol=rtol, atol=atol * min(1.0, saddle[0]))
        finite = np.logical_and.accumulate(np.isfinite(stage.y).all(axis=0))
        branches.append(stage.y.T[finite])
        if stage.status != 1:
            at = f"The {'left' if sign < 0.0 else 'right'} branch ended at {branches[-1][-1, 0]:.6g}, short of {bound:.6g}"
            status, message = "failed" if stage.status < 0 else "horizon", f"{at}: {stage.message}"
    points = np.concatenate([branches[0][::-1], saddle[None], branches[1]]).view(Separatrix)
    points.status, points.message = status, message
    return points

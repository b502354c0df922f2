"""One trajectory of a projected flow on a box of any dimension, by an active set of faces.

A stage has a fixed set of coordinates frozen on their faces, so that its right-hand side is smooth; the solver runs it
up to the first event: a free coordinate arrives at a face, or the raw speed of a frozen one turns inwards. Excursions
that begin and end between two steps are looked for on the dense output. `catode.theory.flow.integrate` is the way in.

Source: docs/mathematics.md section 3, with faces for every coordinate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from catode.theory.flow._stage import Budget, first_crossing, solve_stage
from catode.theory.flow.trajectory import FaceEvent, Trajectory
from catode.theory.systems.box import BoxSystem

__all__ = ["ActiveSetRun"]

_REFINE = 6  # points looked at, and returned, per solver step
_MAX_STAGES = 10_000


class ActiveSetRun:
    """State of one integration.

    Args:
        system: A field on a box.
        start: A state in the box, shape (d,).
        horizon: Time at which to stop.
        options: The tolerances, `rtol` and `atol`.
        budget: Evaluations of the field that may be spent.
    """

    def __init__(
        self, system: BoxSystem, start: np.ndarray, horizon: float, options: dict[str, Any], budget: Budget
    ) -> None:
        self.budget = budget
        self.system, self.horizon, self.options = system, horizon, options
        self.t, self.y = 0.0, start
        self.times, self.states = [np.zeros(1)], [start[None].copy()]
        self.events: list[FaceEvent] = []
        self.ends = np.stack([system.lower, system.upper])
        self.side = np.zeros(start.size, dtype=int)  # -1 on the lower face, 1 on the upper one, 0 free

    def solve(self) -> Trajectory:
        """Integrate up to the horizon."""
        for i in range(self.y.size):
            self._settle(i)
        stalls = 0
        for _ in range(_MAX_STAGES):
            velocity = self._velocity(self.y)
            if not np.isfinite(velocity).all():
                return self._finish("failed", f"The field is not finite at time {self.t:.6g}, state {self.y.tolist()}.")
            if not velocity.any():
                self.times.append(np.array([self.horizon]))
                self.states.append(self.y[None].copy())
                return self._finish("horizon", "The state is at rest.")
            before = self.t
            failure = self._stage()
            if failure:
                return self._finish("failed", f"The solver stopped at time {self.t:.6g}: {failure}")
            if self.t >= self.horizon:
                return self._finish("horizon", f"The horizon {self.horizon:.6g} was reached.")
            stalls = stalls + 1 if self.t == before else 0
            if stalls > 4 * self.y.size:
                return self._finish("failed", f"No time passes at {self.t:.6g}: the faces cannot be told apart.")
        return self._finish("failed", f"Faces were met {_MAX_STAGES} times before time {self.t:.6g}.")

    def _velocity(self, y: np.ndarray) -> np.ndarray:
        return np.where(self.side == 0, self.system.field(y), 0.0)

    def _settle(self, i: int, *, turning: bool = False) -> None:
        """Decide whether coordinate i, where it is on a face, is held there.

        Args:
            i: The coordinate.
            turning: Whether its speed is 0 but for rounding, so that the sign found means nothing.
        """
        self.side[i] = 0
        for side, end in zip((-1, 1), self.ends[:, i], strict=True):
            if self.y[i] == end:
                push = 0.0 if turning else side * float(self.system.field(self.y)[i])
                if push == 0.0:  # the first derivative of the speed decides
                    push = side * float(self.system.jacobian(self.y)[i] @ self._velocity(self.y))
                if push >= 0.0:
                    self.side[i] = side

    def _stage(self) -> str | None:
        """Integrate up to the next event; returns what went wrong."""
        free = np.flatnonzero(self.side == 0)
        whole = self.y.copy()

        def full(x: np.ndarray) -> np.ndarray:
            y = np.repeat(whole[:, None], x.shape[1], axis=1) if x.ndim == 2 else whole.copy()
            y[free] = x
            return y

        def field(t: float, x: np.ndarray) -> np.ndarray:
            return self.system.field(full(x))[free]

        def speed(x: np.ndarray, i: int, sign: int) -> np.ndarray:
            value = sign * np.moveaxis(self.system.field(full(x).T), -1, 0)[i]
            return np.where(value == 0.0, -np.finfo(float).tiny, value)  # at rest it stays where it is

        # Each event: its coordinate, the side of the face, and a function that is negative before it and positive after.
        watched: list[tuple[int, int, Callable[[np.ndarray], np.ndarray]]] = []
        for place, i in enumerate(free):
            for side, end in zip((-1, 1), self.ends[:, i], strict=True):
                if self.y[i] == end:  # it has just come off: it cannot be back before it turns
                    watched.append((int(i), 0, lambda x, i=i, s=side: speed(x, i, s)))
                elif np.isfinite(end):
                    watched.append((int(i), side, lambda x, p=place, s=side, e=end: s * (x[p] - e)))
        for i in np.flatnonzero(self.side):
            watched.append((int(i), 0, lambda x, i=i, s=-self.side[i]: speed(x, i, s)))
        calls = []
        for _, _, value in watched:

            def call(t: float, x: np.ndarray, value: Callable[[np.ndarray], np.ndarray] = value) -> float:
                return float(value(x))

            call.direction = 1.0
            calls.append(call)
        span = (self.t, self.horizon)
        solution = solve_stage(field, span, self.y[free], calls, self.budget, **self.options)
        end = float(solution.t[-1])
        met = [k for k, found in enumerate(solution.t_events or ()) if found.size]
        fraction = np.arange(1, _REFINE + 1) / _REFINE
        fine = (solution.t[:-1, None] + np.diff(solution.t)[:, None] * fraction).ravel()
        inside = solution.sol(fine) if fine.size else np.empty((free.size, 0))
        for k, (_, side, value) in enumerate(watched):
            found = self._passed(solution, value, fine, inside, end)
            if found is None and end > self.t:
                slack = 1e-2 * self.options["atol"] if side else 1e-12 * np.abs(value(solution.y)).max(initial=0.0)
                found = first_crossing(solution, value, end, slack)
                found = None if found == self.t else found
            if found is not None:
                end, met = found, [k]
        began = self.t
        if not self._append(full, solution, fine, inside, end):
            return "the state grew beyond the range of floats."
        if solution.status < 0 and not met:
            return str(solution.message)
        for k in met:
            i, side, _ = watched[k]
            if side:
                self.y[i] = self.states[-1][-1, i] = self.ends[(side + 1) // 2, i]
                self.events.append(FaceEvent(self.t, i, "arrive"))
        for k in met:
            i, side, _ = watched[k]
            held = self.side[i]
            self._settle(i, turning=not side or self.t == began)
            if held and not self.side[i]:
                self.events.append(FaceEvent(self.t, i, "leave"))
        decided = {watched[k][0] for k in met}
        for i in (int(i) for i in free if i not in decided and self.y[i] in self.ends[:, i]):
            self._settle(i, turning=self.t == began)  # it arrived at the same time as another one
            if self.side[i]:
                self.events.append(FaceEvent(self.t, i, "arrive"))
        return None

    @staticmethod
    def _passed(
        solution: Any, value: Callable[[np.ndarray], np.ndarray], times: np.ndarray, states: np.ndarray, end: float
    ) -> float | None:
        """Time of a crossing before `end` that is over again by then; None if there is none."""
        from scipy.optimize import brentq

        values = np.asarray(value(states), dtype=np.float64) if times.size else np.empty(0)
        over = np.flatnonzero((values > 0.0) & (times < end))
        if not over.size:
            return None
        k = int(over[0])
        before = times[k - 1] if k else float(solution.t[0])
        level = [float(value(solution.sol(t))) for t in (before, times[k])]
        if level[0] >= 0.0:  # it starts on the face
            return float(before)
        return float(brentq(lambda t: float(value(solution.sol(t))), before, times[k], xtol=1e-15, rtol=1e-14))

    def _append(self, full: Any, solution: Any, times: np.ndarray, states: np.ndarray, end: float) -> bool:
        """Collect the stage up to `end`, or to its last finite state; returns whether that is all of it.

        Errors of the order of the tolerances are clipped at the faces.
        """
        keep = times < end
        last = solution.y[:, -1] if end == solution.t[-1] else solution.sol(end)
        states = np.clip(full(np.column_stack([states[:, keep], last])).T, self.ends[0], self.ends[1])
        finite = np.logical_and.accumulate(np.isfinite(states).all(axis=1))
        times, states = np.append(times[keep], end)[finite], states[finite]
        if times.size:
            if times[-1] > self.t:
                self.times.append(times)
                self.states.append(states)
            self.t, self.y = float(times[-1]), states[-1].copy()
        return bool(finite[-1])

    def _finish(self, status: str, message: str) -> Trajectory:
        return Trajectory(np.concatenate(self.times), np.concatenate(self.states), status, message, tuple(self.events))

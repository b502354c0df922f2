"""One smooth stage of a trajectory: what `scipy.integrate.solve_ivp` does with DOP853, within a budget.

Two things differ. A stage that makes no headway (a field that jumps makes the solver chatter) ends with a status, and an
event on the very start of a step adds no empty step, which scipy below 1.16 does not take. `first_crossing` looks between
the ends of the steps, where the solver does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from catode.theory.flow._batch_scheme import CHECK, HOPELESS

__all__ = ["Budget", "Stage", "first_crossing", "solve_stage"]

MAX_EVALUATIONS = 500_000
"""Evaluations of the field after which a trajectory counts as failed."""

_NODES, _FINE = 13, 64  # Chebyshev nodes of a step, and points at which their polynomial is looked at


class Budget:
    """Evaluations of the field left to a trajectory, over all its stages."""

    def __init__(self, evaluations: int = MAX_EVALUATIONS) -> None:
        self.evaluations = self.left = evaluations


@dataclass
class Stage:
    """What `solve_ivp` returns: times (n,), states (d, n), times of each event, dense output, status and message."""

    t: np.ndarray
    y: np.ndarray
    t_events: list[np.ndarray]
    sol: Callable[[Any], np.ndarray]
    status: int
    message: str


def solve_stage(
    field: Callable[[float, np.ndarray], np.ndarray],
    span: tuple[float, float],
    start: np.ndarray,
    events: Sequence[Any],
    budget: Budget,
    *,
    rtol: float,
    atol: float | np.ndarray,
) -> Stage:
    """Integrate up to the first event, the end of the span, or the end of the budget.

    Args:
        field: Velocity of a time and a state, shape (d,).
        span: Times of the start and of the end.
        start: State, shape (d,).
        events: Functions of a time and a state, each with its `direction`; each ends the stage.
        budget: What is left to the trajectory; charged.
        rtol: Relative tolerance.
        atol: Absolute tolerance, shape () or (d,).

    Returns:
        The stage; its status is -1 where the solver failed or the budget ended, 1 at an event, and 0 at the end.
    """
    from scipy.integrate import DOP853, OdeSolution
    from scipy.optimize import brentq

    if not np.isfinite(field(span[0], start)).all():  # the solver would look for a first step without end
        return _unmoved(span[0], start, len(events), "the field is not finite at the start.")
    solver = DOP853(field, span[0], start, span[1], rtol=rtol, atol=atol)
    times, states, pieces = [span[0]], [start], []
    values = [event(span[0], start) for event in events]
    found: list[list[float]] = [[] for _ in events]
    status, message = 0, "The end of the span was reached."
    steps, mark, used = 0, span[0], 0
    narrow = 4.0 * np.finfo(np.float64).eps
    while solver.status == "running":
        told = solver.step()
        budget.left -= solver.nfev - used
        used = solver.nfev
        if solver.status == "failed":
            status, message = -1, told
            break
        old, t, y = solver.t_old, solver.t, solver.y
        piece = solver.dense_output()
        now = [event(t, y) for event in events]
        roots = []
        for k, (event, before, after) in enumerate(zip(events, values, now, strict=True)):
            rises, falls = before <= 0.0 <= after, before >= 0.0 >= after
            if (rises and event.direction >= 0) or (falls and event.direction <= 0):
                root = brentq(lambda s, e=event, p=piece: e(s, p(s)), old, t, xtol=narrow, rtol=narrow)
                roots.append((root, k))
        values = now
        if roots:
            t, first = min(roots)
            y = piece(t)
            found[first].append(t)
            status, message = 1, "An event was met."
        if t > times[-1]:
            times.append(t)
            states.append(y)
            pieces.append(piece)
        if roots:
            break
        steps += 1
        if steps % CHECK == 0:
            if (span[1] - t) * CHECK > HOPELESS * (t - mark):
                hint = "a field that jumps makes the solver chatter"
                status, message = -1, f"the steps became so small that the horizon is out of reach; {hint}."
                break
            mark = t
        if budget.left <= 0:
            status, message = -1, f"the budget of {budget.evaluations} evaluations of the field was used up."
            break
    stage = _unmoved(span[0], start, len(events), message)  # what it is where an event lies on the very start
    stage.t_events, stage.status = [np.array(f) for f in found], status
    if pieces:
        stage.t, stage.y, stage.sol = np.array(times), np.array(states).T, OdeSolution(times, pieces)
    return stage


def _unmoved(t: float, start: np.ndarray, n_events: int, message: str) -> Stage:
    """A stage that failed where it began."""

    def sol(at: Any) -> np.ndarray:
        return np.asarray(start) if np.ndim(at) == 0 else np.repeat(np.asarray(start)[:, None], len(at), axis=1)

    return Stage(np.array([t]), np.array([start]).T, [np.empty(0) for _ in range(n_events)], sol, -1, message)


def first_crossing(stage: Stage, value: Callable[[np.ndarray], np.ndarray], end: float, slack: float) -> float | None:
    """First time before `end` at which a value turns positive within a step, even if it is negative again at its end.

    On each step the value is replaced by its polynomial of degree 12, whose peaks are found between 64 points.

    Args:
        stage: A stage.
        value: Function of states (d, k) with values (k,), not positive at the start.
        end: Where to stop looking.
        slack: How far above 0 a peak has to lie.

    Returns:
        The time; None where there is none.
    """
    from scipy.optimize import brentq

    begin = stage.t[:-1][stage.t[:-1] < end]
    if not begin.size:
        return None
    stop = np.minimum(stage.t[1 : begin.size + 1], end)
    angle = np.pi * (np.arange(_NODES) + 0.5) / _NODES
    nodes, grid = -np.cos(angle), np.linspace(-1.0, 1.0, _FINE + 1)
    weights = (-1.0) ** np.arange(_NODES) * np.sin(angle)
    apart = grid[:, None] - nodes
    apart[apart == 0.0] = 1e-300
    shares = weights / apart
    shares /= shares.sum(axis=1, keepdims=True)
    middle, half = 0.5 * (begin + stop), 0.5 * (stop - begin)
    at = (middle[:, None] + half[:, None] * nodes).ravel()
    fine = np.asarray(value(stage.sol(at)), dtype=np.float64).reshape(begin.size, _NODES) @ shares.T
    bend = fine[:, 2:] - 2.0 * fine[:, 1:-1] + fine[:, :-2]
    tilt = 0.5 * (fine[:, 2:] - fine[:, :-2])
    with np.errstate(divide="ignore", invalid="ignore"):
        move = np.where(bend < 0.0, np.clip(-tilt / bend, -1.0, 1.0), 0.0)
    peak = fine[:, 1:-1] + move * tilt + 0.5 * move * move * bend
    for row, column in np.argwhere(peak > slack):
        x = grid[column + 1] + move[row, column] * (grid[1] - grid[0])
        top = float(middle[row] + half[row] * x)
        if not float(value(stage.sol(np.array([top])))[0]) > slack:
            continue
        low = float(begin[row])
        before = (fine[row, : column + 2] <= 0.0).nonzero()[0]
        if before.size:
            low = max(low, float(middle[row] + half[row] * grid[before[-1]]))
        if low >= top or float(value(stage.sol(np.array([low])))[0]) >= 0.0:
            low = float(begin[row])
        if float(value(stage.sol(np.array([low])))[0]) >= 0.0:
            return low
        return float(brentq(lambda t: float(value(stage.sol(np.array([t])))[0]), low, top, xtol=1e-15, rtol=1e-14))
    return None

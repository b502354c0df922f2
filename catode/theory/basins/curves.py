"""Curves of planar flows: the lines on which a component of the field vanishes, and the manifolds of saddles.

Source: docs/mathematics.md sections 3 (the projected flow) and 4 (the stable manifolds that bound the domains).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from catode._validate import check_int, check_interval, check_shape, fail
from catode.theory.basins.equilibria import Equilibrium
from catode.theory.flow._stage import Budget, solve_stage
from catode.theory.systems.box import BoxSystem, as_box
from catode.theory.systems.planar import PlanarSystem

__all__ = ["ENDS", "Branch", "Manifolds", "branches", "manifolds", "nullclines"]

ENDS = ("face", "window", "equilibrium", "horizon", "failed")
"""How a branch can end; see `Branch`."""

_MAX_STAGES = 100
_FINE = 16  # samples per solver step from which arc length is measured


@dataclass(frozen=True, eq=False, kw_only=True)
class Branch:
    """One half of an invariant manifold.

    Args:
        points: A polyline from the saddle on, even in arc length (in widths of the window) between corners, shape (n, 2).
        end: "face" (left the box), "window" (left the window), "equilibrium" (came to rest at one), "horizon" (went on
            too long, e.g. on a cycle) or "failed" (numerical failure; the points up to it are valid).
        message: One sentence that says the same, with numbers.
    """

    points: np.ndarray
    end: str
    message: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Manifolds:
    """The invariant manifolds of a planar saddle.

    Args:
        saddle: The saddle.
        stable: Branches that run into it: two in the interior, one where the saddle lies on a face.
        unstable: The two branches that run out of it.
        tolerance: Largest distance of a point from the manifold, as a share of the window's widths.
    """

    saddle: Equilibrium
    stable: tuple[Branch, ...]
    unstable: tuple[Branch, ...]
    tolerance: float


def nullclines(
    system: BoxSystem | PlanarSystem, *, window: Any = None, resolution: int = 200
) -> dict[str, tuple[np.ndarray, ...]]:
    """Lines on which a component of the raw field vanishes, inside the box.

    Every vertex lies on the nullcline to rounding error and on a line of the grid, and a line that leaves the window
    ends exactly on its edge; between two vertices the chord deviates by the order of a cell squared. Where two lines
    cross, or a component touches zero without changing sign, the grid does not resolve it.

    Args:
        system: A planar field.
        window: Pair (lower, upper) of corners, each of shape (2,); None for the box, or for a comparison system sizes
            up to four times the saddle's.
        resolution: Cells along each side.

    Returns:
        For the name of each coordinate, polylines of shape (n, 2).

    Raises:
        ValueError: if the system is not planar, or the window is missing, empty or not in the box.
    """
    from contourpy import contour_generator

    box = _planar(system)
    low, high = _window(system, box, window)
    resolution = check_int("resolution", resolution, low=2)
    # One cell more on each side, so that a line along a face is one; the box's own edges are lines of the grid.
    axes = [a + (b - a) * np.arange(-1, resolution + 2) / resolution for a, b in zip(low, high, strict=True)]
    for axis, a, b in zip(axes, low, high, strict=True):
        axis[1], axis[-2] = a, b
    grid = np.stack(np.meshgrid(*axes), axis=-1)
    with np.errstate(all="ignore"):
        values = box.field(grid)
        lines = {}
        for i, name in enumerate(box.names):
            level = np.ma.masked_invalid(values[..., i])
            pieces = []
            if level.count():
                for line in contour_generator(*axes, level).lines(0.0):
                    line = _settle(lambda state, i=i: box.field(state)[..., i], line, axes)
                    inside = np.all((line >= low) & (line <= high), axis=1)
                    cuts = np.flatnonzero(np.diff(inside)) + 1
                    runs = zip(np.split(line, cuts), np.split(inside, cuts), strict=True)
                    pieces += [run for run, kept in runs if kept[0] and len(run) > 1]
            lines[name] = tuple(pieces)
    return lines


def manifolds(
    system: BoxSystem | PlanarSystem,
    saddle: Equilibrium,
    *,
    window: Any = None,
    tolerance: float = 1e-8,
    points: int = 200,
) -> Manifolds:
    """Stable and unstable manifolds of a planar saddle of the projected flow.

    The stable branches follow the raw field backwards until it leaves the box: no trajectory comes from beyond. The
    unstable ones follow the projected flow, and slide along the faces. A branch starts on the eigenvector, so near to
    the saddle that the manifold's curvature is below the tolerance, and the flow contracts errors towards it.

    Args:
        system: A planar field.
        saddle: One of its equilibria that is a saddle, in the interior or pushed against one face.
        window: As in `nullclines`; branches stop there.
        tolerance: Largest distance of a point from the manifold, as a share of the window's widths, in [1e-10, 0.01].
            It holds for the points; chords between them deviate by the order of their spacing squared.
        points: About how many points a branch gets.

    Returns:
        The branches. A numerical failure is a status of its branch, never an exception.

    Raises:
        ValueError: if the equilibrium is not such a saddle inside the window, or an argument is out of range.
    """
    stable, unstable = (branches(system, saddle, way, window, tolerance, points) for way in (-1.0, 1.0))
    return Manifolds(saddle=saddle, stable=stable, unstable=unstable, tolerance=float(tolerance))


def branches(
    system: BoxSystem | PlanarSystem, saddle: Equilibrium, way: float, window: Any, tolerance: float, points: int
) -> tuple[Branch, ...]:
    """Branches of the unstable (way 1) or stable (way -1) manifold; arguments and errors as in `manifolds`."""
    box = _planar(system)
    low, high = _window(system, box, window)
    tolerance = check_interval("tolerance", tolerance, 1e-10, 0.01)
    points = check_int("points", points, low=2)
    if saddle.stability != "saddle" or saddle.resting:
        fail("saddle", "be a saddle with no frozen coordinate at rest", saddle.stability)
    if np.any((saddle.state < low) | (saddle.state > high)):
        fail("saddle", f"lie in the window {low.tolist()} to {high.tolist()}", saddle.state.tolist())
    free = np.flatnonzero(np.array(saddle.face) == 0)
    rates, vectors = np.linalg.eig(box.jacobian(saddle.state)[np.ix_(free, free)])
    tracer = _Tracer(box, low, high, tolerance, 1.0 / np.abs(rates.real).min(), points)
    starts = [saddle.state]  # what is pushed against a face runs into the saddle along one trajectory
    if way > 0.0 or saddle.interior:
        vector = np.zeros(2)
        vector[free] = vectors[:, (way * rates.real).argmax()].real
        vector *= 1e-2 * np.sqrt(tolerance) / np.linalg.norm(vector / (high - low))
        starts = [saddle.state - vector, saddle.state + vector]
    return tuple(tracer.follow(saddle, start, way) for start in starts)


def _planar(system: BoxSystem | PlanarSystem) -> BoxSystem:
    box = as_box(system)
    if box.dimension != 2:
        fail("system", "have two coordinates", box.names)
    return box


def _window(system: BoxSystem | PlanarSystem, box: BoxSystem, window: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper corner of the window, each of shape (2,)."""
    if window is None:
        low, high = box.lower, box.upper
        if isinstance(system, PlanarSystem):
            high = np.array([4.0 * system.saddle[0], 1.0])
        if not np.isfinite([low, high]).all():
            fail("window", "be given for a box without end", None, hint="Pass (lower, upper), two corners in the box.")
        return low, high
    try:
        low, high = (box.check_inside("window", corner) for corner in window)
    except TypeError:
        fail("window", "be a pair of corners", window)
    check_shape("window", np.stack([low, high]), "(2, 2)", low.shape == high.shape == (2,))
    if np.any(low >= high):
        fail("window", "have its lower corner below its upper one", (low.tolist(), high.tolist()))
    return low, high


def _settle(value: Callable[[np.ndarray], np.ndarray], line: np.ndarray, axes: Sequence[np.ndarray]) -> np.ndarray:
    """Move each vertex of a contour to the zero on its edge of the grid, by bisection."""
    line, low, high, gaps = line.copy(), line.copy(), line.copy(), np.empty(line.shape)
    for j, axis in enumerate(axes):
        after = np.clip(np.searchsorted(axis, line[:, j]), 1, axis.size - 1)
        node = after - (line[:, j] - axis[after - 1] < axis[after] - line[:, j])
        gaps[:, j] = np.abs(line[:, j] - axis[node]) / (axis[1] - axis[0])
        beside = gaps[:, j] < 1e-6  # at a node the zero may lie in either cell
        low[:, j] = axis[np.where(beside, np.maximum(node - 1, 0), after - 1)]
        high[:, j] = axis[np.where(beside, np.minimum(node + 1, axis.size - 1), after)]
        line[:, j] = np.where(gaps[:, j] < 1e-12, axis[node], line[:, j])
    across = gaps.argmin(axis=1)[:, None] == np.arange(2)  # the coordinate of the grid line that holds the vertex
    low, high = np.where(across, line, low), np.where(across, line, high)
    sign = np.sign(value(low))
    proper = sign * np.sign(value(high)) < 0.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        same = (np.sign(value(middle)) == sign)[:, None]
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return np.where(proper[:, None], high, line)


class _Tracer:
    """Follows the projected flow of a planar field forwards, or its raw field backwards, in a window."""

    def __init__(
        self, box: BoxSystem, low: np.ndarray, high: np.ndarray, tolerance: float, slowest: float, points: int
    ) -> None:
        self.box, self.low, self.high, self.points = box, low, high, points
        self.width = high - low
        self.still = 1e-2 * tolerance / slowest
        self.horizon = 1e4 * slowest
        self.options = {
            "rtol": max(1e-4 * tolerance, 3e-14),
            "atol": 1e-4 * tolerance * self.width,
        }

    def follow(self, saddle: Equilibrium, start: np.ndarray, way: float) -> Branch:
        budget = Budget()
        side = np.array(saddle.face) if way > 0.0 else np.zeros(2, dtype=int)
        t, y = 0.0, np.clip(start, self.low, self.high)
        stages: list[tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], np.ndarray]]] = []
        while True:
            held = side != 0

            def field(_: float, x: np.ndarray, held: np.ndarray = held) -> np.ndarray:
                return np.where(held, 0.0, way * self.box.field(self.box.project(x)))

            events = self._events(side, field)
            solution = solve_stage(field, (t, self.horizon), y, events, budget, **self.options)
            fine = (solution.t[:-1, None] + np.diff(solution.t)[:, None] * np.arange(_FINE) / _FINE).ravel()
            fine = np.append(fine, solution.t[-1])
            stages.append((fine, np.clip(solution.sol(fine).T, self.low, self.high), solution.sol))
            t, y = float(solution.t[-1]), np.clip(solution.y[:, -1], self.low, self.high)
            happened = [k for k, times in enumerate(solution.t_events) if times.size]
            end = self._judge(solution, happened, side, y, way)
            stages[-1][1][-1] = y  # exactly on the face that it met
            if not end and len(stages) == _MAX_STAGES:
                end = "failed", f"It met or left a face {_MAX_STAGES} times up to {y.tolist()}."
            if end:
                return Branch(points=self._space(saddle.state, stages), end=end[0], message=end[1])

    def _events(self, side: np.ndarray, field: Callable[..., np.ndarray]) -> list[Callable[..., float]]:
        """For each coordinate: reaching the lower edge, the upper one, and being released; then coming to rest."""

        def make(function: Callable[..., float]) -> Callable[..., float]:
            function.direction = -1.0
            return function

        events = []
        for i in range(2):
            free = side[i] == 0
            events.append(make(lambda t, x, i=i, free=free: x[i] - self.low[i] if free else 1.0))
            events.append(make(lambda t, x, i=i, free=free: self.high[i] - x[i] if free else 1.0))
            events.append(
                make(lambda t, x, i=i, free=free: 1.0 if free else side[i] * self.box.field(self.box.project(x))[i])
            )
        events.append(make(lambda t, x: np.linalg.norm(field(t, x) / self.width) - self.still))
        return events

    def _judge(
        self, solution: Any, happened: list[int], side: np.ndarray, y: np.ndarray, way: float
    ) -> tuple[str, str] | None:
        """How the branch ends at the end of a stage, or None where it goes on; adjusts the frozen sides in place."""
        if solution.status < 0 or not np.isfinite(y).all():
            return "failed", f"The solver stopped at {y.tolist()}: {solution.message}"
        if not happened:
            return "horizon", f"It is still under way at {y.tolist()} after time {solution.t[-1]:.4g}."
        i, kind = divmod(happened[0], 3)
        if i == 2:
            return "equilibrium", f"It comes to rest near {y.tolist()}."
        if kind == 2:
            side[i] = 0
            return None
        edge, bound = (self.low, self.box.lower) if kind == 0 else (self.high, self.box.upper)
        y[i] = edge[i]
        place = f"{self.box.names[i]} = {edge[i]:.6g}"
        if edge[i] != bound[i]:
            return "window", f"It leaves the window at {place}."
        if way < 0.0:
            return "face", f"It starts on the face {place}, at {y.tolist()}."
        side[i] = 2 * kind - 1
        return ("equilibrium", f"It comes to rest in the corner {y.tolist()}.") if side.all() else None

    def _space(self, saddle: np.ndarray, stages: Sequence[tuple[np.ndarray, np.ndarray, Any]]) -> np.ndarray:
        """Points evenly spaced in arc length on every stage, after the saddle."""
        lengths = [
            np.append(0.0, np.cumsum(np.linalg.norm(np.diff(s, axis=0) / self.width, axis=1))) for _, s, _ in stages
        ]
        total = max(sum(length[-1] for length in lengths), 1e-300)
        points = [saddle[None]]
        for (times, states, dense), length in zip(stages, lengths, strict=True):
            n = max(2, round(self.points * length[-1] / total))
            chosen = dense(np.interp(np.linspace(0.0, length[-1], n), length, times)).T
            chosen[0], chosen[-1] = states[0], states[-1]
            points.append(np.clip(chosen, self.low, self.high))
        line = np.concatenate(points)
        return line[np.append(True, np.any(np.diff(line, axis=0) != 0.0, axis=1))]

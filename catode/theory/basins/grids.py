"""Domains of attraction on grids of starts: integer labels, their attractors, and how much of the grid each one takes.

Source: docs/mathematics.md sections 3 and 4.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from catode._validate import check_bool, check_choice, check_positive, check_real, check_shape, fail
from catode.theory.basins.equilibria import find
from catode.theory.flow.batch import STATUSES, Batch, integrate_batch
from catode.theory.systems.box import BoxSystem, as_box
from catode.theory.systems.planar import PlanarSystem

__all__ = ["UNDECIDED", "Basins", "basins_fractions", "basins_of_attraction", "find_attractors"]

UNDECIDED = -1
"""Label of a start of which nothing is known: time was up, the integration failed, or it is on a boundary."""

_PRUNED, _KEPT, _FAILED, _HORIZON = map(STATUSES.index, ("pruned", "kept", "failed", "horizon"))
_SAMPLE = 400  # starts from which attractors are searched
_ROUNDS = 3  # of searches from the ends of undecided starts
_SEED_FACES = 729  # of the box, searched for stable equilibria
_ALGEBRA_FACES = 81  # of a box, up to which that is done by algebra, some ten times as long
_TOLERANCES = 300.0  # of the integration, below which two ends count as one
_LIVES = 1e4  # horizon of a planar system in units of 1 / growth_rate


@dataclass(frozen=True, eq=False)
class Basins:
    """Which attractor each start of a grid goes to.

    Args:
        labels: Row of `attractors`, or -1 for undecided, one axis for each coordinate that varies.
        axes: The starts: for every coordinate its values, shape (n,), or the single value it has everywhere, shape ().
        attractors: Limits, shape (m, d); `inf` where a coordinate grows without bound, NaN where it is not known.
        names: What to call the attractors.
        failed: Starts whose integration failed; they are among the undecided.
        left_out: Faces of the box that were not searched for stable equilibria, most frozen coordinates first: an attractor
            there is known only if a start ended at it.
        resolution: How near to an attractor a start has to come, along each coordinate, shape (d,): attractors nearer to
            each other than this count as one. None where starts are decided on the faces of a keep probability.
    """

    labels: np.ndarray
    axes: tuple[np.ndarray, ...]
    attractors: np.ndarray
    names: tuple[str, ...]
    failed: int
    left_out: int = 0
    resolution: np.ndarray | None = None


def basins_of_attraction(
    system: BoxSystem | PlanarSystem,
    axes: Sequence[Any],
    horizon: float | None = None,
    *,
    method: str = "integration",
    absorbing: bool | None = None,
    attractors: Any = None,
    radius: float = 1e-3,
    rtol: float = 1e-6,
    atol: float = 1e-9,
) -> Basins:
    """Label every start of a grid by what becomes of it.

    For a keep probability (`absorbing`) the labels are 0, pruned, and 1, kept, decided on the faces as
    `catode.theory.flow.batch.integrate_batch` says. Otherwise a start belongs to the attractor near which it comes. Without
    `attractors` these are the ends of some starts, the stable equilibria of `basins.equilibria.find` (on at most 729 faces;
    the result says how many were left out), and, where starts remain undecided, their ends. Coming near is no proof unless
    the attractor attracts everything within the `resolution` of the result; `find_attractors` tries that on a few states.

    A start on a boundary is undecided: one whose label changes where it is moved by a tenth of the tolerances towards a
    neighbour with another label, or, where some coordinates are held, along these.

    Source: docs/mathematics.md sections 3 and 4.

    Args:
        system: A flow on a box or a planar comparison system.
        axes: For every coordinate the values of the grid, shape (n,), or one number that holds it.
        horizon: Time at which to give up; a planar system has a default, 10,000 times its growth time.
        method: "integration", or for a planar system "separatrix": its closed form, exact and much faster.
        absorbing: Whether the last coordinate is a keep probability; by default so for planar systems alone.
        attractors: Known attractors, shape (m, d), where not `absorbing`.
        radius: How near is near, as a share of the extent of the grid along each coordinate (of 1 where it is held). Not
            less than 300 tolerances, nor more than a quarter of the way from an attractor to another equilibrium.
        rtol: Relative tolerance of the integration.
        atol: Absolute tolerance of the integration.

    Returns:
        Labels and attractors. A warning says where no attractor was found.

    Raises:
        ValueError: if the grid leaves the box, an argument is missing or out of range, or the separatrix bounds nothing.

    Example:
        >>> from catode.theory import UnitSystem
        >>> unit = UnitSystem(price=0.1, weight_decay=0.1, rate_ratio=1.0, benefit_slope=0.5)
        >>> basins = basins_of_attraction(unit, ([0.0, 0.2, 1.0], [0.0, 0.3, 0.6]))
        >>> basins.labels.tolist()
        [[0, 0, 0], [0, 0, 1], [1, 1, 1]]
    """
    planar = isinstance(system, PlanarSystem)
    if not planar and not isinstance(system, BoxSystem):
        fail("system", "be a BoxSystem or a PlanarSystem", system, hint="See `catode.theory.systems.box`.")
    values = _check_axes(axes, 2 if planar else system.dimension)
    method = check_choice("method", method, ("integration", "separatrix"))
    absorbing = planar if absorbing is None else check_bool("absorbing", absorbing)
    if attractors is not None and absorbing:
        fail("attractors", "be None where the system is absorbing", attractors, hint="Give absorbing=False with them.")
    if method == "separatrix":
        if not planar or not absorbing:
            hint = 'Use method="integration".'
            fail("method", "be 'integration' for other than absorbing planar systems", method, hint=hint)
        return _by_separatrix(system, values)
    if horizon is None and planar:
        horizon = _LIVES / system.growth_rate
    if horizon is None:
        hint = "Give some multiples of its slowest time constant."
        fail("horizon", "be a real number for a BoxSystem", None, hint=hint)
    horizon = check_positive("horizon", horizon)
    starts = np.stack(np.meshgrid(*values, indexing="ij"), axis=-1)
    shape, starts = starts.shape[:-1], starts.reshape(-1, len(values))
    tolerances = {"rtol": rtol, "atol": atol}
    resolution, left_out = None, 0
    if absorbing:

        def label(states: np.ndarray) -> tuple[np.ndarray, Batch]:
            batch = integrate_batch(system, states, horizon, absorbing=True, **tolerances)
            return np.where(batch.codes == _PRUNED, 0, np.where(batch.codes == _KEPT, 1, UNDECIDED)), batch

        labels, batch = label(starts)
        known = _planar_attractors(system) if planar else np.full((2, starts.shape[1]), np.nan)
        if not planar:
            known[:, -1] = system.lower[-1], system.upper[-1]
        names = ("pruned", "kept")
    else:
        scale = np.array([np.ptp(v) or 1.0 for v in values])
        if attractors is None:
            near = {"radius": radius, "scale": scale}
            known = find_attractors(system, _sample(starts), horizon, **near, **tolerances)
            known, others, left_out = _add_equilibria(
                system, known, np.maximum(radius * scale, _floor(known, rtol, atol).max(axis=0, initial=0.0))
            )
        else:
            others = np.empty((0, len(values)))
            known = check_real("attractors", attractors, array=True)
            check_shape("attractors", known, f"(m, {len(values)})", known.ndim == 2 and known.shape[1] == len(values))
        resolution = _resolution(known, others, check_positive("radius", radius) * scale, rtol, atol)

        def label(states: np.ndarray) -> tuple[np.ndarray, Batch]:
            batch = integrate_batch(system, states, horizon, targets=known, radius=1.0, scale=resolution, **tolerances)
            return batch.targets, batch

        labels, batch = label(starts)
        for _ in range(_ROUNDS if attractors is None else 0):  # search again from where the undecided ended
            open_ = np.flatnonzero(batch.codes == _HORIZON)
            more = _unlike(
                find_attractors(system, _sample(batch.ends[open_]), horizon, **near, **tolerances), known, resolution
            )
            if not len(more):
                break
            known = np.vstack([known, more])
            labels[open_], later = label(starts[open_])
            batch.codes[open_], batch.ends[open_] = later.codes, later.ends
        names = tuple(f"attractor {i}" for i in range(len(known)))
    labels[_ties(system, starts, shape, labels, lambda states: label(states)[0], rtol, atol)] = UNDECIDED
    if not absorbing and (labels == UNDECIDED).all():
        nothing = "No attractor was found" if not len(known) else "No attractor was reached"
        hint = "Give a longer horizon, a wider grid, or the attractors."
        told = f"{nothing} from {len(starts)} starts by time {horizon:g}: all are undecided. {hint}"
        warnings.warn(told, stacklevel=2)
    labels = labels.reshape(shape).squeeze(axis=tuple(i for i, v in enumerate(values) if v.ndim == 0))
    failed = int((batch.codes == _FAILED).sum())
    return Basins(labels.astype(np.int16), values, known, names, failed, left_out, resolution)


def _add_equilibria(
    system: BoxSystem | PlanarSystem, points: np.ndarray, reach: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Attractors with the stable equilibria that are not among them, the other equilibria, and faces not searched."""
    box = as_box(system)
    sides = 1 + np.isfinite(box.lower).astype(int) + np.isfinite(box.upper)
    few = math.prod(sides.tolist()) <= _ALGEBRA_FACES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of faces that were left out: the result says it
        found = find(system, max_faces=_SEED_FACES, algebra=few)
    stable = np.array([e.state for e in found if e.stable]).reshape(-1, points.shape[1])
    others = np.array([e.state for e in found if not e.stable and e.isolated]).reshape(-1, points.shape[1])
    apart = (np.abs(points[:, None] - stable) / reach).max(axis=2, initial=0.0)
    order: dict[tuple[float, ...], None] = {}
    for point, row in zip(points, apart, strict=True):  # where Newton ended too, its end is the more exact
        order[tuple((stable[row.argmin()] if row.size and row.min() <= 1.0 else point).tolist())] = None
    order |= dict.fromkeys(map(tuple, stable.tolist()))
    return np.array(list(order)).reshape(-1, points.shape[1]), others, found.left_out


def _unlike(points: np.ndarray, known: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """The points that are not within reach of a known one."""
    near = (np.abs(points[:, None] - known) <= reach).all(axis=2).any(axis=1)
    return points[~near]


def _resolution(points: np.ndarray, others: np.ndarray, reach: np.ndarray, rtol: float, atol: float) -> np.ndarray:
    """How near is near: what was asked for, not below the error of the integration, nor near another equilibrium."""
    reach = np.broadcast_to(np.maximum(reach, _floor(points, rtol, atol).max(axis=0, initial=0.0)), points.shape[1:])
    apart = (np.abs(points[:, None] - np.vstack([points, others])) / reach).max(axis=2)
    least = apart[apart > 1e-3].min(initial=np.inf)  # less than that is the same point twice
    return reach * min(1.0, least / 4.0)


def _floor(points: np.ndarray, rtol: float, atol: float) -> np.ndarray:
    """Distance along each coordinate that integration to the given tolerances tells apart with certainty."""
    return _TOLERANCES * (atol + rtol * np.abs(points))


def _ties(
    system: BoxSystem | PlanarSystem,
    starts: np.ndarray,
    shape: tuple[int, ...],
    labels: np.ndarray,
    label: Callable[[np.ndarray], np.ndarray],
    rtol: float,
    atol: float,
) -> np.ndarray:
    """Indices of decided starts on a boundary between labels, to within a tenth of the tolerances."""

    def step(rows: np.ndarray, columns: Any) -> np.ndarray:
        return 0.1 * (atol + rtol * np.abs(starts[rows, columns]))

    suspects, moves = [], []
    for axis, n in enumerate(shape):
        if n == 1:
            continue
        inner = math.prod(shape[axis + 1 :])  # distance of neighbours in the flat order
        grid = labels.reshape(-1, n, inner)
        outer, rest = np.divmod(np.flatnonzero(grid[:, :-1] != grid[:, 1:]), (n - 1) * inner)
        low = outer * (n * inner) + rest
        high = low + inner
        rising = np.sign(starts[high, axis] - starts[low, axis])
        for here, sign in ((low, rising), (high, -rising)):
            decided = labels[here] >= 0
            suspects.append(here[decided])
            moves.append((axis, sign[decided]))
    for axis, n in enumerate(shape):
        if n > 1:
            continue
        some = np.linspace(0, len(starts) - 1, min(len(starts), _SAMPLE)).astype(int)
        for sign in (-1.0, 1.0):
            moved = starts[some].copy()
            moved[:, axis] += sign * step(some, axis)
            here = some
            if (label(system.project(moved)) != labels[some]).any():
                here = np.arange(len(starts))
            suspects.append(here[labels[here] >= 0])
            moves.append((axis, np.full(len(suspects[-1]), sign)))
    if not suspects or not sum(map(len, suspects)):
        return np.empty(0, dtype=int)
    index = np.concatenate(suspects)
    axes = np.repeat([axis for axis, _ in moves], [len(here) for here in suspects])
    moved, rows = starts[index].copy(), np.arange(len(index))
    moved[rows, axes] += np.concatenate([sign for _, sign in moves]) * step(index, axes)
    box = as_box(system)
    here = starts[index, axes]
    leaves = np.where(here <= box.lower[axes], 1.0, np.where(here >= box.upper[axes], -1.0, 0.0))
    normal = leaves * box.field(starts[index])[rows, axes]
    free = (leaves == 0.0) | (normal > 0.0)  # a start on a face that the flow does not leave is on it exactly
    index, moved = index[free], moved[free]
    return np.unique(index[label(system.project(moved)) != labels[index]])


def find_attractors(
    system: BoxSystem | PlanarSystem,
    starts: Any,
    horizon: float,
    *,
    radius: float = 1e-3,
    scale: Any = 1.0,
    rtol: float = 1e-6,
    atol: float = 1e-9,
) -> np.ndarray:
    """Resting points that attract: where the starts end, if they rest there and their surroundings come there too.

    A point passes if the states `radius` away from it along each coordinate, those in the box, come within a tenth of
    `radius` of it in time; the distance is never taken less than 300 tolerances, which integration tells apart. Limit
    cycles and what needs longer than `horizon` are not found.

    Args:
        system: A flow on a box or a planar comparison system.
        starts: States to begin from, shape (n, d).
        horizon: Time after which a start should be at rest.
        radius: Distance below which two ends are the same point: the largest coordinate distance, divided by `scale`.
        scale: Unit of every coordinate, shape () or (d,).
        rtol: Relative tolerance of the integration.
        atol: Absolute tolerance of the integration.

    Returns:
        Attractors in the order in which the starts come to them, shape (m, d).

    Raises:
        ValueError: as `integrate_batch` does.
    """
    tolerances = {"rtol": rtol, "atol": atol}
    batch = integrate_batch(system, starts, horizon, radius=radius, scale=scale, **tolerances)
    ends = batch.ends[batch.codes != _FAILED]
    wide = _floor(np.median(np.abs(ends), axis=0) if len(ends) else np.zeros(batch.ends.shape[1]), rtol, atol)
    reach = np.maximum(radius * np.asarray(scale, dtype=np.float64), wide)
    points = np.empty((0, reach.size))
    for end in ends:
        if not (np.abs(points - end) <= reach).all(axis=1).any():
            points = np.vstack([points, end])
    if not len(points):
        return points
    around = points[:, None] + np.concatenate([np.zeros((1, reach.size)), np.diag(reach), -np.diag(reach)])
    around = system.project(around)
    later = integrate_batch(system, around.reshape(-1, reach.size), horizon, **tolerances).ends.reshape(around.shape)
    points = later[:, 0]
    good = (np.abs(later - points[:, None]) <= 0.1 * reach).all(axis=(1, 2))
    good &= (np.abs(points - around[:, 0]) <= 0.1 * reach).all(axis=1)
    return points[good]


def basins_fractions(basins: Basins) -> dict[int, float]:
    """Share of the grid that goes to each attractor.

    Args:
        basins: Labels on a grid.

    Returns:
        Shares by label, that of the undecided (-1) included; they sum to 1.
    """
    if not isinstance(basins, Basins):
        fail("basins", "be a Basins", basins, hint="Get one from `basins_of_attraction`.")
    counts = np.bincount(basins.labels.ravel() + 1, minlength=len(basins.attractors) + 1)
    return {label: float(count / basins.labels.size) for label, count in enumerate(counts, start=UNDECIDED)}


def _check_axes(axes: Any, d: int) -> tuple[np.ndarray, ...]:
    if not isinstance(axes, (tuple, list)) and not (isinstance(axes, np.ndarray) and axes.ndim):
        fail("axes", "be a sequence with one entry for each coordinate", axes)
    if len(axes) != d:
        fail("axes", f"have one entry for each of {d} coordinates", len(axes))
    values = tuple(check_real(f"axes[{i}]", axis, array=True) for i, axis in enumerate(axes))
    for i, axis in enumerate(values):
        check_shape(f"axes[{i}]", axis, "(n,) with n >= 1, or ()", axis.ndim < 2 and axis.size > 0)
    if all(axis.ndim == 0 for axis in values):
        fail("axes", "let at least one coordinate vary", [float(a) for a in values])
    return values


def _sample(starts: np.ndarray) -> np.ndarray:
    """Some of the starts, the same ones in every run."""
    if len(starts) <= _SAMPLE:
        return starts
    return starts[np.sort(np.random.default_rng(0).choice(len(starts), _SAMPLE, replace=False))]


def _planar_attractors(system: PlanarSystem) -> np.ndarray:
    """Where the size goes with the keep probability at 0 and at 1."""
    corners = np.array([[1.0, 0.0], [1.0, 1.0]])
    return np.column_stack([[float(system.rest(corner)) for corner in corners], corners[:, 1]])


def _by_separatrix(system: PlanarSystem, axes: tuple[np.ndarray, ...]) -> Basins:
    """Labels from the closed form: below the separatrix pruned, above kept; all pruned where theta* > 1."""
    size, theta = axes
    for i, (axis, high) in enumerate(((size, np.inf), (theta, 1.0))):
        if axis.min() < 0.0 or axis.max() > high:
            worst = float(axis.min() if axis.min() < 0.0 else axis.max())
            fail(f"axes[{i}]", f"lie in the box, [0, {high:g}]", worst)
    star = system.saddle[1]
    if star < 0.0:
        hint = 'The size grows to the price even at theta = 0; use method="integration".'
        fail("system", "have a saddle with theta* >= 0 for the separatrix to bound a basin", star, hint=hint)
    edge = np.full(size.shape, np.inf) if star > 1.0 else system.separatrix(size)
    edge = np.asarray(edge)[..., None] if theta.ndim else edge
    labels = np.subtract(theta > edge, theta == edge, dtype=np.int16)
    return Basins(np.asarray(labels), axes, _planar_attractors(system), ("pruned", "kept"), 0)

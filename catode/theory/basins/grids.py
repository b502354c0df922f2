"""Domains of attraction on grids of starts: integer labels, their attractors, and how much of the grid each one takes.

Source: docs/mathematics.md sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from catode._validate import check_bool, check_choice, check_positive, check_real, check_shape, fail
from catode.theory.flow.batch import STATUSES, integrate_batch
from catode.theory.systems.box import BoxSystem
from catode.theory.systems.planar import PlanarSystem

__all__ = ["UNDECIDED", "Basins", "basins_fractions", "basins_of_attraction", "find_attractors"]

UNDECIDED = -1
"""Label of a start of which nothing is known: time was up, the integration failed, or it is on a boundary."""

_PRUNED, _KEPT, _FAILED, _ARRIVED = map(STATUSES.index, ("pruned", "kept", "failed", "arrived"))
_SAMPLE = 400  # starts from which attractors are searched
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
    """

    labels: np.ndarray
    axes: tuple[np.ndarray, ...]
    attractors: np.ndarray
    names: tuple[str, ...]
    failed: int


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
    `catode.theory.flow.batch.integrate_batch` says. Otherwise a start belongs to the attractor near which it comes; without
    `attractors` those that attract some of the starts are found first. Coming near is no proof unless the attractor
    attracts everything within `radius`; `find_attractors` tries that on a few states.

    Source: docs/mathematics.md sections 3 and 4.

    Args:
        system: A flow on a box or a planar comparison system.
        axes: For every coordinate the values of the grid, shape (n,), or one number that holds it.
        horizon: Time at which to give up; a planar system has a default, 10,000 times its growth time.
        method: "integration", or for a planar system "separatrix": its closed form, exact and much faster.
        absorbing: Whether the last coordinate is a keep probability; by default so for planar systems alone.
        attractors: Known attractors, shape (m, d), where not `absorbing`.
        radius: How near is near, as a share of the extent of the grid along each coordinate (of 1 where it is held).
        rtol: Relative tolerance of the integration.
        atol: Absolute tolerance of the integration.

    Returns:
        Labels and attractors.

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
    if absorbing:
        batch = integrate_batch(system, starts, horizon, absorbing=True, **tolerances)
        labels = np.where(batch.codes == _PRUNED, 0, np.where(batch.codes == _KEPT, 1, UNDECIDED))
        known = _planar_attractors(system) if planar else np.full((2, starts.shape[1]), np.nan)
        if not planar:
            known[:, -1] = system.lower[-1], system.upper[-1]
        names = ("pruned", "kept")
    else:
        scale = np.array([np.ptp(v) or 1.0 for v in values])
        if attractors is None:
            near = {"radius": radius, "scale": scale}
            known = find_attractors(system, _sample(starts), horizon, **near, **tolerances)
        else:
            known = check_real("attractors", attractors, array=True)
            check_shape("attractors", known, f"(m, {len(values)})", known.ndim == 2 and known.shape[1] == len(values))
        batch = integrate_batch(system, starts, horizon, targets=known, radius=radius, scale=scale, **tolerances)
        labels, names = batch.targets, tuple(f"attractor {i}" for i in range(len(known)))
    labels = labels.reshape(shape).squeeze(axis=tuple(i for i, v in enumerate(values) if v.ndim == 0))
    return Basins(labels.astype(np.int16), values, known, names, int((batch.codes == _FAILED).sum()))


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
    `radius` of it in time. Limit cycles and what needs longer than `horizon` are not found.

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
    reach = np.broadcast_to(radius * np.asarray(scale, dtype=np.float64), batch.ends.shape[1:])
    ends = batch.ends[batch.codes != _FAILED]
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

"""How the domain of attraction of the removed state moves with one parameter, and where its saddle leaves the box.

Source: docs/mathematics.md sections 4.1 to 4.3 (saddles and separatrices) and 5 (the noise margin), derived there.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from catode._validate import check_interval, check_real, check_shape, fail
from catode.theory.basins.curves import branches
from catode.theory.basins.equilibria import Equilibrium, find
from catode.theory.systems.benefit import BenefitSystem
from catode.theory.systems.box import BoxSystem
from catode.theory.systems.planar import PlanarSystem
from catode.theory.tolerance.derivation import derive

__all__ = ["STATUSES", "Bifurcation", "Continuation", "follow"]

STATUSES = ("inside", "above", "below", "beside", "folded", "lost")
"""Where the saddle can be; see `Continuation`."""

_CELLS = 512
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)

Curve = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Bifurcation:
    """A parameter value at which the phase portrait changes.

    Args:
        value: The parameter, to rounding error of the root finding.
        event: What happens there: the face that the saddle meets, e.g. "theta = 1", or "tolerance = 0".
        saddle: The saddle there, shape (2,).
        meaning: One sentence on what it means on either side.
    """

    value: float
    event: str
    saddle: np.ndarray
    meaning: str


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Continuation:
    """The saddle and the domain D along values of one parameter.

    Args:
        name: Name of the parameter.
        values: Its values, increasing, shape (n,).
        saddles: Zero (size*, theta*) of the raw field, shape (n, 2); NaN where lost.
        statuses: For each value "inside" (the saddle is in the box, and D is exactly the basin), "above" (theta* beyond
            its upper end: for a comparison system the whole box is the basin, and D a part of it), "below" (theta* under
            its lower end: no start is certain to stay removed), "beside" (the size is out of the box), "folded" (in the
            box, but its stable manifold is no falling graph over the size) or "lost" (no saddle was found).
        window: Range (low, high) of the sizes over which `share` is taken.
        share: Area of D as a share of the window times the range of theta, shape (n,). For a BoxSystem it is known where
            the status is "inside", and NaN elsewhere.
        sizes: Where the separatrix is given, shape (m,).
        separatrix: Keep probability on the stable manifold of the saddle, shape (n, m), `inf` and `-inf` where the
            manifold left the box to the left and right; NaN where `share` is.
        tolerance: Keep probability at which removal is safe in spite of the noise, shape (n, m), or None without noise.
        safe_share: Area below the tolerance, as `share`, shape (n,), or None without noise.
        bifurcations: Where the saddle crosses a face, or the tolerance at size 0 crosses 0; values increasing.
    """

    name: str
    values: np.ndarray
    saddles: np.ndarray
    statuses: tuple[str, ...]
    window: tuple[float, float]
    share: np.ndarray
    sizes: np.ndarray
    separatrix: np.ndarray
    tolerance: np.ndarray | None
    safe_share: np.ndarray | None
    bifurcations: tuple[Bifurcation, ...]


def follow(
    make_system: Callable[..., PlanarSystem | BoxSystem],
    name: str,
    values: Any,
    *,
    window: tuple[float, float] | None = None,
    sizes: Any = None,
    noise: Callable[..., Mapping[str, float]] | None = None,
) -> Continuation:
    """Follow the saddle and the domain D along one parameter, and locate where the portrait changes.

    The saddle and separatrix of a comparison system are in closed form. That of a planar BoxSystem is followed by Newton
    iterations from one value to the next (along the raw field also out of the box), its manifold by integration.

    The batch size and whatever else acts through noise enters by `noise`: D then shrinks to what lies below the
    tolerance of docs/mathematics.md section 5.

    Source: docs/mathematics.md sections 4.1 to 4.3; for the noise section 5.

    Args:
        make_system: Called with the parameter as its only keyword, e.g. `functools.partial(LayerSystem, price=0.1, ...)`.
        name: Name of the parameter, e.g. "weight_decay".
        values: Its values, increasing, shape (n,) with n at least 2; bifurcations are looked for between neighbours.
        window: Range (low, high) of sizes over which areas are taken; None for 0 (a BoxSystem: its lower end) to twice
            the largest saddle.
        sizes: Sizes at which to give the separatrix, shape (m,); None for 5 over the window.
        noise: Called like `make_system`; returns `noise`, `benefit_noise`, `step_time` and `risk` as `tolerance.derive`
            takes them. For a BenefitSystem only.

    Returns:
        The continuation. A lost saddle is a status, never an exception.

    Raises:
        ValueError: if an argument is malformed, a BoxSystem is not planar or starts with several interior saddles, or
            `noise` is given for another system than a BenefitSystem.

    Example:
        >>> from functools import partial
        >>> from catode.theory import LayerSystem
        >>> make = partial(LayerSystem, price=0.1, rate_ratio=1.0, grad_bound=1.0, benefit_slope=0.5)
        >>> found = follow(make, "weight_decay", [0.1, 1.0, 10.0], window=(0.0, 1.0))
        >>> [(round(b.value, 10), b.event) for b in found.bifurcations]
        [(5.0, 'theta = 1')]
    """
    values = check_real("values", values, array=True)
    check_shape("values", values, "(n,) with n >= 2", values.ndim == 1 and values.size >= 2)
    wrong = np.flatnonzero(np.diff(values) <= 0.0)
    if wrong.size:
        i = int(wrong[0]) + 1
        fail("values", f"increase, and so exceed {values[i - 1]:g}", values[i], index=(i,))
    family = _Family(make_system, name, noise)
    systems = [family.make(value) for value in values]
    saddles = np.full((values.size, 2), np.nan)
    for k, system in enumerate(systems):
        saddles[k] = family.saddle(system, saddles[k - 1] if k else np.full(2, np.nan))
    low, high = _range(window, systems[0], saddles)
    sizes = np.linspace(low, high, 5) if sizes is None else check_real("sizes", sizes, array=True)
    check_shape("sizes", sizes, "(m,)", sizes.ndim == 1)

    statuses, share, separatrix = [], np.full(values.size, np.nan), np.full((values.size, sizes.size), np.nan)
    for k, (system, saddle) in enumerate(zip(systems, saddles, strict=True)):
        status, curve = _boundary(system, saddle, (low, high))
        statuses.append(status)
        if curve is not None:
            bottom, top = _faces(system)[1]
            with np.errstate(invalid="ignore"):
                separatrix[k] = curve(sizes)
            empty = getattr(system, "empty", False)
            share[k] = 0.0 if empty else _area(curve, low, high, bottom, top)
    tolerance = safe_share = None
    if noise is not None:
        curves = [family.tolerance(value, system) for value, system in zip(values, systems, strict=True)]
        tolerance = np.stack([curve(sizes) for curve in curves])
        safe_share = np.array([_area(curve, low, high) for curve in curves])
    return Continuation(
        name=name,
        values=values,
        saddles=saddles,
        statuses=tuple(statuses),
        window=(low, high),
        share=share,
        sizes=sizes,
        separatrix=separatrix,
        tolerance=tolerance,
        safe_share=safe_share,
        bifurcations=tuple(sorted(_bifurcations(family, values, systems, saddles), key=lambda b: b.value)),
    )


class _Family:
    """A system for each value of the parameter, with its saddle and its tolerance."""

    def __init__(self, make_system: Any, name: Any, noise: Any) -> None:
        for argument, value in (("make_system", make_system), ("noise", noise)):
            if not callable(value) and not (value is None and argument == "noise"):
                fail(argument, "be callable", value, hint="Pass e.g. functools.partial(LayerSystem, price=0.1, ...).")
        if not isinstance(name, str) or not name.isidentifier():
            fail("name", "be the name of a parameter", name)
        self.make_system, self.name, self.noise = make_system, name, noise

    def make(self, value: float) -> PlanarSystem | BoxSystem:
        system = self.make_system(**{self.name: float(value)})
        if not isinstance(system, PlanarSystem | BoxSystem) or getattr(system, "dimension", 2) != 2:
            fail("make_system", "return a PlanarSystem or a planar BoxSystem", system)
        if self.noise is not None and not isinstance(system, BenefitSystem):
            fail("make_system", "return a BenefitSystem where `noise` is given", system)
        return system

    def saddle(self, system: PlanarSystem | BoxSystem, near: np.ndarray) -> np.ndarray:
        """Zero of the raw field, shape (2,); NaN where there is none."""
        if isinstance(system, PlanarSystem):
            return np.array(system.saddle)
        if np.isfinite(near).all():
            state = _polish(system, near)
            if state is not None:
                return state
        inner = [e.state for e in find(system) if e.interior and e.stability == "saddle"]
        if len(inner) > 1:
            fail("make_system", "return a system with one saddle inside its box", [e.tolist() for e in inner])
        return inner[0] if inner else np.full(2, np.nan)

    def tolerance(self, value: float, system: BenefitSystem) -> Curve:
        known = {key: getattr(system, key) for key in ("price", "gain", "decay", "rate_ratio", "drift")}
        given = dict(self.noise(**{self.name: float(value)}))
        return lambda size: derive(benefit=size, **known, **given).values


def _polish(system: BoxSystem, state: np.ndarray) -> np.ndarray | None:
    """Newton iterations on the raw field, out of the box too; None if they meet no saddle."""
    with np.errstate(all="ignore"):
        for _ in range(30):
            speed, matrix = system.field(state), system.jacobian(state)
            if not (np.isfinite(speed).all() and np.isfinite(matrix).all() and np.linalg.det(matrix) < 0.0):
                return None
            step = np.linalg.solve(matrix, speed)
            state = state - step
            if np.all(np.abs(step) <= 1e-14 * (1e-3 + np.abs(state))):
                return state
            last = step
    return state if np.all(np.abs(last) <= 1e-10 * (1.0 + np.abs(state))) else None


def _faces(system: PlanarSystem | BoxSystem) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ends of the box: of the size, of theta."""
    if isinstance(system, PlanarSystem):
        return (0.0, np.inf), (0.0, 1.0)
    return tuple(zip(system.lower.tolist(), system.upper.tolist(), strict=True))


def _range(window: Any, system: PlanarSystem | BoxSystem, saddles: np.ndarray) -> tuple[float, float]:
    """The window of sizes, inside the box."""
    bounds, theta = _faces(system)
    if not np.isfinite(theta).all():
        fail("make_system", "return a system whose second coordinate has two finite ends", theta)
    if window is None:
        known = saddles[np.isfinite(saddles[:, 0]), 0]
        low = bounds[0] if np.isfinite(bounds[0]) else 0.0
        high = min(bounds[1], 2.0 * known.max()) if known.size else bounds[1]
        if not (np.isfinite(high) and low < high):
            fail("window", "be given where no saddle shows the scale", None, hint="Pass the sizes (low, high).")
        return low, float(high)
    ends = check_real("window", window, array=True)
    check_shape("window", ends, "(2,)", ends.shape == (2,))
    low = check_interval("window", ends[0], *bounds)
    return low, check_interval("window", ends[1], low, bounds[1], True)


def _boundary(
    system: PlanarSystem | BoxSystem, saddle: np.ndarray, window: tuple[float, float]
) -> tuple[str, Curve | None]:
    """Where the saddle is, and theta on its stable manifold as a function of the size."""
    bounds, (bottom, top) = _faces(system)
    if not np.isfinite(saddle).all():
        return "lost", None
    planar = isinstance(system, PlanarSystem)
    if not bounds[0] <= saddle[0] <= bounds[1]:
        return "beside", None
    if not bottom <= saddle[1] <= top:
        return "above" if saddle[1] > top else "below", system.separatrix if planar else None
    if planar:
        return "inside", system.separatrix
    from scipy.interpolate import CubicHermiteSpline

    point = Equilibrium(
        state=saddle,
        face=(0, 0),
        speed=system.field(saddle),
        resting=(),
        eigenvalues=np.linalg.eigvals(system.jacobian(saddle)).astype(complex),
        stability="saddle",
        isolated=True,
        origin="searched",
    )
    reach = min(window[0], saddle[0]), max(window[1], saddle[0])
    stable = branches(system, point, -1.0, ((reach[0], bottom), (reach[1], top)), 1e-9, 400)
    left, right = sorted((branch.points for branch in stable), key=lambda line: line[-1, 0])
    line = np.concatenate([left[:0:-1], right])
    if np.any(np.diff(line[:, 0]) <= 0.0) or np.any(np.diff(line[:, 1]) >= 0.0):
        return "folded", None
    speed = system.field(line)
    speed[len(left) - 1] = _stable_direction(system, saddle)
    spline = CubicHermiteSpline(line[:, 0], line[:, 1], speed[:, 1] / speed[:, 0])

    def curve(size: np.ndarray) -> np.ndarray:
        inner = spline(np.clip(size, line[0, 0], line[-1, 0]))
        return np.where(size < line[0, 0], np.inf, np.where(size > line[-1, 0], -np.inf, inner))

    return "inside", curve


def _stable_direction(system: BoxSystem, saddle: np.ndarray) -> np.ndarray:
    rates, vectors = np.linalg.eig(system.jacobian(saddle))
    return vectors[:, rates.real.argmin()].real


def _area(curve: Curve, low: float, high: float, bottom: float = 0.0, top: float = 1.0) -> float:
    """Share of the window times [bottom, top] that lies below the curve.

    The cells in which the curve meets an end are cut there, by bisection, so that Gauss's rule sees smooth pieces.
    """

    def level(size: np.ndarray) -> np.ndarray:
        value = curve(size)
        return (value >= top).astype(int) + (value > bottom)

    edges = np.linspace(low, high, _CELLS + 1)
    levels = level(edges)
    cells = np.flatnonzero(np.diff(levels))
    left, right, first = edges[cells], edges[cells + 1], levels[cells]
    for _ in range(60):
        middle = 0.5 * (left + right)
        same = level(middle) == first
        left, right = np.where(same, middle, left), np.where(same, right, middle)
    edges = np.sort(np.concatenate([edges, left]))
    half = 0.5 * np.diff(edges)
    nodes = (edges[:-1] + half)[:, None] + half[:, None] * _NODES
    below = (np.clip(curve(nodes), bottom, top) - bottom) / (top - bottom)
    return float(half @ (below @ _WEIGHTS) / (high - low))


def _bifurcations(
    family: _Family, values: np.ndarray, systems: list[PlanarSystem | BoxSystem], saddles: np.ndarray
) -> list[Bifurcation]:
    """Where the saddle meets a face, and where the tolerance at size 0 meets 0."""
    found = []
    planar = isinstance(systems[0], PlanarSystem)
    names = ("size", "theta") if planar else systems[0].names
    for i, bounds in enumerate(_faces(systems[0])):
        for outer, bound in enumerate(bounds):
            if not np.isfinite(bound):
                continue

            def gap(value: float, near: np.ndarray, i: int = i, bound: float = bound) -> float:
                return float(family.saddle(family.make(value), near)[i] - bound)

            for value, near, rises in _crossings(gap, values, saddles[:, i] - bound, saddles):
                out = "above" if rises == bool(outer) else "below"
                event = f"{names[i]} = {bound:g}"
                meaning = f"The saddle meets {event}: for {family.name} {out} {value:.10g} it is outside the box"
                if planar and bound == 1.0:
                    meaning += ", and the whole box is the basin of theta = 0 (D is a part of it)"
                elif planar:
                    meaning += ", and no start is certain to stay removed"
                found.append(
                    Bifurcation(
                        value=value,
                        event=event,
                        saddle=family.saddle(family.make(value), near),
                        meaning=f"{meaning}.",
                    )
                )
    if family.noise is not None:

        def safe(value: float, _: Any = None) -> float:
            return max(float(family.tolerance(value, family.make(value))(np.zeros(()))), -1.0)

        for value, near, rises in _crossings(safe, values, np.array([safe(v) for v in values]), saddles):
            side = "below" if rises else "above"
            meaning = f"For {family.name} {side} {value:.10g} no keep probability is safe at this noise and risk."
            saddle = family.saddle(family.make(value), near)
            found.append(Bifurcation(value=value, event="tolerance = 0", saddle=saddle, meaning=meaning))
    return found


def _crossings(
    gap: Callable[[float, np.ndarray], float], values: np.ndarray, gaps: np.ndarray, saddles: np.ndarray
) -> list[tuple[float, np.ndarray, bool]]:
    """Zeros of `gap` between neighbouring values at which its sign changes, or at an end: where, near what, rising."""
    from scipy.optimize import brentq

    known = np.flatnonzero(np.isfinite(gaps))
    crossings = []
    for a, b in itertools.pairwise(known):
        if b > a + 1:
            continue  # the saddle was lost between
        start, end = gaps[a], gaps[b]
        if start * end < 0.0:
            root = brentq(gap, values[a], values[b], args=(saddles[a],), xtol=1e-300, rtol=1e-15)
            crossings.append((float(root), saddles[a], bool(end > 0.0)))
        elif start == 0.0 and end != 0.0 and (a == 0 or gaps[a - 1] * end < 0.0 or not np.isfinite(gaps[a - 1])):
            crossings.append((float(values[a]), saddles[a], bool(end > 0.0)))
        elif end == 0.0 and start != 0.0 and b == len(values) - 1:
            crossings.append((float(values[b]), saddles[b], bool(start < 0.0)))
    return crossings

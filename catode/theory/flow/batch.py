"""The projected flow of thousands to millions of starts at once, each with its own step size and its own faces.

One scheme in two forms: compiled by numba from the field's expressions (`_batch_compiled`), and vectorised in numpy for a
field that is only a Python function (`_batch_numpy`). Here is what both are asked through, and how a system is posed to
them. A start moves by steps of the Dormand-Prince pair (order 5), with a set of coordinates frozen on their faces. The
field is never masked inside a step: a step that would pass an event (a free coordinate leaves the box, or the speed of a
frozen one turns inwards) is shortened to the event, which is located by a root search on the step itself, so that its
error is that of the step. An excursion beyond a face that begins and ends within a step is seen on the cubic through the
step's ends and speeds. A start that makes no headway, as where the field jumps, fails after some thousand steps.

Source: docs/mathematics.md section 3.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from catode._validate import check_bool, check_int, check_interval, check_positive, check_real, check_shape, fail
from catode.theory.flow import trajectory
from catode.theory.flow._batch_compiled import compile_solver, write_solver
from catode.theory.flow._batch_numpy import solve as solve_in_numpy
from catode.theory.flow._batch_scheme import outputs
from catode.theory.systems._expressions import without_jumps
from catode.theory.systems.box import BoxSystem
from catode.theory.systems.planar import PlanarSystem

__all__ = ["STATUSES", "Batch", "integrate_batch"]

STATUSES = (*trajectory.STATUSES, "arrived")
"""How a start can end, in the order of the codes in `Batch.codes`; see `Batch`."""


@dataclass(frozen=True, eq=False)
class Batch:
    """How many starts ended.

    Args:
        ends: Last states, in the box, shape (n, d).
        times: Times of the last states, shape (n,).
        codes: Indices into `STATUSES`, shape (n,): "pruned" (the keep probability is 0 and pushed down), "kept" (it is
            1 and stays there), "horizon" (time was up), "failed" (numerical failure; the state before it is given) or
            "arrived" (near a target).
        targets: Index of the target that was reached, -1 for none, shape (n,).
        steps: Steps tried, those that failed their error test included, shape (n,).
        compiled: Whether numba ran it; otherwise numpy.
        compile_seconds: What this call spent on compiling, or on loading what an earlier process compiled.
    """

    ends: np.ndarray
    times: np.ndarray
    codes: np.ndarray
    targets: np.ndarray
    steps: np.ndarray
    compiled: bool
    compile_seconds: float

    @property
    def statuses(self) -> np.ndarray:
        """The status of every start in words, shape (n,)."""
        return np.array(STATUSES)[self.codes]


def integrate_batch(
    system: BoxSystem | PlanarSystem,
    starts: Any,
    horizon: float,
    *,
    rtol: float = 1e-6,
    atol: float = 1e-9,
    absorbing: bool = False,
    targets: Any = None,
    radius: float = 1e-3,
    scale: Any = 1.0,
    max_steps: int = 100_000,
) -> Batch:
    """Solve the projected ODE from many states.

    A system with `expressions`, and every planar system of `catode.theory.systems`, is compiled; numba keeps the result
    on disk, under the user's cache folder, for the next process. The field is evaluated a little outside the box too.

    Source: docs/mathematics.md section 3.

    Args:
        system: A flow on a box; a planar system is one on [0, inf) x [0, 1].
        starts: Initial states in the box, shape (n, d).
        horizon: Time at which to stop, in ODE time.
        rtol: Relative tolerance of each step, for every coordinate.
        atol: Absolute tolerance of each step, likewise.
        absorbing: Stop where the last coordinate, a keep probability, is decided, as `flow.integrate` does: it is on its
            lower face and pushed down ("pruned"), or on its upper face for ever ("kept"). For ever means, in a system
            of `catode.theory.systems`, that its size does not fall below the price's level; in any other, that no other
            coordinate falls, which is a proof if it is cooperative (speeds do not fall as other coordinates rise).
        targets: States near which to stop ("arrived", also where `absorbing` would stop), shape (m, d).
        radius: How near: the largest coordinate distance, each divided by its `scale`.
        scale: Unit of every coordinate for `radius`, shape () or (d,).
        max_steps: Steps after which a start counts as failed; sooner where the horizon is out of reach of its last 1000.

    Returns:
        Ends, times and statuses. A numerical failure is a status, never an exception.

    Raises:
        ValueError: if a start lies outside the box, or an argument is out of range or has a wrong shape.

    Example:
        >>> from catode.theory import LayerSystem
        >>> layer = LayerSystem(price=0.1, weight_decay=0.1, rate_ratio=1.0, grad_bound=1.0, benefit_slope=0.5)
        >>> batch = integrate_batch(layer, [[0.1, 0.05], [0.3, 0.5]], 50.0, absorbing=True)
        >>> batch.statuses.tolist()
        ['pruned', 'kept']
    """
    problem = _pose(system)
    d = problem.lower.size
    starts = check_real("starts", starts, array=True)
    check_shape("starts", starts, f"(n, {d})", starts.ndim == 2 and starts.shape[1] == d)
    columns = zip(starts.T, problem.lower, problem.upper, strict=True)
    if any(x.min(initial=low) < low or x.max(initial=high) > high for x, low, high in columns):
        i, j = (int(v) for v in np.argwhere((starts < problem.lower) | (starts > problem.upper))[0])
        box = f"[{problem.lower[j]:g}, {problem.upper[j]:g}]"
        fail("starts", f"lie in the box, coordinate {j} in {box}", float(starts[i, j]), index=(i, j))
    horizon = check_positive("horizon", horizon)
    rtol = check_interval("rtol", rtol, 0.0, 0.1, True)
    atol = check_positive("atol", atol)
    absorbing = check_bool("absorbing", absorbing)
    if absorbing and not np.isfinite([problem.lower[-1], problem.upper[-1]]).all():
        ends = (float(problem.lower[-1]), float(problem.upper[-1]))
        fail("system", "bound its last coordinate on both sides where `absorbing`", ends, hint="Give it faces.")
    targets = np.empty((0, d)) if targets is None else check_real("targets", targets, array=True)
    check_shape("targets", targets, f"(m, {d})", targets.ndim == 2 and targets.shape[1] == d)
    reach = check_positive("radius", radius) * check_positive("scale", scale, array=True)
    check_shape("scale", reach, f"() or ({d},)", reach.shape in ((), (d,)))
    max_steps = check_int("max_steps", max_steps, low=1)
    results = outputs(starts)
    arrays = targets, np.broadcast_to(reach, (d,)), problem.lower, problem.upper
    targets, reach, lower, upper = (a.copy() for a in arrays)  # writable and in C order, as the compiled form expects
    options = (horizon, rtol, atol, absorbing, problem.holds, targets, reach, max_steps, lower, upper)
    began = time.perf_counter()
    solve = None if problem.source is None else compile_solver(problem.source)
    seconds = time.perf_counter() - began
    if solve is not None:
        solve(*results, *options, problem.values)
    else:
        with np.errstate(all="ignore"):
            solve_in_numpy(*results, *options, problem.field)
    return Batch(*results, solve is not None, 0.0 if solve is None else seconds)


@dataclass(frozen=True, eq=False)
class _Problem:
    """A flow on a box as the solvers take it."""

    field: Callable[[np.ndarray], np.ndarray]
    lower: np.ndarray
    upper: np.ndarray
    holds: bool  # whether the speed of the last coordinate stays outwards on its upper face while the others fall
    source: str | None  # of the compiled solver
    values: np.ndarray  # numbers in the expressions; the source depends on their order alone


def _pose(system: Any) -> _Problem:
    if isinstance(system, BoxSystem):
        source, values = (None, np.empty(0)) if system.expressions is None else _parametrise(system)
        return _Problem(system.field, system.lower, system.upper, False, source, values)
    if isinstance(system, PlanarSystem):
        return _pose_planar(system)
    fail("system", "be a BoxSystem or a PlanarSystem", system, hint="See `catode.theory.systems.box`.")


# --- fields as text ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _parametrise(system: BoxSystem) -> tuple[str | None, np.ndarray]:
    """Source of the solver, with the floating-point numbers of the expressions taken out; None if it has no such form."""
    import sympy

    names = [sympy.Symbol(name) for name in system.names]
    floats = sorted(set().union(*(e.atoms(sympy.Float) for e in system.expressions)), key=float)
    renamed = {s: sympy.Symbol(f"y{i}") for i, s in enumerate(names)}
    renamed |= {f: sympy.Symbol(f"p{i}") for i, f in enumerate(floats)}
    symbols = {s for e in system.expressions for s in e.free_symbols}
    renamed |= {s: renamed[sympy.Symbol(s.name)] for s in symbols}  # symbols with assumptions of their own
    parts, components = sympy.cse(
        [without_jumps(sympy.sympify(e)).xreplace(renamed) for e in system.expressions], order="none"
    )
    try:
        lines = [f"{symbol} = {sympy.pycode(part)}" for symbol, part in parts]
        lines += [f"f{i} = 1.0 * ({sympy.pycode(component)})" for i, component in enumerate(components)]
    except NotImplementedError:
        lines = ["Not supported"]
    bounded = tuple(zip(np.isfinite(system.lower).tolist(), np.isfinite(system.upper).tolist(), strict=True))
    if any("Not supported" in line for line in lines):  # as older versions of sympy say it
        return None, np.empty(0)
    return write_solver(tuple(lines), bounded, len(floats)), np.array([float(f) for f in floats])


_SHAPES = (  # terms of the two speeds: layers, units and benefits; anything affine in each coordinate
    (("1.0", "y0", "y1", "y0 * y1"), ("1.0", "y0")),
    (("1.0", "y0", "y1", "y0 * y1"), ("1.0", "y0", "y1", "y0 * y1")),
)


def _pose_planar(system: PlanarSystem) -> _Problem:
    """The speeds are affine in each coordinate: read their coefficients from field and Jacobian, and check them."""
    corner, along = system.jacobian(np.zeros(2)), system.jacobian(np.array([1.0, 0.0]))
    value = system.field(np.zeros(2))
    found = [
        {"1.0": value[i], "y0": corner[i, 0], "y1": corner[i, 1], "y0 * y1": along[i, 1] - corner[i, 1]} for i in (0, 1)
    ]
    lower, upper = np.zeros(2), np.array([np.inf, 1.0])
    face = np.array([1.0, 1.0])
    rest = np.append(system.rest(face), 1.0)
    holds = bool(np.isfinite(rest).all() and system.field(rest)[-1] >= 0.0)

    def field(state: np.ndarray) -> np.ndarray:
        return np.asarray(system.field(state), dtype=np.float64)

    probes = np.array([[0.3, 0.7], [2.0, 0.2], [5.0, 1.0]])
    terms = {"1.0": np.ones(3), "y0": probes[:, 0], "y1": probes[:, 1], "y0 * y1": probes.prod(axis=1)}
    guess = np.stack([sum(c * terms[t] for t, c in row.items()) for row in found], axis=-1)
    size = np.stack([sum(abs(c * terms[t]) for t, c in row.items()) for row in found], axis=-1)
    if not np.all(np.abs(guess - field(probes)) <= 1e-12 * size):  # a planar system of the user's
        return _Problem(field, lower, upper, False, None, np.empty(0))
    shape = next(
        s for s in _SHAPES if all(c == 0.0 or t in row for row, f in zip(s, found, strict=True) for t, c in f.items())
    )
    lines, values = [], []
    for i, row in enumerate(shape):
        lines.append(f"f{i} = " + " + ".join(f"p{len(values) + j} * {t}" for j, t in enumerate(row)))
        values += [found[i][t] for t in row]
    return _Problem(
        field,
        lower,
        upper,
        holds,
        write_solver(tuple(lines), ((True, False), (True, True)), len(values)),
        np.array(values),
    )

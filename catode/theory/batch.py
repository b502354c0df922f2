"""The projected flow of thousands to millions of starts at once, each with its own step size and its own faces.

One scheme in two forms: compiled by numba from the field's expressions, and vectorised in numpy for a field that is only
a Python function. A start moves by steps of the Dormand-Prince pair (order 5), with a set of coordinates frozen on their
faces. The field is never masked inside a step: a step that would pass an event (a free coordinate leaves the box, or
the speed of a frozen one turns inwards) is shortened to the event, which is located by a root search on the step itself,
so that its error is that of the step.

Source: THEORY section 3.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from catode._validate import check_bool, check_int, check_interval, check_positive, check_real, check_shape, fail
from catode.theory import flow
from catode.theory.box import BoxSystem
from catode.theory.systems import PlanarSystem

__all__ = ["STATUSES", "Batch", "integrate_batch"]

STATUSES = (*flow.STATUSES, "arrived")
"""How a start can end, in the order of the codes in `Batch.codes`; see `Batch`."""

_PRUNED, _KEPT, _HORIZON, _FAILED, _ARRIVED = range(5)
_SLACK = 1e-2  # an event counts as located where the state passed it by less than this share of `atol`
_GROW, _SHRINK, _SAFETY = 8.0, 0.2, 0.9  # limits of a change of step, and its safety factor
_TRIES = 80  # of a root search


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

    Source: THEORY section 3.

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
        max_steps: Steps after which a start counts as failed.

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
    outside = np.argwhere((starts < problem.lower) | (starts > problem.upper))
    if outside.size:
        i, j = (int(v) for v in outside[0])
        box = f"[{problem.lower[j]:g}, {problem.upper[j]:g}]"
        fail("starts", f"lie in the box, coordinate {j} in {box}", float(starts[i, j]), index=(i, j))
    horizon = check_positive("horizon", horizon)
    rtol = check_interval("rtol", rtol, 0.0, 0.1, True)
    atol = check_positive("atol", atol)
    absorbing = check_bool("absorbing", absorbing)
    if absorbing and not np.isfinite([problem.lower[-1], problem.upper[-1]]).all():
        ends = (float(problem.lower[-1]), float(problem.upper[-1]))
        fail("system", "bound its last coordinate on both sides where `absorbing`", ends, mend="Give it faces.")
    targets = np.empty((0, d)) if targets is None else check_real("targets", targets, array=True)
    check_shape("targets", targets, f"(m, {d})", targets.ndim == 2 and targets.shape[1] == d)
    reach = check_positive("radius", radius) * check_positive("scale", scale, array=True)
    check_shape("scale", reach, f"() or ({d},)", reach.shape in ((), (d,)))
    max_steps = check_int("max_steps", max_steps, low=1)
    results = _outputs(starts)
    arrays = targets, np.broadcast_to(reach, (d,)), problem.lower, problem.upper
    targets, reach, lower, upper = (a.copy() for a in arrays)  # writable and in C order, as the compiled form expects
    options = (horizon, rtol, atol, absorbing, problem.holds, targets, reach, max_steps, lower, upper)
    began = time.perf_counter()
    solve = None if problem.source is None else _compile(problem.source)
    seconds = time.perf_counter() - began
    if solve is not None:
        solve(*results, *options, problem.values)
    else:
        with np.errstate(all="ignore"):
            _solve(*results, *options, problem.field)
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
    fail("system", "be a BoxSystem or a PlanarSystem", system, mend="See `catode.theory.box`.")


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
    parts, components = sympy.cse([sympy.sympify(e).xreplace(renamed) for e in system.expressions], order="none")
    try:
        lines = [f"{symbol} = {sympy.pycode(part)}" for symbol, part in parts]
        lines += [f"f{i} = 1.0 * ({sympy.pycode(component)})" for i, component in enumerate(components)]
    except NotImplementedError:
        lines = ["Not supported"]
    bounded = tuple(bool(b) for b in np.isfinite(system.lower) | np.isfinite(system.upper))
    if any("Not supported" in line for line in lines):  # as older versions of sympy say it
        return None, np.empty(0)
    return _write(tuple(lines), bounded, len(floats)), np.array([float(f) for f in floats])


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
    return _Problem(field, lower, upper, holds, _write(tuple(lines), (True, True), len(values)), np.array(values))


_TEMPLATE = '''"""Solver of one field; written by catode.theory.batch, which writes it anew when it is missing."""
import math

from numba import njit

options = {"error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "arcp"}, "no_cfunc_wrapper": True}
jit = njit(no_cpython_wrapper=True, **options)


@jit
def field(<y>, <p,>):
    {lines}
    return <f>


@jit
def step(<y>, <k>, <a,> sliding, h, rtol, atol, <p,>):
    turn = 1.0
    {stages}
    return <z>, <q>, error, turn


@jit
def passed(<z>, <q>, <a,> h, <w>, <b,>):
    v = -1e300
    {passed}
    return v


@jit
def dip(y, k, z, q, h, face, sign, slack):
    a, b, c = h * k * sign, 0.0, (z - y) * sign
    b, c = 3.0 * c - 2.0 * a - h * q * sign, a + h * q * sign - 2.0 * c
    s = -a / (b + math.sqrt(max(b * b - 3.0 * a * c, 0.0)))
    return s if (y - face) * sign + s * (a + s * (b + s * c)) < -slack else 1.0


@jit
def cross(y, k, z, q, h, face):
    a, b, c = h * k, 0.0, z - y
    b, c = 3.0 * c - 2.0 * a - h * q, a + h * q - 2.0 * c
    s = (face - y) / (z - y)
    for _ in range(3):
        slope = a + s * (2.0 * b + 3.0 * s * c)
        s -= (y - face + s * (a + s * (b + s * c))) / slope if slope != 0.0 else 0.0
    return s * h if 0.0 < s < 1.0 else h


@jit
def locate(<y>, <k>, <a,> sliding, h, <z>, <q>, rtol, atol, <p,> <b,>):
    {weights}
    low, below = 0.0, passed(<y>, <k>, <a,> h, <w>, <b,>)
    high, above = h, passed(<z>, <q>, <a,> h, <w>, <b,>)
    guess, aim, left, right = h, 0.5 * SLACK, below, above
    {guess}
    side = 0
    for i in range(TRIES):
        if above <= SLACK or high - low <= 1e-15 * h:
            break
        if i > 0 or guess >= h:
            if below >= 0.0 or i % 4 == 3:
                guess = 0.5 * (low + high)
            else:
                guess = low + (high - low) * max(aim - left, 0.0) / (right - left)
        x = step(<y>, <k>, <a,> sliding, guess, rtol, atol, <p,>)
        now = passed(<x>, <xq>, <a,> h, <w>, <b,>)
        if now > 0.0:
            high, above, right = guess, now, now
            <z>, <q> = <x>, <xq>
            if side == 1:
                left *= 0.5
            side = 1
        else:
            low, below, left = guess, now, now
            if side == -1:
                right = max(0.5 * right, SLACK)
            side = -1
    return high, <z>, <q>


@jit
def first(<y>, <k>, <a,> rtol, atol, <p,>):
    {first}
    return h


@njit(cache=True, **options)
def solve(
    ends, times, codes, reached, counts,
    horizon, rtol, atol, absorbing, holds, targets, reach, max_steps, lower, upper, values,
):
    {load}
    slack = SLACK * atol
    for item in range(len(ends)):
        {begin}
        t, steps, code, sliding = 0.0, 0, -1, {sliding}
        h = first(<y>, <k>, <a,> rtol, atol, <p,>)
        while True:
            {absorbed}
            for target in range(len(targets)):
                if {near}:
                    code, reached[item] = ARRIVED, target
                    break
            if code >= 0:
                break
            if t >= horizon:
                code = HORIZON
                break
            last = h >= horizon - t
            if last:
                h = horizon - t
            if steps >= max_steps or not t + h > t:
                code = FAILED
                break
            steps += 1
            x = step(<y>, <k>, <a,> sliding, h, rtol, atol, <p,>)
            error, turn = x[2 * D], x[2 * D + 1]
            if not error <= 1.0:
                h *= max(SHRINK, SAFETY / math.sqrt(math.sqrt(error))) if error < 1e300 else SHRINK
                continue
            <z>, <q> = <x>, <xq>
            v = passed(<z>, <q>, <a,> h, {ones}, <b,>)
            grown = h * (min(GROW, SAFETY / math.sqrt(math.sqrt(error))) if error > 0.0 else GROW)
            if v > 0.0:
                h, <z>, <q> = locate(<y>, <k>, <a,> sliding, h, <z>, <q>, rtol, atol, <p,> <b,>)
                last, turn = False, 1.0
            {dips}
            if turn < 1.0:
                h *= turn
                continue
            t = horizon if last else t + h
            <y> = <z>
            <k> = <q>
            h = grown
            if v > 0.0:
                {update}
                <k> = field(<y>, <p,>)
                {refreeze}
                sliding = {sliding}
        {store}
        times[item], codes[item], counts[item] = t, code, steps
'''


@lru_cache(maxsize=64)
def _write(lines: tuple[str, ...], bounded: tuple[bool, ...], n_values: int) -> str:
    """Source of the solver: every coordinate a scalar, every loop over coordinates and stages written out."""
    from scipy.integrate import RK45

    d, faces = len(bounded), [i for i, b in enumerate(bounded) if b]
    dims = range(d)

    def names(prefix: str, indices: Any = dims) -> str:
        return ", ".join(f"{prefix}{i}" for i in indices)

    def total(weights: Any, i: int) -> str:
        return " + ".join(f"{float(w)!r} * s{j}_{i}" for j, w in enumerate(weights) if w)

    def hold(prefix: str, i: int) -> str:
        return f"({prefix}{i} if a{i} == 0.0 else 0.0)" if i in faces else f"{prefix}{i}"

    stages = [f"s0_{i} = {hold('k', i)}" for i in dims]
    for j in range(1, 6):
        stages += [f"x{i} = y{i} + h * ({total(RK45.A[j, :j], i)})" for i in dims]
        stages += [f"{names('r')} = field({names('x')}, <p,>)"]
        stages += [f"s{j}_{i} = {hold('r', i)}" for i in dims]
        late = " or ".join(f"-a{i} * r{i} * h > SLACK * atol" for i in faces)
        stages += (
            [f"if sliding and turn == 1.0 and ({late}):", f"    turn = {float(RK45.C[j])!r}"] if faces and j < 5 else []
        )
    stages += [f"z{i} = y{i} + h * ({total(RK45.B, i)})" for i in dims]
    stages += [f"{names('q')} = field({names('z')}, <p,>)"]
    stages += [f"s6_{i} = {hold('q', i)}" for i in dims]
    errors = [f"abs({total(RK45.E, i)}) * h / (atol + rtol * max(abs(y{i}), abs(z{i})))" for i in dims]
    stages += [f"e{i} = {e}" for i, e in enumerate(errors)]
    stages += [f"error = max({names('e')}, 0.0) + 0.0 * ({' + '.join(f'e{i}' for i in dims)})"]  # NaN if one is

    outside = [
        f"v = max(v, (max(lo{i} - z{i}, z{i} - hi{i}) if a{i} == 0.0 else -a{i} * q{i} * h) * w{i})" for i in faces
    ]
    guess, dips, update, refreeze = [], [], [], []
    for i in faces:
        for face, sign in (("lo", "1.0"), ("hi", "-1.0")):
            beyond = f"(z{i} - {face}{i}) * {sign} < 0.0"
            guess += [
                f"if a{i} == 0.0 and {beyond}:",
                f"    guess = min(guess, cross(y{i}, k{i}, z{i}, q{i}, h, {face}{i} - {sign} * aim / w{i}))",
            ]
            ends = f"k{i} * {sign} < 0.0 and q{i} * {sign} > 0.0 and (z{i} - {face}{i}) * {sign} >= 0.0"
            test = f"dip(y{i}, k{i}, z{i}, q{i}, h, {face}{i}, {sign}, slack)"
            dips += [f"if a{i} == 0.0 and {ends}:", f"    turn = min(turn, {test})"]
        update += [
            f"if a{i} != 0.0:",
            f"    if -a{i} * k{i} > 0.0:",
            f"        a{i} = 0.0",
            f"elif y{i} <= lo{i} or y{i} >= hi{i}:",
            f"    y{i} = lo{i} if y{i} <= lo{i} else hi{i}",
            f"    a{i} = -1.0 if y{i} == lo{i} else 1.0",
            f"    new{i} = True",
        ]
        refreeze += [f"if new{i} and -a{i} * k{i} > 0.0:", f"    a{i} = 0.0"]
    update = [f"new{i} = False" for i in faces] + update

    load = [f"lo{i}, hi{i} = lower[{i}], upper[{i}]" for i in faces] + [f"p{i} = values[{i}]" for i in range(n_values)]
    begin = [f"y{i} = ends[item, {i}]" for i in dims] + ["<k> = field(<y>, <p,>)"]
    for i in faces:
        low, high = f"y{i} <= lo{i} and k{i} < 0.0", f"y{i} >= hi{i} and k{i} > 0.0"
        begin += [f"a{i} = -1.0 if {low} else (1.0 if {high} else 0.0)"]
    first = [f"c{i} = 1.0 / (atol + rtol * abs(y{i}))" for i in dims]
    first += [f"m{i} = {hold('k', i)}" for i in dims]
    first += [f"d0 = max({', '.join(f'abs(y{i}) * c{i}' for i in dims)}, 0.0)"]
    first += [f"d1 = max({', '.join(f'abs(m{i}) * c{i}' for i in dims)}, 0.0)"]
    first += ["h = 0.01 * d0 / d1 if d0 > 1e-5 and d1 > 1e-5 else 1e-6"]
    first += [f"{names('r')} = field({', '.join(f'y{i} + h * m{i}' for i in dims)}, <p,>)"]
    change = [f"abs({hold('r', i)} - m{i}) * c{i} / h" for i in dims]
    first += [f"d2 = max(d1, {', '.join(change)})"]
    first += ["h = min(100.0 * h, 0.3 / math.sqrt(math.sqrt(d2))) if d2 > 1e-15 else 100.0 * h"]
    absorbed = []
    if bounded[-1]:
        e = d - 1
        rising = " and ".join(f"({hold('k', i)}) >= 0.0" for i in range(e)) or "True"
        absorbed = [
            "if absorbing:",
            f"    if a{e} < 0.0 and k{e} < 0.0:",
            "        code = PRUNED",
            f"    elif a{e} > 0.0 and k{e} > 0.0 and (holds or ({rising})):",
            "        code = KEPT",
        ]
    blocks = {
        "lines": lines,
        "stages": stages,
        "passed": outside or ["pass"],
        "weights": [f"w{i} = 1.0 / (atol + rtol * max(abs(y{i}), abs(z{i})))" for i in faces] or ["pass"],
        "guess": guess or ["pass"],
        "load": load or ["pass"],
        "begin": begin,
        "first": first,
        "absorbed": absorbed or ["pass"],
        "dips": dips or ["pass"],
        "update": update or ["pass"],
        "refreeze": refreeze or ["pass"],
        "store": [f"ends[item, {i}] = y{i}" for i in dims],
    }
    text = []
    for line in _TEMPLATE.splitlines():
        name = line.strip()
        indent = line[: len(line) - len(line.lstrip())]
        block = blocks.get(name[1:-1]) if name.startswith("{") and name.endswith("}") else None
        text += [line] if block is None else [indent + part for part in block]
    source = "\n".join(text) + "\n"
    sliding = " or ".join(f"a{i} != 0.0" for i in faces) or "False"
    near = " and ".join(f"abs(y{i} - targets[target, {i}]) <= reach[{i}]" for i in dims)
    ones = "1.0, " * len(faces)
    source = source.replace("{ones}, ", ones).replace("{sliding}", sliding).replace("{near}", near)
    groups = {
        "<x>": ", ".join(f"x[{i}]" for i in dims),
        "<xq>": ", ".join(f"x[{d + i}]" for i in dims),
        "<a,>": "".join(f"a{i}, " for i in faces),
        "<w>, ": "".join(f"w{i}, " for i in faces),
        "<b,>": "".join(f"lo{i}, hi{i}, " for i in faces),
        "<p,>": "".join(f"p{i}, " for i in range(n_values)),
    }
    groups |= {f"<{name}>": names(name) for name in "yzkqf"}
    for key, group in groups.items():
        source = source.replace(key, group)
    constants = {
        "SLACK": _SLACK,
        "TRIES": _TRIES,
        "GROW": _GROW,
        "SHRINK": _SHRINK,
        "SAFETY": _SAFETY,
        "D": d,
        "VALUES": n_values,
    }
    constants |= {"PRUNED": _PRUNED, "KEPT": _KEPT, "HORIZON": _HORIZON, "FAILED": _FAILED, "ARRIVED": _ARRIVED}
    head, _, body = source.partition("@jit")
    return head + "".join(f"{name} = {value!r}\n" for name, value in constants.items()) + "\n\n@jit" + body


def _folder() -> Path:
    """Where compiled solvers stay."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "catode" / "flows"


@lru_cache(maxsize=64)
def _compile(source: str) -> Callable[..., tuple[np.ndarray, ...]] | None:
    """The solver as machine code, from the disk where an earlier process left it; None where numba cannot do it."""
    from numba.core.errors import NumbaError

    name = f"catode_flow_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    try:
        return _warm(_load(name, source))
    except NumbaError:  # a function that numba does not know
        return None
    except Exception:  # no place to write, or a cache that cannot be read: then without
        space = {"__name__": name}
        exec(source.replace("cache=True", "cache=False"), space)
        return _warm(space)


def _load(name: str, source: str) -> dict[str, Any]:
    """Import the source from the cache folder, where it is put first."""
    path = _folder() / f"{name}.py"
    if not path.exists() or path.read_text() != source:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(source)
        os.replace(file.name, path)
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # numba looks it up when it reads its cache
    spec.loader.exec_module(module)
    return vars(module)


def _outputs(starts: np.ndarray) -> tuple[np.ndarray, ...]:
    """Ends, times, codes, targets and steps, before the first step."""
    n = len(starts)
    return starts.copy(), np.zeros(n), np.full(n, -1, np.int8), np.full(n, -1, np.int32), np.zeros(n, np.int32)


def _warm(space: dict[str, Any]) -> Callable[..., tuple[np.ndarray, ...]]:
    """Compile for the types that `integrate_batch` passes, by a call without starts."""
    solve, width = space["solve"], np.ones(space["D"])
    nothing = np.empty((0, space["D"]))
    solve(*_outputs(nothing), 1.0, 1e-3, 1e-3, False, False, nothing, width, 1, width, width, np.ones(space["VALUES"]))
    return solve


# --- the same scheme in numpy ------------------------------------------------------------------------------------------


class _Faces:
    """The box and the size of what counts as nothing, for states of many starts."""

    def __init__(
        self, field: Callable[[np.ndarray], np.ndarray], lower: np.ndarray, upper: np.ndarray, rtol: float, atol: float
    ) -> None:
        from scipy.integrate import RK45

        self.field, self.lower, self.upper, self.rtol, self.atol, self.pair = field, lower, upper, rtol, atol, RK45
        self.slack = _SLACK * atol

    def step(self, y: np.ndarray, k: np.ndarray, a: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, ...]:
        """One step of every start: states, raw speeds, errors, and where in it a frozen coordinate seemed to turn."""
        pair, h = self.pair, h[:, None]
        speeds = np.empty((7, *y.shape))
        speeds[0] = np.where(a == 0.0, k, 0.0)
        turn = np.ones(len(y))
        for j in range(1, 6):
            raw = self.field(y + h * np.tensordot(pair.A[j, :j], speeds[:j], 1))
            speeds[j] = np.where(a == 0.0, raw, 0.0)
            if j < 5:
                turn = np.where((turn == 1.0) & (-a * raw * h > self.slack).any(axis=1), pair.C[j], turn)
        z = y + h * np.tensordot(pair.B, speeds[:6], 1)
        q = self.field(z)
        speeds[6] = np.where(a == 0.0, q, 0.0)
        width = self.atol + self.rtol * np.maximum(np.abs(y), np.abs(z))
        return z, q, (np.abs(np.tensordot(pair.E, speeds, 1)) * h / width).max(axis=1), turn

    def passed(self, z: np.ndarray, q: np.ndarray, a: np.ndarray, h: np.ndarray, width: Any = 1.0) -> np.ndarray:
        """How far each start is past an event: beyond a face, or on its way off one."""
        beyond = np.maximum(self.lower - z, z - self.upper)
        return (np.where(a == 0.0, beyond, -a * q * h[:, None]) / width).max(axis=1)

    def dip(
        self, y: np.ndarray, k: np.ndarray, z: np.ndarray, q: np.ndarray, a: np.ndarray, h: np.ndarray
    ) -> np.ndarray:
        """Where in the step (1: nowhere) a free coordinate lies furthest beyond a face that it has come back from."""
        share, h = np.ones(len(y)), h[:, None]
        for face, sign in ((self.lower, 1.0), (self.upper, -1.0)):
            slope, end, rise = h * k * sign, h * q * sign, (z - y) * sign
            square, cube = 3.0 * rise - 2.0 * slope - end, slope + end - 2.0 * rise
            s = -slope / (square + np.sqrt(np.maximum(square * square - 3.0 * slope * cube, 0.0)))
            depth = (y - face) * sign + s * (slope + s * (square + s * cube))
            inside = (z - face) * sign >= 0.0
            found = (a == 0.0) & (slope < 0.0) & (end > 0.0) & inside & (depth < -self.slack)
            share = np.minimum(share, np.where(found, s, 1.0).min(axis=1))
        return share

    def locate(
        self, y: np.ndarray, k: np.ndarray, a: np.ndarray, h: np.ndarray, z: np.ndarray, q: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Times into the step, states and raw speeds just past the first event."""
        low, high, z, q, side = np.zeros_like(h), h.copy(), z.copy(), q.copy(), np.zeros(len(h))
        width = self.atol + self.rtol * np.maximum(np.abs(y), np.abs(z))
        below, above = self.passed(y, k, a, h, width), self.passed(z, q, a, h, width)
        left, right = below.copy(), above.copy()  # these are halved where the same end stays (Illinois)
        for i in range(_TRIES):
            (on,) = np.nonzero((above > _SLACK) & (high - low > 1e-15 * h))
            if not on.size:
                break
            middle = (below[on] >= 0.0) | (i % 4 == 3)
            share = np.where(middle, 0.5, (0.5 * _SLACK - left[on]) / (right[on] - left[on]))
            guess = low[on] + (high[on] - low[on]) * share
            x, xq, _, _ = self.step(y[on], k[on], a[on], guess)
            now = self.passed(x, xq, a[on], h[on], width[on])
            past = now > 0.0
            to, back = on[past], on[~past]
            high[to], above[to], z[to], q[to] = guess[past], now[past], x[past], xq[past]
            low[back], below[back] = guess[~past], now[~past]
            right[to], left[back] = now[past], now[~past]
            left[to[side[to] == 1.0]] *= 0.5
            stay = back[side[back] == -1.0]
            right[stay] = np.maximum(0.5 * right[stay], _SLACK)
            side[to], side[back] = 1.0, -1.0
        return high, z, q

    def begin(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Raw speeds, frozen coordinates (-1 lower face, 1 upper, 0 free) and first steps."""
        k = self.field(y)
        a = np.where((y <= self.lower) & (k < 0.0), -1.0, np.where((y >= self.upper) & (k > 0.0), 1.0, 0.0))
        m = np.where(a == 0.0, k, 0.0)
        width = self.atol + self.rtol * np.abs(y)
        d0, d1 = (np.abs(y) / width).max(axis=1), (np.abs(m) / width).max(axis=1)
        h = np.where((d0 > 1e-5) & (d1 > 1e-5), 0.01 * d0 / d1, 1e-6)[:, None]
        later = np.where(a == 0.0, self.field(y + h * m), 0.0)
        d2 = np.maximum(d1, (np.abs(later - m) / width / h).max(axis=1))
        return k, a, np.where(d2 > 1e-15, np.minimum(100.0 * h[:, 0], 0.3 / np.sqrt(np.sqrt(d2))), 100.0 * h[:, 0])


def _solve(
    ends: np.ndarray,
    times: np.ndarray,
    codes: np.ndarray,
    reached: np.ndarray,
    counts: np.ndarray,
    horizon: float,
    rtol: float,
    atol: float,
    absorbing: bool,
    holds: bool,
    targets: np.ndarray,
    reach: np.ndarray,
    max_steps: int,
    lower: np.ndarray,
    upper: np.ndarray,
    field: Callable[[np.ndarray], np.ndarray],
) -> None:
    """What `solve` of the compiled source does, for all starts at a time."""
    if not len(ends):
        return
    faces = _Faces(field, lower, upper, rtol, atol)
    speeds, frozen, steps = faces.begin(ends)
    while True:
        live = np.nonzero(codes < 0)[0]
        y, k, a, t = ends[live], speeds[live], frozen[live], times[live]
        code = np.where(t >= horizon, _HORIZON, -1)
        if absorbing:
            rising = holds | (np.where(a == 0.0, k, 0.0)[:, :-1] >= 0.0).all(axis=1)
            code = np.where((a[:, -1] > 0.0) & (k[:, -1] > 0.0) & rising, _KEPT, code)
            code = np.where((a[:, -1] < 0.0) & (k[:, -1] < 0.0), _PRUNED, code)
        if len(targets):
            near = (np.abs(y[:, None] - targets) <= reach).all(axis=2)
            code = np.where(near.any(axis=1), _ARRIVED, code)
            reached[live] = np.where(near.any(axis=1), near.argmax(axis=1), -1)
        last = steps[live] >= horizon - t
        steps[live] = np.where(last, horizon - t, steps[live])
        stuck = (code < 0) & ((counts[live] >= max_steps) | ~(t + steps[live] > t))
        codes[live] = np.where(stuck, _FAILED, code)
        on = codes[live] < 0
        live, y, k, a, t, last = live[on], y[on], k[on], a[on], t[on], last[on]
        if not live.size:
            return
        h = steps[live]
        counts[live] += 1
        z, q, error, turn = faces.step(y, k, a, h)
        change = np.where(error > 0.0, _SAFETY / np.sqrt(np.sqrt(error)), _GROW)
        good = error <= 1.0
        steps[live[~good]] *= np.where(error < 1e300, np.maximum(_SHRINK, change), _SHRINK)[~good]
        grown = h * np.minimum(_GROW, change)
        event = good & (faces.passed(z, q, a, h) > 0.0)
        if event.any():
            h[event], z[event], q[event] = faces.locate(y[event], k[event], a[event], h[event], z[event], q[event])
        turn = np.minimum(np.where(event, 1.0, turn), faces.dip(y, k, z, q, a, h))
        steps[live[good]] = np.where(turn < 1.0, h * turn, grown)[good]
        good &= turn == 1.0
        event &= good
        if event.any():
            z[event], q[event], a[event] = _touch(faces, z[event], q[event], a[event])
        times[live[good]] = np.where(last & ~event, horizon, t + h)[good]
        ends[live[good]], speeds[live[good]], frozen[live[good]] = z[good], q[good], a[good]


def _touch(faces: _Faces, y: np.ndarray, k: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put coordinates that left the box on their face, frozen unless pushed inwards, and let go those that turned."""
    touched = (a == 0.0) & ((y <= faces.lower) | (y >= faces.upper))
    a = np.where((a != 0.0) & (-a * k > 0.0), 0.0, a)
    y = np.clip(y, faces.lower, faces.upper)
    side = np.where(y == faces.lower, -1.0, 1.0)
    k = faces.field(y)
    return y, k, np.where(touched & (-side * k <= 0.0), side, a)

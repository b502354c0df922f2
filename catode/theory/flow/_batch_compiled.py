"""The compiled form of `catode.theory.flow.batch`: a solver written out for one field, compiled by numba and kept on disk.

`write_solver` turns the lines of a field into the source of a solver, `compile_solver` turns that source into machine
code. A source is named by its hash, so that a change of the template here, or of a number in `_batch_scheme`, gives
another file and leaves the old one unused.

Source: docs/mathematics.md section 3.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from catode.theory.flow._batch_scheme import (
    ARRIVED,
    CHECK,
    FAILED,
    GROW,
    HOPELESS,
    HORIZON,
    KEPT,
    PRUNED,
    SAFETY,
    SHRINK,
    SLACK,
    TRIES,
    outputs,
)

_TEMPLATE = '''"""Solver of one field; written by catode.theory.flow._batch_compiled, which writes it anew when it is missing."""
import math

from numba import njit

options = {"error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "arcp"}, "no_cfunc_wrapper": True}
jit = njit(no_cpython_wrapper=True, forceinline=True, **options)


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
    return s if 0.0 < s < 1.0 and (y - face) * sign + s * (a + s * (b + s * c)) < -slack else 1.0


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
        mark, look = 0.0, CHECK
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
            if steps >= look:
                if (horizon - t) * CHECK > HOPELESS * (t - mark):
                    code = FAILED
                    break
                mark, look = t, steps + CHECK
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
def write_solver(lines: tuple[str, ...], bounded: tuple[tuple[bool, bool], ...], n_values: int) -> str:
    """Source of the solver: every coordinate a scalar, every loop over coordinates and stages written out.

    Args:
        lines: The field, from y0, y1, .. and p0, p1, .. to f0, f1, ..
        bounded: Whether each coordinate has a lower and an upper face.
        n_values: How many numbers p0, p1, .. there are.
    """
    from scipy.integrate import RK45

    d, faces = len(bounded), [i for i, sides in enumerate(bounded) if any(sides)]
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

    def either(i: int, low: str, high: str, both: str) -> str:
        return both.format(low, high) if all(bounded[i]) else low if bounded[i][0] else high

    beyond = {i: either(i, f"lo{i} - z{i}", f"z{i} - hi{i}", "max({}, {})") for i in faces}
    outside = [f"v = max(v, ({beyond[i]} if a{i} == 0.0 else -a{i} * q{i} * h) * w{i})" for i in faces]
    guess, dips, update, refreeze = [], [], [], []
    for i in faces:
        for face, sign in itertools.compress((("lo", "1.0"), ("hi", "-1.0")), bounded[i]):
            guess += [
                f"if a{i} == 0.0 and (z{i} - {face}{i}) * {sign} < 0.0:",
                f"    guess = min(guess, cross(y{i}, k{i}, z{i}, q{i}, h, {face}{i} - {sign} * aim / w{i}))",
            ]
            # It turns once, from outwards to inwards, or twice: then only if its speed at an end could carry it out.
            early = f"(k{i} * {sign} < 0.0 and (q{i} * {sign} > 0.0 or (y{i} - {face}{i} + h * k{i}) * {sign} < 0.0))"
            late = f"(k{i} * {sign} > 0.0 and (z{i} - {face}{i} - h * q{i}) * {sign} < 0.0)"
            ends = f"(z{i} - {face}{i}) * {sign} >= 0.0 and ({early} or {late})"
            test = f"dip(y{i}, k{i}, z{i}, q{i}, h, {face}{i}, {sign}, slack)"
            dips += [f"if a{i} == 0.0 and {ends}:", f"    turn = min(turn, {test})"]
        met = either(i, f"y{i} <= lo{i}", f"y{i} >= hi{i}", "{} or {}")
        update += [
            f"if a{i} != 0.0:",
            f"    if -a{i} * k{i} > 0.0:",
            f"        a{i} = 0.0",
            f"elif {met}:",
            f"    y{i} = {either(i, f'lo{i}', f'hi{i}', f'{{}} if y{i} <= lo{i} else {{}}')}",
            f"    a{i} = {either(i, '-1.0', '1.0', f'{{}} if y{i} == lo{i} else {{}}')}",
            f"    new{i} = True",
        ]
        refreeze += [f"if new{i} and -a{i} * k{i} > 0.0:", f"    a{i} = 0.0"]
    update = [f"new{i} = False" for i in faces] + update

    load = [f"lo{i}, hi{i} = lower[{i}], upper[{i}]" for i in faces] + [f"p{i} = values[{i}]" for i in range(n_values)]
    begin = [f"y{i} = ends[item, {i}]" for i in dims] + ["<k> = field(<y>, <p,>)"]
    for i in faces:
        low, high = f"-1.0 if y{i} <= lo{i} and k{i} < 0.0 else 0.0", f"1.0 if y{i} >= hi{i} and k{i} > 0.0 else 0.0"
        begin += [f"a{i} = {either(i, low, high, '({}) + ({})')}"]
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
    if all(bounded[-1]):
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
        "SLACK": SLACK,
        "TRIES": TRIES,
        "GROW": GROW,
        "SHRINK": SHRINK,
        "SAFETY": SAFETY,
        "CHECK": CHECK,
        "HOPELESS": float(HOPELESS),
        "D": d,
        "VALUES": n_values,
    }
    constants |= {"PRUNED": PRUNED, "KEPT": KEPT, "HORIZON": HORIZON, "FAILED": FAILED, "ARRIVED": ARRIVED}
    head, _, body = source.partition("@jit")
    return head + "".join(f"{name} = {value!r}\n" for name, value in constants.items()) + "\n\n@jit" + body


def _folder() -> Path:
    """Where compiled solvers stay."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "catode" / "flows"


@lru_cache(maxsize=64)
def compile_solver(source: str) -> Callable[..., tuple[np.ndarray, ...]] | None:
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


def _warm(space: dict[str, Any]) -> Callable[..., tuple[np.ndarray, ...]]:
    """Compile for the types that `integrate_batch` passes, by a call without starts."""
    solve, width = space["solve"], np.ones(space["D"])
    nothing = np.empty((0, space["D"]))
    solve(*outputs(nothing), 1.0, 1e-3, 1e-3, False, False, nothing, width, 1, width, width, np.ones(space["VALUES"]))
    return solve

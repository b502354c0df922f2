"""The staircase that `catode.theory.certify` proposes for a polynomial system on a box: chains of order intervals.

Nothing here is trusted: `Certificate.verify` proves the staircase by the ray lemma and the order lemma.

Source: docs/certificates.md; the order lemma is that of docs/mathematics.md section 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from catode._validate import fail
from catode.theory.certificates._exact import (
    BITS,
    Point,
    Polynomial,
    Segments,
    accuse,
    as_floats,
    below,
    evaluate,
    exact_field,
    shortened,
    uncooperative,
)
from catode.theory.systems.box import BoxSystem

_MAX_PIECES = 4_000
_STEP = 0.1  # of the super-solutions, in units of the fastest time scale


def propose_staircase(system: BoxSystem, slack: float, directions: int) -> dict[str, Any]:
    """Super-solutions stepped in floats from the farthest starts, along a fan of directions, that reach the goal.

    Returns:
        The parts of a `Certificate`, but for its seal.
    """
    if not (np.isfinite(system.lower).all() and np.isfinite(system.upper).all()):
        fail("system", "have a bounded box for a certificate", [system.lower.tolist(), system.upper.tolist()])
    field = exact_field(system)
    lower, upper = (tuple(map(Fraction, end.tolist())) for end in (system.lower, system.upper))
    witness = uncooperative(field, lower, upper)
    if witness:
        i, j, value, _ = witness
        shown = float("nan") if value is None else float(value)
        hint = f"{accuse(witness, system.names)}. Order intervals need every off-diagonal entry to be non-negative."
        fail("system", "be cooperative in its box", shown, index=(i, j), hint=hint)
    segments = Segments(field)
    goal = _goal(system, field, segments)
    floats = as_floats(goal)
    fan = _fan(system.lower.size, directions)
    low, high = np.zeros(len(fan)), np.ones(len(fan))
    width = system.upper - system.lower
    for _ in range(12):
        middle = 0.5 * (low + high)
        arrived = _descend(system, system.lower + middle[:, None] * fan * width, floats, slack)[1] > 0
        low, high = np.where(arrived, middle, low), np.where(arrived, high, middle)
    paths, lengths, step = _descend(system, system.lower + low[:, None] * fan * width, floats, slack)
    chains, durations, tops = [], [], floats[None]
    for path, length in zip(np.moveaxis(paths, 1, 0), lengths, strict=True):
        covered = (path[1:length, None] <= tops).all(axis=-1).any(axis=-1) if length > 1 else np.zeros(0, dtype=bool)
        chain = path[: 2 + int(np.argmax(covered))] if covered.any() else path[:length]
        chain = tuple(tuple(map(Fraction, p)) for p in chain.tolist())
        times = (Fraction(step),) * (len(chain) - 1)
        if all(
            segments.bounds_flow(upper, a, b, t) for (a, b), t in zip(itertools.pairwise(chain), times, strict=True)
        ):
            chains.append(chain)
            durations.append(times)
            tops = np.concatenate([tops, path[: len(chain)]])
    return {
        "kind": "order",
        "system": tuple(tuple(component.items()) for component in field),
        "names": system.names,
        "lower": lower,
        "upper": upper,
        "chains": tuple(chains),
        "durations": tuple(durations),
        "goal": goal,
    }


def _fan(d: int, n: int) -> np.ndarray:
    """Directions into the box, scaled so that their largest component is 1, shape (k, d)."""
    grid = np.linspace(0.0, 1.0, n)
    faces = []
    for j in range(d):
        rest = np.stack(np.meshgrid(*[grid] * (d - 1), indexing="ij"), axis=-1).reshape(-1, d - 1) if d > 1 else [[]]
        faces.append(np.insert(rest, j, 1.0, axis=1))
    return np.unique(np.concatenate(faces), axis=0)


def _goal(system: BoxSystem, field: Sequence[Polynomial], segments: Segments) -> Point:
    """Top of the largest found interval above the lower corner all along whose diagonal the field points down."""
    lower, upper = (tuple(map(Fraction, end.tolist())) for end in (system.lower, system.upper))
    speed = np.array([float(evaluate(component, lower)) for component in field])
    if (speed > 0).any():
        i = int(np.argmax(speed > 0))
        hint = f"{system.names[i]} rises at the lower corner {system.lower.tolist()}, so nothing ends there."
        fail("system", "rest at the lower corner of its box", float(speed[i]), index=(i,), hint=hint)
    free = speed == 0.0
    direction = np.array(system.upper - system.lower)
    if free.any():  # the linearised field must fall in every free coordinate, the pushed ones being kept small
        matrix = system.jacobian(system.lower)
        block = matrix[np.ix_(free, free)]
        try:
            fall = np.linalg.solve(block, -direction[free] - matrix[np.ix_(free, ~free)] @ direction[~free])
        except np.linalg.LinAlgError:
            fall = np.full(int(free.sum()), -1.0)
        direction[free] = fall
    if (direction > 0).all():
        direction = direction * np.min((system.upper - system.lower) / direction)
        for k in range(400):
            top = tuple(low + shortened(0.9**k * x) for low, x in zip(lower, direction.tolist(), strict=True))
            if below(top, upper) and segments.falls(lower, top):
                return top
    fail(
        "system",
        "attract a neighbourhood of the lower corner of its box",
        system.lower.tolist(),
        hint="No direction was found along which the field points down near it.",
    )


def _descend(
    system: BoxSystem, start: np.ndarray, goal: np.ndarray, slack: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Euler steps along the larger speed of both ends, plus slack: super-solutions, up to curvature.

    Returns:
        Corners, shape (steps, k, d); the number of corners up to the goal, 0 where it was not reached, shape (k,);
        the time step.
    """
    corners = np.stack(np.meshgrid(*np.stack([system.lower, system.upper, 0.5 * (system.lower + system.upper)], 1)), -1)
    corners = corners.reshape(-1, start.shape[1])
    step = float(shortened(_STEP / max(np.abs(system.jacobian(corners)).sum(-1).max(), 1e-300)))
    pad = slack * np.abs(system.field(corners)).max(axis=0)
    grid = 2.0 ** (np.floor(np.log2(system.upper - system.lower)) - BITS)
    y = np.minimum(system.lower + np.floor((start - system.lower) / grid) * grid, system.upper)
    path, lengths = [y], np.zeros(len(start), dtype=int)
    for k in range(1, _MAX_PIECES):
        speed = system.field(y)
        speed = np.maximum(speed, system.field(np.clip(y + step * speed, system.lower, system.upper))) + pad
        lengths[(lengths == 0) & (y <= goal).all(axis=1)] = k
        if ((lengths > 0) | (speed >= 0.0).all(axis=1)).all():  # what rises in every coordinate never comes down
            break
        y = y + step * speed
        y = np.clip(system.lower + np.ceil((y - system.lower) / grid) * grid, system.lower, system.upper)
        path.append(y)
    return np.array(path), lengths, step

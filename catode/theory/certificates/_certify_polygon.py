"""The polygon that `catode.theory.certify` proposes for a comparison system: chords just below its separatrix.

Nothing here is trusted: `Certificate.verify` proves the polygon by the gauge lemma.

Source: docs/certificates.md; docs/mathematics.md sections 4.1 to 4.3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from catode._validate import fail
from catode.theory.certificates._exact import PARAMETERS, Point, Segments, comparison_field, shortened
from catode.theory.systems.norms import UnitSystem

_MAX_EDGES = 6_000


def propose_polygon(system: Any, size: float, slack: float) -> dict[str, Any]:
    """Chords of a curve just below the separatrix, cut in halves where the exact check asks for it.

    Returns:
        The parts of a `Certificate`, but for its seal.
    """
    kind = type(system).__name__
    parameters = {name: Fraction(getattr(system, name)) for name in PARAMETERS[kind]}
    crosses = Segments(comparison_field(kind, parameters)).crosses
    cheaper = dataclasses.replace(system, price=system.price * (1.0 - slack))
    if getattr(cheaper, "empty", False):
        hint = (
            "D is empty: the drift is too strong." if system.empty else "The drift leaves less; choose a smaller one."
        )
        fail("slack", "leave a part of D", slack, hint=hint)
    middle, height = cheaper.saddle
    curve = _unit_curve(cheaper, size, slack) if kind == "UnitSystem" else cheaper.separatrix

    def vertex(x: float) -> Point:
        x = shortened(x)
        return x, shortened(float(curve(float(x))))

    right = middle
    while curve(right) > 0.0:
        right *= 2.0
    ends = [(shortened(_fall(curve, 0.0, 0.0, right)), Fraction(0))]
    if kind == "UnitSystem":  # the separatrix is infinite at 0: start with a level edge
        level = vertex(_fall(curve, max(1.0, 1.02 * height), 0.2 * slack * middle, middle))
        polygon = [(Fraction(0), level[1]), level]
    else:
        polygon = [vertex(0.0)]
    while ends:
        a, b = polygon[-1], ends[-1]
        if crosses(a, b, (a[1] - b[1], b[0] - a[0])):
            polygon.append(ends.pop())
        elif len(polygon) + len(ends) < _MAX_EDGES and b[0] - a[0] > b[0] / 10**6:
            ends.append(vertex(float((a[0] + b[0]) / 2)))
        else:
            fail("slack", "leave enough margin for the exact proof", slack, hint="Choose a larger one.")
    return {
        "kind": "lyapunov",
        "system": (kind, *parameters.items()),
        "names": ("benefit" if kind == "BenefitSystem" else "size", "keep_prob"),
        "lower": (Fraction(0), Fraction(0)),
        "upper": (Fraction(size), Fraction(1)),
        "chains": (tuple(polygon),),
        "durations": (),
        "goal": (),
    }


def _unit_curve(system: UnitSystem, size: float, slack: float) -> Callable[[float], float]:
    """The separatrix, bent down where that costs little area and saves many edges: near size 0 and outside the box."""
    middle = system.saddle[0]
    bend = slack * (system.rate_ratio * system.price / system.benefit_slope) ** 0.5
    edge = max(size, middle)
    outer = float(system.separatrix(edge))

    def curve(x: float) -> float:
        y = float(system.separatrix(x))
        if x < middle:
            return y - bend * ((middle / x) ** 0.5 - 1.0)
        return y - 0.2 * (outer - y) if x > edge else y

    return curve


def _fall(curve: Callable[[float], float], level: float, low: float, high: float) -> float:
    """Where a falling curve passes a level, from the left; `low` where it does not."""
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if curve(middle) > level else (low, middle)
    return low

"""Verified domains of attraction: sets of starts proved, in exact rational arithmetic, to end removed.

Floats only propose a set; `Certificate.verify` proves it again from the certificate's own data with fractions alone, so
no rounding error and no solver stands between the claim and the proof. The proof is here, its arithmetic in `_exact`, the
proposing in `_certify_polygon` and `_certify_staircase`. Two kinds exist, with their lemmas in docs/certificates.md:

* "lyapunov", for the three comparison systems: a falling polygon from the theta axis to the size axis, every edge of
  which the field crosses inwards. Its gauge is a Lyapunov function, for the layer the linear one of docs/mathematics.md
  section 4.1.
* "order", for polynomial cooperative systems on a box of any dimension: order intervals [lower, p] below the points of
  piecewise linear super-solutions that descend into an interval on which the field points down.

Source: docs/mathematics.md section 4 (the order lemma and the domains D_B and D_U); that of the gauge is in
docs/certificates.md.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from catode._validate import check_choice, check_int, check_interval, check_positive, check_real, check_shape, fail
from catode.theory.certificates._certify_polygon import propose_polygon
from catode.theory.certificates._certify_staircase import propose_staircase
from catode.theory.certificates._exact import (
    MAY_BE_ZERO,
    PARAMETERS,
    Point,
    Polynomial,
    Segments,
    accuse,
    as_floats,
    below,
    comparison_field,
    derivative,
    dot,
    evaluate,
    uncooperative,
)
from catode.theory.systems.benefit import BenefitSystem
from catode.theory.systems.box import BoxSystem
from catode.theory.systems.norms import LayerSystem, UnitSystem
from catode.theory.systems.planar import PlanarSystem

__all__ = ["Certificate", "certify"]


VERSION = 1
"""Version of the text that `Certificate.to_json` writes."""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """A set of starts proved to end removed, with all that the proof needs.

    Make one with `certify`, or read one with `from_json` and call `verify` before trusting it.

    Args:
        kind: "lyapunov" or "order".
        system: The exact system: for "lyapunov" pairs of names and rationals, the class first; for "order" the
            components as pairs of exponents and rationals.
        names: Names of the coordinates.
        lower: Lower corner of the box, where the removed state lies.
        upper: Upper corner of the box.
        chains: For "lyapunov" the vertices of the polygon, from the theta axis to the size axis, as the one chain; for
            "order" the corners of the super-solutions.
        durations: For "order" the time that each piece of each super-solution takes; else empty.
        goal: For "order" the top of the interval in which every super-solution ends; else empty.
        seal: SHA-256 of all the rest. It shows a change that leaves a true claim; the proof does not rest on it.
    """

    kind: str
    system: tuple[Any, ...]
    names: tuple[str, ...]
    lower: Point
    upper: Point
    chains: tuple[tuple[Point, ...], ...] = dataclasses.field(repr=False)
    durations: tuple[tuple[Fraction, ...], ...] = dataclasses.field(repr=False)
    goal: Point
    seal: str

    def verify(self) -> bool:
        """Whether the claim holds, proved again in exact arithmetic from this object's data alone."""
        return self.fault() is None

    def fault(self) -> str | None:
        """The first step of the proof that fails, in a sentence; None where the proof holds."""
        if self.seal != _digest(self._body()):
            return "The seal does not fit: something was changed after the certificate was made."
        if self.kind == "lyapunov":
            return self._polygon_fault()
        return self._order_fault()

    @functools.cached_property
    def field(self) -> tuple[Polynomial, ...]:
        """The exact velocity, one polynomial for each coordinate."""
        if self.kind == "lyapunov":
            return comparison_field(self.system[0], dict(self.system[1:]))
        return tuple({tuple(powers): value for powers, value in component} for component in self.system)

    @property
    def stays(self) -> bool:
        """Whether theta, once 0, is proved to stay there; False only for a benefit that drift carries past its price."""
        if self.kind == "order":
            return True
        speed, pull = self.field
        return evaluate(speed, (_turning_point(pull), Fraction(0))) <= 0

    @functools.cached_property
    def rate(self) -> Fraction:
        """For "lyapunov" the rate gamma, 1/time, in V' <= -gamma (1 - V): from V0, theta is 0 by log(1/(1-V0))/gamma.

        Source: docs/certificates.md; for the layer gamma is close to mu.

        Raises:
            ValueError: for a certificate of kind "order".
        """
        self._require_polygon("rate")
        start = [evaluate(component, self.lower) for component in self.field]
        return min(-dot(n, start) / dot(n, a) for a, _, n in _edges(self.chains[0]))

    def value(self, state: Any) -> np.ndarray:
        """The Lyapunov function V, the gauge of the polygon: 1 on it, less below it, 0 at the removed state.

        Args:
            state: States (size, theta), shape (..., 2).

        Returns:
            Values in floats, shape (...).

        Raises:
            ValueError: for a certificate of kind "order", or for wrong states.
        """
        self._require_polygon("value")
        state = self._states(state)
        edges = _edges(self.chains[0])
        heads = np.array([[float(x) for x in a] for a, _, _ in edges])
        forms = np.array([[float(x / dot(n, a)) for x in n] for a, _, n in edges])
        # the cone of edge k lies between the rays through its ends; size / theta grows from one to the next
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            turned = np.searchsorted(heads[:, 0] / heads[:, 1], state[..., 0] / state[..., 1], side="right")
        return (forms[np.maximum(turned - 1, 0)] * state).sum(axis=-1)

    def contains(self, state: Any) -> np.ndarray:
        """Whether states are certified; decided without rounding error.

        Args:
            state: States, shape (..., d); a negative benefit counts as 0.

        Returns:
            Booleans, shape (...); False outside the box.
        """
        state = self._states(state)
        lower, upper = as_floats(self.lower, up=True), as_floats(self.upper)
        inside = ((state >= lower) & (state <= upper)).all(axis=-1)
        if self.kind == "order":
            tops = np.array([as_floats(top) for top in self._tops()])
            flat = state.reshape(-1, len(lower))
            covered = [(flat[k : k + 256, None] <= tops).all(axis=-1).any(axis=-1) for k in range(0, len(flat), 256)]
            return inside & np.concatenate([np.zeros(0, dtype=bool), *covered]).reshape(inside.shape)
        value = self.value(state)
        clear = np.asarray(inside & (value < 1.0 - 1e-9))
        for index in np.argwhere(inside & (np.abs(value - 1.0) <= 1e-9)):
            clear[tuple(index)] = self._holds_exactly(state[tuple(index)])
        return clear

    @property
    def share(self) -> float:
        """Certified share of the box's area (plane only).

        Raises:
            ValueError: if the box is not a plane one.
        """
        if len(self.lower) != 2:
            fail("share", "be asked of a planar certificate", len(self.lower), hint="Count `contains` over samples.")
        (x0, y0), (x1, y1) = self.lower, self.upper
        area = Fraction(0)
        if self.kind == "lyapunov":
            for (xa, ya), (xb, yb), _ in _edges(self.chains[0]):
                cuts = {max(xa, x0), min(xb, x1)}
                if yb < y1 < ya:
                    cuts.add(min(max(xa + (ya - y1) / (ya - yb) * (xb - xa), x0), x1))
                for left, right in itertools.pairwise(sorted(cuts) if xa < x1 else []):
                    heights = [min(ya + (yb - ya) * (x - xa) / (xb - xa), y1) for x in (left, right)]
                    area += (right - left) * sum(heights) / 2
        else:
            edge = x0
            for x, y in reversed(self._tops()):
                area += (x - edge) * (y - y0)
                edge = x
        return float(area / ((x1 - x0) * (y1 - y0)))

    def to_json(self) -> str:
        """One line of JSON with every number as an exact rational in text."""
        return json.dumps({**self._body(), "seal": self.seal}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Read what `to_json` wrote, and nothing else. The result is not trusted: call `verify`.

        Raises:
            ValueError: if the text is not the JSON of a certificate of this version, or holds anything (a second value
                for a key, an unknown key, a number in another notation) that the certificate read from it does not.
        """
        try:
            body = json.loads(text, object_pairs_hook=_unique)
            if body["certificate"] != VERSION or isinstance(body["certificate"], bool):
                fail("certificate", f"be {VERSION}, the version that is read here", body["certificate"])
            kind = check_choice("kind", body["kind"], ("lyapunov", "order"))
            if kind == "lyapunov":
                name, *pairs = body["system"]
                system = (str(name), *((str(key), _read(value)) for key, value in pairs))
            else:
                system = tuple(
                    tuple((tuple(map(int, powers)), _read(value)) for powers, value in component)
                    for component in body["system"]
                )
            points = functools.partial(map, lambda values: tuple(map(_read, values)))
            proof = cls(
                kind=kind,
                system=system,
                names=tuple(map(str, body["names"])),
                lower=tuple(map(_read, body["lower"])),
                upper=tuple(map(_read, body["upper"])),
                chains=tuple(tuple(points(chain)) for chain in body["chains"]),
                durations=tuple(points(body["durations"])),
                goal=tuple(map(_read, body["goal"])),
                seal=str(body["seal"]),
            )
            if _canonical(body) != _canonical({**proof._body(), "seal": proof.seal}):
                fail("text", "hold what a certificate writes and no more", sorted(body))
            return proof
        except (ValueError, KeyError, TypeError, ArithmeticError, AttributeError, RecursionError) as error:
            fail("text", "be the JSON of a certificate", text, hint=f"{type(error).__name__}: {error}.")

    def _body(self) -> dict[str, Any]:
        """Everything but the seal, with rationals as texts."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "seal"}
        return {"certificate": VERSION, **_textual(body)}

    def _require_polygon(self, name: str) -> None:
        if self.kind != "lyapunov":
            fail(name, 'be asked of a certificate of kind "lyapunov"', self.kind)

    def _states(self, state: Any) -> np.ndarray:
        state = check_real("state", state, array=True)
        good = state.ndim > 0 and state.shape[-1] == len(self.lower)
        check_shape("state", state, f"(..., {len(self.lower)})", good)
        if self.kind == "lyapunov" and self.system[0] == "BenefitSystem":
            state = np.stack([np.maximum(state[..., 0], 0.0), state[..., 1]], axis=-1)
        return state

    def _holds_exactly(self, state: np.ndarray) -> bool:
        x, y = map(Fraction, state.tolist())
        return any(a[0] <= x <= b[0] and dot(n, (x, y)) <= dot(n, a) for a, b, n in _edges(self.chains[0]))

    def _tops(self) -> list[Point]:
        """Corners of the order intervals; in the plane only those that no other one exceeds."""
        tops = [self.goal, *itertools.chain.from_iterable(self.chains)]
        return _maximal(tops) if len(self.lower) == 2 else tops

    def _polygon_fault(self) -> str | None:
        """The gauge lemma of docs/certificates.md, premise by premise."""
        kind, *pairs = self.system
        names = tuple(name for name, _ in pairs)
        if kind not in PARAMETERS or names != PARAMETERS[kind]:
            return f"No comparison system {kind!r} has the parameters {', '.join(names)}."
        for name, value in pairs:
            if value < 0 or (value == 0 and name not in MAY_BE_ZERO):
                return f"The parameter {name} is out of range."
        zero = Fraction(0)
        if self.lower != (zero, zero) or len(self.upper) != 2 or min(self.upper) <= 0 or self.upper[1] != 1:
            return "The box is not [0, size] x [0, 1]."
        field = self.field
        if any(c < 0 for f in field for powers, c in f.items() if sum(powers) >= 2):
            return "The field is not convex along rays."
        if any(c < 0 for i in (0, 1) for c in derivative(field[i], 1 - i).values()):
            return "The system is not cooperative."
        if len(self.chains) != 1 or len(self.chains[0]) < 2 or any(len(p) != 2 for p in self.chains[0]):
            return "The polygon is not one chain of points in the plane."
        (first, *_, last) = self.chains[0]
        if first[0] != 0 or first[1] <= 0 or last[0] <= 0 or last[1] != 0:
            return "The polygon does not lead from the theta axis to the size axis."
        start = [evaluate(component, self.lower) for component in field]
        segments = Segments(field)
        for k, (a, b, n) in enumerate(_edges(self.chains[0])):
            if not (n[0] >= 0 and n[1] > 0 and a[1] > 0):
                return f"Edge {k} does not fall from left to right."
            if not dot(n, start) < 0:
                return f"The field at the removed state does not point below edge {k}."
            if not segments.crosses(a, b, n):
                return f"The field does not cross edge {k} inwards."
        return None

    def _order_fault(self) -> str | None:
        """The ray lemma and the order lemma of docs/certificates.md, premise by premise."""
        d = len(self.lower)
        if d == 0 or len({d, len(self.upper), len(self.goal), len(self.system), len(self.names)}) != 1:
            return "The dimensions differ."
        if any(len(p) != d or min(p) < 0 for f in self.field for p in f):
            return "The field is not polynomial in the coordinates."
        if not all(low < high for low, high in zip(self.lower, self.upper, strict=True)):
            return "The box is empty."
        witness = uncooperative(self.field, self.lower, self.upper)
        if witness:
            return f"The system is not cooperative: {accuse(witness, self.names)}."
        segments = Segments(self.field)
        placed = all(a < top <= b for a, top, b in zip(self.lower, self.goal, self.upper, strict=True))
        if not (placed and segments.falls(self.lower, self.goal)):
            return "The field does not point down all along the way to the top of the goal."
        if len(self.durations) != len(self.chains):
            return "The durations do not fit the chains."
        for j, (chain, times) in enumerate(zip(self.chains, self.durations, strict=True)):
            if len(times) != len(chain) - 1 or any(len(p) != d for p in chain):
                return f"The durations do not fit chain {j}."
            if not all(below(self.lower, p) and below(p, self.upper) for p in chain):
                return f"Chain {j} leaves the box."
            known = [self.goal, *itertools.chain.from_iterable(self.chains[:j])]
            if not any(below(chain[-1], p) for p in known):
                return f"Chain {j} ends neither in the goal nor below an earlier chain."
            for k, (a, b) in enumerate(itertools.pairwise(chain)):
                if not segments.bounds_flow(self.upper, a, b, times[k]):
                    return f"Piece {k} of chain {j} is no super-solution."
        return None


def certify(
    system: PlanarSystem | BoxSystem,
    *,
    size: float = 1.0,
    slack: float = 3e-3,
    directions: int = 8,
) -> Certificate:
    """Prove, in exact arithmetic, for a large part of D that its starts end removed.

    For a comparison system the proof is a polygon just below the separatrix, and covers D up to about `slack`. For a
    `BoxSystem` it is a staircase of order intervals; it takes polynomials only, and claims convergence to the lower
    corner. Parameters given as floats count at their exact binary values.

    Source: docs/certificates.md; docs/mathematics.md section 4.

    Args:
        system: A comparison system, or a cooperative polynomial `BoxSystem` made with `from_expressions`.
        size: Upper end of the box in the first coordinate of a comparison system; a `BoxSystem` has its own.
        slack: What to give up so that the proof holds with a margin: relative to the price for a comparison system, and
            to the largest speed in the box for a `BoxSystem`.
        directions: For a `BoxSystem`, along how many directions per coordinate to look for points of the staircase.

    Returns:
        A certificate whose `verify()` is True.

    Raises:
        ValueError: if the system is not cooperative (the entry of the Jacobian and the place are named), if it is not
            polynomial or its removed state attracts nothing, or if `slack` leaves nothing or too little to prove with.

    Example:
        >>> from catode.theory import UnitSystem
        >>> unit = UnitSystem(price=0.1, weight_decay=0.1, rate_ratio=1.0, benefit_slope=0.5)
        >>> proof = certify(unit)
        >>> proof.verify(), bool(proof.contains([0.0, 1.0])), bool(proof.contains([0.9, 0.9]))
        (True, True, False)
    """
    slack = check_interval("slack", slack, 0.0, 0.5, True, True)
    if isinstance(system, BoxSystem):
        parts = propose_staircase(system, slack, check_int("directions", directions, low=1, high=200))
    elif type(system) in (LayerSystem, UnitSystem, BenefitSystem):  # a subclass may have another field
        parts = propose_polygon(system, check_positive("size", size), slack)
    else:
        fail("system", "be a LayerSystem, UnitSystem, BenefitSystem or BoxSystem", system)
    unsealed = Certificate(**parts, seal="")
    proposal = dataclasses.replace(unsealed, seal=_digest(unsealed._body()))
    fault = proposal.fault()
    if fault:
        fail("slack", "leave enough margin for the exact proof", slack, hint=f"{fault} Choose a larger one.")
    return proposal


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(body).encode()).hexdigest()


def _canonical(body: Any) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys all differ: of two values for one key, the reader would drop the first in silence."""
    body = dict(pairs)
    if len(body) != len(pairs):
        fail("text", "give every key once", [key for key, _ in pairs])
    return body


def _textual(value: Any) -> Any:
    """Nested tuples and dictionaries with every rational as text."""
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, dict):
        return {key: _textual(item) for key, item in value.items()}
    return [_textual(item) for item in value] if isinstance(value, (tuple, list)) else value


def _read(text: Any) -> Fraction:
    if not isinstance(text, str):
        fail("number", "be a rational in quotes", text)
    return Fraction(text)


def _turning_point(pull: Polynomial) -> Fraction:
    """Size above which theta rises."""
    return -pull[0, 0] / pull[1, 0]


def _edges(polygon: Sequence[Point]) -> list[tuple[Point, Point, Point]]:
    """Ends and outward normal of every edge."""
    return [(a, b, (a[1] - b[1], b[0] - a[0])) for a, b in itertools.pairwise(polygon)]


def _maximal(points: Sequence[Point]) -> list[Point]:
    """The planar points that no other one exceeds, by falling first coordinate."""
    chosen: list[Point] = []
    for point in sorted(points, reverse=True):
        if not chosen or point[1] > chosen[-1][1]:
            chosen.append(point)
    return chosen

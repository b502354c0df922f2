"""Verified domains of attraction: sets of starts proved, in exact rational arithmetic, to end removed.

Floats only propose a set; `Certificate.verify` proves it again from the certificate's own data with fractions alone, so
no rounding error and no solver stands between the claim and the proof. Two kinds exist, with their lemmas in
docs/certificates.md:

* "lyapunov", for the three comparison systems: a falling polygon from the theta axis to the size axis, every edge of
  which the field crosses inwards. Its gauge is a Lyapunov function, for the layer the linear one of THEORY 4.1.
* "order", for polynomial cooperative systems on a box of any dimension: order intervals [lower, p] below the points of
  piecewise linear super-solutions that descend into an interval on which the field points down.

Source: THEORY section 4 (the order lemma and the domains D_B and D_U); the gauge lemma is derived in the docs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import comb, frexp, lcm, ldexp, prod
from typing import Any

import numpy as np

from catode._validate import check_choice, check_int, check_interval, check_positive, check_real, check_shape, fail
from catode.theory.box import BoxSystem
from catode.theory.systems import BenefitSystem, LayerSystem, PlanarSystem, UnitSystem

__all__ = ["Certificate", "certify"]

Polynomial = dict[tuple[int, ...], Fraction]  # exponents to coefficient
Point = tuple[Fraction, ...]

_PARAMETERS = {
    "LayerSystem": ("price", "weight_decay", "rate_ratio", "grad_bound", "benefit_slope"),
    "UnitSystem": ("price", "weight_decay", "rate_ratio", "benefit_slope"),
    "BenefitSystem": ("price", "gain", "rate_ratio", "decay", "drift"),
}
_MAY_BE_ZERO = ("weight_decay", "decay", "drift")
_MAX_EDGES = 6_000
_MAX_PIECES = 4_000
_BITS = 30  # of the proposed coordinates, so that texts stay short
_STEP = 0.1  # of the super-solutions, in units of the fastest time scale


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
            return _comparison_field(self.system[0], dict(self.system[1:]))
        return tuple({tuple(powers): value for powers, value in component} for component in self.system)

    @property
    def stays(self) -> bool:
        """Whether theta, once 0, is proved to stay there; False only for a benefit that drift carries past its price."""
        if self.kind == "order":
            return True
        speed, pull = self.field
        return _evaluate(speed, (_turning_point(pull), Fraction(0))) <= 0

    @functools.cached_property
    def rate(self) -> Fraction:
        """For "lyapunov" the rate gamma, 1/time, in V' <= -gamma (1 - V): from V0, theta is 0 by log(1/(1-V0))/gamma.

        Source: docs/certificates.md; for the layer gamma is close to mu.

        Raises:
            ValueError: for a certificate of kind "order".
        """
        self._require_polygon("rate")
        start = [_evaluate(component, self.lower) for component in self.field]
        return min(-_dot(n, start) / _dot(n, a) for a, _, n in _edges(self.chains[0]))

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
        forms = np.array([[float(x / _dot(n, a)) for x in n] for a, _, n in edges])
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
        lower, upper = _floats(self.lower, up=True), _floats(self.upper)
        inside = ((state >= lower) & (state <= upper)).all(axis=-1)
        if self.kind == "order":
            tops = np.array([_floats(top) for top in self._tops()])
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
            fail("share", "be asked of a planar certificate", len(self.lower), mend="Count `contains` over samples.")
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
        """Read what `to_json` wrote. The result is not trusted: call `verify`.

        Raises:
            ValueError: if the text is not the JSON of a certificate.
        """
        try:
            body = json.loads(text)
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
            return cls(
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
        except (ValueError, KeyError, TypeError, ArithmeticError, AttributeError) as error:
            fail("text", "be the JSON of a certificate", text, mend=f"{type(error).__name__}: {error}.")

    def _body(self) -> dict[str, Any]:
        """Everything but the seal, with rationals as texts."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "seal"}
        return {"certificate": 1, **_textual(body)}

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
        return any(a[0] <= x <= b[0] and _dot(n, (x, y)) <= _dot(n, a) for a, b, n in _edges(self.chains[0]))

    def _tops(self) -> list[Point]:
        """Corners of the order intervals; in the plane only those that no other one exceeds."""
        tops = [self.goal, *itertools.chain.from_iterable(self.chains)]
        return _maximal(tops) if len(self.lower) == 2 else tops

    def _polygon_fault(self) -> str | None:
        """The gauge lemma of docs/certificates.md, premise by premise."""
        kind, *pairs = self.system
        names = tuple(name for name, _ in pairs)
        if kind not in _PARAMETERS or names != _PARAMETERS[kind]:
            return f"No comparison system {kind!r} has the parameters {', '.join(names)}."
        for name, value in pairs:
            if value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
                return f"The parameter {name} is out of range."
        zero = Fraction(0)
        if self.lower != (zero, zero) or len(self.upper) != 2 or min(self.upper) <= 0 or self.upper[1] != 1:
            return "The box is not [0, size] x [0, 1]."
        field = self.field
        if any(c < 0 for f in field for powers, c in f.items() if sum(powers) >= 2):
            return "The field is not convex along rays."
        if any(c < 0 for i in (0, 1) for c in _derivative(field[i], 1 - i).values()):
            return "The system is not cooperative."
        if len(self.chains) != 1 or len(self.chains[0]) < 2 or any(len(p) != 2 for p in self.chains[0]):
            return "The polygon is not one chain of points in the plane."
        (first, *_, last) = self.chains[0]
        if first[0] != 0 or first[1] <= 0 or last[0] <= 0 or last[1] != 0:
            return "The polygon does not lead from the theta axis to the size axis."
        start = [_evaluate(component, self.lower) for component in field]
        segments = _Segments(field)
        for k, (a, b, n) in enumerate(_edges(self.chains[0])):
            if not (n[0] >= 0 and n[1] > 0 and a[1] > 0):
                return f"Edge {k} does not fall from left to right."
            if not _dot(n, start) < 0:
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
        witness = _uncooperative(self.field, self.lower, self.upper)
        if witness:
            return f"The system is not cooperative: {_accuse(witness, self.names)}."
        segments = _Segments(self.field)
        placed = all(a < top <= b for a, top, b in zip(self.lower, self.goal, self.upper, strict=True))
        if not (placed and segments.falls(self.lower, self.goal)):
            return "The field does not point down all along the way to the top of the goal."
        if len(self.durations) != len(self.chains):
            return "The durations do not fit the chains."
        for j, (chain, times) in enumerate(zip(self.chains, self.durations, strict=True)):
            if len(times) != len(chain) - 1 or any(len(p) != d for p in chain):
                return f"The durations do not fit chain {j}."
            if not all(_below(self.lower, p) and _below(p, self.upper) for p in chain):
                return f"Chain {j} leaves the box."
            known = [self.goal, *itertools.chain.from_iterable(self.chains[:j])]
            if not any(_below(chain[-1], p) for p in known):
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

    Source: docs/certificates.md; THEORY section 4.

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
        proposal = _propose_order(system, slack, check_int("directions", directions, low=1, high=200))
    elif type(system) in (LayerSystem, UnitSystem, BenefitSystem):  # a subclass may have another field
        proposal = _propose_polygon(system, check_positive("size", size), slack)
    else:
        fail("system", "be a LayerSystem, UnitSystem, BenefitSystem or BoxSystem", system)
    fault = proposal.fault()
    if fault:
        fail("slack", "leave enough margin for the exact proof", slack, mend=f"{fault} Choose a larger one.")
    return proposal


def _seal(**parts: Any) -> Certificate:
    unsealed = Certificate(**parts, seal="")
    return dataclasses.replace(unsealed, seal=_digest(unsealed._body()))


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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


# Exact polynomials -------------------------------------------------------------------------------------------------


def _dot(one: Sequence[Fraction], other: Sequence[Fraction]) -> Fraction:
    return sum((a * b for a, b in zip(one, other, strict=True)), Fraction(0))


def _below(one: Point, other: Point) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


def _evaluate(polynomial: Polynomial, point: Sequence[Fraction]) -> Fraction:
    terms = (c * prod(x**e for x, e in zip(point, powers, strict=True)) for powers, c in polynomial.items())
    return sum(terms, Fraction(0))


def _derivative(polynomial: Polynomial, j: int) -> Polynomial:
    return {
        (*powers[:j], powers[j] - 1, *powers[j + 1 :]): c * powers[j]
        for powers, c in polynomial.items()
        if powers[j] > 0
    }


class _Segments:
    """Bounds of a polynomial field on straight segments, in integers: exact, and much faster than fractions."""

    def __init__(self, field: Sequence[Polynomial]) -> None:
        self.degree = max((sum(powers) for component in field for powers in component), default=0)
        self.factor = lcm(*(c.denominator for component in field for c in component.values()))
        self.weights = [comb(self.degree, j) for j in range(self.degree + 1)]
        self.scale = lcm(*self.weights)
        self.terms = [  # made homogeneous by one more coordinate, the common denominator of the ends
            [((*powers, self.degree - sum(powers)), int(c * self.factor)) for powers, c in component.items()]
            for component in field
        ]

    def __call__(self, a: Point, b: Point) -> tuple[list[list[int]], int]:
        """Bernstein coefficients of s -> field(a + s (b - a)) on [0, 1]; they enclose its range, the ends exactly.

        Returns:
            For each component the coefficients times a common positive factor, and that factor.
        """
        common = lcm(*(x.denominator for x in (*a, *b)))
        start = [*(x.numerator * (common // x.denominator) for x in a), common]
        end = [*(x.numerator * (common // x.denominator) for x in b), common]
        change = [y - x for x, y in zip(start, end, strict=True)]
        n = self.degree + 1
        rows = []
        for terms in self.terms:
            total = [0] * n
            for powers, c in terms:
                term = [c]
                for x, dx, power in zip(start, change, powers, strict=True):
                    for _ in range(power):
                        term = [x * u + dx * v for u, v in zip([*term, 0], [0, *term], strict=True)]
                for k, value in enumerate(term):
                    total[k] += value
            scaled = [value * (self.scale // weight) for value, weight in zip(total, self.weights, strict=True)]
            rows.append([sum(comb(i, j) * scaled[j] for j in range(i + 1)) for i in range(n)])
        return rows, self.factor * self.scale * common**self.degree

    def falls(self, lower: Point, top: Point) -> bool:
        """Whether every component is negative all along the ray from `lower`, that excluded, to `top`."""
        return all(max(row) <= 0 and row[-1] < 0 for row in self(lower, top)[0])

    def crosses(self, a: Point, b: Point, normal: Point) -> bool:
        """Whether the field has a negative component along the normal everywhere on an edge."""
        common = lcm(*(x.denominator for x in normal))
        weights = [int(x * common) for x in normal]
        rows, _ = self(a, b)
        return max(sum(w * x for w, x in zip(weights, column, strict=True)) for column in zip(*rows, strict=True)) < 0

    def bounds_flow(self, upper: Point, a: Point, b: Point, duration: Fraction) -> bool:
        """Whether the straight piece from `a` to `b` is a super-solution of the projected flow.

        A coordinate that ends on its upper face may be raised to it at once: a super-solution may jump up.
        """
        if duration <= 0:
            return False
        raised = tuple(top if y == top else x for x, y, top in zip(a, b, upper, strict=True))
        rows, factor = self(raised, b)
        return all(
            y == top or max(row) <= (y - x) * factor / duration
            for x, y, top, row in zip(raised, b, upper, rows, strict=True)
        )


def _bernstein_on_box(polynomial: Polynomial, lower: Point, upper: Point) -> np.ndarray:
    """Tensor of Bernstein coefficients of a polynomial on a box; they enclose its range, the corners exactly."""
    degrees = [max((powers[j] for powers in polynomial), default=0) for j in range(len(lower))]
    tensor = np.full([n + 1 for n in degrees], Fraction(0), dtype=object)
    for powers, c in polynomial.items():
        tensor[powers] += c
    for j, (n, low, high) in enumerate(zip(degrees, lower, upper, strict=True)):
        matrix = np.full((n + 1, n + 1), Fraction(0), dtype=object)  # of x^e, by its polar form
        for i, e in itertools.product(range(n + 1), repeat=2):
            parts = (comb(i, k) * comb(n - i, e - k) * high**k * low ** (e - k) for k in range(e + 1))
            matrix[i, e] = sum(parts, Fraction(0)) / comb(n, e)
        tensor = np.moveaxis(np.tensordot(matrix, tensor, axes=(1, j)), 0, j)
    return tensor


def _uncooperative(
    field: Sequence[Polynomial], lower: Point, upper: Point
) -> tuple[int, int, Fraction | None, Point] | None:
    """First off-diagonal entry (i, j) of the Jacobian not proved non-negative, with a value and where; None if none."""
    for i, j in itertools.permutations(range(len(field)), 2):
        entry = _derivative(field[i], j)
        boxes = [(lower, upper, 0)]
        while boxes:
            low, high, depth = boxes.pop()
            if min(_bernstein_on_box(entry, low, high).flat) >= 0:
                continue
            middle = tuple((a + b) / 2 for a, b in zip(low, high, strict=True))
            for point in (*itertools.product(*zip(low, high, strict=True)), middle):
                value = _evaluate(entry, point)
                if value < 0:
                    return i, j, value, point
            axis = depth % len(low)
            if depth == 10 * len(low):
                return i, j, None, middle
            cut = middle[axis]
            boxes.append((low, (*high[:axis], cut, *high[axis + 1 :]), depth + 1))
            boxes.append(((*low[:axis], cut, *low[axis + 1 :]), high, depth + 1))
    return None


def _accuse(witness: tuple[int, int, Fraction | None, Point], names: Sequence[str]) -> str:
    i, j, value, point = witness
    amount = "not provably non-negative" if value is None else f"{float(value):g}"
    place = ", ".join(f"{float(x):g}" for x in point)
    return f"Jacobian entry [{i}, {j}], d({names[i]}')/d({names[j]}), is {amount} at ({', '.join(names)}) = ({place})"


# The gauge lemma: comparison systems -------------------------------------------------------------------------------


def _comparison_field(kind: str, p: dict[str, Fraction]) -> tuple[Polynomial, Polynomial]:
    """The raw field of a comparison system, THEORY 4.1 to 4.3; a test holds it against `field` of the system."""
    pull = {(0, 0): -p["rate_ratio"] * p["price"]}
    if kind == "LayerSystem":
        speed = {(1, 0): -p["weight_decay"], (0, 1): p["grad_bound"]}
        return speed, {**pull, (1, 0): p["rate_ratio"] * p["benefit_slope"]}
    if kind == "UnitSystem":
        speed = {(1, 0): -2 * p["weight_decay"], (1, 1): 2 * p["benefit_slope"]}
        return speed, {**pull, (1, 0): p["rate_ratio"] * p["benefit_slope"] / 2}
    return {(0, 0): p["drift"], (1, 0): -p["decay"], (0, 1): p["gain"]}, {**pull, (1, 0): p["rate_ratio"]}


def _turning_point(pull: Polynomial) -> Fraction:
    """Size above which theta rises."""
    return -pull[0, 0] / pull[1, 0]


def _edges(polygon: Sequence[Point]) -> list[tuple[Point, Point, Point]]:
    """Ends and outward normal of every edge."""
    return [(a, b, (a[1] - b[1], b[0] - a[0])) for a, b in itertools.pairwise(polygon)]


def _round(x: float) -> Fraction:
    """`x` with a short mantissa, as a fraction."""
    mantissa, exponent = frexp(x)
    return Fraction(ldexp(round(ldexp(mantissa, _BITS)), exponent - _BITS))


def _propose_polygon(system: Any, size: float, slack: float) -> Certificate:
    """Chords of a curve just below the separatrix, cut in halves where the exact check asks for it."""
    kind = type(system).__name__
    parameters = {name: Fraction(getattr(system, name)) for name in _PARAMETERS[kind]}
    crosses = _Segments(_comparison_field(kind, parameters)).crosses
    cheaper = dataclasses.replace(system, price=system.price * (1.0 - slack))
    if getattr(cheaper, "empty", False):
        mend = (
            "D is empty: the drift is too strong." if system.empty else "The drift leaves less; choose a smaller one."
        )
        fail("slack", "leave a part of D", slack, mend=mend)
    middle, height = cheaper.saddle
    curve = _unit_curve(cheaper, size, slack) if kind == "UnitSystem" else cheaper.separatrix

    def vertex(x: float) -> Point:
        x = _round(x)
        return x, _round(float(curve(float(x))))

    right = middle
    while curve(right) > 0.0:
        right *= 2.0
    ends = [(_round(_fall(curve, 0.0, 0.0, right)), Fraction(0))]
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
            fail("slack", "leave enough margin for the exact proof", slack, mend="Choose a larger one.")
    return _seal(
        kind="lyapunov",
        system=(kind, *parameters.items()),
        names=("benefit" if kind == "BenefitSystem" else "size", "keep_prob"),
        lower=(Fraction(0), Fraction(0)),
        upper=(Fraction(size), Fraction(1)),
        chains=(tuple(polygon),),
        durations=(),
        goal=(),
    )


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


# The order and ray lemmas: polynomial systems on a box -------------------------------------------------------------


def _maximal(points: Sequence[Point]) -> list[Point]:
    """The planar points that no other one exceeds, by falling first coordinate."""
    chosen: list[Point] = []
    for point in sorted(points, reverse=True):
        if not chosen or point[1] > chosen[-1][1]:
            chosen.append(point)
    return chosen


def _floats(point: Point, *, up: bool = False) -> np.ndarray:
    """Floats not above (with `up`: not below) the exact coordinates."""
    out = []
    for x in point:
        value = float(x)
        if up and Fraction(value) < x:
            value = np.nextafter(value, np.inf)
        elif not up and Fraction(value) > x:
            value = np.nextafter(value, -np.inf)
        out.append(value)
    return np.array(out)


def _exact_field(system: BoxSystem) -> tuple[Polynomial, ...]:
    """The components of a system given in sympy as exact polynomials; floats count at their binary value."""
    mend = "Build it with BoxSystem.from_expressions from polynomials in the coordinates."
    if system.expressions is None:
        fail("system", "know its field in symbols", "BoxSystem without expressions", mend=mend)
    import sympy

    field = []
    for name, value in zip(system.names, system.expressions, strict=True):
        value = value.xreplace({x: sympy.Rational(*float(x).as_integer_ratio()) for x in value.atoms(sympy.Float)})
        own = {str(s): s for s in value.free_symbols}
        try:
            terms = sympy.Poly(value, *(own.get(n, sympy.Symbol(n)) for n in system.names)).terms()
            field.append({powers: Fraction(int(c.p), int(c.q)) for powers, c in terms})
        except (sympy.PolynomialError, AttributeError):
            fail("system", "be polynomial with rational coefficients", str(value), mend=f"See {name}'. {mend}")
    return tuple(field)


def _propose_order(system: BoxSystem, slack: float, directions: int) -> Certificate:
    """Super-solutions stepped in floats from the farthest starts, along a fan of directions, that reach the goal."""
    if not (np.isfinite(system.lower).all() and np.isfinite(system.upper).all()):
        fail("system", "have a bounded box for a certificate", [system.lower.tolist(), system.upper.tolist()])
    field = _exact_field(system)
    lower, upper = (tuple(map(Fraction, end.tolist())) for end in (system.lower, system.upper))
    witness = _uncooperative(field, lower, upper)
    if witness:
        i, j, value, _ = witness
        shown = float("nan") if value is None else float(value)
        mend = f"{_accuse(witness, system.names)}. Order intervals need every off-diagonal entry to be non-negative."
        fail("system", "be cooperative in its box", shown, index=(i, j), mend=mend)
    segments = _Segments(field)
    goal = _goal(system, field, segments)
    floats = _floats(goal)
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
    return _seal(
        kind="order",
        system=tuple(tuple(component.items()) for component in field),
        names=system.names,
        lower=lower,
        upper=upper,
        chains=tuple(chains),
        durations=tuple(durations),
        goal=goal,
    )


def _fan(d: int, n: int) -> np.ndarray:
    """Directions into the box, scaled so that their largest component is 1, shape (k, d)."""
    grid = np.linspace(0.0, 1.0, n)
    faces = []
    for j in range(d):
        rest = np.stack(np.meshgrid(*[grid] * (d - 1), indexing="ij"), axis=-1).reshape(-1, d - 1) if d > 1 else [[]]
        faces.append(np.insert(rest, j, 1.0, axis=1))
    return np.unique(np.concatenate(faces), axis=0)


def _goal(system: BoxSystem, field: Sequence[Polynomial], segments: _Segments) -> Point:
    """Top of the largest found interval above the lower corner all along whose diagonal the field points down."""
    lower, upper = (tuple(map(Fraction, end.tolist())) for end in (system.lower, system.upper))
    speed = np.array([float(_evaluate(component, lower)) for component in field])
    if (speed > 0).any():
        i = int(np.argmax(speed > 0))
        mend = f"{system.names[i]} rises at the lower corner {system.lower.tolist()}, so nothing ends there."
        fail("system", "rest at the lower corner of its box", float(speed[i]), index=(i,), mend=mend)
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
            top = tuple(low + _round(0.9**k * x) for low, x in zip(lower, direction.tolist(), strict=True))
            if _below(top, upper) and segments.falls(lower, top):
                return top
    fail(
        "system",
        "attract a neighbourhood of the lower corner of its box",
        system.lower.tolist(),
        mend="No direction was found along which the field points down near it.",
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
    step = float(_round(_STEP / max(np.abs(system.jacobian(corners)).sum(-1).max(), 1e-300)))
    pad = slack * np.abs(system.field(corners)).max(axis=0)
    grid = 2.0 ** (np.floor(np.log2(system.upper - system.lower)) - _BITS)
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

"""Exact rational arithmetic: polynomials, their bounds on segments and boxes, and the fields of systems as polynomials.

All that `catode.theory.certificates` proves with; nothing here rounds but `as_floats` and `shortened`, which say how.

Source: docs/certificates.md; the fields of the comparison systems are those of docs/mathematics.md sections 4.1 to 4.3.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from math import comb, frexp, lcm, ldexp, prod

import numpy as np

from catode._validate import fail
from catode.theory.systems.box import BoxSystem

Polynomial = dict[tuple[int, ...], Fraction]  # exponents to coefficient
Point = tuple[Fraction, ...]

PARAMETERS = {
    "LayerSystem": ("price", "weight_decay", "rate_ratio", "grad_bound", "benefit_slope"),
    "UnitSystem": ("price", "weight_decay", "rate_ratio", "benefit_slope"),
    "BenefitSystem": ("price", "gain", "rate_ratio", "decay", "drift"),
}
MAY_BE_ZERO = ("weight_decay", "decay", "drift")
BITS = 30  # of the proposed coordinates, so that texts stay short


def dot(one: Sequence[Fraction], other: Sequence[Fraction]) -> Fraction:
    return sum((a * b for a, b in zip(one, other, strict=True)), Fraction(0))


def below(one: Point, other: Point) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))


def as_floats(point: Point, *, up: bool = False) -> np.ndarray:
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


def shortened(x: float) -> Fraction:
    """`x` with a short mantissa, as a fraction."""
    mantissa, exponent = frexp(x)
    return Fraction(ldexp(round(ldexp(mantissa, BITS)), exponent - BITS))


def evaluate(polynomial: Polynomial, point: Sequence[Fraction]) -> Fraction:
    terms = (c * prod(x**e for x, e in zip(point, powers, strict=True)) for powers, c in polynomial.items())
    return sum(terms, Fraction(0))


def derivative(polynomial: Polynomial, j: int) -> Polynomial:
    return {
        (*powers[:j], powers[j] - 1, *powers[j + 1 :]): c * powers[j]
        for powers, c in polynomial.items()
        if powers[j] > 0
    }


class Segments:
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


def bernstein_on_box(polynomial: Polynomial, lower: Point, upper: Point) -> np.ndarray:
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


def uncooperative(
    field: Sequence[Polynomial], lower: Point, upper: Point
) -> tuple[int, int, Fraction | None, Point] | None:
    """First off-diagonal entry (i, j) of the Jacobian not proved non-negative, with a value and where; None if none."""
    for i, j in itertools.permutations(range(len(field)), 2):
        entry = derivative(field[i], j)
        boxes = [(lower, upper, 0)]
        while boxes:
            low, high, depth = boxes.pop()
            if min(bernstein_on_box(entry, low, high).flat) >= 0:
                continue
            middle = tuple((a + b) / 2 for a, b in zip(low, high, strict=True))
            for point in (*itertools.product(*zip(low, high, strict=True)), middle):
                value = evaluate(entry, point)
                if value < 0:
                    return i, j, value, point
            axis = depth % len(low)
            if depth == 10 * len(low):
                return i, j, None, middle
            cut = middle[axis]
            boxes.append((low, (*high[:axis], cut, *high[axis + 1 :]), depth + 1))
            boxes.append(((*low[:axis], cut, *low[axis + 1 :]), high, depth + 1))
    return None


def accuse(witness: tuple[int, int, Fraction | None, Point], names: Sequence[str]) -> str:
    i, j, value, point = witness
    amount = "not provably non-negative" if value is None else f"{float(value):g}"
    place = ", ".join(f"{float(x):g}" for x in point)
    return f"Jacobian entry [{i}, {j}], d({names[i]}')/d({names[j]}), is {amount} at ({', '.join(names)}) = ({place})"


def comparison_field(kind: str, p: dict[str, Fraction]) -> tuple[Polynomial, Polynomial]:
    """The raw field of a comparison system; a test holds it against `field` of the system.

    Source: docs/mathematics.md sections 4.1 to 4.3.
    """
    pull = {(0, 0): -p["rate_ratio"] * p["price"]}
    if kind == "LayerSystem":
        speed = {(1, 0): -p["weight_decay"], (0, 1): p["grad_bound"]}
        return speed, {**pull, (1, 0): p["rate_ratio"] * p["benefit_slope"]}
    if kind == "UnitSystem":
        speed = {(1, 0): -2 * p["weight_decay"], (1, 1): 2 * p["benefit_slope"]}
        return speed, {**pull, (1, 0): p["rate_ratio"] * p["benefit_slope"] / 2}
    return {(0, 0): p["drift"], (1, 0): -p["decay"], (0, 1): p["gain"]}, {**pull, (1, 0): p["rate_ratio"]}


def exact_field(system: BoxSystem) -> tuple[Polynomial, ...]:
    """The components of a system given in sympy as exact polynomials; floats count at their binary value."""
    hint = "Build it with BoxSystem.from_expressions from polynomials in the coordinates."
    if system.expressions is None:
        fail("system", "know its field in symbols", "BoxSystem without expressions", hint=hint)
    import sympy

    field = []
    for name, value in zip(system.names, system.expressions, strict=True):
        value = value.xreplace({x: sympy.Rational(*float(x).as_integer_ratio()) for x in value.atoms(sympy.Float)})
        own = {str(s): s for s in value.free_symbols}
        try:
            terms = sympy.Poly(value, *(own.get(n, sympy.Symbol(n)) for n in system.names)).terms()
            field.append({powers: Fraction(int(c.p), int(c.q)) for powers, c in terms})
        except (sympy.PolynomialError, AttributeError):
            fail("system", "be polynomial with rational coefficients", str(value), hint=f"See {name}'. {hint}")
    return tuple(field)

"""Equilibria of projected flows, in the interior and on every face of the box, and what they do to what is near.

A face is where some coordinates are frozen at a bound. An equilibrium of the projected flow lies on exactly one: its
free coordinates stand still, and its frozen ones are pushed outwards or stand still too. A pushed coordinate comes
back to its bound in finite time, so it counts as stable, and the eigenvalues are those of the free block alone:
differentiating across the clamp would mix two fields.

Source: docs/mathematics.md sections 3 (the projected flow) and 4 (the saddles of the comparison systems).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from catode._validate import check_bool, check_int
from catode.theory.systems.box import BoxSystem, as_box
from catode.theory.systems.planar import PlanarSystem

__all__ = ["STABILITIES", "Equilibria", "Equilibrium", "find"]

STABILITIES = ("stable node", "stable focus", "unstable node", "unstable focus", "saddle", "centre", "degenerate")
"""How an equilibrium can behave; see `Equilibrium`."""

_MAX_ROOTS = 36  # product of the degrees up to which polynomials are solved by algebra
_ZERO = 1e-7  # relative size below which an eigenvalue counts as zero


@dataclass(frozen=True, eq=False, kw_only=True)
class Equilibrium:
    """A state at which the projected flow stands still.

    The class is that of the projected flow near it: pushed coordinates count as stable. "centre" is a statement about
    the linear part alone. "degenerate" means that the linear part does not decide: an eigenvalue is zero, or a frozen
    coordinate is at rest and depends on others in a way that no test of `_classify_coupled` shows to decay.

    Args:
        state: Where it is, shape (d,).
        face: For each coordinate -1 (frozen at its lower end), 0 (free) or 1 (frozen at its upper end).
        speed: Raw velocity there, shape (d,): how hard the frozen coordinates are pushed.
        resting: Frozen coordinates that are not pushed, but at rest to rounding error.
        eigenvalues: Of the free block of the raw Jacobian, real parts increasing; with the slopes of the resting
            coordinates where these are independent of the others. Complex.
        stability: One of `STABILITIES`.
        isolated: False if other zeros of the free components lie beside it: a continuum.
        origin: "solved" (algebra: this face has no other equilibrium) or "searched" (Newton from many starts).
    """

    state: np.ndarray
    face: tuple[int, ...]
    speed: np.ndarray
    resting: tuple[int, ...]
    eigenvalues: np.ndarray
    stability: str
    isolated: bool
    origin: str

    @property
    def interior(self) -> bool:
        """Whether no coordinate is frozen."""
        return not any(self.face)

    @property
    def pushed(self) -> tuple[int, ...]:
        """Frozen coordinates whose raw speed points strictly out of the box."""
        return tuple(i for i, side in enumerate(self.face) if side and i not in self.resting)

    @property
    def stable(self) -> bool:
        """Whether every near state is drawn to it, by the linear part and the pushes."""
        return self.stability.startswith("stable")


class Equilibria(tuple[Equilibrium, ...]):
    """The equilibria that `find` found, and which faces it did not search.

    Attributes:
        faces: Number of faces of the box, the interior included.
        left_out: How many of them were not searched.
        searched_to: Number of free coordinates of the last face searched before the interior, and that face; None
            where all were searched. Faces with fewer free coordinates were all searched, those with more were not.
    """

    faces: int = 0
    left_out: int = 0
    searched_to: tuple[int, tuple[int, ...]] | None = None

    @property
    def note(self) -> str:
        """What was searched, in a sentence."""
        if self.searched_to is None:
            return f"All {self.faces} faces were searched."
        n, _ = self.searched_to
        return (
            f"{self.left_out} of {self.faces} faces were left out: some with {n} free coordinates, and those with more, "
            "the interior excepted."
        )


def find(
    system: BoxSystem | PlanarSystem, *, starts: int = 64, max_faces: int = 729, algebra: bool = True
) -> Equilibria:
    """Equilibria of the projected flow, in the interior and on every face of the box.

    Where the system knows its expressions and they are small polynomials, a face is solved by a Groebner basis, which
    misses nothing. Elsewhere damped Newton iterations start from evenly spread states, and may miss some. Zeros of the
    raw field outside the box, and those on a face whose frozen speed points inwards, are no equilibria.

    Source: docs/mathematics.md section 3.

    Args:
        system: A field on a box, or a comparison system (size not negative, theta in [0, 1]).
        starts: Number of Newton starts on each face.
        max_faces: Number of faces to search: the interior, then those with most frozen coordinates. A box in d
            dimensions has up to 3^d. Where some are left out, a warning says so and the result names them.
        algebra: Whether to solve by a Groebner basis where that is possible. Newton iterations alone are faster.

    Returns:
        The equilibria, those with most frozen coordinates first. Where a face holds a continuum, one of its singular
        equilibria is given.

    Raises:
        ValueError: if `starts` or `max_faces` is not a positive integer.

    Example:
        >>> from catode.theory import BenefitSystem
        >>> system = BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0, decay=0.05)
        >>> [(e.state.round(6).tolist(), e.stability) for e in find(system)]
        [([0.0, 0.0], 'stable node'), ([10.0, 1.0], 'stable node'), ([0.1, 0.01], 'saddle')]
    """
    box = as_box(system)
    starts = check_int("starts", starts, low=1)
    max_faces = check_int("max_faces", max_faces, low=1)
    algebra = check_bool("algebra", algebra)
    sides = [(0, *(s for s, end in ((-1, low), (1, up)) if np.isfinite(end))) for low, up in _ends(box)]
    count = int(np.prod([len(s) for s in sides], dtype=float))
    interior = (0,) * box.dimension
    if count > max_faces:
        order = itertools.chain(itertools.islice(_faces(sides), max_faces - 1), [interior])
    else:
        order = sorted(itertools.product(*sides), key=lambda f: -sum(map(abs, f)))
    size = _sizes(system, box)
    found: list[Equilibrium] = []
    reached = interior
    with np.errstate(all="ignore"):
        for face in order:
            _add_face(found, box, face, size, starts, algebra)
            reached = face if any(face) else reached
    result = Equilibria(found)
    result.faces = count
    if count > max_faces:
        result.left_out = count - max_faces
        result.searched_to = (sum(side == 0 for side in reached), reached)
        warnings.warn(f"{result.note} Give max_faces={count} to search them all.", stacklevel=2)
    return result


def _faces(sides: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """Every face, those with most frozen coordinates first; made one by one, since there may be millions."""
    d = len(sides)
    for n_free in range(d + 1):
        for free in itertools.combinations(range(d), n_free):
            yield from itertools.product(*((0,) if i in free else sides[i][1:] for i in range(d)))


def _ends(box: BoxSystem) -> list[tuple[float, float]]:
    return list(zip(box.lower.tolist(), box.upper.tolist(), strict=True))


def _sizes(system: BoxSystem | PlanarSystem, box: BoxSystem) -> np.ndarray:
    """Typical size of each coordinate, shape (d,)."""
    if isinstance(system, PlanarSystem):
        return np.array([system.saddle[0], 1.0])
    finite = np.where(np.isfinite(box.lower), box.lower, np.where(np.isfinite(box.upper), box.upper, 0.0))
    width = box.upper - box.lower
    return np.where(np.isfinite(width), width, np.maximum(1.0, np.abs(finite)))


# Zeros of the free components on one face


def _add_face(
    found: list[Equilibrium], box: BoxSystem, face: tuple[int, ...], size: np.ndarray, starts: int, algebra: bool
) -> None:
    """Append the equilibria on one face or its edges that are not there yet."""
    side = np.array(face)
    free = np.flatnonzero(side == 0)
    sown = _sow(box, side, size, starts)
    states, origin = sown[:1], "solved"  # a corner is all there is of it
    if free.size:
        states = _solve(box, side) if algebra else None
    if states is None:
        states, origin = sown, "searched"
    pace, steep = np.median(np.abs(box.field(sown)), axis=0), np.median(np.abs(box.jacobian(sown)), axis=0)
    states = _newton(box, states, free)
    states = np.where(states - box.lower <= 1e-12 * size, box.lower, states)
    states = np.where(box.upper - states <= 1e-12 * size, box.upper, states)
    speeds, matrices = box.field(states), box.jacobian(states)
    rest = 1e-11 * (pace + np.abs(matrices) @ size)
    low, up = states == box.lower, states == box.upper
    outward = np.where(up, speeds, np.where(low, -speeds, -np.abs(speeds)))
    good = np.all(outward >= -rest, axis=1) & np.isfinite(matrices).all(axis=(1, 2)) & np.isfinite(states).all(axis=1)
    good &= np.all((states >= box.lower) & (states <= box.upper), axis=1)
    states, speeds, matrices, resting = (
        part[good] for part in (states, speeds, matrices, (low | up) & (outward <= rest))
    )
    more = np.linalg.pinv(matrices[:, free[:, None], free], rcond=1e-12) @ speeds[:, free, None]  # e^-x has no zero
    _, first = np.unique(np.round(states / size, 10), axis=0, return_index=True)
    for k in sorted(first):
        if np.any(np.abs(more[k, :, 0]) > 1e-7 * size[free]):
            continue
        state, speed, matrix = states[k], speeds[k], matrices[k]
        side = (state == box.upper).astype(int) - (state == box.lower)
        stays = np.flatnonzero(side == 0)
        reference = max(np.abs(matrix[stays]).max(initial=0.0), steep[stays].max(initial=0.0))
        block = matrix[np.ix_(stays, stays)]
        singular = bool(stays.size) and bool(np.linalg.svd(block, compute_uv=False)[-1] <= _ZERO * reference)
        radius = (1e-5 if singular else 1e-8) * size
        place = (tuple(side.tolist()), tuple(np.flatnonzero(resting[k]).tolist()))
        if any(
            np.all(np.abs(state - e.state) <= radius) or (singular and not e.isolated and place == (e.face, e.resting))
            for e in found
        ):
            continue
        inward = np.where(side == 1, -1.0, 1.0)  # a frozen coordinate counts from its bound into the box
        values, stability = _classify(inward[:, None] * matrix * inward, stays, np.flatnonzero(resting[k]), reference)
        found.append(
            Equilibrium(
                state=state,
                face=place[0],
                speed=speed,
                resting=place[1],
                eigenvalues=values,
                stability=stability,
                isolated=not (singular and _continues(box, state, stays, size)),
                origin=origin,
            )
        )


def _classify(matrix: np.ndarray, free: np.ndarray, resting: np.ndarray, reference: float) -> tuple[np.ndarray, str]:
    """Eigenvalues that count, real parts increasing, and the class.

    A resting coordinate whose speed depends, to first order, on itself alone moves on its half line as if it were free,
    so its slope is an eigenvalue. If it depends on others, the flow near it switches between two fields; see
    `_classify_coupled`.
    """
    others = matrix[resting].copy()
    others[np.arange(resting.size), resting] = 0.0
    pushed = np.setdiff1d(np.arange(len(matrix)), np.append(free, resting))
    others[:, pushed] = 0.0  # they are back at their bound before anything else moves
    values = np.linalg.eigvals(matrix[np.ix_(free, free)]).astype(complex)
    reference = max(reference, np.abs(matrix[resting]).max(initial=0.0))
    if np.any(np.abs(others) > _ZERO * reference):
        return _classify_coupled(matrix, free, resting, reference)
    values = np.sort_complex(np.append(values, matrix[resting, resting]))
    real, turning = values.real, bool(np.any(np.abs(values.imag) > _ZERO * reference))
    zero = np.abs(real) <= _ZERO * reference
    if zero.any():
        centre = zero.all() and np.all(np.abs(values.imag) > _ZERO * reference)
        return values, "centre" if centre else "degenerate"
    shape = "focus" if turning else "node"
    if np.all(real < 0.0):
        return values, f"stable {shape}"
    return values, f"unstable {shape}" if np.all(real > 0.0) and not pushed.size else "saddle"


def _classify_coupled(
    matrix: np.ndarray, free: np.ndarray, resting: np.ndarray, reference: float
) -> tuple[np.ndarray, str]:
    """As `_classify`, where resting coordinates depend on others: a cascade of groups that decay one after the other.

    The groups are the strongly connected ones of the dependences. The flow z of one, with resting coordinates held at
    z >= 0, decays if all of it is free and its eigenvalues lie to the left, if it is one resting coordinate with a
    negative slope, if its symmetric part is negative definite (projection never adds to |z|), or if its majorant has
    its eigenvalues to the left: |z|' <= M |z|, where a coupling that pushes a resting coordinate down counts as 0.
    """
    from scipy.sparse.csgraph import connected_components

    moving = np.concatenate([free, resting])
    held = np.isin(moving, resting)
    block = matrix[np.ix_(moving, moving)]
    links = (np.abs(block) > _ZERO * reference) & ~np.eye(len(moving), dtype=bool)
    _, group = connected_components(links, directed=True, connection="strong")
    values: list[complex] = []
    decays = True
    for g in range(group.max() + 1):
        (members,) = np.nonzero(group == g)
        part, resting_here = block[np.ix_(members, members)], held[members]
        own = np.linalg.eigvals(part).astype(complex)
        values += own.tolist()
        tests = [part]
        if resting_here.any() and len(members) > 1:
            majorant = np.abs(part)
            majorant[resting_here[:, None] & resting_here] = np.maximum(part, 0.0)[resting_here[:, None] & resting_here]
            np.fill_diagonal(majorant, part.diagonal())
            tests = [majorant, (part + part.T) / 2.0]
        decays &= any(np.linalg.eigvals(m).real.max() < -_ZERO * reference for m in tests)
    values = np.sort_complex(np.array(values))
    turning = bool(np.any(np.abs(values.imag) > _ZERO * reference))
    return values, f"stable {'focus' if turning else 'node'}" if decays else "degenerate"


def _continues(box: BoxSystem, state: np.ndarray, free: np.ndarray, size: np.ndarray) -> bool:
    """Whether other equilibria of the free components lie beside a singular one."""
    null = np.linalg.svd(box.jacobian(state)[np.ix_(free, free)])[2][-1]
    beside = np.repeat(state[None], 2, axis=0)
    beside[:, free] += 1e-3 * np.array([[1.0], [-1.0]]) * null * size[free]
    beside = _newton(box, box.project(beside), free)
    far = np.max(np.abs(beside - state) / size, axis=1) > 1e-4
    speed, matrix = np.abs(box.field(beside)[:, free]), np.abs(box.jacobian(beside)[:, free])
    return bool(np.any(far & np.all(speed <= 1e-11 * (matrix @ size), axis=1)))


def _sow(box: BoxSystem, side: np.ndarray, size: np.ndarray, n: int) -> np.ndarray:
    """Evenly spread states of a face, shape (n, d): a Kronecker sequence, dense near the finite end of a half line."""
    d = side.size
    root = 2.0
    for _ in range(60):
        root = (1.0 + root) ** (1.0 / (d + 1))
    u = (0.5 + np.outer(np.arange(n), root ** -np.arange(1.0, d + 1))) % 1.0
    low, up = box.lower, box.upper
    states = np.where(np.isfinite(low), low + size * u / (1.0 - u), up - size * (1.0 - u) / u)
    states = np.where(np.isinf(low) & np.isinf(up), size * np.log(u / (1.0 - u)), states)
    both = np.isfinite(up - low)
    states[:, both] = (low + u * (up - low))[:, both]
    return np.where(side < 0, low, np.where(side > 0, up, states))


def _newton(box: BoxSystem, states: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Damped Newton iterations in the free coordinates, kept in the box, on all states at once, shape (n, d)."""
    states = states.copy()
    active = np.arange(len(states) if free.size else 0)
    for _ in range(60):
        here = states[active]
        speed, matrix = box.field(here)[:, free], box.jacobian(here)[:, free[:, None], free]
        error = np.linalg.norm(speed, axis=1)
        good = np.isfinite(matrix).all(axis=(1, 2)) & np.isfinite(error) & (error > 0.0)
        active, here, speed, matrix, error = (part[good] for part in (active, here, speed, matrix, error))
        if not active.size:
            break
        step = np.zeros_like(here)
        step[:, free] = -(np.linalg.pinv(matrix, rcond=1e-12) @ speed[..., None])[..., 0]
        better = np.zeros(active.size, dtype=bool)
        for halvings in range(10):
            trial = box.project(here + 0.5**halvings * step)
            take = ~better & (np.linalg.norm(box.field(trial)[:, free], axis=1) < error)
            states[active[take]] = trial[take]
            better |= take
            if better.all():
                break
        active = active[better]
    return states


def _solve(box: BoxSystem, side: np.ndarray) -> np.ndarray | None:
    """Every zero of the free components on a face, by algebra, shape (n, d); None where that does not apply."""
    if box.expressions is None:
        return None
    import sympy

    known = {str(s): s for e in box.expressions for s in e.free_symbols}
    symbols = [known.get(name, sympy.Symbol(name)) for name in box.names]
    bounds = np.where(side < 0, box.lower, box.upper).tolist()
    held = {s: sympy.Rational(str(e)) for s, k, e in zip(symbols, side, bounds, strict=True) if k}
    free = [s for s in symbols if s not in held]
    chosen = [sympy.nsimplify(e, rational=True).subs(held) for e, k in zip(box.expressions, side, strict=True) if not k]
    if len(free) > 3 or not all(e.is_polynomial(*free) for e in chosen):
        return None
    polynomials = [sympy.Poly(e, *free, domain="QQ") for e in chosen]
    if np.prod([max(p.total_degree(), 1) for p in polynomials]) > _MAX_ROOTS or any(p.is_zero for p in polynomials):
        return None
    roots = _common_roots(polynomials, free)
    if roots is None:
        return None
    roots = roots[np.all(np.abs(roots.imag) <= 1e-5 * (1.0 + np.abs(roots)), axis=1)].real
    states = np.where(side < 0, box.lower, np.where(side > 0, box.upper, 0.0)) + np.zeros((len(roots), 1))
    states[:, side == 0] = roots
    reach = 1e-5 * (1.0 + np.abs(states))  # a multiple root is this uncertain
    return box.project(states[np.all((states >= box.lower - reach) & (states <= box.upper + reach), axis=1)])


def _common_roots(polynomials: Sequence[Any], symbols: Sequence[Any]) -> np.ndarray | None:
    """Common complex roots, shape (n, k), or None where there are infinitely many or multiple ones.

    Stickelberger: in the quotient by the ideal, multiplication by a coordinate is a matrix whose left eigenvectors are
    the standard monomials evaluated at the roots.
    """
    import sympy

    k = len(symbols)
    basis = sympy.groebner([p.as_expr() for p in polynomials], *symbols, order="grevlex")
    leads = [p.monoms(order="grevlex")[0] for p in basis.polys]
    if (0,) * k in leads:
        return np.zeros((0, k))
    if not basis.is_zero_dimensional:
        return None
    ends = [min(lead[i] for lead in leads if sum(lead) == lead[i]) for i in range(k)]
    standard = [
        m
        for m in itertools.product(*map(range, ends))
        if not any(all(a >= b for a, b in zip(m, lead, strict=True)) for lead in leads)
    ]
    place = {m: i for i, m in enumerate(standard)}
    times = np.zeros((k, len(standard), len(standard)))
    for i, symbol in enumerate(symbols):
        for column, m in enumerate(standard):
            product = symbol * sympy.prod(s**e for s, e in zip(symbols, m, strict=True))
            for monomial, value in sympy.Poly(basis.reduce(product)[1], *symbols).terms():
                times[i, place[monomial], column] += float(value)
    weights = np.cos(1.0 + np.arange(k)) / np.maximum(np.abs(times).max(axis=(1, 2)), 1e-300)
    values, vectors = np.linalg.eig(np.tensordot(weights, times, 1).T)
    apart = np.abs(values[:, None] - values) + np.where(np.eye(len(values)), np.inf, 0.0)
    if apart.min() < 1e-9:
        return None
    ones = vectors[place[(0,) * k]]
    return np.stack([times[i][:, place[(0,) * k]] @ vectors / ones for i in range(k)], axis=1)

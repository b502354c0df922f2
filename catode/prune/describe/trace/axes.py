"""Index maps: which units an index along a dimension of a tensor belongs to.

The indices of a dimension form an axis. An axis is a leaf, whose indices are its units; a product of axes, the last of which
runs fastest, as after a flatten; or a sum of axes, one behind another, as after a concatenation. Operations that join two
dimensions unify their axes: the tree is refined until both agree, and from then on they are one axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

PRODUCT, SUM = "product", "sum"
MOST_RUNS = 4096
"""Runs of consecutive entries that a unit may have along one dimension; nothing that is cut has more than a few."""


class Axis:
    """The indices of a dimension.

    Args:
        size: How many.

    Attributes:
        form: Empty for a leaf, `PRODUCT` or `SUM`.
        parts: The axes that it is made of.
    """

    def __init__(self, size: int, form: str = "", parts: Sequence[Axis] = ()):
        self.size, self.form, self.parts = size, form, tuple(parts)
        self._same: Axis | None = None

    def find(self) -> Axis:
        """The axis that stands for all that were unified with this one."""
        axis = self
        while axis._same is not None:
            if axis._same._same is not None:
                axis._same = axis._same._same
            axis = axis._same
        return axis

    def refine(self, form: str, parts: Sequence[Axis]) -> None:
        """Say what a leaf is made of."""
        self.form, self.parts = form, tuple(parts)

    def leaves(self) -> Iterator[Axis]:
        """The leaves that it is made of, in order, repeated where they occur again."""
        axis = self.find()
        if not axis.form:
            yield axis
        for part in axis.parts:
            yield from part.leaves()

    def left(self, kept: dict[Axis, int]) -> int:
        """Size once leaves are cut.

        Args:
            kept: Units that stay of the leaves that are cut.
        """
        axis = self.find()
        if not axis.form:
            return kept.get(axis, axis.size)
        return (math.prod if axis.form == PRODUCT else sum)(part.left(kept) for part in axis.parts)


def product(parts: Sequence[Axis]) -> Axis:
    """Product of axes; those of one index are left out."""
    flat = factors(parts)
    return (
        flat[0] if len(flat) == 1 else Axis(math.prod(part.size for part in flat), PRODUCT, flat) if flat else Axis(1)
    )


def total(parts: Sequence[Axis]) -> Axis:
    """Sum of axes; empty ones are left out."""
    flat = segments(parts)
    return flat[0] if len(flat) == 1 else Axis(sum(part.size for part in flat), SUM, flat)


def factors(axes: Sequence[Axis]) -> list[Axis]:
    """Factors of the product of axes, those of one index left out."""
    found = []
    for axis in axes:
        axis = axis.find()
        found += factors(axis.parts) if axis.form == PRODUCT else [axis] * (axis.size != 1)
    return found


def segments(axes: Sequence[Axis]) -> list[Axis]:
    """Segments of the sum of axes, empty ones left out."""
    found = []
    for axis in axes:
        axis = axis.find()
        found += segments(axis.parts) if axis.form == SUM else [axis] * (axis.size != 0)
    return found


class Mismatch(Exception):
    """Two axes have no common refinement."""


def unify(one: Axis, other: Axis) -> None:
    """Make two axes of the same size one.

    Raises:
        Mismatch: if they cannot be refined to the same tree.
    """
    one, other = one.find(), other.find()
    if one is other:
        return
    if one.size != other.size:
        raise Mismatch
    if not one.form:
        one._same = other
        return
    if not other.form:
        other._same = one
        return
    if one.form != other.form:
        one, other = (one, other) if one.form == SUM else (other, one)
        _unify_sum_with_product(one, other)
    elif one.form == PRODUCT:
        _align(factors([one]), factors([other]), split_product)
    else:
        _align(segments([one]), segments([other]), split_sum)
    one, other = one.find(), other.find()
    if one is not other:
        one._same = other


def _align(these: list[Axis], those: list[Axis], split: Callable[[Axis, int], tuple[Axis, Axis]]) -> None:
    """Unify two lists of axes from the front, the larger one split to the size of the smaller."""
    these, those = list(these), list(those)
    while these and those:
        one, other = these[0].find(), those[0].find()
        if one.size > other.size:
            these[:1] = split(one, other.size)
        elif one.size < other.size:
            those[:1] = split(other, one.size)
        else:
            unify(one, other)
            these.pop(0)
            those.pop(0)


def _unify_sum_with_product(summed: Axis, multiplied: Axis) -> None:
    """Unify a sum with a product, whose first factors are split into the segments."""
    rest = multiplied
    for segment in segments([summed]):
        here, rest = split_sum(rest, segment.size) if rest.size > segment.size else (rest, rest)
        unify(segment, here)


def split_product(axis: Axis, outer: int) -> tuple[Axis, Axis]:
    """An axis as a product of two.

    Args:
        axis: The axis.
        outer: Size of the first factor.

    Raises:
        Mismatch: if its tree cannot be divided so.
    """
    axis = axis.find()
    if axis.size % outer:
        raise Mismatch
    if outer in (1, axis.size):
        return (Axis(1), axis) if outer == 1 else (axis, Axis(1))
    inner = axis.size // outer
    if not axis.form:
        axis.refine(PRODUCT, (Axis(outer), Axis(inner)))
    if axis.form == PRODUCT:
        first, done, rest = [], 1, factors([axis])
        while done < outer:
            here, need = rest.pop(0), outer // done
            if outer % done or (here.size % need and need % here.size):
                raise Mismatch
            if here.size > need:
                here, behind = split_product(here, need)
                rest.insert(0, behind)
            first.append(here)
            done *= here.size
        return product(first), product(rest)
    heads, shared = [], None
    for segment in segments([axis]):
        if segment.size % inner:
            raise Mismatch
        head, tail = split_product(segment, segment.size // inner) if segment.size > inner else (Axis(1), segment)
        heads.append(head)
        shared = shared or tail
        unify(shared, tail)
    return total(heads), shared


def split_sum(axis: Axis, first: int) -> tuple[Axis, Axis]:
    """An axis as a sum of two.

    Args:
        axis: The axis.
        first: Size of the first segment, between 0 and that of the axis, both left out.

    Raises:
        Mismatch: if its tree cannot be divided so.
    """
    axis = axis.find()
    if not axis.form:
        axis.refine(SUM, (Axis(first), Axis(axis.size - first)))
    if axis.form == PRODUCT:
        outer, *inner = factors([axis])
        inner = product(inner)
        if first % inner.size:
            raise Mismatch
        one, other = split_sum(outer, first // inner.size)
        return product([one, inner]), product([other, inner])
    left, rest, done = [], segments([axis]), 0
    while done < first:
        here = rest.pop(0)
        if done + here.size > first:
            here, behind = split_sum(here, first - done)
            rest.insert(0, behind)
        left.append(here)
        done += here.size
    return total(left), total(rest)


@dataclass(frozen=True)
class Run:
    """Where the units of a leaf lie along a dimension: unit u at ``offset + each * u`` and the `each - 1` entries after it."""

    leaf: Axis
    offset: int
    each: int
    inner: tuple[Axis, ...]


def runs(axis: Axis) -> list[Run]:
    """All places of all leaves of an axis; a leaf behind an outer factor has several.

    Raises:
        Mismatch: if there are more than `MOST_RUNS`.
    """
    found: list[Run] = []
    _collect(axis, 0, 1, (), found)
    return found


def _collect(axis: Axis, offset: int, each: int, inner: tuple[Axis, ...], found: list[Run]) -> None:
    axis = axis.find()
    if len(found) > MOST_RUNS:
        raise Mismatch
    if not axis.form:
        found.append(Run(axis, offset, each, inner))
    elif axis.form == SUM:
        for segment in axis.parts:
            _collect(segment, offset, each, inner, found)
            offset += each * segment.size
    else:
        parts = factors([axis])
        for position, part in enumerate(parts):
            behind = tuple(parts[position + 1 :])
            here = each * math.prod(other.size for other in behind)
            outer = math.prod(other.size for other in parts[:position])
            if outer > MOST_RUNS:
                raise Mismatch
            for copy in range(outer):
                _collect(part, offset + copy * here * part.size, here, (*inner, *behind), found)

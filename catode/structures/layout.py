"""Where the units of every site lie in the tensors of a network that has been cut."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from catode.structures.description import PRODUCER, Site, Slice
from catode.structures.inventory import Inventory


class Layout:
    """Units present at the sites, and the place of their entries, which every cut before them in a tensor moves.

    Sites without `parts` have their tensors' dimensions to themselves, so that nothing is kept about them.

    Args:
        sites: The sites; several may have ranges of one dimension of one tensor.
        present: Number of units present at each of them; all, where not given.
    """

    def __init__(self, sites: Iterable[Site], present: Mapping[Site, int] | None = None):
        self._numbers: dict[Site, int] = {}  # of the sites; to hash one takes long
        self._gone: list[int] = []
        self._ranges: dict[
            tuple[str, int], list[tuple[int, int, int]]
        ] = {}  # offset, entries of a unit, number of the site
        for site in sites:
            if not site.parts or site in self._numbers:
                continue
            number = self._numbers[site] = len(self._gone)
            self._gone.append(0 if present is None else site.width - present.get(site, site.width))
            for part in site.parts:
                self._ranges.setdefault((part.tensor, part.dim), []).append((part.offset, part.each, number))

    def copy(self) -> Layout:
        """A layout that later cuts of this one do not change."""
        other = Layout(())
        other._numbers, other._ranges, other._gone = self._numbers, self._ranges, list(self._gone)
        return other

    def keep(self, site: Site, units: int) -> None:
        """Note that a site has been cut down to a number of units."""
        number = self._numbers.get(site)
        if number is not None:
            self._gone[number] = site.width - units

    def present(self, site: Site) -> int | None:
        """Number of units present at a site; None for one that is not kept here."""
        number = self._numbers.get(site)
        return None if number is None else site.width - self._gone[number]

    def entries(self, part: Slice, units: ArrayLike) -> NDArray[np.int64]:
        """Indices of units along a slice's dimension, shape (len(units) * each,).

        Args:
            part: The slice.
            units: The units, as positions among those present at their site.
        """
        before = self._ranges.get((part.tensor, part.dim), ())
        gone = sum(each * self._gone[number] for offset, each, number in before if offset < part.offset)
        return part.entries(units) - gone


def layout_of(inventory: Inventory, present: Sequence[NDArray[np.int64]]) -> Layout:
    """The layout of a network that has been cut.

    Args:
        inventory: Numbering of the structures.
        present: Numbers of the units physically present at each site.
    """
    sites = {place.site: len(present[place.number]) for place in inventory.places}
    return Layout(sites, sites)


def units_in(multiple: int, site: Site) -> int:
    """Units whose entries make up a multiple of a width: `multiple` for channels, fewer for units of several entries each."""
    each = max((part.each for part in site.parts if part.role == PRODUCER), default=1)
    return multiple // math.gcd(multiple, each)

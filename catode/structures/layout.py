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
        self._present: dict[Site, int] = {}
        self._ranges: dict[tuple[str, int], list[tuple[Slice, Site]]] = {}
        for site in sites:
            if not site.parts:
                continue
            self._present[site] = site.width if present is None or site not in present else present[site]
            for part in site.parts:
                self._ranges.setdefault((part.tensor, part.dim), []).append((part, site))

    def copy(self) -> Layout:
        """A layout that later cuts of this one do not change."""
        other = Layout(())
        other._present, other._ranges = dict(self._present), self._ranges
        return other

    def keep(self, site: Site, units: int) -> None:
        """Note that a site has been cut down to a number of units."""
        if site in self._present:
            self._present[site] = units

    def present(self, site: Site) -> int | None:
        """Number of units present at a site; None for one that is not kept here."""
        return self._present.get(site)

    def entries(self, part: Slice, units: ArrayLike) -> NDArray[np.int64]:
        """Indices of units along a slice's dimension, shape (len(units) * each,).

        Args:
            part: The slice.
            units: The units, as positions among those present at their site.
        """
        gone = 0
        for other, site in self._ranges.get((part.tensor, part.dim), ()):
            if other.offset < part.offset:
                gone += other.each * (site.width - self._present[site])
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

"""Numbering of all removable structures, defined here alone.

Structures are numbered from 0: all layers (one for each residual block), then the units, site by site. Arrays over
structures have shape (n,) in this order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from catode.structures.description import Block, Site

KINDS = ("layer", "unit")


@dataclass(frozen=True, eq=False)
class Place:
    """Position of a site in the numbering.

    Attributes:
        number: Number of the site, over all blocks.
        layer: Number of its block, which is that of the block's layer.
        position: Its position among the sites of the block.
        block: Description of the block.
        site: Description of the site.
        units: Numbers of its units, shape (width,).
    """

    number: int
    layer: int
    position: int
    block: Block
    site: Site
    units: NDArray[np.int64]


class Inventory:
    """Numbers, names, kinds and masks of the structures of a network.

    Args:
        blocks: Residual blocks in the order of the forward pass.

    Attributes:
        blocks: The blocks.
        layers: Number of layers.
        size: Number of structures n.
        places: The sites of all blocks, in order.
        units: Numbers of the units of each site.
        widths: Units of each site, shape (sites,).
        site_layer: Number of each site's layer, shape (sites,).
        unit_site: Number of each unit's site, shape (n - layers,).
        unit_layer: Number of each unit's layer, shape (n - layers,).
        is_layer: Which structures are layers, shape (n,); the others are units.
        removable: Which structures can go by themselves: all but the layers of blocks that are not removable, and the units of
            sites that are to stay whole, shape (n,).
        least: Fewest units that each site keeps while its block stands, shape (sites,): 1 at least if the block is not
            removable; 0 where the block goes with the last unit.
    """

    def __init__(self, blocks: Sequence[Block]):
        self.blocks = tuple(blocks)
        self.layers = len(self.blocks)
        places, first = [], self.layers
        for layer, block in enumerate(self.blocks):
            for position, site in enumerate(block.sites):
                units = np.arange(first, first + site.width)
                places.append(Place(len(places), layer, position, block, site, units))
                first += site.width
        self.places = tuple(places)
        self.size = first
        self.units = [place.units for place in places]
        self.widths = np.array([place.site.width for place in places], dtype=np.int64)
        self.site_layer = np.array([place.layer for place in places], dtype=np.int64)
        self.unit_site = np.repeat(np.arange(len(places)), self.widths)
        self.unit_layer = self.site_layer[self.unit_site]
        self.is_layer = np.arange(self.size) < self.layers
        self.removable = np.ones(self.size, dtype=bool)
        self.removable[: self.layers] = [block.removable for block in self.blocks]
        given = np.array([place.site.least for place in places], dtype=np.int64)
        self.least = np.maximum(given, ~self.removable[self.site_layer])
        self.removable[self.layers :] = ((given == 0) | (given < self.widths))[self.unit_site]

    def standing(self, kept: NDArray[np.bool_]) -> Iterator[Place]:
        """The sites of the blocks in the network.

        Args:
            kept: Structures in the network, shape (n,).
        """
        return (place for place in self.places if kept[place.layer])

    def left(self, kept: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
        """Numbers of the units that are left at each site."""
        return [units[kept[units]] for units in self.units]

    def close(self, kept: ArrayLike) -> NDArray[np.bool_]:
        """Removal with the block: an emptied site removes its block, a removed block all its units.

        A block that is not removable stays. A site of a block that stays keeps its `least`, if need be of its first units.

        Args:
            kept: Structures that would stay, shape (n,).

        Returns:
            Those that stay, the largest such set, shape (n,).
        """
        kept = np.array(kept, dtype=bool) | (self.is_layer & ~self.removable)
        layers, units = kept[: self.layers], kept[self.layers :]
        missing = self.least - np.bincount(self.unit_site, units, len(self.widths)).astype(np.int64)
        for number in np.flatnonzero((missing > 0) & layers[self.site_layer]):
            absent = self.units[number][~kept[self.units[number]]]
            kept[absent[: missing[number]]] = True
        alive = np.bincount(self.unit_site, units, len(self.widths)) > 0
        np.logical_and.at(layers, self.site_layer, alive)
        units &= layers[self.unit_layer]
        return kept

    def short(self, kept: NDArray[np.bool_], going: NDArray[np.bool_]) -> list[tuple[NDArray[np.int64], int]]:
        """What would leave sites with fewer units than their least: numbers of units, and how many of them must stay.

        Args:
            kept: Structures in the network, shape (n,).
            going: Those that would be removed, shape (n,).
        """
        found = []
        for number in np.flatnonzero(self.least):
            units = self.units[number][kept[self.units[number]]]
            leaving = units[going[units]]
            missing = int(self.least[number]) - (len(units) - len(leaving))
            if len(leaving) and missing > 0:
                found.append((leaving, missing))
        return found

    def at_least(self, kept: NDArray[np.bool_], groups: ArrayLike = 1) -> NDArray[np.bool_]:
        """Which units are left at sites that cannot lose any more, shape (n,).

        Args:
            kept: Structures that stay, shape (n,).
            groups: Final widths are multiples of this, that of each site or of all.
        """
        number = np.bincount(self.unit_site, kept[self.layers :], len(self.widths)).astype(np.int64)
        groups = np.broadcast_to(groups, number.shape)
        next_group = np.where(number % groups, number % groups, groups)
        full = (self.least > 0) & (number - next_group < self.least)
        return kept & np.concatenate([~self.is_layer[self.is_layer], full[self.unit_site]])

    def names(self) -> list[dict]:
        """kind, block, site and index of every structure, as in structures.csv."""
        layers = [{"kind": "layer", "block": block.name, "site": "", "index": ""} for block in self.blocks]
        return layers + [
            {"kind": "unit", "block": place.block.name, "site": place.site.name, "index": index}
            for place in self.places
            for index in range(place.site.width)
        ]

    def record(self, kept: NDArray[np.bool_]) -> dict:
        """The structure as in structure.json: for each block whether it is kept, and the indices of the units kept.

        Args:
            kept: Structures in the network, shape (n,).
        """
        record: dict = {block.name: {"kept": bool(k), "sites": {}} for block, k in zip(self.blocks, kept, strict=False)}
        for place in self.places:
            left = place.units[kept[place.units]] - place.units[:1] if kept[place.layer] else ()
            record[place.block.name]["sites"][place.site.name] = [int(index) for index in left]
        return record

    def kept(self, record: dict) -> NDArray[np.bool_]:
        """The mask of a `record`, shape (n,).

        Raises:
            ValueError: if the record is not of this network.
        """
        if set(record) != {block.name for block in self.blocks}:
            raise ValueError(
                "`blocks` of structure.json must name the architecture's blocks; got a different architecture's"
            )
        kept = np.zeros(self.size, dtype=bool)
        for layer, block in enumerate(self.blocks):
            kept[layer] = record[block.name]["kept"]
            if not kept[layer] and not block.removable:
                raise ValueError(
                    f"`{block.name}` in structure.json must be kept, as it is no branch; got one that is not"
                )
            if kept[layer] and set(record[block.name]["sites"]) != {site.name for site in block.sites}:
                named = sorted(record[block.name]["sites"])
                raise ValueError(f"`{block.name}` in structure.json must name its sites; got {named}")
        for place in self.standing(kept):
            units, width = record[place.block.name]["sites"][place.site.name], place.site.width
            if not units or min(units) < 0 or max(units) >= width or len(set(units)) < len(units):
                raise ValueError(
                    f"`{place.site.name}` in structure.json must keep different units of 0..{width - 1}; got {units}"
                )
            if len(units) < place.site.least:
                raise ValueError(
                    f"`{place.site.name}` in structure.json must keep at least {place.site.least} units; got {len(units)}. "
                    "Describe the model without `least`."
                )
            kept[place.units[units]] = True
        return kept

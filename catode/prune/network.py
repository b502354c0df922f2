"""The network under the gates: cut while it trains, together with the optimizer's state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from catode.prune import cut
from catode.prune.gates import Gates
from catode.prune.growth import GradientProducts
from catode.structures.inventory import Inventory


class Network:
    """A model that is cut while it trains.

    Args:
        model: The model; changed in place.
        optimizer: Its optimizer.
        inventory: Numbering of the structures.
        gates: Its gates.
        products: Gradient products, attached again whenever the weights change.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        inventory: Inventory,
        gates: Gates,
        products: GradientProducts,
    ):
        self.model, self.optimizer, self.inventory, self.gates = model, optimizer, inventory, gates
        self.products = products

    def install(self, kept: NDArray[np.bool_], open_: NDArray[np.bool_], present: Sequence[NDArray[np.int64]]) -> None:
        """Put the gates of what is undecided into the plain model.

        Args:
            kept: Structures in the network, shape (n,).
            open_: Undecided structures, shape (n,).
            present: Numbers of the units physically present at each site.
        """
        self.products.attach(self.model, self.inventory, kept, present)
        layers = [bool(alive) for alive in (open_ & kept)[: self.inventory.layers]]
        sites: list[torch.Tensor | None] = [None] * len(self.inventory.places)
        for place in self.inventory.standing(kept):
            units = present[place.number]
            if open_[units].any():
                sites[place.number] = torch.from_numpy(units)
        self.gates.install(layers, sites)

    def cut(
        self,
        kept: NDArray[np.bool_],
        before: NDArray[np.bool_],
        present: Sequence[NDArray[np.int64]],
        multiple: int = 1,
        *,
        stay: Sequence[NDArray[np.int64]] | None = None,
        fold: NDArray | None = None,
    ) -> list[NDArray[np.int64]]:
        """Cut the plain model, which must hold no gates, down to what is kept.

        Args:
            kept: Structures that stay, shape (n,).
            before: Structures that were kept before, shape (n,).
            present: Numbers of the units physically present at each site.
            multiple: Widths are rounded up to a multiple of this by dead channels.
            stay: Instead, the units that stay at each site, dead channels included.
            fold: Factors of the weights that read each unit, shape (n,).

        Returns:
            Numbers of the units now present at each site.
        """
        change, after = cut.Change(), list(present)
        for layer, block in enumerate(self.inventory.blocks):
            if before[layer] and not kept[layer]:
                cut.drop_block(self.model, block, change)
        for place in self.inventory.standing(kept):
            here, site = present[place.number], place.site
            live = kept[here]
            dead = np.flatnonzero(~live)
            cut.check_dead(self.model, site, np.flatnonzero(~before[here]))
            wanted = np.arange(len(dead)) < -int(live.sum()) % multiple
            fill = dead[wanted if stay is None else np.isin(here[dead], stay[place.number])]
            if fold is not None and (fold[here] != 1.0).any():
                cut.fold_units(self.model, site, fold[here], change)
            if len(fill):
                cut.silence_units(self.model, site, fill.tolist(), change)
            left = np.union1d(np.flatnonzero(live), fill)
            if len(left) < len(live):
                cut.keep_units(self.model, site, left.tolist(), change)
            after[place.number] = here[left]
        change.follow(self.optimizer)
        return after

    def snapshot(self, kept: NDArray[np.bool_], present: Sequence[NDArray[np.int64]]) -> dict[str, torch.Tensor]:
        """State dict of the compact network in mean field: theta folded into the weights, no dead channels.

        Args:
            kept: Structures in the network, shape (n,).
            present: Numbers of the units physically present at each site.
        """
        state = self.gates.folded_state()
        for place in self.inventory.standing(kept):
            live = kept[present[place.number]]
            if not live.all():
                cut.keep_units_of_state(self.model, state, place.site, np.flatnonzero(live))
        return state

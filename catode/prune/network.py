"""The network under the gates: cut while it trains, together with the optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

    Attributes:
        listeners: Called with the `catode.prune.cut.Cut` after every cut, while the model holds no gates.
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
        self.listeners: list[Callable[[cut.Cut], object]] = []

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
        """Cut the plain model, which must hold no gates, and its optimizer down to what is kept; tell all `listeners`.

        Arguments and result are those of `catode.prune.cut.Cut`.
        """
        change, done = cut.Change(), cut.Cut(self.inventory, kept, before, present, multiple, stay, fold)
        after = done.apply(self.model, change)
        change.follow(self.optimizer)
        for listener in self.listeners:
            listener(done)
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

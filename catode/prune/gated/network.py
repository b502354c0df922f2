"""The network under the gates: cut while it trains, together with the optimizer's state and with copies of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from catode.prune.describe.protocol import slices, tensor_of
from catode.prune.devices.distributed import Group, refuse_wrapped
from catode.prune.gated import cut
from catode.prune.gated.gates import Gates, drop_copied_hooks
from catode.prune.gated.heads import adopt
from catode.prune.measure.growth import GradientProducts
from catode.prune.optimizers import check_state
from catode.structures.description import Block, Site
from catode.structures.inventory import Inventory
from catode.structures.layout import Layout, layout_of, units_in

STEPS = (0, 1, 10, 100)
"""Numbers of steps after which the optimizer's state is looked at: a gradient scaler may skip a few dozen of the first."""


@dataclass(frozen=True)
class SiteCut:
    """What a cut does to one site; units as positions among those present.

    Attributes:
        site: The site.
        fold: Factors of the weights that read each unit, shape (units,); None for none.
        silence: Units that stay as dead channels.
        keep: Units that stay; None for all.
    """

    site: Site
    fold: NDArray | None
    silence: list[int]
    keep: list[int] | None


@dataclass(frozen=True)
class Cut:
    """One removal, as it can be carried out on any copy of the network.

    Attributes:
        blocks: Residual branches that go.
        sites: What becomes of the units of the others.
        layout: Where the units were before it.
    """

    blocks: tuple[Block, ...]
    sites: tuple[SiteCut, ...]
    layout: Layout = field(default_factory=lambda: Layout(()))

    def apply(self, model: nn.Module) -> cut.Change:
        """Cut a network without gates, in place.

        Args:
            model: The network, or a copy of it that every earlier cut was applied to.

        Returns:
            What changed, which an optimizer can follow.
        """
        change, layout = cut.Change(), self.layout.copy()
        for block in self.blocks:
            cut.drop_block(model, block, change)
        change.removed -= set(model.parameters())  # shared with what stays
        for part in self.sites:
            if part.fold is not None:
                cut.fold_units(model, part.site, part.fold, change, layout)
            if part.silence:
                cut.silence_units(model, part.site, part.silence, change, layout)
            if part.keep is not None:
                cut.keep_units(model, part.site, part.keep, change, layout)
        return change


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
        self._copies: list[tuple[nn.Module, Gates]] = []
        self._callbacks: list[Callable[[Cut], object]] = []
        self._begun = False
        self._placed: tuple[list[bool], list[torch.Tensor | None], Layout] | None = None

    def follow(self, copy: nn.Module) -> None:
        """Let a copy of the network, such as an average of its weights, follow every cut; its gates are always at theta.

        Args:
            copy: The copy, or a module that holds it as ``module``.

        Raises:
            ValueError: if it has not the network's parameters.
        """
        here = {name: p.shape for name, p in self.model.named_parameters()}
        for root in (copy, getattr(copy, "module", None)):
            if isinstance(root, nn.Module) and {n: p.shape for n, p in root.named_parameters()} == here:
                break
        else:
            raise ValueError(
                f"`on_cut` must be given a copy of the model as it is now, or a function; got {type(copy).__name__} with other "
                "parameters. Copy the model when the pruner has been built, and call on_cut at once."
            )
        if root is self.model:
            raise ValueError("`on_cut` must be given a copy of the model; got the model itself. Use copy.deepcopy.")
        drop_copied_hooks(root)
        adopt(root, self.gates.blocks)
        gates = Gates.at_theta(root, self.gates)
        self._copies.append((root, gates))
        if self._placed is not None:
            gates.install(*self._placed)

    def call(self, callback: Callable[[Cut], object]) -> None:
        """Call a function with every `Cut` when it has been made."""
        self._callbacks.append(callback)

    def check_step(self, done: int, group: Group, gated: NDArray[np.bool_], kept: NDArray[np.bool_]) -> None:
        """Refuse what can only be seen when the first steps are taken: a wrapper, an optimizer whose state cannot be cut.

        Args:
            done: Steps so far.
            group: Processes that train the model.
            gated: Which structures have gates, shape (n,).
            kept: Which are in the network, shape (n,).

        Raises:
            ValueError: if there is one.
        """
        if done == 0:
            refuse_wrapped(self.model, group)
        if done not in STEPS:
            return
        sites = [place.site for place in self.inventory.standing(kept) if gated[place.units].any()]
        found = [
            tensor_of(self.model, name) for name in {part.tensor for site in sites for part in slices(self.model, site)}
        ]
        check_state(self.optimizer, [tensor for tensor in found if isinstance(tensor, nn.Parameter)])

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
        self._placed = layers, sites, self.layout(present)
        for gates in (self.gates, *(gates for _, gates in self._copies)):
            gates.install(*self._placed)
        self._forget_compiled()

    def remove_gates(self) -> None:
        """Remove the gates of the model and of its copies, and what notes gradients."""
        self._placed = None
        self.products.ignore()
        self.products.begin()
        for gates in (self.gates, *(gates for _, gates in self._copies)):
            gates.remove()
        self._forget_compiled()

    def _forget_compiled(self) -> None:
        """Make what ``torch.compile`` compiled be compiled anew: it does not notice that gates come and go.

        It also limits how often a function is compiled again for other shapes, which removals may exceed.
        """
        every = (self.gates, *(gates for _, gates in self._copies))
        if not self._begun or any(gates.traced for gates in every):
            torch.compiler.reset()
        self._begun = True
        for gates in every:
            gates.traced = False

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
        after, sites, layout = list(present), [], self.layout(present)
        for place in self.inventory.standing(kept):
            here, site = present[place.number], place.site
            live = kept[here]
            dead = np.flatnonzero(~live)
            cut.check_dead(self.model, site, np.flatnonzero(~before[here]), layout)
            wanted = np.arange(len(dead)) < -int(live.sum()) % units_in(multiple, site)
            fill = dead[wanted if stay is None else np.isin(here[dead], stay[place.number])]
            left = np.union1d(np.flatnonzero(live), fill)
            factors = None if fold is None or (fold[here] == 1.0).all() else fold[here]
            part = SiteCut(site, factors, fill.tolist(), left.tolist() if len(left) < len(live) else None)
            if part.fold is not None or part.silence or part.keep is not None:
                sites.append(part)
            after[place.number] = here[left]
        gone = [b for layer, b in enumerate(self.inventory.blocks) if before[layer] and not kept[layer]]
        if gone or sites:
            made = Cut(tuple(gone), tuple(sites), layout)
            made.apply(self.model).follow(self.optimizer)
            for copy, _ in self._copies:
                made.apply(copy)
            for callback in self._callbacks:
                callback(made)
        return after

    def snapshot(
        self, kept: NDArray[np.bool_], present: Sequence[NDArray[np.int64]], keep_prob: NDArray
    ) -> tuple[dict[str, torch.Tensor], NDArray[np.bool_]]:
        """State dict of the compact network in mean field: theta folded into the weights, no dead channels.

        A branch that ends in a module without parameters has no weights to fold theta into: it is in the snapshot as it
        is if its theta is at least 1/2, else it is not.

        Args:
            kept: Structures in the network, shape (n,).
            present: Numbers of the units physically present at each site.
            keep_prob: theta, shape (n,).

        Returns:
            The state dict, and the structures in it, shape (n,).
        """
        state, layout = self.gates.folded_state(), self.layout(present)
        gone = [number for number in self.gates.unfolded if keep_prob[number] < 0.5]
        if gone:
            kept = kept.copy()
            kept[gone] = False
            small = deepcopy(self.model)
            drop_copied_hooks(small)
            small.load_state_dict(state)
            for number in gone:
                cut.drop_block(small, self.inventory.blocks[number])
            state, kept = small.state_dict(), self.inventory.close(kept)
        for place in self.inventory.standing(kept):
            live = kept[present[place.number]]
            if not live.all():
                cut.keep_units_of_state(self.model, state, place.site, np.flatnonzero(live), layout)
        return state, kept

    def layout(self, present: Sequence[NDArray[np.int64]]) -> Layout:
        """Where the units are, from the numbers of those physically present at each site."""
        return layout_of(self.inventory, present)

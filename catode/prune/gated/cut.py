"""Physical removal: slices in convolutions, linear and norm layers, shortcuts in place of dead blocks.

Every function works on a network without gates and changes its parameters in place: whoever holds a list of them (an
optimizer, a gradient clipper) holds the cut ones. Units are given as positions among those now present.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from catode.prune.describe.protocol import slices
from catode.structures.description import CONSUMER, PRODUCER, Block, Site, Slice
from catode.structures.inventory import Inventory


class Change:
    """Record of a compaction: the operations on each changed parameter, in order, and the removed parameters."""

    def __init__(self) -> None:
        self.changed: dict[nn.Parameter, tuple[torch.Size, list[tuple[Callable, int, torch.Tensor]]]] = {}
        self.removed: set[nn.Parameter] = set()

    def slice(self, module: nn.Module, name: str, dim: int, index: torch.Tensor) -> None:
        """Keep `index` along `dim` of the parameter or buffer `module.name`."""
        tensor = getattr(module, name)
        if not isinstance(tensor, nn.Parameter):
            setattr(module, name, _take(tensor, dim, index))
            return
        self._record(tensor, (_take, dim, index))
        gradient = None if tensor.grad is None else _take(tensor.grad, dim, index)
        shrink(tensor, _take(tensor.detach(), dim, index))
        tensor.grad = gradient

    def silence(self, module: nn.Module, name: str, dim: int, index: torch.Tensor) -> None:
        """Set `index` along `dim` of the parameter `module.name` to 0, in place."""
        self._in_place(getattr(module, name), _zero, dim, index)

    def scale(self, module: nn.Module, name: str, dim: int, factors: torch.Tensor) -> None:
        """Multiply the slices of the parameter `module.name` along `dim` by `factors`, in place."""
        self._in_place(getattr(module, name), _scale, dim, factors)

    def _in_place(self, parameter: nn.Parameter, change: Callable, dim: int, by: torch.Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(change(parameter, dim, by))
        self._record(parameter, (change, dim, by))

    def _record(self, parameter: nn.Parameter, step: tuple[Callable, int, torch.Tensor]) -> None:
        self.changed.setdefault(parameter, (parameter.shape, []))[1].append(step)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply the same operations to the per-parameter optimizer state; drop the removed parameters."""
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p not in self.removed]
        for parameter in self.removed:
            optimizer.state.pop(parameter, None)
            parameter.grad = None
        for parameter, (shape, steps) in self.changed.items():
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == shape:
                    for change, dim, index in steps:
                        value = change(value, dim, index)
                    state[key] = value


def shrink(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Give a parameter data of another shape, and forget its gradient.

    Autograd keeps a node for the parameter's gradient, of the shape at the time, as long as any graph that used it lives.
    It is made anew only if the type of the data changes, which is why that changes for a moment.
    """
    parameter.grad = None
    parameter.data = parameter.data.new_empty(0, dtype=torch.float64 if data.dtype != torch.float64 else torch.float32)
    parameter.data = data


@dataclass(frozen=True, eq=False)
class Cut:
    """What one cut of a `Pruner` removes: applied to its model, and to any plain copy with the same structure.

    Args:
        inventory: Numbering of the structures.
        kept: Structures that stay, shape (n,).
        before: Structures that were kept before, shape (n,).
        present: Numbers of the units physically present at each site.
        multiple: Widths are rounded up to a multiple of this by dead channels.
        stay: Instead, the units that stay at each site, dead channels included.
        fold: Factors of the weights that read each unit, shape (n,).
    """

    inventory: Inventory
    kept: NDArray[np.bool_]
    before: NDArray[np.bool_]
    present: Sequence[NDArray[np.int64]]
    multiple: int = 1
    stay: Sequence[NDArray[np.int64]] | None = None
    fold: NDArray | None = None

    def apply(self, model: nn.Module, change: Change | None = None) -> list[NDArray[np.int64]]:
        """Cut a model in place, its parameters and buffers.

        Args:
            model: A plain network, without gates, to which all earlier cuts were applied, such as a copy for averaged weights.
            change: Record to extend; its `follow` then cuts the state of the model's optimizer.

        Returns:
            Numbers of the units now present at each site.

        Raises:
            RuntimeError: if a dead channel is no longer dead.
        """
        change, after = Change() if change is None else change, list(self.present)
        for layer, block in enumerate(self.inventory.blocks):
            if self.before[layer] and not self.kept[layer]:
                drop_block(model, block, change)
        for place in self.inventory.standing(self.kept):
            here, site = self.present[place.number], place.site
            live = self.kept[here]
            dead = np.flatnonzero(~live)
            check_dead(model, site, np.flatnonzero(~self.before[here]))
            wanted = np.arange(len(dead)) < -int(live.sum()) % self.multiple
            fill = dead[wanted if self.stay is None else np.isin(here[dead], self.stay[place.number])]
            if self.fold is not None and (self.fold[here] != 1.0).any():
                fold_units(model, site, self.fold[here], change)
            if len(fill):
                silence_units(model, site, fill.tolist(), change)
            left = np.union1d(np.flatnonzero(live), fill)
            if len(left) < len(live):
                keep_units(model, site, left.tolist(), change)
            after[place.number] = here[left]
        return after


def _take(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """Copy of the slices `index` along `dim`, in the memory format of `tensor`."""
    taken = tensor.index_select(dim, index)
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return taken.contiguous(memory_format=torch.channels_last) if channels_last else taken


def _zero(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    return tensor.index_fill(dim, index.to(tensor.device), 0.0)


def _scale(tensor: torch.Tensor, dim: int, factors: torch.Tensor) -> torch.Tensor:
    return tensor * factors.to(tensor).view([-1 if d == dim else 1 for d in range(tensor.dim())])


def keep_units(model: nn.Module, site: Site, index: Iterable[int], change: Change | None = None) -> Change:
    """Keep only some units of one site.

    Args:
        model: The plain network; changed in place.
        site: The site's description.
        index: Units to keep, as positions among those now present, at least one.
        change: Record to extend.

    Raises:
        ValueError: if no unit would be left: an emptied site must be removed with its block.
    """
    change = Change() if change is None else change
    index = list(index)
    if not index:
        raise ValueError(f"site `{site.name}` must keep at least one unit; got none. Remove its block instead.")
    for part in distinct(model, slices(model, site)):
        module, name = _owner(model, part)
        change.slice(module, name, part.dim, _entries(part, index, getattr(module, name)))
    for names, attributes in (
        (site.producers, ("out_channels", "out_features", "num_features")),
        (site.consumers, ("in_channels", "in_features")),
    ):
        for name in names:
            module = model.get_submodule(name)
            for attribute in attributes:
                if hasattr(module, attribute):
                    setattr(module, attribute, len(index))
    return change


def silence_units(model: nn.Module, site: Site, index: Iterable[int], change: Change) -> None:
    """Keep units only as dead channels, for the speed of a round width: every weight into and out of them is 0.

    With an activation that maps 0 to 0 no gradient reaches a dead channel, and decay leaves it at 0, so it stays dead.

    Args:
        model: The plain network; changed in place.
        site: The site's description.
        index: Units to silence, as positions among those now present.
        change: Record to extend.
    """
    index = list(index)
    for part in slices(model, site):
        module, name = _owner(model, part)
        if isinstance(getattr(module, name), nn.Parameter):
            change.silence(module, name, part.dim, _entries(part, index, getattr(module, name)))


def fold_units(model: nn.Module, site: Site, factors: NDArray, change: Change) -> None:
    """Multiply the weights that read a site's units by `factors`: gates folded into the weights.

    Args:
        model: The plain network; changed in place.
        site: The site's description.
        factors: Shape (units present,).
        change: Record to extend.
    """
    for part in distinct(model, _with_role(slices(model, site), CONSUMER)):
        module, name = _owner(model, part)
        change.scale(module, name, part.dim, torch.from_numpy(np.repeat(factors, part.each)))


def check_dead(model: nn.Module, site: Site, index: NDArray[np.int64]) -> None:
    """Make sure that silenced units are still dead.

    Args:
        model: The plain network.
        site: The site's description.
        index: Silenced units, as positions among those now present, shape (k,).

    Raises:
        RuntimeError: if training changed one, which an activation with f(0) != 0 allows.
    """
    if not len(index):
        return
    for part in _with_role(slices(model, site), CONSUMER):
        weight = getattr(*_owner(model, part))
        if weight.index_select(part.dim, _entries(part, index, weight)).any():
            raise RuntimeError(
                f"`width_multiple` must be 1 where an activation does not map 0 to 0; dead channels of `{site.name}` "
                "are no longer 0. Pass width_multiple=1."
            )


def keep_units_of_state(model: nn.Module, state: dict[str, torch.Tensor], site: Site, index: NDArray[np.int64]) -> None:
    """Keep only some units of one site in a state dict, as `keep_units` does in the network.

    Args:
        model: The plain network; its modules name the tensors.
        state: Its state dict; changed in place.
        site: The site's description.
        index: Units to keep, as positions among those now present, shape (k,).
    """
    for part in slices(model, site):
        tensor = state[part.tensor]
        state[part.tensor] = _take(tensor, part.dim, _entries(part, index, tensor))


def unit_norms(model: nn.Module, site: Site) -> NDArray:
    """Norm of the filter that makes each unit of a site, and scale of its norm layer, shape (2, width); gates left out.

    Where a site has no norm layer the filter's norm is used for both.
    """
    filters, scale = 0.0, None
    for part in _with_role(slices(model, site), PRODUCER):
        module, name = _owner(model, part)
        if name != "weight":
            continue
        weight = module.weight.detach()
        if weight.dim() > 1:
            filters = filters + weight.flatten(1).double().square().sum(1)
        else:
            scale = weight.double().abs()
    filters = filters.sqrt()
    return torch.stack([filters, filters if scale is None else scale]).cpu().numpy()


def drop_block(model: nn.Module, block: Block, change: Change | None = None) -> Change:
    """Replace a block by its shortcut; changes `model` in place."""
    change = Change() if change is None else change
    before = model.get_submodule(block.name)
    after = before.shortcut_only()
    after.train(before.training)
    change.removed |= set(before.parameters()) - set(after.parameters())
    model.set_submodule(block.name, after)
    return change


def restrict(model: nn.Module, blocks: list[Block], structure: dict) -> nn.Module:
    """Cut a whole network down to a recorded structure, as in a run's structure.json.

    Args:
        model: A fresh, whole network; changed in place.
        blocks: Its description.
        structure: A `catode.structures.inventory.Inventory.record`.

    Raises:
        ValueError: if the record does not fit the architecture.
    """
    inventory = Inventory(blocks)
    kept = inventory.kept(structure)
    for block, stays in zip(blocks, kept, strict=False):
        if not stays:
            drop_block(model, block)
    for place in inventory.standing(kept):
        units = structure[place.block.name]["sites"][place.site.name]
        if len(units) < place.site.width:
            keep_units(model, place.site, units)
    return model


def distinct(model: nn.Module, parts: Iterable[Slice]) -> list[Slice]:
    """The slices without those of a tensor that another name has had already: a shared parameter is cut once."""
    found = {}
    for part in parts:
        module, name = _owner(model, part)
        found.setdefault((id(getattr(module, name)), part.dim, part.offset, part.each), part)
    return list(found.values())


def _with_role(parts: Iterable[Slice], role: str) -> list[Slice]:
    return [part for part in parts if part.role == role]


def _owner(model: nn.Module, part: Slice) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and the tensor's name there."""
    path, _, name = part.tensor.rpartition(".")
    return model.get_submodule(path), name


def _entries(part: Slice, units: Iterable[int] | NDArray, tensor: torch.Tensor) -> torch.Tensor:
    """Indices of units along a slice's dimension, on the device of its tensor."""
    return torch.from_numpy(part.entries(units)).to(tensor.device)

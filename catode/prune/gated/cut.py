"""Physical removal: slices in convolutions, linear and norm layers, shortcuts in place of dead blocks.

Every function works on a network without gates and changes its parameters in place: whoever holds a list of them (an
optimizer, a gradient clipper) holds the cut ones. Units are given as positions among those now present.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from catode.prune.describe.protocol import attributes, branch, owner, slices, tensor_of
from catode.prune.gated import absent
from catode.prune.gated.heads import adopt
from catode.prune.gated.remainder import without
from catode.structures.description import CONSUMER, PRODUCER, Block, Site, Slice
from catode.structures.inventory import Inventory
from catode.structures.layout import Layout


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


def _take(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """Copy of the slices `index` along `dim`, in the memory format of `tensor`."""
    taken = tensor.index_select(dim, index)
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return taken.contiguous(memory_format=torch.channels_last) if channels_last else taken


def _zero(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    return tensor.index_fill(dim, index.to(tensor.device), 0.0)


def _scale(tensor: torch.Tensor, dim: int, factors: torch.Tensor) -> torch.Tensor:
    return tensor * factors.to(tensor).view([-1 if d == dim else 1 for d in range(tensor.dim())])


def keep_units(
    model: nn.Module, site: Site, index: Iterable[int], change: Change | None = None, layout: Layout | None = None
) -> Change:
    """Keep only some units of one site.

    Args:
        model: The plain network; changed in place.
        site: The site's description.
        index: Units to keep, as positions among those now present, at least one.
        change: Record to extend.
        layout: Where the units of all sites are; None for a site that is whole, with no cut one in its tensors. It is brought up to
            date.

    Raises:
        ValueError: if fewer units than the site's least would be left, or none: an emptied site must be removed with its block.
    """
    change = Change() if change is None else change
    index = list(index)
    if not index:
        raise ValueError(f"site `{site.name}` must keep at least one unit; got none. Remove its block instead.")
    if len(index) < site.least:
        raise ValueError(
            f"site `{site.name}` must keep at least {site.least} units; got {len(index)}. Lower its `least`."
        )
    layout = layout or Layout([site])
    widths = attributes(model, site) if site.parts else []  # plain sites: below
    for parts in _by_dimension(model, slices(model, site)):
        module, name = owner(model, parts[0].tensor)
        kept = _kept(layout, site, parts, index, getattr(module, name))
        _forget(module)
        change.slice(module, name, parts[0].dim, kept)
    for names, counted in (
        (site.producers, ("out_channels", "out_features", "num_features")),
        (site.consumers, ("in_channels", "in_features")),
    ):
        for name in names:
            module = model.get_submodule(name)
            for attribute in counted:
                if hasattr(module, attribute):
                    setattr(module, attribute, len(index))
    for width in widths:
        module = model.get_submodule(width.module)
        gone = width.each * (layout.present(site) - len(index))
        setattr(module, width.name, getattr(module, width.name) - gone)
    layout.keep(site, len(index))
    return change


def silence_units(
    model: nn.Module, site: Site, index: Iterable[int], change: Change, layout: Layout | None = None
) -> None:
    """Keep units only as dead channels, for the speed of a round width: every weight into and out of them is 0.

    With an activation that maps 0 to 0 no gradient reaches a dead channel, and decay leaves it at 0, so it stays dead.

    Args:
        model: The plain network; changed in place.
        site: The site's description.
        index: Units to silence, as positions among those now present.
        change: Record to extend.
        layout: Where the units of all sites are; None as for `keep_units`.
    """
    index, layout = list(index), layout or Layout([site])
    for part in slices(model, site):
        module, name = owner(model, part.tensor)
        if isinstance(getattr(module, name), nn.Parameter):
            change.silence(module, name, part.dim, _entries(layout, part, index, getattr(module, name)))


def fold_units(model: nn.Module, site: Site, factors: NDArray, change: Change, layout: Layout | None = None) -> None:
    """Multiply the weights that read a site's units by `factors`: gates folded into the weights.

    Args:
        model: The plain network; changed in place.
        site: The site's description.
        factors: Shape (units present,).
        change: Record to extend.
        layout: Where the units of all sites are; None as for `keep_units`.
    """
    layout = layout or Layout([site])
    for parts in _by_dimension(model, _with_role(slices(model, site), CONSUMER)):
        module, name = owner(model, parts[0].tensor)
        weight = getattr(module, name)
        every = np.ones(weight.shape[parts[0].dim])
        for part in parts:
            every[layout.entries(part, np.arange(len(factors)))] = np.repeat(factors, part.each)
        change.scale(module, name, parts[0].dim, torch.from_numpy(every))


def check_dead(model: nn.Module, site: Site, index: NDArray[np.int64], layout: Layout | None = None) -> None:
    """Make sure that silenced units are still dead.

    Args:
        model: The plain network.
        site: The site's description.
        index: Silenced units, as positions among those now present, shape (k,).
        layout: Where the units of all sites are; None as for `keep_units`.

    Raises:
        RuntimeError: if training changed one, which an activation with f(0) != 0 allows.
    """
    if not len(index):
        return
    layout = layout or Layout([site])
    for part in _with_role(slices(model, site), CONSUMER):
        weight = tensor_of(model, part.tensor)
        if weight.index_select(part.dim, _entries(layout, part, index, weight)).any():
            raise RuntimeError(
                f"`width_multiple` must be 1 where an activation does not map 0 to 0; dead channels of `{site.name}` "
                "are no longer 0. Pass width_multiple=1."
            )


def keep_units_of_state(
    model: nn.Module,
    state: dict[str, torch.Tensor],
    site: Site,
    index: NDArray[np.int64],
    layout: Layout | None = None,
) -> None:
    """Keep only some units of one site in a state dict, as `keep_units` does in the network.

    Args:
        model: The plain network; its modules name the tensors.
        state: Its state dict; changed in place.
        site: The site's description.
        index: Units to keep, as positions among those now present, shape (k,).
        layout: Where the units of all sites are in the state; None as for `keep_units`. It is brought up to date.
    """
    layout, parts = layout or Layout([site]), {}
    for part in slices(model, site):
        parts.setdefault((part.tensor, part.dim), []).append(part)
    for (name, dim), several in parts.items():
        state[name] = _take(state[name], dim, _kept(layout, site, several, index, state[name]))
    layout.keep(site, len(index))


def unit_norms(model: nn.Module, site: Site, layout: Layout | None = None) -> NDArray:
    """Norm of the filter that makes each unit of a site, and scale of its norm layer, shape (2, width); gates left out.

    Where a site has no norm layer the filter's norm is used for both.
    """
    layout, filters, scale = layout or Layout([site]), 0.0, None
    for part in slices(model, site):
        module, name = owner(model, part.tensor)
        if name != "weight" or part.role == CONSUMER:
            continue
        weight = module.weight.detach()
        units = layout.present(site)
        if units is not None:
            entries = _entries(layout, part, np.arange(units), weight)
            weight = weight.movedim(part.dim, 0).index_select(0, entries)
        if weight.dim() > 1:
            if part.role == PRODUCER:
                squares = weight.flatten(1).double().square().sum(1)
                filters = filters + squares.view(-1, part.each).sum(1)
        else:
            scale = weight.double().abs().view(-1, part.each).sum(1)
    if isinstance(filters, float):  # a site without a weight of its own
        filters = torch.zeros(layout.present(site), dtype=torch.float64)
    filters = filters.sqrt()
    return torch.stack([filters, filters if scale is None else scale]).cpu().numpy()


def drop_block(model: nn.Module, block: Block, change: Change | None = None) -> Change:
    """Replace a block by what is left of it without its branch; changes `model` in place."""
    change = Change() if change is None else change
    if block.absent:
        gone = set(branch(model, block).values())
        absent.remove(model, block)
        change.removed |= gone - set(model.parameters())
        return change
    before = model.get_submodule(block.place)
    if block.addend:
        after = without(before, block.addend)
    else:
        after = before.shortcut_only()
        after.train(before.training)
    change.removed |= set(before.parameters()) - set(after.parameters())
    model.set_submodule(block.place, after)
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
    layout = Layout(place.site for place in inventory.places)
    kept = inventory.kept(structure)
    adopt(model, blocks)
    for block, stays in zip(blocks, kept, strict=False):
        if not stays:
            drop_block(model, block)
    for place in inventory.standing(kept):
        units = structure[place.block.name]["sites"][place.site.name]
        if len(units) < place.site.width:
            keep_units(model, place.site, units, layout=layout)
    return model


def _forget(module: nn.Module) -> None:
    """Empty what a module keeps of tensors that it computed from its parameters, such as timm's biases of attention."""
    for name, value in vars(module).items():
        if "cache" in name and isinstance(value, dict):
            value.clear()


def _by_dimension(model: nn.Module, parts: Iterable[Slice]) -> list[list[Slice]]:
    """Slices of one dimension of one tensor together; a shared parameter of several names is cut once."""
    found: dict[tuple[int, int], dict[tuple[int, int], Slice]] = {}
    for part in parts:
        several = found.setdefault((id(tensor_of(model, part.tensor)), part.dim), {})
        several.setdefault((part.offset, part.each), part)
    return [list(several.values()) for several in found.values()]


def _with_role(parts: Iterable[Slice], role: str) -> list[Slice]:
    return [part for part in parts if part.role == role]


def _entries(layout: Layout, part: Slice, units: Iterable[int] | NDArray, tensor: torch.Tensor) -> torch.Tensor:
    """Indices of units along a slice's dimension, on the device of its tensor."""
    return torch.from_numpy(layout.entries(part, units)).to(tensor.device)


def _kept(
    layout: Layout, site: Site, parts: list[Slice], units: Iterable[int] | NDArray, tensor: torch.Tensor
) -> torch.Tensor:
    """Indices along the parts' dimension that are left when only some units of the site are kept."""
    if layout.present(site) is None:
        return _entries(layout, parts[0], units, tensor)
    stays = np.ones(tensor.shape[parts[0].dim], dtype=bool)
    gone = np.setdiff1d(np.arange(layout.present(site)), np.asarray(units, dtype=np.int64))
    for part in parts:
        stays[layout.entries(part, gone)] = False
    return torch.from_numpy(np.flatnonzero(stays)).to(tensor.device)

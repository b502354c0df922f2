"""Physical removal: slices in convolutions, linear and norm layers, shortcuts in place of dead blocks.

Every function works on a plain network (no gates installed) and replaces `nn.Parameter` objects; the returned mapping
tells an optimizer how to follow (`follow`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import parametrize

from catode.structures.description import Block, Site

_AFFINE, _STATISTICS = ("weight", "bias"), ("running_mean", "running_var")


class Change:
    """What a compaction did to the parameters: what became of each changed one, step by step, and the removed ones."""

    def __init__(self) -> None:
        self.changed: dict[nn.Parameter, tuple[nn.Parameter, list[tuple[Callable, int, torch.Tensor]]]] = {}
        self.removed: set[nn.Parameter] = set()

    def slice(self, module: nn.Module, name: str, dim: int, index: torch.Tensor) -> None:
        """Keep `index` along `dim` of the parameter `module.name`."""
        old = getattr(module, name)
        new = nn.Parameter(_take(old.detach(), dim, index), old.requires_grad)
        setattr(module, name, new)
        self._record(old, new, (_take, dim, index))

    def silence(self, module: nn.Module, name: str, dim: int, index: torch.Tensor) -> None:
        """Set `index` along `dim` of the parameter `module.name` to 0, in place."""
        parameter = getattr(module, name)
        with torch.no_grad():
            parameter.copy_(_zero(parameter, dim, index))
        self._record(parameter, parameter, (_zero, dim, index))

    def scale(self, module: nn.Module, name: str, dim: int, factors: torch.Tensor) -> None:
        """Multiply the slices of the parameter `module.name` along `dim` by `factors`, in place."""
        parameter = getattr(module, name)
        with torch.no_grad():
            parameter.copy_(_scale(parameter, dim, factors))
        self._record(parameter, parameter, (_scale, dim, factors))

    def _record(self, old: nn.Parameter, new: nn.Parameter, step: tuple[Callable, int, torch.Tensor]) -> None:
        first, steps = next(((o, s) for o, (n, s) in self.changed.items() if n is old), (old, []))
        self.changed[first] = (new, [*steps, step])

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Carry every piece of per-parameter optimizer state along; drop the removed parameters."""
        for group in optimizer.param_groups:
            group["params"] = [
                self.changed[p][0] if p in self.changed else p for p in group["params"] if p not in self.removed
            ]
        for parameter in self.removed:
            optimizer.state.pop(parameter, None)
        for old, (new, steps) in self.changed.items():
            state = optimizer.state.pop(old, None)
            if state is None:
                continue
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == old.shape:
                    for change, dim, index in steps:
                        value = change(value, dim, index)
                    state[key] = value
            optimizer.state[new] = state


def _take(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """Copy of the slices `index` along `dim`, in the memory format of `tensor`."""
    taken = tensor.index_select(dim, index)
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return taken.contiguous(memory_format=torch.channels_last) if channels_last else taken


def _zero(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    return tensor.index_fill(dim, index.to(tensor.device), 0.0)


def _scale(tensor: torch.Tensor, dim: int, factors: torch.Tensor) -> torch.Tensor:
    return tensor * factors.to(tensor).view([-1 if d == dim else 1 for d in range(tensor.dim())])


def keep_units(model: nn.Module, block: Block, site: int, index: Iterable[int], change: Change | None = None) -> Change:
    """Keep only some units of one site.

    Args:
        model: The plain network; changed in place.
        block: The block's description.
        site: Position of the site in `block.sites`.
        index: Units to keep, as positions among those now present, at least one.
        change: Record to extend.

    Raises:
        ValueError: if no unit would be left: an emptied site must take its block along.
    """
    change = Change() if change is None else change
    spec = block.sites[site]
    index = torch.as_tensor(list(index), dtype=torch.long)
    if index.numel() == 0:
        raise ValueError(f"site `{spec.name}` must keep at least one unit; got none. Remove its block instead.")
    for name in spec.producers:
        module = model.get_submodule(name)
        index = index.to(next(module.parameters()).device)
        for parameter in _AFFINE:
            if getattr(module, parameter, None) is not None:
                change.slice(module, parameter, 0, index)
        for buffer in _STATISTICS:
            if getattr(module, buffer, None) is not None:
                setattr(module, buffer, getattr(module, buffer)[index].clone())
        _set_width(module, ("out_channels", "out_features", "num_features"), len(index))
    for name in spec.consumers:
        module = model.get_submodule(name)
        change.slice(module, "weight", 1, index)
        _set_width(module, ("in_channels", "in_features"), len(index))
    return change


def silence_units(model: nn.Module, block: Block, site: int, index: Iterable[int], change: Change) -> None:
    """Keep units only as dead channels, for the speed of a round width: every weight into and out of them is 0.

    With an activation that maps 0 to 0 no gradient reaches a dead channel, and decay leaves it at 0, so it stays dead.

    Args:
        model: The plain network; changed in place.
        block: The block's description.
        site: Position of the site in `block.sites`.
        index: Units to silence, as positions among those now present.
        change: Record to extend.
    """
    spec = block.sites[site]
    index = torch.as_tensor(list(index), dtype=torch.long)
    for name in spec.producers:
        for parameter in _AFFINE:
            if getattr(model.get_submodule(name), parameter, None) is not None:
                change.silence(model.get_submodule(name), parameter, 0, index)
    for name in spec.consumers:
        change.silence(model.get_submodule(name), "weight", 1, index)


def fold_units(model: nn.Module, block: Block, site: int, factors: NDArray, change: Change) -> None:
    """Multiply the weights that read a site's units by `factors`, shape (units present,): gates made part of the weights."""
    for name in block.sites[site].consumers:
        change.scale(model.get_submodule(name), "weight", 1, torch.from_numpy(factors))


def check_dead(model: nn.Module, spec: Site, index: NDArray[np.int64]) -> None:
    """Make sure that silenced units are still dead.

    Raises:
        RuntimeError: if training revived one, which an activation with f(0) != 0 can do.
    """
    for name in spec.consumers:
        weight = model.get_submodule(name).weight
        if len(index) and weight[:, torch.from_numpy(index).to(weight.device)].any():
            raise RuntimeError(
                f"`width_multiple` must be 1 where an activation does not map 0 to 0; dead channels of `{spec.name}` came "
                "back to life. Pass width_multiple=1."
            )


def keep_units_of_state(state: dict[str, torch.Tensor], spec: Site, index: NDArray[np.int64]) -> None:
    """What `keep_units` does to a network, done to its state dict, in place."""
    kept = torch.from_numpy(index)
    for dim, names, tensors in ((0, spec.producers, _AFFINE + _STATISTICS), (1, spec.consumers, ("weight",))):
        for key in (f"{name}.{tensor}" for name in names for tensor in tensors):
            if key in state:
                state[key] = _take(state[key], dim, kept.to(state[key].device))


def drop_block(model: nn.Module, block: Block, change: Change | None = None) -> Change:
    """Replace a block by its shortcut; changes `model` in place."""
    change = Change() if change is None else change
    before = model.get_submodule(block.name)
    after = before.shortcut_only()
    after.train(before.training)
    change.removed |= set(before.parameters()) - set(after.parameters())
    model.set_submodule(block.name, after)
    return change


def _set_width(module: nn.Module, names: tuple[str, ...], width: int) -> None:
    for name in names:
        if hasattr(module, name):
            setattr(module, name, width)


def restrict(model: nn.Module, blocks: list[Block], structure: dict) -> nn.Module:
    """Cut a whole network down to a recorded structure, as in a run's structure.json.

    Args:
        model: A fresh, whole network; changed in place.
        blocks: Its description.
        structure: For each block name ``{"kept": bool, "sites": {site name: [units kept, original indices]}}``.

    Raises:
        ValueError: if the record does not fit the architecture.
    """
    if set(structure) != {b.name for b in blocks}:
        raise ValueError(
            "`blocks` of structure.json must name the architecture's blocks; got a different architecture's"
        )
    for block in blocks:
        record = structure[block.name]
        if not record["kept"]:
            drop_block(model, block)
            continue
        if set(record["sites"]) != {site.name for site in block.sites}:
            raise ValueError(f"`{block.name}` in structure.json must name its sites; got {sorted(record['sites'])}")
        for i, site in enumerate(block.sites):
            units = record["sites"][site.name]
            if not units or min(units) < 0 or max(units) >= site.width or len(set(units)) < len(units):
                raise ValueError(
                    f"`{site.name}` in structure.json must keep different units of 0..{site.width - 1}; got {units}"
                )
            if len(units) < site.width:
                keep_units(model, block, i, units)
    return model


def unit_norms(model: nn.Module, spec: Site) -> NDArray:
    """Norm of the filter that makes each unit of a site, and scale of its norm layer, shape (2, width).

    Where a site has no norm layer the filter's norm stands for both.
    """
    filters, scale = 0.0, None
    for name in spec.producers:
        weight = _ungated(model.get_submodule(name)).detach()
        if weight.dim() > 1:
            filters = filters + weight.flatten(1).double().square().sum(1)
        else:
            scale = weight.double().abs()
    filters = filters.sqrt()
    return torch.stack([filters, filters if scale is None else scale]).cpu().numpy()


def _ungated(module: nn.Module) -> torch.Tensor:
    """A module's weight itself: what reads gated units shows it times the draw."""
    return module.parametrizations.weight.original if parametrize.is_parametrized(module, "weight") else module.weight

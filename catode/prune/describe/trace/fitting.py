"""Trial of a description by shapes: the cut network, its tensors without numbers, must run the same operations.

Index maps say what shape every tensor of the cut network must have. A network that writes a width into its code, or keeps it
in an attribute that nobody rewrote, fails or makes other shapes; the widths at fault are named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from catode.prune.describe.trace.axes import Axis
from catode.prune.describe.trace.maps import Maps
from catode.prune.describe.trace.recording import Failed, Operation, Recording, fake_copy, record
from catode.prune.describe.trace.sites import Width
from catode.structures.description import Attribute, Slice


def shapes_cut(copied: nn.Module, parts: Iterable[tuple[Slice, np.ndarray]]) -> dict[str, np.ndarray]:
    """Positions along each cut dimension that stay, of slices and the units that go.

    Returns:
        (tensor, dim) -> positions.
    """
    gone: dict[tuple[str, int], list[np.ndarray]] = {}
    for part, units in parts:
        gone.setdefault((part.tensor, part.dim), []).append(part.entries(units))
    found = {}
    for (tensor, dim), indices in gone.items():
        size = _tensor(copied, tensor).shape[dim]
        found[tensor, dim] = np.setdiff1d(np.arange(size), np.concatenate(indices))
    return found


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    path, _, name = name.rpartition(".")
    return getattr(model.get_submodule(path), name)


def cut(model: nn.Module, parts: Iterable[tuple[Slice, np.ndarray]]) -> None:
    """Take units out of the tensors of a copy of a network, all dimensions at once.

    Args:
        model: The copy; changed in place.
        parts: Slices, each with the positions of the units that go.
    """
    for (tensor, dim), stay in shapes_cut(model, list(parts)).items():
        path, _, name = tensor.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, name)
        new = old.detach().index_select(dim, torch.as_tensor(stay, device=old.device)) if stay.size else old.detach()
        if isinstance(old, nn.Parameter):
            module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        else:
            module._buffers[name] = new


def rewrite(model: nn.Module, attributes: Iterable[tuple[Attribute, int]]) -> None:
    """Rewrite attributes of a copy of a network.

    Args:
        model: The copy; changed in place.
        attributes: Attributes, each with the number of units that stay of its site.
    """
    values: dict[tuple[str, str], int] = {}
    for attribute, left in attributes:
        key = attribute.module, attribute.name
        values[key] = values.get(key, attribute.fixed) + attribute.each * left
    for (path, name), value in values.items():
        setattr(model.get_submodule(path), name, value)


def misfits(
    model: nn.Module,
    example: Any,
    maps: Maps,
    whole: Recording,
    chosen: Sequence[tuple[Width, tuple[Slice, ...], tuple[Attribute, ...]]],
    training: bool,
) -> tuple[set[Width], str]:
    """Widths at whose cut the network fails or changes its operations.

    Args:
        model: The network; not changed.
        example: One input batch.
        maps: Index maps of the network.
        whole: Its pass before the cut, in the same mode.
        chosen: Widths, with their slices and attributes.
        training: Whether in train mode.

    Returns:
        The widths, none if all fit, and where and why.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copied, kept = fake_copy(model, mode), {}
    parts, attributes = [], []
    for width, slices, rewritten in chosen:
        gone = np.arange(width.leaf.size - max(1, width.leaf.size // 3), width.leaf.size)
        kept[width.leaf.find()] = width.leaf.size - len(gone)
        parts += [(part, gone) for part in slices]
        attributes += [(attribute, kept[width.leaf.find()]) for attribute in rewritten]
    with mode:
        cut(copied, parts)
    rewrite(copied, attributes)
    widths = {width.leaf.find(): width for width, _, _ in chosen}
    try:
        found = record(copied, example, mode, training)
    except Failed as error:
        at = len(error.recording.operations)
        same = _first_difference(maps, whole, error.recording, kept)
        position = at if same is None else min(at, same)
        if position < at:
            op = whole.operations[position]
            return _blamed(maps, whole, position, op.path, widths), f"a shape that is written into `{op.path}`"
        return _blamed(maps, whole, at, error.path, widths), f"`{error.path}` fails without some units: {error}"
    position = _first_difference(maps, whole, found, kept)
    if position is None:
        return set(), ""
    path = whole.operations[min(position, len(whole.operations) - 1)].path
    return _blamed(maps, whole, position, path, widths), f"a shape that is written into `{path}`"


def _first_difference(maps: Maps, whole: Recording, found: Recording, kept: Mapping[Axis, int]) -> int | None:
    """Position of the first operation that is not what the index maps say."""
    these, those = (
        [(n, op) for n, op in enumerate(recording.operations) if op.name != "clone"] for recording in (whole, found)
    )  # a reshape clones or not, as the numbers lie in memory
    for (position, one), (_, other) in zip(these, those, strict=False):
        same = one.target is other.target or {one.name, other.name} == {"view", "_unsafe_view"}
        if not same or len(one.outputs) != len(other.outputs) or _scalars(one) != _scalars(other):
            return position
        for before, after in zip(one.outputs, other.outputs, strict=True):
            if before not in maps.unruled and tuple(axis.left(kept) for axis in maps.of(before)) != after.shape:
                return position
    if len(those) >= len(these) or not found.results:
        return None
    return these[len(those)][0]


def _scalars(op: Operation) -> list[float]:
    """Numbers that an operation computes with."""
    if torch.Tag.pointwise in op.target.tags:
        return [value for value in (*op.args, *op.kwargs.values()) if isinstance(value, (int, float))]
    return [value for value in (*op.args, *op.kwargs.values()) if isinstance(value, float)]


def _blamed(maps: Maps, whole: Recording, position: int, path: str, widths: Mapping[Axis, Width]) -> set[Width]:
    """Widths that an operation has to do with, else those of the module that ran it, or of the modules around."""
    found: set[Width] = set()
    if position < len(whole.operations):
        op = whole.operations[position]
        leaves = {leaf for value in (*op.inputs, *op.outputs) for axis in maps.of(value) for leaf in axis.leaves()}
        found = {widths[leaf] for leaf in leaves if leaf in widths}
    while not found:
        inside = path + "." if path else ""
        found = {
            width
            for width in widths.values()
            if path in width.reshaped or any(tensor.startswith(inside) for tensor in width.tensors)
        }
        if not path:
            break
        path = path.rpartition(".")[0]
    return found or set(widths.values())

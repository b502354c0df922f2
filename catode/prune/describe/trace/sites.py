"""From index maps to widths: which axes are units that can go, where they lie in which tensors, and what a cut rewrites."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from catode.prune.describe.trace.axes import Axis, Mismatch, Run, runs
from catode.prune.describe.trace.maps import Maps
from catode.prune.describe.trace.recording import Recording
from catode.prune.describe.trace.rules import BATCH_NORMS
from catode.structures.description import CONSUMER, PRODUCER, TIED, Attribute, Site, Slice

RESHAPES = (
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "expand",
    "repeat",
    "split",
    "split_with_sizes",
    "slice",
)
COUNTS = re.compile(r"head|group", re.IGNORECASE)
SIZES = re.compile(r"dim|feature|channel|width|size|plane|hidden|inner|split|inplanes|nf|nx", re.IGNORECASE)


@dataclass(eq=False)
class Width:
    """An axis of parameters: a site, if nothing forbids it.

    Attributes:
        leaf: The axis.
        places: Every run of its units: tensor, dimension, run.
        reasons: Why its units cannot go, in the order in which it was noted.
        reading: Tensors that sum over it.
        making: Tensors whose products have it.
        counting: Tensors of convolutions and norms whose groups it counts.
        reshaped: Paths of modules that reshape a tensor which has it.
        normalised: Whether all sums over it go straight into batch norms.
    """

    leaf: Axis
    places: list[tuple[str, int, Run]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    reading: set[str] = field(default_factory=set)
    making: set[str] = field(default_factory=set)
    counting: set[str] = field(default_factory=set)
    reshaped: set[str] = field(default_factory=set)
    normalised: bool = True

    @property
    def first(self) -> str:
        """Path of the module that makes its units."""
        return next((tensor for tensor, _, _ in self.places if tensor in self.making), self.places[0][0]).rpartition(
            "."
        )[0]

    @property
    def tensors(self) -> set[str]:
        """Names of the tensors that have it."""
        return {tensor for tensor, _, _ in self.places}

    def parts(self) -> tuple[Slice, ...]:
        """Its slices."""
        found = []
        for tensor, dim, run in self.places:
            role = CONSUMER if tensor in self.reading else PRODUCER if tensor in self.making else TIED
            found.append(Slice(tensor, dim, role, run.offset, run.each))
        return tuple(found)


def widths(maps: Maps, recordings: Iterable[Recording], others: Mapping[str, Sequence[str]]) -> list[Width]:
    """All axes of parameters with more than one index, in the order of the parameters.

    Args:
        maps: Index maps of the network.
        recordings: Its passes.
        others: Further names of tensors that have several.
    """
    found: dict[Axis, Width] = {}
    for tensor, axes in maps.tensors.items():
        for dim, axis in enumerate(axes):
            try:
                places = runs(axis)
            except Mismatch:
                maps.forbid([axis], "too many pieces of one dimension")
                continue
            for run in places:
                if run.leaf.size > 1:
                    found.setdefault(run.leaf, Width(run.leaf)).places.append((tensor, dim, run))
                    found[run.leaf].places += [(name, dim, run) for name in others.get(tensor, ())]
    for name, uses in (("reading", maps.reads), ("making", maps.makes), ("counting", maps.grouped)):
        for use in uses:
            for leaf in use.axis.leaves():
                if leaf in found:
                    getattr(found[leaf], name).update((use.tensor, *others.get(use.tensor, ())))
    for use in maps.reads:
        if not use.value.users or any(user.name not in BATCH_NORMS for user in use.value.users):
            for leaf in use.axis.leaves():
                if leaf in found:
                    found[leaf].normalised = False
        owner = use.tensor.rpartition(".")[0]
        if owner and not any(path == owner for path, _ in use.op.stack):
            maps.forbid([use.axis], f"`{use.tensor}` used outside of its own module's call,", use.op)
    for note in maps.notes:
        for leaf in note.axis.leaves():
            if leaf in found:
                found[leaf].reasons.append(note.text)
    for recording in recordings:
        for op in recording.operations:
            if op.name in RESHAPES:
                for axis in {axis for value in (op.inputs[0], *op.outputs) for axis in maps.of(value)}:
                    for leaf in axis.leaves():
                        if leaf in found:
                            found[leaf].reshaped.add(op.path)
    for width in found.values():
        twice = width.reading & width.making - width.counting
        if twice:
            width.reasons.append(f"made and read by `{min(twice)}`")
        if not width.making:
            width.reasons.append("no weight makes it")
        elif not width.reading:
            width.reasons.append("no weight reads it")
    return list(found.values())


def selected(candidates: Sequence[Width]) -> list[Width]:
    """Widths none of which lies inside another one's units: of two, the outer one."""
    by_leaf = {width.leaf: width for width in candidates}
    inside = {
        width: {
            by_leaf[leaf]
            for _, _, run in width.places
            for axis in run.inner
            for leaf in axis.leaves()
            if leaf in by_leaf and leaf is not width.leaf
        }
        for width in candidates
    }
    depth = {width: sum(width in others for others in inside.values()) for width in candidates}
    chosen: list[Width] = []
    for width in sorted(candidates, key=lambda width: depth[width]):
        if not any(width in inside[other] or other in inside[width] for other in chosen):
            chosen.append(width)
    return [width for width in candidates if width in chosen]


def entries(width: Width) -> dict[tuple[str, int], int]:
    """Entries of a unit along each dimension of each tensor."""
    found: dict[tuple[str, int], int] = {}
    for tensor, dim, run in width.places:
        found[tensor, dim] = found.get((tensor, dim), 0) + run.each
    return found


def known_attributes(model: nn.Module, width: Width) -> dict[tuple[str, str], int]:
    """Attributes of PyTorch's own layers that follow a width: (path, name) -> share of a unit."""
    found: dict[tuple[str, str], int] = {}
    for (tensor, dim), count in entries(width).items():
        path, _, name = tensor.rpartition(".")
        module = model.get_submodule(path)
        for attribute, each in _of_layer(module, name, dim, count, tensor in width.counting):
            if isinstance(getattr(module, attribute, None), int):
                found[path, attribute] = each
    return found


def _of_layer(module: nn.Module, name: str, dim: int, count: int, counting: bool) -> list[tuple[str, int]]:
    """Attributes of a layer that follow one dimension of one of its tensors."""
    if isinstance(module, nn.modules.conv._ConvNd):
        if name != "weight":
            return []
        if counting:
            other = "out_channels" if module.transposed else "in_channels"
            own = "in_channels" if module.transposed else "out_channels"
            return [(own, count), (other, getattr(module, other) // module.groups), ("groups", 1)]
        if (dim == 0) != module.transposed:
            return [("out_channels", count * (module.groups if module.transposed else 1))]
        return [("in_channels", count * (1 if module.transposed else module.groups))]
    if isinstance(module, nn.Linear):
        return [("out_features" if dim == 0 else "in_features", count)] if name == "weight" else []
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        return [("num_features", count), ("num_channels", count)] + [("num_groups", 1)] * counting
    if isinstance(module, nn.Embedding):
        return [("embedding_dim", count)] * (dim == 1)
    if isinstance(module, nn.PReLU):
        return [("num_parameters", count)]
    if name == "weight" and hasattr(module, "nf") and hasattr(module, "nx"):  # transformers' Conv1D
        return [("nx" if dim == 0 else "nf", count)]
    if hasattr(module, "num_features") and hasattr(module, "running_mean"):
        return [("num_features", count)]
    return []


def variants(model: nn.Module, width: Width) -> list[dict[tuple[str, str], int]]:
    """Sets of attributes of other modules that may follow a width, to be tried in order; the last one is empty.

    A module that reshapes by its own numbers keeps them in attributes such as ``num_heads``: whole numbers of the right size
    and with a usual name.
    """
    shares = {run.each for _, _, run in width.places} | set(entries(width).values())
    taken = {path for path, _ in known_attributes(model, width)}
    paths = {tensor.rpartition(".")[0] for tensor in width.tensors} | width.reshaped
    counts, both, sizes = {}, {}, {}
    for path in sorted(paths - taken):
        for name, value in vars(model.get_submodule(path)).items():
            if type(value) is not int or not value or value % width.leaf.size:
                continue
            share = value // width.leaf.size
            if share == 1 and COUNTS.search(name) and not SIZES.search(name):
                counts[path, name] = 1
            elif share == 1 and (COUNTS.search(name) or SIZES.search(name)):
                both[path, name] = 1
            elif share in shares and SIZES.search(name):
                sizes[path, name] = share
    tried = ({**counts, **both}, counts, {**counts, **both, **sizes}, {})
    return [dict(one) for one in dict.fromkeys(tuple(one.items()) for one in tried)]


def as_sites(model: nn.Module, chosen: Sequence[tuple[Width, dict[tuple[str, str], int]]]) -> dict[Width, Site]:
    """Sites of widths.

    Args:
        model: The network.
        chosen: The widths, each with the attributes that follow it.
    """
    shared: dict[tuple[str, str], int] = {}
    for width, attributes in chosen:
        for key, each in attributes.items():
            shared[key] = shared.get(key, 0) + each * width.leaf.size
    names: dict[str, int] = {}
    found = {}
    for width, attributes in chosen:
        number = names[width.first] = names.get(width.first, -1) + 1
        rewritten = tuple(
            Attribute(path, name, each, getattr(model.get_submodule(path), name) - shared[path, name])
            for (path, name), each in attributes.items()
        )
        name = f"{width.first}:{number}" if number else width.first
        found[width] = Site(name, width.leaf.size, (), (), width.normalised, parts=width.parts(), attributes=rewritten)
    return found

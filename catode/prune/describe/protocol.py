"""The protocol by which an architecture describes what may be removed from it.

An architecture is any ``nn.Module`` with a method ``structures() -> list[Block]``. A `Block` is a residual branch, a
`Site` one hidden width inside it; both name modules by their dotted path. The pruner, the cutting and the complexity
polynomial use nothing else of an architecture, so a new one needs only this method (see
`catode.train.models.resnets` for convolutional and fully-connected examples). Where units are no plain channels of plain
layers, a site lists its `parts`: slices of any tensors. A block without ``shortcut_only()`` says what goes by its `addend`, or
by what is `absent`; one that is not `removable` only holds sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from catode.structures.description import CONSUMER, PRODUCER, Attribute, Block, Site, Slice

AFFINE, STATISTICS = ("weight", "bias"), ("running_mean", "running_var")


@runtime_checkable
class Prunable(Protocol):
    """An architecture that can be pruned."""

    def structures(self) -> list[Block]:
        """Residual branches in the order of the forward pass."""
        ...


def unwrapped(model: nn.Module) -> nn.Module:
    """The network that can be pruned: what ``torch.compile`` was given, or the model itself.

    Raises:
        ValueError: for a model without ``structures()``, or one that a wrapper for several processes or devices holds.
    """
    model = getattr(model, "_orig_mod", model)
    kind = type(model).__name__
    spread = (
        isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or "FullyShardedDataParallel" in kind
    )
    sharded = any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
    if spread or sharded:
        raise ValueError(
            f"`model` must be the plain network, whose parameters may change their shapes; got {'shards' if sharded else kind}. "
            "Use the network itself, and after backward() call pruner.group.join(model.parameters(), loss)."
        )
    for name, part in model.named_modules():
        if part._compiled_call_impl is not None or hasattr(part, "_orig_mod"):
            raise ValueError(
                f"`model` must be compiled as a whole, by torch.compile(model); got one whose {name or 'own call'} is compiled. "
                "Build the pruner, then call compiled = torch.compile(model) and train that."
            )
    if not isinstance(model, Prunable):
        raise ValueError(f"`model` must have a method structures(); got {kind}. See catode.prune.describe.protocol.")
    return model


def slices(model: nn.Module, site: Site) -> list[Slice]:
    """Every tensor in which the units of a site have entries, and where.

    Args:
        model: The network.
        site: One of its sites.

    Returns:
        The site's parts, but for those of branches that went; else producers' weights, biases and statistics along their first
        dimension, consumers' weights along their second.
    """
    if site.parts:
        return [part for part in site.parts if _stands(model, part.tensor)]
    found = []
    for name in site.producers:
        module = model.get_submodule(name)
        found += [
            Slice(f"{name}.{tensor}", 0, PRODUCER)
            for tensor in (*AFFINE, *STATISTICS)
            if getattr(module, tensor, None) is not None
        ]
    return found + [Slice(f"{name}.weight", 1, CONSUMER) for name in site.consumers]


def attributes(model: nn.Module, site: Site) -> list[Attribute]:
    """What a cut of a site's parts rewrites: what the site says, and the widths and groups of torch's own layers.

    Args:
        model: The network.
        site: One of its sites; of one without parts nothing is found.
    """
    if not site.parts:
        return []
    found = {(own.module, own.name): 0 for own in site.attributes}
    every, parts = [own for own in site.attributes if _stands(model, own.module)], slices(model, site)
    sizes: dict[tuple[str, str], int] = {}
    for part in {(p.tensor, p.dim, p.offset): p for p in parts}.values():
        module, name = owner(model, part.tensor)
        for width, each in _widths(module, name, part):
            if hasattr(module, width):
                key = part.tensor.rpartition(".")[0], width
                sizes[key] = sizes.get(key, 0) + each
                break
    for part in parts:
        module, name = owner(model, part.tensor)
        path = part.tensor.rpartition(".")[0]
        if isinstance(module, nn.modules.conv._ConvNd) and name == "weight" and module.groups > 1 and part.dim == 0:
            for width in ("groups", "in_channels", "out_channels"):
                sizes[path, width] = part.each * getattr(module, width) // module.weight.shape[0]
    return every + [Attribute(*key, each) for key, each in sizes.items() if key not in found]


def _stands(model: nn.Module, path: str) -> bool:
    """Whether a network has a module or tensor, which it loses with its branch."""
    here: object = model
    for name in path.split(".") if path else ():
        here = getattr(here, name, None)
    return here is not None


def _widths(module: nn.Module, name: str, part: Slice) -> list[tuple[str, int]]:
    """Attributes of torch's own layers that count the entries of a dimension of a tensor."""
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
        own = next((key for key in ("weight", "running_mean") if getattr(module, key, None) is not None), None)
        return [("num_features", part.each)] if name == own else []
    if name != "weight":
        return []
    if isinstance(module, nn.Linear):
        return [(("out_features", "in_features")[part.dim], part.each)]
    if isinstance(module, nn.modules.conv._ConvNd) and part.dim < 2 and module.groups == 1:
        return [(("out_channels", "in_channels")[part.dim != module.transposed], part.each)]
    return []


def tensor_of(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer of a name, as in the network's state dict.

    Raises:
        AttributeError: if there is none.
    """
    module, name = owner(model, name)
    found = getattr(module, name)
    if not isinstance(found, torch.Tensor):
        raise AttributeError(f"`{name}` is no tensor")
    return found


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and the tensor's name there.

    Args:
        model: The network.
        name: Name of the tensor, as in the network's state dict.
    """
    path, _, name = name.rpartition(".")
    return model.get_submodule(path), name


def branch(model: nn.Module, block: Block) -> dict[str, nn.Parameter]:
    """The parameters that go with a block's branch, by name; none of a block that is not removable."""
    if not block.removable:
        return {}
    if block.branch:
        every, found = dict(model.named_parameters(remove_duplicate=False)), {}
        for path in block.branch:
            found |= {n: p for n, p in every.items() if n == path or n.startswith(f"{path}.")}
        return found
    inside = model.get_submodule(block.name).named_parameters(prefix=block.name)
    return {n: p for n, p in inside if not any(n.startswith(f"{path}.") for path in block.fixed)}


def goes_with(block: Block, path: str) -> bool:
    """Whether a module or parameter goes with a block's branch."""
    if not block.removable:
        return False
    return within(path, *(block.branch or (block.name,))) and not within(path, *block.fixed)


def within(path: str, *roots: str) -> bool:
    """Whether a path is that of one of some modules, or of something inside them."""
    return any(not root or path == root or path.startswith(f"{root}.") for root in roots)


def gated_modules(blocks: Iterable[Block]) -> set[str]:
    """Paths of the modules that can carry a gate."""
    found = {block.reader or block.output for block in blocks if block.removable}
    for site in (site for block in blocks for site in block.sites):
        found |= {*site.consumers, *(p.tensor.rpartition(".")[0] for p in site.parts if p.role == CONSUMER)}
    return found


def before(model: nn.Module, blocks: Sequence[Block], number: int) -> list[nn.Module]:
    """Modules that hold earlier blocks' branches, and neither a block's own branch nor a later one."""
    later = [block.place for block in blocks[number:]]
    places = dict.fromkeys(block.place for block in blocks[:number] if block.removable)
    return [model.get_submodule(place) for place in places if not any(within(path, place) for path in later)]

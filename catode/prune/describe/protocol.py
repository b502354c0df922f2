"""The protocol by which an architecture describes what may be removed from it.

An architecture is any ``nn.Module`` with a method ``structures() -> list[Block]``. A `Block` is a residual branch, a
`Site` one hidden width inside it; both name modules by their dotted path. The pruner, the cutting and the complexity
polynomial use nothing else of an architecture, so a new one needs only this method (see
`catode.train.models.resnets` for convolutional and fully-connected examples).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

from catode.structures.description import CONSUMER, PRODUCER, Block, Site, Slice

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
        Producers' weights, biases and statistics along their first dimension, consumers' weights along their second.
    """
    found = []
    for name in site.producers:
        module = model.get_submodule(name)
        found += [
            Slice(f"{name}.{tensor}", 0, PRODUCER)
            for tensor in (*AFFINE, *STATISTICS)
            if getattr(module, tensor, None) is not None
        ]
    return found + [Slice(f"{name}.weight", 1, CONSUMER) for name in site.consumers]

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

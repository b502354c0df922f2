"""Description of an architecture's removable parts: residual branches, and the hidden widths inside them.

Everything is named by dotted paths of the network, so that nothing here needs PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

PRODUCER, CONSUMER = "producer", "consumer"


@dataclass(frozen=True)
class Slice:
    """The entries of one tensor that belong to the units of a site, along one of its dimensions.

    Args:
        tensor: Name of the parameter or buffer, as in the network's state dict.
        dim: Dimension along which the units lie.
        role: `PRODUCER`: the entries make the unit; `CONSUMER`: they read it, and carry its gate.
        offset: Index of the first unit's first entry.
        each: Entries of a unit, which follow each other: 1 for a channel, the head size for an attention head.
    """

    tensor: str
    dim: int
    role: str
    offset: int = 0
    each: int = 1

    def entries(self, units: ArrayLike) -> NDArray[np.int64]:
        """Indices along `dim` of the units at the given positions of the site, shape (len(units) * each,)."""
        first = self.offset + self.each * np.asarray(units, dtype=np.int64)
        return (first[:, None] + np.arange(self.each)).reshape(-1)


@dataclass(frozen=True)
class Site:
    """One hidden width of a residual branch; its units are removed one by one.

    Args:
        name: Name in logs, usually the path of the layer that computes the units.
        width: Number of units.
        producers: Paths of the modules whose *output* dimension is this width: the layer and its norm.
        consumers: Paths of the convolutions or linear layers whose *input* dimension is this width. Their input slices
            carry the unit gates.
        normalised: Whether the consumers' outputs go straight into batch norms. A constant shift of the units then
            has no effect, so that removing a unit means replacing it by its mean.
    """

    name: str
    width: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    normalised: bool = False


@dataclass(frozen=True)
class Block:
    """A residual branch that can be removed as a whole.

    The module at `name` must have a method ``shortcut_only() -> nn.Module``: what is left when its branch is gone.

    Args:
        name: Path of the block's module.
        output: Path of the branch's last module with an affine (a norm, or a linear or convolutional layer); the layer
            gate scales its weight and bias.
        sites: Hidden widths of the branch, in order.
        fixed: Paths inside the block that stay when the branch goes (a shortcut with weights).
    """

    name: str
    output: str
    sites: tuple[Site, ...]
    fixed: tuple[str, ...] = ()

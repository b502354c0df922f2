"""Description of an architecture's removable parts: residual branches, and the hidden widths inside them.

Everything is named by dotted paths of the network, so that nothing here needs PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

PRODUCER, CONSUMER, TIED = "producer", "consumer", "tied"


@dataclass(frozen=True)
class Slice:
    """The entries of one tensor that belong to the units of a site, along one of its dimensions.

    Args:
        tensor: Name of the parameter or buffer, as in the network's state dict.
        dim: Dimension along which the units lie.
        role: `PRODUCER`: the entries make the unit; `CONSUMER`: they read it, and carry its gate; `TIED`: they are computed
            with for every unit by itself, such as a norm's affine and statistics, depthwise filters, a LayerScale.
        offset: Index of the first unit's first entry, in the whole tensor, before anything was cut. The units of a slice
            follow each other; units of other sites, or what always stays, may come before and after them.
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
class Attribute:
    """A number that a module keeps about its width, which a cut rewrites: ``fixed + each * units that stay``, added up over sites.

    Args:
        module: Path of the module.
        name: Its attribute: ``out_channels``, ``in_features``, ``groups``, ``num_heads`` ...
        each: Times the units of the site.
        fixed: What no site has a share in.
    """

    module: str
    name: str
    each: int = 1
    fixed: int = 0


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
        parts: Every slice of the units, where they are no plain channels of plain layers; then `producers` and `consumers`
            are empty.
        attributes: What a cut rewrites beside the tensors, where `parts` are given.
        least: Fewest units that stay while the block stands. From 1 on the width cannot take its block along by losing its
            last unit; the block may still go as a whole. 0: the block goes with the last unit.
    """

    name: str
    width: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    normalised: bool = False
    parts: tuple[Slice, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    least: int = 0


@dataclass(frozen=True)
class Block:
    """A residual branch that can be removed as a whole, or a part of the network that only holds sites.

    Without `addend` or `absent`, the module at `name` must have a method ``shortcut_only() -> nn.Module``: what is left when
    its branch is gone.

    Args:
        name: Path of the block's module. With `addend` or `absent`, or if not `removable`: any name that no other block has.
        output: Path of the branch's last module with an affine (a norm, or a linear or convolutional layer); the layer
            gate scales its weight and bias, or what it returns if it has no parameters. Empty if not `removable`.
        reader: Path of the module whose forward pass reads the weight of `output` without calling it, as torch's own attention
            does, and returns a multiple of what it makes. Empty: `output` is called.
        sites: Hidden widths of the branch, in order.
        fixed: Paths inside the block that stay when the branch goes (a shortcut with weights).
        module: Path of the smallest module that holds the whole branch and the addition that ends it, where it has no
            ``shortcut_only()`` or several branches: the remainder of its own traced graph takes its place. Empty: `name`.
        addend: Name of the node of that module's traced graph which is added to the shortcut; it is what goes. The graph is
            that of `catode.prune.gated.remainder.trace`, which follows no submodule. Empty: the block has ``shortcut_only()``.
        absent: Instead of an `addend`, where `module` cannot be traced: paths of the branch's modules that `module` calls, and the
            number of things that each returns, 0 for a tensor. What takes their places returns a single 0, so that 0 is added
            to the shortcut; see `catode.prune.gated.absent`.
        branch: Paths of the modules and parameters that go with the branch, where there is an `addend`, or what is `absent`.
            Empty: everything inside `name` but what is `fixed`.
        removable: Whether the branch can go as a whole. If not, the block only holds sites, none of which may lose its last
            unit, and its layer counts as decided: kept.
    """

    name: str
    output: str
    sites: tuple[Site, ...]
    fixed: tuple[str, ...] = ()
    module: str = ""
    addend: str = ""
    absent: tuple[tuple[str, int], ...] = ()
    branch: tuple[str, ...] = ()
    reader: str = ""
    removable: bool = True

    @property
    def place(self) -> str:
        """Path of the module that holds the block; empty for the whole network."""
        return self.module or (self.name if self.removable and not self.absent else "")

"""What an architecture says of what may be removed from it: residual branches, and the hidden widths inside them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One hidden width of a residual branch; its units are removed one by one.

    Args:
        name: Name in logs, usually the path of the layer that computes the units.
        width: Number of units.
        producers: Paths of the modules whose *output* dimension is this width: the layer and its norm.
        consumers: Paths of the convolutions or linear layers whose *input* dimension is this width. Their input slices
            carry the unit gates.
        normalised: Whether the consumers' outputs go straight into batch norms. A constant shift of the units is then
            taken out again, so that removing a unit means replacing it by its mean.
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

"""Small gated networks as exact expected losses and projected ODEs, and bounds that put them under a comparison system."""

from catode.theory.networks.comparisons import (
    Comparison,
    benefit_comparison,
    layer_comparison,
    mirror_comparison,
    unit_comparison,
)
from catode.theory.networks.gated import GatedNetwork
from catode.theory.networks.structure import Structure, box_grid, box_starts, draw, usual_norm

__all__ = [
    "Comparison",
    "GatedNetwork",
    "Structure",
    "benefit_comparison",
    "box_grid",
    "box_starts",
    "draw",
    "layer_comparison",
    "mirror_comparison",
    "unit_comparison",
    "usual_norm",
]

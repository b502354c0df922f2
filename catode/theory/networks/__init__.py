"""Small gated networks as exact expected losses and projected ODEs, and bounds that put them under a comparison system."""

from catode.theory.networks.structure import Structure, box_grid, box_starts, draw, usual_norm

__all__ = ["Structure", "box_grid", "box_starts", "draw", "usual_norm"]

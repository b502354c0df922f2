"""Pictures of the theory: Axes in, Axes out, one palette."""

from catode.theory.plotting.plotting import (
    PALETTE,
    STYLE,
    basin_map,
    basin_slices,
    decisions,
    flow_portrait,
    house_style,
    legend_below,
    new_figure,
    phase_portrait,
    tolerance_over_batch_size,
    tolerance_over_risk,
    tolerances,
)

__all__ = [
    "PALETTE",
    "STYLE",
    "basin_map",
    "basin_slices",
    "decisions",
    "flow_portrait",
    "house_style",
    "legend_below",
    "new_figure",
    "phase_portrait",
    "tolerance_over_batch_size",
    "tolerance_over_risk",
    "tolerances",
]

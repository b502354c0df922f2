"""Pictures of the theory: Axes in, Axes out, one palette.

Every function draws on the Axes that it is given and returns it. Nothing here touches pyplot or any other global state,
so the functions work alike in notebooks, in scripts and inside a training run.
"""

from catode.theory.plotting.basins import basin_map, basin_slices
from catode.theory.plotting.portraits import flow_portrait, phase_portrait
from catode.theory.plotting.runs import decisions, tolerances
from catode.theory.plotting.style import PALETTE, STYLE, house_style, legend_below, new_figure
from catode.theory.plotting.tolerance import tolerance_over_batch_size, tolerance_over_risk

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

"""Domains of attraction on grids: a plane of starts, and slices of a box."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import to_rgba

from catode.theory.plotting.style import PALETTE, house_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from catode.theory.basins.grids import Basins


def basin_map(ax: Axes, basins: Basins, *, names: Sequence[str] = ("", ""), legend: bool = True) -> Axes:
    """Shade a plane of starts by the attractor that each one goes to; what is undecided stays white.

    Args:
        ax: Where to draw.
        basins: Labels on a grid along two coordinates; further ones must be held.
        names: Names of the two coordinates.
        legend: Whether to name the attractors and their shares below the Axes.

    Returns:
        `ax`.

    Raises:
        ValueError: if not exactly two coordinates vary.
    """
    axes = [axis for axis in basins.axes if axis.ndim]
    if len(axes) != 2:
        raise ValueError(f"`basins` must vary along two coordinates; got {len(axes)}. Use basin_slices for three.")
    colors = ("yellow", "sky", "orange", "green", "purple", "vermillion", "blue")
    shades = [to_rgba(PALETTE[colors[i % len(colors)]], 0.45) for i in range(len(basins.names))]
    image = np.ones((*basins.labels.shape, 4))
    for label, shade in enumerate(shades):
        image[basins.labels == label] = shade
    ax.pcolormesh(*axes, np.swapaxes(image, 0, 1), shading="nearest", zorder=0.4, rasterized=True)
    for label, shade in enumerate(shades):
        share = float((basins.labels == label).mean())
        if share:
            ax.fill_between([], [], color=shade, linewidth=0, label=f"{basins.names[label]} ({share:.0%})")
    undecided = float((basins.labels < 0).mean())
    if undecided:
        ax.fill_between([], [], facecolor="white", edgecolor="#444444", label=f"undecided ({undecided:.1%})")
    ax.grid(visible=False)
    ax.set_xlabel(names[0])
    ax.set_ylabel(names[1])
    if legend:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    return ax


def basin_slices(figure: Figure, basins: Basins, *, names: Sequence[str] = ("x", "y", "z"), count: int = 4) -> Figure:
    """Draw a three-dimensional map of basins as slices along its last coordinate, side by side.

    Args:
        figure: An empty figure.
        basins: Labels on a grid along three coordinates.
        names: Names of the coordinates.
        count: Number of slices, evenly spread.

    Returns:
        `figure`.

    Raises:
        ValueError: if not three coordinates vary.
    """
    if basins.labels.ndim != 3:
        raise ValueError(
            f"`basins` must vary along three coordinates; got {basins.labels.ndim}. Use basin_map for two."
        )
    with house_style():
        panels = np.atleast_1d(figure.subplots(1, count, sharey=True))
    *plane, last = basins.axes
    chosen = np.linspace(0, len(last) - 1, count).round().astype(int)
    for ax, i in zip(panels, chosen, strict=True):
        part = dataclasses.replace(basins, labels=basins.labels[..., i], axes=(*plane, np.asarray(last[i])))
        basin_map(ax, part, names=(names[0], names[1] if i == 0 else ""), legend=False)
        ax.set_title(f"{names[2]} = {last[i]:.3g}")
    return figure

"""The look of every picture: one palette, one style, figures outside pyplot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
    "grey": "#7F7F7F",
    "wine": "#882255",
    "indigo": "#332288",
}
"""The colour-blind-safe colours of Okabe and Ito, a grey for what is in the background, and two of Paul Tol's muted ones."""

STYLE: dict[str, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "figure.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
"""The house style, as matplotlib rc settings; `new_figure` and `house_style` apply it."""


@contextmanager
def house_style() -> Iterator[None]:
    """Apply `STYLE` inside a `with` block and restore the settings afterwards."""
    with mpl.rc_context(STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure with the Agg canvas, outside pyplot.

    Create its Axes inside `with house_style():`, since matplotlib reads the style when an Axes is made.

    Args:
        width: Inches.
        height: Inches.

    Returns:
        A figure with constrained layout; save it with `figure.savefig(path)`.
    """
    with house_style():
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
    return figure


def legend_below(ax: Axes, columns: int = 2) -> Axes:
    """Put the legend under the Axes, if there is anything to tell in it."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False)
    return ax

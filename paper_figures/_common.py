"""Parts of every figure: the drawing, its caption and its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from catode.theory.plotting import PALETTE, house_style

COLORS = 256
"""Colours of a PNG file; more make it larger, not clearer."""


@dataclass(frozen=True)
class Made:
    """One figure, or one table.

    Args:
        title: Its heading in the index.
        caption: What is seen, and from which runs.
        figure: The drawing; None for a table alone.
        table: Markdown under the caption; empty for none.
    """

    title: str
    caption: str
    figure: Figure | None
    table: str = ""

    def save(self, folder: Path, name: str, formats: Sequence[str]) -> list[Path]:
        """Write the drawing as `name` in each format; a table alone writes nothing."""
        if self.figure is None:
            return []
        paths = [folder / f"{name}.{ending}" for ending in formats]
        stamp = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
        for path, ending in zip(paths, formats, strict=True):
            with house_style():
                self.figure.savefig(path, metadata=stamp.get(ending))
            if ending == "png":
                with Image.open(path) as image:
                    look = {
                        "method": Image.Quantize.FASTOCTREE,
                        "dither": Image.Dither.NONE,
                    }  # others lose rare colours
                    image.convert("RGB").quantize(COLORS, **look).save(path, optimize=True)
        return paths


def letter(axes: Sequence[Axes]) -> None:
    """Put (a), (b), ... before the titles."""
    for ax, sign in zip(np.ravel(axes), "abcdefghijkl", strict=False):
        ax.set_title(f"({sign}) {ax.get_title(loc='left')}")


def percent(axis) -> None:
    """Show shares as percentages."""
    axis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))


def seeds_text(seeds: Sequence[int]) -> str:
    """Seeds in words."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def mark_mean(ax: Axes, x: Sequence[float], y: Sequence[float], *, color: str, marker: str, label: str) -> None:
    """Draw every seed small and faint, and their mean with bars from the least to the largest of the seeds."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    ax.plot(x, y, marker, color=color, markersize=3.5, alpha=0.45, markeredgewidth=0, zorder=2)
    look = {"color": color, "markeredgecolor": PALETTE["black"], "markeredgewidth": 0.7, "markersize": 8}
    bars = {"xerr": span(x), "yerr": span(y)} if len(x) > 1 else {}
    ax.errorbar(x.mean(), y.mean(), fmt=marker, elinewidth=1.2, capsize=2.5, zorder=3, label=label, **look, **bars)


def span(values: Sequence[float]) -> np.ndarray:
    """How far the least and the largest value lie below and above the mean, as error bars want it, shape (2, 1)."""
    values = np.asarray(values, dtype=float)
    return np.array([[values.mean() - values.min()], [values.max() - values.mean()]])

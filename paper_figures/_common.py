"""What every figure is made of: the drawing, its caption and its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from catode.theory.plotting import PALETTE, house_style


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
    """Draw every seed small and faint, and their mean with the standard deviations of both as bars."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    ax.plot(x, y, marker, color=color, markersize=3.5, alpha=0.45, markeredgewidth=0, zorder=2)
    spread = {"xerr": x.std(ddof=1), "yerr": y.std(ddof=1)} if len(x) > 1 else {}
    look = {"color": color, "markeredgecolor": PALETTE["black"], "markeredgewidth": 0.7, "markersize": 8}
    ax.errorbar(x.mean(), y.mean(), fmt=marker, elinewidth=1.2, capsize=2.5, zorder=3, label=label, **look, **spread)

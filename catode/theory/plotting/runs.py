"""The structures of a run: where they were decided, and how they stood to their tolerances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from catode.structures.fates import COLORS, FATES
from catode.theory.plotting.style import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def decisions(ax: Axes, rows: Sequence[dict[str, Any]]) -> Axes:
    """Draw where structures were decided: benefit over price against the keep probability, a colour for each fate.

    Args:
        ax: Where to draw.
        rows: Rows of a run's structures.csv with `benefit`, `price`, `keep_prob` and `fate`.

    Returns:
        `ax`.
    """
    window = -10.0, 100.0
    for fate in FATES:
        chosen = [row for row in rows if row["fate"] == fate and np.isfinite(row["benefit"]) and row["price"] > 0]
        if chosen:
            ratio = np.clip([row["benefit"] / row["price"] for row in chosen], *window)
            theta = [row["keep_prob"] for row in chosen]
            label = f"{fate.replace('_', ' ')} ({len(chosen)})"
            ax.scatter(ratio, theta, s=14, color=PALETTE[COLORS[fate]], alpha=0.7, linewidths=0, label=label)
    ax.axvline(1.0, color=PALETTE["grey"], linestyle="--", linewidth=1.2)
    ax.set_xscale("symlog", linthresh=1.0)
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlim(1.2 * window[0], 1.2 * window[1])
    ax.set_xlabel(f"benefit / price, cut at {window[0]:g} and {window[1]:g}")
    ax.set_ylabel("keep probability θ at the last check")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    return ax


def tolerances(ax: Axes, rows: Sequence[dict[str, Any]], anew: Sequence[float]) -> Axes:
    """Draw the keep probability of every structure against its tolerance; on and below the diagonal it may be removed.

    Args:
        ax: Where to draw.
        rows: Rows of a run's structures.csv, as in `decisions`.
        anew: The tolerance of each; those that are not positive, or not known, lie in the grey band on the left.

    Returns:
        `ax`.
    """
    x = np.asarray(anew, dtype=float)
    known, floor = x > 0.0, 1e-3
    ax.axvspan(floor / 3.0, floor, color=PALETTE["grey"], alpha=0.15, linewidth=0)
    line = np.geomspace(floor, 1.0, 100)
    ax.plot(line, line, color=PALETTE["black"], linewidth=1.2, label="θ = tolerance")
    x = np.where(known, np.maximum(x, floor), floor / 3.0**0.5)
    for fate in FATES:
        chosen = np.array([row["fate"] == fate for row in rows], dtype=bool)
        if chosen.any():
            theta = np.array([row["keep_prob"] for row in rows])[chosen]
            ax.scatter(x[chosen], theta, s=14, color=PALETTE[COLORS[fate]], alpha=0.7, linewidths=0, clip_on=False)
    ax.set_xscale("log")
    ax.set_xlim(floor / 3.0, 1.0)
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel(f"tolerance on θ (grey: none is safe, or unknown: {np.sum(~known)})")
    ax.set_ylabel("keep probability θ at the last check")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    return ax

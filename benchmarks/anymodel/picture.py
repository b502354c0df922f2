"""What went of each network: widths, heads and branches along its depth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.anymodel.table import read
from catode.theory.plotting import PALETTE, house_style
from catode.theory.plotting.style import new_figure

COLORS = {"branch": PALETTE["vermillion"], "width": PALETTE["blue"], "heads": PALETTE["green"]}
NAMES = {
    "branch": "branches",
    "width": "channels and hidden units",
    "heads": "attention heads",
}


def draw(records: Path) -> Figure:
    """The runs with gates, one panel for each.

    Args:
        records: Folder of the records.
    """
    runs = {name: run for name, run in read(records).items() if run["config"]["nu"] > 0}
    with house_style():
        figure = new_figure(11.0, 3.3 * len(runs) + 0.6)
        for ax, run in zip(figure.subplots(len(runs), 1, squeeze=False)[:, 0], runs.values(), strict=True):
            rows, result = run["parts"], run["result"]
            x = np.arange(len(rows))
            kept, total = (np.array([float(row[key]) for row in rows]) for key in ("kept", "total"))
            ax.bar(x, np.ones(len(rows)), width=0.8, color="#E3E3E3", edgecolor="#BDBDBD", linewidth=0.6, label="went")
            for kind, color in COLORS.items():
                own = np.array([row["kind"] == kind for row in rows])
                if own.any():
                    ax.bar(x[own], (kept / total)[own], width=0.8, color=color, label=f"{NAMES[kind]} left")
            for n, row in enumerate(rows):
                if row["kind"] != "branch":
                    ax.text(n, 1.02, f"{row['kept']}/{row['total']}", ha="center", va="bottom", fontsize=6, rotation=90)
            ax.set_xticks(x, [row["name"] for row in rows], rotation=90, fontsize=6)
            ax.set_xlim(-0.7, len(rows) - 0.3)
            ax.set_ylim(0, 1.35)
            ax.set_yticks([0, 0.5, 1.0], ["0", "½", "1"])
            ax.set_ylabel("share left")
            ax.grid(visible=False)
            share = result["macs"] / result["macs_dense"]
            ax.set_title(
                f"{run['config']['arch']}: {share:.1%} of the MACs, test accuracy {result['test_accuracy']:.1%}"
            )
        handles = {}
        for ax in figure.axes:
            handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    return figure

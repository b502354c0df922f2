"""The picture: heads, widths and branches that are left of every seed, and the training loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from catode.theory.plotting import PALETTE, house_style, new_figure

GAP = 0.12
WHOLE = 6.0  # length of a whole branch


def draw(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], every: int) -> Figure:
    """A panel for each seed and one of the loss.

    Args:
        pairs: Records of pruned and dense trainings.
        every: Steps over which the training loss was averaged.
    """
    figure = new_figure(3.1 * len(pairs) + 4.2, 3.9)
    with house_style():
        panels = figure.subplots(1, len(pairs) + 1, width_ratios=[3] * len(pairs) + [4])
        for ax, (pruned, _) in zip(panels, pairs, strict=False):
            _branches(ax, pruned)
        _losses(panels[-1], pairs, every)
    handles = [
        Rectangle((0, 0), 1, 1, color=PALETTE["blue"]),
        Rectangle((0, 0), 1, 1, color=PALETTE["green"]),
        Rectangle((0, 0), 1, 1, facecolor="white", edgecolor=PALETTE["grey"]),
        Rectangle((0, 0), 1, 1, facecolor="white", edgecolor=PALETTE["vermillion"], hatch="////"),
    ]
    names = ("heads left", "MLP units left", "removed", "branch removed as a whole")
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _branches(ax: Axes, record: dict[str, Any]) -> None:
    """Every branch from below to above, as the signal runs: cells for heads, a bar for units."""
    for place, branch in enumerate(record["branches"]):
        units, bottom = np.array(branch["units"]), place + GAP
        if not branch["stands"]:
            look = dict(facecolor="white", edgecolor=PALETTE["vermillion"], hatch="////", linewidth=0.8)
            ax.add_patch(Rectangle((0, bottom), WHOLE, 1 - 2 * GAP, **look))
        elif place % 2 == 0:
            cell = WHOLE / len(units)
            for head, kept in enumerate(units):
                look = dict(facecolor=PALETTE["blue"] if kept else "white", edgecolor=PALETTE["grey"], linewidth=0.8)
                ax.add_patch(Rectangle((head * cell, bottom), cell, 1 - 2 * GAP, **look))
        else:
            look = dict(facecolor="white", edgecolor=PALETTE["grey"], linewidth=0.8)
            ax.add_patch(Rectangle((0, bottom), WHOLE, 1 - 2 * GAP, **look))
            ax.add_patch(Rectangle((0, bottom), WHOLE * units.mean(), 1 - 2 * GAP, facecolor=PALETTE["green"]))
        ax.text(WHOLE + 0.15, place + 0.5, f"{int(units.sum())}", va="center", fontsize=8)
    number = len(record["branches"])
    labels = [f"{'attention' if place % 2 == 0 else 'MLP'} {place // 2 + 1}" for place in range(number)]
    ax.set_yticks(np.arange(number) + 0.5, labels)
    ax.set(xlim=(-0.1, WHOLE + 1.2), ylim=(0, number), xticks=[])
    ax.set_title(f"seed {record['seed']}: {100 * record['macs']:.0f} % of the MACs")
    ax.grid(False)
    for side in ("top", "right", "bottom"):
        ax.spines[side].set_visible(False)


def _losses(ax: Axes, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], every: int) -> None:
    """Training loss of every training, and when everything was decided."""
    for number, pair in enumerate(pairs):
        for record, name, color in zip(pair, ("pruned", "dense"), ("blue", "black"), strict=True):
            loss = record["training_loss"]
            steps = every * (np.arange(len(loss)) + 0.5)
            label = name if number == 0 else None
            ax.plot(steps, loss, color=PALETTE[color], lw=1.0, ls="-" if name == "pruned" else "--", label=label)
    recipe = pairs[0][0]["recipe"]
    for share, word in ((recipe["wait"], "thetas move"), (recipe["decide"], "all decided")):
        ax.axvline(share * recipe["steps"], color=PALETTE["grey"], lw=0.8, ls=":")
        ax.text(share * recipe["steps"], 0.97, f" {word}", transform=ax.get_xaxis_transform(), fontsize=8, va="top")
    ax.set(xlabel="step", ylabel="nats a character", ylim=(1.0, 3.5))
    ax.set_title("training loss")
    ax.legend(frameon=False, loc="center right")

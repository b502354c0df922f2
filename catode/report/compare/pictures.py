"""The picture of a comparison: regret rates, a reliability diagram and leads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from catode.decisions import shadow
from catode.report.compare.runs import Run, groups
from catode.report.compare.scores import BY_SIZE, Score, calibration, interval, rules
from catode.theory.plotting import PALETTE, house_style, legend_below, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase


def picture(runs: Sequence[Run], path: Path) -> None:
    """Save a picture of regret rates, reliability and leads, one row for each of the `groups`.

    Args:
        runs: Runs; those that are not shadow runs are ignored.
        path: File name, with a suffix that matplotlib can write.

    Raises:
        ValueError: if none of the runs is a shadow run.
    """
    watched = groups(runs)
    figure = new_figure(14.0, 5.2 * max(1, len(watched)))
    if len(watched) <= 1:
        draw(figure, runs)
    else:
        for part, (name, own) in zip(figure.subfigures(len(watched), 1), watched.items(), strict=True):
            draw(part, own)
            part.suptitle(name)
    figure.savefig(path)


def draw(figure: FigureBase, runs: Sequence[Run]) -> None:
    """Draw one row of `picture` into an empty figure or subfigure, three times as wide as high.

    Raises:
        ValueError: if none of the runs is a shadow run, or they are of several groups.
    """
    watched = groups(runs)
    if not watched:
        raise ValueError("`runs` must hold a shadow run; got none. Train with --shadow.")
    if len(watched) > 1:
        raise ValueError(f"`runs` must be of one group; got {'; '.join(watched)}. Draw each group by itself.")
    (runs,) = watched.values()
    scores = {rule: s for rule, s in rules(runs).items() if rule not in BY_SIZE and s.decisions}
    with house_style():
        axes = figure.subplots(1, 3, width_ratios=(1.0, 1.1, 1.1))
        _draw_regrets(axes[0], scores, runs[0].config["risk"], runs[0].config.get("tol"))
        _draw_reliability(axes[1], calibration(runs))
        _draw_leads(axes[2], scores, runs[0].config.get("tol"))


def _draw_regrets(ax: Axes, scores: dict[str, Score], risk: float, tol: float | None) -> None:
    for place, (rule, s) in enumerate(scores.items()):
        derived = rule.startswith(shadow.DERIVED) and (tol is None or rule != shadow.DERIVED)
        color = PALETTE["blue"] if derived else PALETTE["vermillion"]
        ax.plot([s.low, s.high], [place] * 2, color=color, linewidth=2)
        ax.plot(
            s.regrets / s.decisions, place, "o" if derived else "D", color=color, markersize=5, clip_on=False, zorder=3
        )
        if derived:
            stated = float(rule.partition("@")[2] or risk)
            ax.plot(stated, place, "|", color=PALETTE["black"], markersize=14, markeredgewidth=1.6)
    names = {rule: rule.replace("@", ", risk ") for rule in scores}
    names |= {shadow.DERIVED: f"{f'derived, risk {risk:g}' if tol is None else f'tolerance {tol:g}'} (the run's)"}
    ax.set_yticks(range(len(scores)), [f"{names[rule]}  (n={s.decisions})" for rule, s in scores.items()])
    ax.grid(visible=False, axis="y")
    ax.invert_yaxis()
    ax.set_xlim(0.0, 1.02 * max([0.5, *(s.high for s in scores.values())]))
    ax.set_xlabel("regret rate, 95 % interval")
    ax.set_title("Regrets by rule")
    if tol is None or any("@" in rule for rule in scores):
        ax.plot([], [], "|", color=PALETTE["black"], markersize=12, markeredgewidth=1.6, label="stated risk")
        legend_below(ax)


def _draw_reliability(ax: Axes, bins: Sequence[tuple[float, float, float, int, int, int]]) -> None:
    floor = 1e-3
    ax.plot([floor, 1], [floor, 1], color=PALETTE["grey"], linestyle="--", label="bound met exactly")
    for place, (low, high, mean, count, regrets, left) in enumerate(bins):
        mean, span = max(mean, floor), (interval(regrets, count)[0], interval(regrets + left, count)[1])
        ax.plot([max(low, floor), high], [span[1]] * 2, color=PALETTE["sky"], linewidth=3, solid_capstyle="butt")
        ax.plot([mean] * 2, [max(span[0], floor), span[1]], color=PALETTE["blue"], linewidth=1.6)
        look = ("o", regrets / count) if regrets else ("v", floor)
        ax.plot(mean, look[1], look[0], color=PALETTE["blue"], clip_on=False, zorder=3)
        middle = (max(low, floor) * high) ** 0.5
        note = ax.annotate(
            f"{regrets}/{count}", (middle, span[1]), (0, 4 + 12 * (place % 2)), textcoords="offset points", ha="center"
        )
        note.set(fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.2, "alpha": 0.8})
    ax.plot([], [], color=PALETTE["sky"], linewidth=3, label="upper end, open counted")
    ax.plot([], [], "o", color=PALETTE["blue"], label="observed (▾ none)")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(floor, 1.05)
    ax.set_ylim(floor, 1.6)
    ax.set_xlabel("predicted bound on the probability of an escape")
    ax.set_ylabel("share of regrets")
    ax.set_title("Reliability (regrets / structures)")
    legend_below(ax)


def _draw_leads(ax: Axes, scores: dict[str, Score], tol: float | None) -> None:
    styles = {shadow.DERIVED: (PALETTE["blue"], "-")}
    marks = ((PALETTE["vermillion"], ":"), (PALETTE["orange"], "--"), (PALETTE["purple"], "-."))
    styles |= {f"fixed {t:g}": mark for t, mark in zip(shadow.FIXED, marks, strict=True)}
    for rule, (color, line) in styles.items():
        leads = np.sort(scores[rule].leads) if rule in scores else []
        if len(leads):
            x, y = np.maximum(leads, 1), np.arange(1, len(leads) + 1) / len(leads)
            name = rule if tol is None or rule != shadow.DERIVED else f"tolerance {tol:g}"
            label = f"{name}: median {np.median(leads):.0f}"
            ax.step(np.r_[x[0], x], np.r_[0.0, y], color=color, linestyle=line, where="post", label=label)
    ax.set_xscale("log")
    ax.set_ylim(0.0, 1.02)
    ax.set_xlabel("steps from decision to θ = 0")
    ax.set_ylabel("share of confirmed decisions")
    ax.set_title("How early the rules decide")
    legend_below(ax)

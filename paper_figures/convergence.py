"""Where the keep probabilities go: their distribution over time, prior by prior."""

from __future__ import annotations

import numpy as np

from catode.report import history
from catode.structures.fates import REMOVED_WITH_BLOCK
from catode.theory.plotting import PALETTE, house_style, new_figure
from paper_figures._common import Made, letter, percent, seeds_text
from paper_figures.complexity import keep_probabilities
from paper_figures.runs import Data

NEEDS = ("priors", "shadow")
NEAR = 0.01
BANDS = (
    ("θ = 0", 0.0, "vermillion", 0.85),
    ("0 < θ ≤ 1/4", 0.25, "orange", 0.7),
    ("1/4 < θ ≤ 3/4", 0.75, "yellow", 0.7),
    ("3/4 < θ < 1", np.nextafter(1.0, 0.0), "sky", 0.7),
    ("θ = 1", 1.0, "blue", 0.85),
)


def make(data: Data) -> Made:
    """Draw a row for each prior."""
    priors = data.by_prior()
    figure = new_figure(10.0, 3.9 * len(priors) + 0.4)
    told = []
    with house_style():
        rows = figure.subplots(len(priors), 2, squeeze=False, sharey=True)
        for row, (prior, runs) in zip(rows, priors.items(), strict=True):
            for ax, kind in zip(row, ("layer", "unit"), strict=True):
                handles = _panel(ax, runs, kind)
                ax.set_title(f"{prior} prior: {kind}s")
            row[0].set_ylabel("share of the structures")
            told.append(_ends(prior, runs))
        letter(rows)
        figure.legend(handles=handles, loc="outside lower center", ncols=len(BANDS), frameon=False)
    ends = [trace["keep_prob"][-1] for run in data.reports("shadow") for trace in _own(run)]
    arrived = sum(theta in (0.0, 1.0) for theta in ends)
    caption = (
        "Shares of the structures by keep probability after every epoch, layers left and units right, with equal epochs, "
        "prices, start (θ = 0.9), and speed of θ at 1/2; what is at or below 0.01 with the upper limit of its benefit "
        "below its price is removed. By Theorem 3.1 the optimal network under the flattening prior is deterministic: what "
        "is in between should drain away to θ = 0 and θ = 1. Under the rivals θ never is exactly 0 or 1: "
        "what is drawn there was removed at 0.01, or rounds to 1. The dotted line is "
        f"the end of the deciding phase, where what is in between is rounded. {' '.join(told)} With the preset, which "
        f"starts at θ = 1, and nothing removed before θ = 0 ({len(data.reports('shadow'))} shadow runs), {arrived} of "
        f"{len(ends)} structures ({100 * arrived / len(ends):.1f} %) are at exactly 0 or 1 in the end, by themselves."
    )
    return Made("Keep probabilities drain to 0 and 1", caption, figure)


def _own(run: history.Run) -> list[history.Trace]:
    """Structures that were not removed with their site or block."""
    return [trace for trace in run.traces if trace.fate != REMOVED_WITH_BLOCK]


def _thetas(run: history.Run, kind: str) -> np.ndarray:
    """theta of all structures of one kind at the start and after every epoch, shape (epochs + 1, n)."""
    steps = np.r_[0.0, run.metrics["step"]]
    found = keep_probabilities(run, steps)
    return np.stack([theta for (_, site, _), theta in found.items() if (site == "") == (kind == "layer")], axis=1)


def _panel(ax, runs: list[history.Run], kind: str) -> list:
    theta = np.concatenate([_thetas(run, kind) for run in runs], axis=1)
    epoch = np.r_[0.0, runs[0].metrics["epoch"]]
    below = np.zeros(len(epoch))
    handles = []
    for label, top, color, alpha in BANDS:
        share = (theta <= top).mean(axis=1)
        handles.append(
            ax.fill_between(epoch, below, share, color=PALETTE[color], alpha=alpha, linewidth=0, label=label)
        )
        below = share
    ax.axvline(runs[0].config["decide_until"] * epoch[-1], color=PALETTE["black"], linestyle=":", linewidth=1.4)
    ax.set_xlim(0, epoch[-1])
    ax.set_ylim(0, 1)
    percent(ax.yaxis)
    ax.grid(visible=False)
    ax.set_xlabel("epoch")
    return handles


def _ends(prior: str, runs: list[history.Run]) -> str:
    """How many thetas arrived by themselves, in words."""
    theta = np.array([trace["keep_prob"][-1] for run in runs for trace in _own(run)])
    near = int(np.sum((theta <= NEAR) | (theta >= 1.0 - NEAR)))
    return (
        f"{prior.capitalize()} prior ({seeds_text([run.config['seed'] for run in runs])}): the last θ of {near} of "
        f"{theta.size} structures ({100 * near / theta.size:.1f} %) is within {NEAR:g} of 0 or 1, those left out that "
        "went with their site or block."
    )

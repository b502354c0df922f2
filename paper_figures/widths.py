"""Final hidden widths, block by block, over seeds."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from matplotlib.ticker import MaxNLocator

from benchmarks.cifar import task
from benchmarks.common import differences
from catode.report import history
from catode.theory.plotting import PALETTE, house_style, new_figure
from paper_figures._common import Made, letter, seeds_text
from paper_figures.runs import Data

NEEDS = ("pruned",)
COLORS = ("blue", "vermillion", "green", "purple", "orange", "sky")


def make(data: Data) -> Made:
    """Draw a panel for each data set and network; what was pruned with other settings gets another colour."""
    panels: dict[str, dict[str, list[history.Run]]] = defaultdict(lambda: defaultdict(list))
    for run in data.reports("pruned"):
        panels[f"{run.config['arch']}, {run.config['dataset']}"]["pruned"].append(run)
    for run in data.record_reports():
        dataset, arch, _ = task(run.config, run.env)
        panels[f"{arch}, {dataset}"][differences(run.config) or "preset"].append(run)
    figure = new_figure(8.0, 2.7 * len(panels))
    with house_style():
        axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for ax, (name, groups) in zip(axes, panels.items(), strict=True):
            _panel(ax, groups)
            ax.set_title(name)
        letter(axes)
    told = "; ".join(
        f"{name}: "
        + ", ".join(f"{variant} {seeds_text([r.config['seed'] for r in runs])}" for variant, runs in groups.items())
        for name, groups in panels.items()
    )
    caption = (
        "Channels left in every residual block, from the input (left) to the output. Grey bars are the widths before "
        "training, lines the means over seeds (a removed block counts as 0), dots single runs; a cross is a run in which "
        "the whole block was "
        "removed, so that its signal takes the shortcut. Runs of which a rule decided less than half are left out: they keep "
        f"nearly all. Runs ({told})."
    )
    return Made("Final widths over seeds", caption, figure)


def _panel(ax, groups: dict[str, list[history.Run]]) -> None:
    sites = [history.final_sites(run) for runs in groups.values() for run in runs]
    names = [_short(site.site or site.block) for site in sites[0]]
    total = [max(site.total or 0 for site in same) for same in zip(*sites, strict=True)]
    x = np.arange(len(names))
    ax.bar(x, total, width=0.86, color="#E9E9E9", label="before training", zorder=1)
    for number, (variant, runs) in enumerate(groups.items()):
        color = PALETTE[COLORS[number % len(COLORS)]]
        kept = np.array([[site.kept or 0 for site in history.final_sites(run)] for run in runs])
        alive = np.array([[site.alive for site in history.final_sites(run)] for run in runs])
        shift = (number - (len(groups) - 1) / 2) * 0.8 / len(groups)
        half = 0.36 / len(groups)
        mean = f"mean of {len(runs)} runs" if len(runs) > 1 else "one run"
        label = f"{variant}: {mean}" if len(groups) > 1 else mean
        ax.hlines(
            kept.mean(axis=0), x + shift - half, x + shift + half, color=color, linewidth=2.4, label=label, zorder=3
        )
        places = x + shift + np.linspace(-0.6, 0.6, len(runs))[:, None] * half if len(runs) > 1 else (x + shift)[None]
        places = np.broadcast_to(places, kept.shape)
        ax.plot(places[alive], kept[alive], "o", color=color, markersize=4, alpha=0.8, markeredgewidth=0, zorder=4)
        gone = {"color": color, "markersize": 6, "markeredgewidth": 1.6, "zorder": 4, "clip_on": False}
        if (
            not alive.all()
        ):  # an empty unclipped line has its extent at the corner of the figure, which upsets the layout
            ax.plot(places[~alive], kept[~alive], "x", **gone)
    ax.set_xticks(x, names, rotation=0 if len(names) <= 12 else 90)
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.set_ylim(0, 1.05 * max(total))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.grid(visible=False, axis="x")
    ax.set_xlabel("block")
    ax.set_ylabel("channels")
    ax.legend(loc="upper left")


def _short(site: str) -> str:
    """A site in few letters: the stage and number of its block, and its convolution where a block has two sites."""
    return site.removeprefix("layer").removesuffix(".conv1").replace(".conv2", " b")

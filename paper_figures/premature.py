"""Whether a tolerance set too large by hand costs anything: accuracy, size and regrets beside the derived one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.cifar import Record
from benchmarks.common import mean_interval, spread
from catode.decisions import shadow
from catode.report import compare
from catode.theory.plotting import PALETTE, house_style, new_figure
from paper_figures._common import Made, letter, percent, seeds_text
from paper_figures.runs import GROUPS, Data

NEEDS = ("pruned", "dense", "fixed", "shadow")
COLORS = {"derived": ("blue", "o"), "dense": ("black", "*")}
FEW = 10  # decisions; fewer give no useful interval
FIXED = (("orange", "s"), ("vermillion", "D"), ("purple", "^"))


def make(data: Data) -> Made:
    """Draw accuracy and MACs by tolerance over seeds, and regret rates of such rules in shadow runs."""
    groups = {f"fixed {change['tol']:g}": data.results(name) for name, change in GROUPS["fixed"].items()}
    looks = dict(zip(groups, FIXED, strict=False)) | COLORS
    groups = {"dense": data.results("dense"), "derived": data.results("pruned")} | groups
    common = set.intersection(*({record.config["seed"] for record in group} for group in groups.values()))
    groups = {name: [r for r in group if r.config["seed"] in common] for name, group in groups.items()}
    figure = new_figure(10.0, 4.2)
    with house_style():
        axes = figure.subplots(1, 3)
        _strip(axes[0], {name: _accuracies(group) for name, group in groups.items()}, looks)
        axes[0].set_ylabel("test accuracy")
        axes[0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.1f}%")
        axes[0].set_title("Accuracy")
        macs = {
            name: [r.result["macs"] / r.result["macs_dense"] for r in group]
            for name, group in groups.items()
            if name != "dense"
        }
        _strip(axes[1], macs, looks)
        axes[1].set_ylim(0, None)
        axes[1].set_ylabel("share of the dense network's")
        percent(axes[1].yaxis)
        axes[1].set_title("MACs left")
        shadows = data.own_shadows()
        scores = compare.rules(shadows)
        half = scores[f"fixed {max(shadow.FIXED):g}"]
        shown = {rule: scores[rule] for rule in (shadow.DERIVED, *(f"fixed {t:g}" for t in sorted(shadow.FIXED)))}
        shown = {rule: score for rule, score in shown.items() if score.decisions >= FEW}
        for place, (rule, score) in enumerate(shown.items()):
            color = PALETTE["blue" if rule == shadow.DERIVED else "orange"]
            axes[2].plot([place] * 2, [score.low, score.high], color=color, linewidth=2.5)
            axes[2].plot(place, score.regrets / score.decisions, "o", color=color, clip_on=False, zorder=3)
            text = f"{score.regrets} of\n{score.decisions}"
            note = axes[2].annotate(text, (place, score.high), (0, 4), textcoords="offset points", ha="center")
            note.set(fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
        axes[2].axhline(
            shadows[0].config["risk"], color=PALETTE["black"], linestyle=":", linewidth=1.4, label="stated risk"
        )
        axes[2].set_xticks(range(len(shown)), [rule.replace(" ", "\n") for rule in shown])
        axes[2].set_xlim(-0.6, len(shown) - 0.4)
        axes[2].set_ylim(0, 1.3 * max(score.high for score in shown.values()))
        percent(axes[2].yaxis)
        axes[2].set_ylabel("regret rate, 95 % interval")
        axes[2].set_title("Regrets in shadow runs")
        axes[2].grid(visible=False, axis="x")
        axes[2].legend(loc="upper left")
        letter(axes)
    told, harmed = [], False
    for name in [name for name in groups if name not in COLORS]:
        pairs = [(a, b) for a in groups[name] for b in groups["derived"] if a.config["seed"] == b.config["seed"]]
        difference = [a.accuracy - b.accuracy for a, b in pairs]
        harmed |= mean_interval(difference)[2] < 0.0
        sizes = [
            100 * np.mean([one.result["macs"] / one.result["macs_dense"] for one in side])
            for side in zip(*pairs, strict=True)
        ]
        told.append(
            f"{name}: accuracy {spread(difference, '{:+.2f}')}, points against the derived tolerance, paired by seed, "
            f"at {sizes[0]:.0f} % of the MACs in place of {sizes[1]:.0f} %"
        )
    seeds = [record.config["seed"] for record in groups["derived"]]
    caption = (
        "A fixed tolerance removes a structure as soon as its θ is at or below it and the upper limit of its benefit "
        f"is below its price, however noisy the way there. ResNet-20 on the digits, {seeds_text(seeds)}; bars are "
        f"means, dots seeds, and one test image is 0.28 points. {'; '.join(told)}. {_verdict(harmed)} "
        "Five seeds and larger tolerances are in "
        f"benchmarks/results/premature.md. (c) Regrets over {len(shadows)} shadow runs, in "
        "which nothing is removed before θ = 0, of the derived rule and of rules that look at θ alone: regrets of "
        f"decisions; the upper end counts what was left open as regrets; rules with fewer than {FEW} decisions are left "
        f"out. Hardly anything comes back in these runs: of all {half.decisions} θ that sank to one half {half.regrets} did, "
        "so there is little that haste could lose."
    )
    title = "Haste with a fixed tolerance: " + ("it costs accuracy" if harmed else "no harm seen on the digits")
    return Made(title, caption, figure)


def _verdict(harmed: bool) -> str:
    """What the intervals say, in a sentence."""
    if harmed:
        return "An interval below 0 is a loss."
    return "No interval lies below 0: these runs show no harm from haste, nor do they prove that there is none."


def _accuracies(group: Sequence[Record]) -> list[float]:
    return [record.result["test_accuracy"] for record in group]


def _strip(ax, values: dict[str, list[float]], looks: dict[str, tuple[str, str]]) -> None:
    """Draw every seed's value and the mean, a column for each name; lines join the runs of a seed."""
    for seed in zip(*values.values(), strict=False):
        ax.plot(range(len(seed)), seed, color="#C8C8C8", linewidth=0.9, zorder=1)
    for place, (name, own) in enumerate(values.items()):
        color, marker = looks[name]
        ax.plot([place] * len(own), own, marker, color=PALETTE[color], markersize=5.5, alpha=0.8, zorder=3)
        ax.hlines(np.mean(own), place - 0.28, place + 0.28, color=PALETTE[color], linewidth=2.4, zorder=2)
    ax.set_xticks(range(len(values)), [name.replace(" ", "\n") for name in values])
    ax.set_xlim(-0.6, len(values) - 0.4)
    ax.grid(visible=False, axis="x")

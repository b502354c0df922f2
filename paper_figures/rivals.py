"""Accuracy against MACs: pruned networks, the dense one, and what else one could do for the same MACs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.cifar import ALIKE, Record
from benchmarks.common import each, markdown, spread
from catode.theory.plotting import PALETTE, house_style, legend_below, new_figure
from paper_figures._common import (
    Made,
    letter,
    mark_mean,
    percent,
    seeds_text,
)
from paper_figures.runs import GROUPS, Data

NEEDS = ("pruned", "dense", "narrow", "fixed")
COLORS = {"pruned": "blue", "narrow": "vermillion", "fixed": "orange", "short": "purple", "rival": "green"}
MARKERS = "osv^DPX<>"
SMALLER = 0.9  # share of the dense MACs that a network must be below for its panel to be drawn


def make(data: Data) -> Made:
    """Draw a panel for each data set, network and number of epochs."""
    panels = {"digits, resnet20, 30 epochs": _digits(data)}
    for record in data.records:
        dataset, arch, epochs = record.task
        variant = record.variant.replace(f" {arch}", "")
        panels.setdefault(f"{dataset}, {arch}, {epochs} epochs", {}).setdefault(variant, []).append(record)
    drawn = {name: groups for name, groups in panels.items() if _least(groups) < SMALLER}
    columns = min(3, len(drawn))
    height = -(-len(drawn) // columns)
    figure = new_figure(4.7 * columns, 5.6 * height)
    with house_style():
        axes = figure.subplots(height, columns, squeeze=False)
        for ax, (name, groups) in zip(axes.flat, drawn.items(), strict=False):
            _panel(ax, name, groups)
        for ax in axes.flat[len(drawn) :]:
            ax.set_axis_off()
        letter(axes.flat[: len(drawn)])
    tables = [
        f"{name}:\n\n{_table(groups)}\n\n{_differences(groups)}".strip() for name, groups in panels.items() if groups
    ]
    told = "; ".join(
        f"{name}: "
        + ", ".join(
            f"{variant} {seeds_text(sorted(r.config['seed'] for r in group))}" for variant, group in groups.items()
        )
        for name, groups in panels.items()
    )
    caption = (
        "Test accuracy at the final epoch against the MACs of the final network, as a share of the dense one's. Large "
        "marks are means, bars go from the least to the largest of the seeds, small marks are single runs. The tables have the "
        "differences paired by seed with their 95 % t-intervals, not corrected for their number: one that holds 0 does not tell "
        "which network is better, and with two seeds it reaches nine standard deviations to either side. All networks of a "
        "panel were trained for the same number of epochs. Narrow: trained plainly with hidden widths scaled from the start. "
        "Fixed: one tolerance on θ set by hand. Digits: 30 epochs; one test image is 0.28 points. Tasks in which no network has "
        f"less than {100 * SMALLER:.0f} % of the dense MACs are in the tables alone. Runs ({told})."
    )
    return Made("Accuracy against MACs, with rivals", caption, figure, "\n\n".join(tables))


def _least(groups: dict[str, list[Record]]) -> float:
    """Least share of the dense network's MACs among the runs."""
    results = [record.result for group in groups.values() for record in group]
    return min(result["macs"] for result in results) / max(result["macs_dense"] for result in results)


def _differences(groups: dict[str, list[Record]]) -> str:
    """Pruned networks against the dense one and against rivals of about the same MACs, paired by seed, as Markdown."""
    rows = []
    for variant, group in groups.items():
        for rival, others in groups.items():
            if not variant.startswith("pruned") or rival.startswith("pruned"):
                continue
            a, b = (float(np.mean([r.result["macs"] for r in side])) for side in (group, others))
            pairs = [(x, y) for x in group for y in others if x.config["seed"] == y.config["seed"]]
            if pairs and (rival == "dense" or abs(a - b) <= ALIKE * b):
                rows.append([f"{variant} - {rival}", spread([x.accuracy - y.accuracy for x, y in pairs], "{:+.2f}")])
    return markdown(["difference, paired by seed", "accuracy, points [95 % t-interval]"], rows) if rows else ""


def _digits(data: Data) -> dict[str, list[Record]]:
    names = {"pruned": "pruned", "dense": "dense", "narrow": "narrow"}
    names |= {name: f"fixed tolerance {change['tol']:g}" for name, change in GROUPS["fixed"].items()}
    return {text: found for name, text in names.items() if (found := data.results(name))}


def _panel(ax, name: str, groups: dict[str, list[Record]]) -> None:
    dense = max(record.result["macs_dense"] for group in groups.values() for record in group)
    markers = {kind: iter(MARKERS) for kind in COLORS}  # a colour for each method, a marker for each of its settings
    for variant, group in sorted(groups.items(), key=lambda item: (not item[0].startswith("pruned"), item[0])):
        kind = "fixed" if variant.startswith("fixed") else group[0].kind
        color, marker = ("black", "*") if kind == "dense" else (COLORS[kind], next(markers[kind]))
        x, y = [r.result["macs"] / dense for r in group], [r.accuracy / 100 for r in group]
        mark_mean(ax, x, y, color=PALETTE[color], marker=marker, label=f"{variant}, n={len(group)}")
    ax.set_xlim(0, 1.06)
    percent(ax.xaxis)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.1f}%")
    ax.set_xlabel("MACs, share of the dense network's")
    ax.set_ylabel("test accuracy")
    ax.set_title(name)
    legend_below(ax, columns=1)


def _table(groups: dict[str, Sequence[Record]]) -> str:
    dense = max(record.result["macs_dense"] for group in groups.values() for record in group)
    params = max(record.result["params_dense"] for group in groups.values() for record in group)
    rows = [
        [
            variant,
            spread([r.accuracy for r in group]),
            each([100 * r.result["macs"] / dense for r in group], "{:.1f}"),
            each([100 * r.result["params"] / params for r in group], "{:.1f}"),
        ]
        for variant, group in groups.items()
    ]
    return markdown(["network", "accuracy % [95 % t-interval]", "MACs %", "parameters %"], rows)

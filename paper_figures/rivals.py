"""Accuracy against MACs: pruned networks, the dense one, and what else one could do for the same MACs."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks._common import markdown, spread
from benchmarks.cifar import Record
from catode.theory.plotting import PALETTE, house_style, legend_below, new_figure
from paper_figures._common import Made, letter, mark_mean, percent, seeds_text
from paper_figures.runs import GROUPS, Data

NEEDS = ("pruned", "dense", "narrow", "fixed")
COLORS = {"pruned": "blue", "narrow": "vermillion", "fixed": "orange", "short": "purple", "rival": "green"}
MARKERS = "osv^DPX<>"


def make(data: Data) -> Made:
    """Draw a panel for each data set, network and number of epochs."""
    panels = {"digits, resnet20, 30 epochs": _digits(data)}
    for record in data.records:
        dataset, arch, epochs = record.task
        variant = record.variant.replace(f" {arch}", "")
        panels.setdefault(f"{dataset}, {arch}, {epochs} epochs", {}).setdefault(variant, []).append(record)
    columns = min(2, len(panels))
    height = -(-len(panels) // columns)
    figure = new_figure(6.6 * columns, 5.6 * height)
    with house_style():
        axes = figure.subplots(height, columns, squeeze=False)
        for ax, (name, groups) in zip(axes.flat, panels.items(), strict=False):
            _panel(ax, name, groups)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        letter(axes.flat[: len(panels)])
    tables = [f"{name}:\n\n{_table(groups)}" for name, groups in panels.items() if groups]
    told = "; ".join(
        f"{name}: "
        + ", ".join(
            f"{variant} {seeds_text(sorted(r.config['seed'] for r in group))}" for variant, group in groups.items()
        )
        for name, groups in panels.items()
    )
    caption = (
        "Test accuracy at the final epoch against the MACs of the final network, as a share of the dense one's. Large "
        "marks are means, bars standard deviations over seeds, small marks single runs. All networks of a panel were "
        "trained for the same number of epochs. Narrow: trained plainly with hidden widths scaled from the start. "
        f"Fixed: one tolerance on θ set by hand. Digits: 30 epochs; one test image is 0.28 points. Runs ({told})."
    )
    return Made("Accuracy against MACs, with rivals", caption, figure, "\n\n".join(tables))


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
            len(group),
            spread([r.accuracy for r in group]),
            spread([100 * r.result["macs"] / dense for r in group], "{:.1f}"),
            spread([100 * r.result["params"] / params for r in group], "{:.1f}"),
        ]
        for variant, group in groups.items()
    ]
    return markdown(["network", "n", "accuracy %", "MACs %", "parameters %"], rows)

"""What nu, alpha and beta do: one varied at a time on the digits, and what the records on larger images hold."""

from __future__ import annotations

import numpy as np
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.cifar import Record
from benchmarks.common import each, markdown, spread
from catode.theory.plotting import PALETTE, house_style, new_figure
from paper_figures._common import Made, letter, percent, span
from paper_figures.runs import GROUPS, Data

NEEDS = ("pruned", "knobs")
KNOBS = {"nu": r"$\nu$", "alpha": r"$\alpha$", "beta": r"$\beta$"}
SHARES = {
    "MACs": ("macs", "macs_dense", "vermillion", "o", "-"),
    "parameters": ("params", "params_dense", "green", "s", "--"),
    "layers": ("layers_kept", "layers_total", "blue", "^", "-."),
    "units": ("units_kept", "units_total", "purple", "D", ":"),
}


def make(data: Data) -> Made:
    """Draw shares left and accuracy over each knob; the runs with preset settings are the common middle."""
    centre = data.results("pruned")
    found = {knob: _line(data, knob, centre) for knob in KNOBS}
    figure = new_figure(10.0, 5.8)
    with house_style():
        axes = figure.subplots(2, 3, sharey="row", sharex="col", height_ratios=(1.6, 1.0))
        for column, (knob, line) in zip(axes.T, found.items(), strict=True):
            values = list(line)
            for text, (part, whole, color, marker, style) in SHARES.items():
                shares = [[r.result[part] / r.result[whole] for r in runs] for runs in line.values()]
                _bars(column[0], values, shares, linestyle=style, marker=marker, color=PALETTE[color], label=text)
            accuracies = [[r.accuracy / 100 for r in runs] for runs in line.values()]
            _bars(column[1], values, accuracies, linestyle="-", marker="o", color=PALETTE["black"])
            if knob == "nu":
                column[1].set_xscale("log")
                column[1].xaxis.set_minor_locator(NullLocator())
            column[1].xaxis.set_major_locator(FixedLocator(values))
            column[1].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            column[0].set_ylim(0, 1)
            spare = ", ".join(f"{sign} = {centre[0].config[k]:g}" for k, sign in KNOBS.items() if k != knob)
            column[0].set_title(f"{KNOBS[knob]}  ({spare})")
            column[1].set_xlabel(KNOBS[knob] + (" (nats)" if knob == "nu" else ""))
        percent(axes[0, 0].yaxis)
        axes[0, 0].set_ylabel("share left")
        axes[1, 0].set_ylabel("test accuracy")
        axes[1, 0].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.1f}%")
        letter(axes[0])
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    sentences = [_sentence(knob, line) for knob, line in found.items()]
    caption = (
        "One knob varied at a time, ResNet-20 on the digits: `nu`, the nats that the whole network may cost; `alpha`, "
        "the price's share on layers (1) against units (0); `beta`, parameters (1) against MACs (0). "
        f"{_counts(found)}; one test image is 0.28 points. Differences of accuracy are paired by "
        "seed, with their 95 % t-intervals. " + " ".join(sentences)
    )
    return Made("Effect of nu, alpha and beta", caption, figure, _table(data, centre))


def _bars(ax, x: list[float], groups: list[list[float]], **look) -> None:
    """Draw means joined by a line, with bars from the least to the largest value where there are several."""
    ax.plot(x, [np.mean(values) for values in groups], clip_on=False, **look)
    for place, values in zip(x, groups, strict=True):
        if len(values) > 1:
            ax.errorbar(
                place, np.mean(values), span(values), color=look["color"], capsize=2.5, elinewidth=1.0, zorder=1.5
            )


def _line(data: Data, knob: str, centre: list[Record]) -> dict[float, list[Record]]:
    """Runs in which only one knob differs, by its value."""
    line = {centre[0].config[knob]: centre}
    for name, changed in GROUPS["knobs"].items():
        if set(changed) == {knob} and (runs := data.results(name)):
            line[runs[0].config[knob]] = runs
    return dict(sorted(line.items()))


def _counts(found: dict[str, dict[float, list[Record]]]) -> str:
    """How many runs there are to a point, in words."""
    groups = [runs for line in found.values() for runs in line.values()]
    text = "Points are means over the seeds of the table, bars go from the least to the largest"
    return text + ("; a point without bars is one run" if any(len(runs) == 1 for runs in groups) else "")


def _sentence(knob: str, line: dict[float, list[Record]]) -> str:
    """What a knob does from one end of its range to the other, from the measured runs."""
    low, high = min(line), max(line)
    parts = []
    for text, (part, whole, *_) in SHARES.items():
        a, b = (100 * np.mean([r.result[part] / r.result[whole] for r in line[end]]) for end in (low, high))
        parts.append(f"{text} {a:.0f} to {b:.0f} %")
    before = {r.config["seed"]: r for r in line[low]}
    change = [r.accuracy - before[r.config["seed"]].accuracy for r in line[high] if r.config["seed"] in before]
    told = spread(change, "{:+.2f}")
    return f"`{knob}` from {low:g} to {high:g}: left of the {', of the '.join(parts)}; accuracy {told}, points."


def _table(data: Data, centre: list[Record]) -> str:
    groups = {"digits, preset": centre}
    groups |= {
        f"digits, {name.replace('-', ' = ')}": found for name in GROUPS["knobs"] if (found := data.results(name))
    }
    for record in data.records:
        if record.kind == "pruned":
            groups.setdefault(f"{record.task[0]}, {record.variant}", []).append(record)
    rows = [
        [
            name,
            "/".join(f"{group[0].config[knob]:g}" for knob in KNOBS),
            ", ".join(str(r.config["seed"]) for r in group),
            *(
                each([100 * r.result[part] / r.result[whole] for r in group], "{:.1f}")
                for part, whole, *_ in list(SHARES.values())[:2]
            ),
            *(
                "/".join(str(r.result[part]) for r in group) + f" of {group[0].result[whole]}"
                for part, whole, *_ in list(SHARES.values())[2:]
            ),
            spread([r.accuracy for r in group]),
            each([100 * r.result["decided_by_rule"] for r in group], "{:.1f}"),
        ]
        for name, group in groups.items()
    ]
    return markdown(
        [
            "runs",
            "nu/alpha/beta",
            "seeds",
            "MACs %",
            "parameters %",
            "layers",
            "units",
            "accuracy % [95 % t-interval]",
            "decided by rule %",
        ],
        rows,
    )

"""Keep probabilities over a run, layers and units, coloured by what became of them."""

from __future__ import annotations

from matplotlib.ticker import MaxNLocator

from benchmarks.cifar import task
from benchmarks.common import differences
from catode.report import history
from catode.report.looks import LOOKS, fate_handle
from catode.report.pictures import theta_panel
from catode.theory.plotting import house_style, new_figure
from paper_figures._common import Made, letter, seeds_text
from paper_figures.runs import SHORT, Data

NEEDS = ("pruned",)


def make(data: Data) -> Made:
    """Draw one pruned run of each data set, a row each: of the records with gates on both kinds that which lost most layers.

    Records that were condensed to the last row of each structure have no path to draw and are left out.
    """
    first = {}
    records = [run for run in data.record_reports() if 0.0 < run.config["alpha"] < 1.0 and _has_paths(run)]
    records.sort(key=lambda run: run.result["layers_kept"] / run.result["layers_total"])
    for run in [*data.reports("pruned"), *records]:
        first.setdefault(task(run.config, run.env)[0], run)
    figure = new_figure(8.0, 3.0 * len(first) + 0.9)
    with house_style():
        rows = figure.subplots(len(first), 2, sharey=True, squeeze=False)
        for (dataset, run), row in zip(first.items(), rows, strict=True):
            for ax, kind in zip(row, ("layer", "unit"), strict=True):
                theta_panel(ax, run, kind)
                number = len(run.of(kind))
                ax.set_title(f"{dataset}: {number} {kind}s")
                ax.set_xlim(0, run.metrics["epoch"][-1])
                ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
                ax.set_xlabel("epoch")
            row[0].set_ylabel("keep probability θ")
        letter(rows)
        found = [trace.fate for run in first.values() for trace in run.traces]
        seen = [fate for fate in LOOKS if fate in found]
        handles = [fate_handle(fate, LOOKS[fate].text) for fate in seen]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    told = "; ".join(
        f"{run.config['arch']}, {dataset}{_other(run)}, {seeds_text([run.config['seed']])}: "
        + ", ".join(
            f"{sum(t.fate == fate for t in run.traces)} {fate}"
            for fate in seen
            if any(t.fate == fate for t in run.traces)
        )
        for dataset, run in first.items()
    )
    caption = (
        "Each line is the keep probability θ of one structure: whole residual blocks on the left, channels on the "
        "right. It rises while the loss that the structure saves exceeds its price, and sinks otherwise. A marker "
        "shows where a structure was removed from the network: above θ = 0 where θ had come below the tolerance "
        "derived for the structure. Records of which a rule decided less than half are left out: hardly a θ moves there. What "
        f"became of them ({told})."
    )
    return Made("Keep probabilities during training", caption, figure)


def _has_paths(run: history.Run) -> bool:
    """Whether both kinds have a structure that was recorded more than once."""
    return all(any(len(trace.fates) > 1 for trace in run.of(kind)) for kind in ("layer", "unit"))


def _other(run: history.Run) -> str:
    """Settings of a record that differ from its preset, in words; runs on the digits have those that the index states."""
    if run.config["dataset"] == SHORT["dataset"]:
        return ""
    notes = differences(run.config)
    return f", {notes}" if notes else ""

"""Expected against counted complexity: along training, and convolution by convolution at the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from catode.report import history
from catode.structures.complexity import Complexity
from catode.theory.plotting import PALETTE, house_style, new_figure
from catode.train import count, describe, load
from catode.train.loop import checkpoint
from paper_figures._common import Made, letter, percent, seeds_text
from paper_figures.runs import Data

NEEDS = ("pruned",)


@dataclass(frozen=True)
class Check:
    """Expected and counted complexity of one run.

    Args:
        steps: Training steps at the end of each epoch, shape (epochs,).
        expected: MACs and parameters of the whole network expected under theta, shape (epochs, 2).
        counted: The same of the network as it was cut by then, shape (epochs, 2).
        dense: The same of the whole network, shape (2,).
        layers: By convolution and linear layer, its MACs in the dense network, expected at the end, and counted at the end.
    """

    steps: NDArray
    expected: NDArray
    counted: NDArray
    dense: NDArray
    layers: dict[str, tuple[float, float, int]]


def keep_probabilities(run: history.Run, steps: NDArray) -> dict[tuple[str, str, str], NDArray]:
    """theta of every structure after some steps, as last recorded: 0 once it is gone, 1 once committed.

    Returns:
        By (block, site, index), site and index empty for a layer, shape (len(steps),).
    """
    layers = {trace.block: trace for trace in run.of("layer")}
    found = {}
    for trace in run.traces:
        recorded = trace["step"]
        place = np.searchsorted(recorded, steps, side="right") - 1
        theta = np.where(place >= 0, trace["keep_prob"][np.maximum(place, 0)], run.config["initial_keep_prob"])
        if not trace.removed or trace.removed_at is None:  # committed, or rounded up, and recorded no more
            theta = np.where(steps >= recorded[-1], 1.0, theta)
        gone = trace.gone_at(layers)
        if gone is not None:
            theta = np.where(steps >= gone, 0.0, theta)
        found[trace.block, trace.site, trace.index] = theta
    return found


def check(run: history.Run) -> Check:
    """Compare a run's polynomial with what is counted.

    Raises:
        ValueError: if expected and counted MACs or parameters differ at the end, in a layer or in all.
    """
    structure = checkpoint.read_structure(run.folder)
    model, example = checkpoint.fresh(structure), torch.zeros(1, *structure["image_shape"])
    whole = describe(model, model.structures(), example)
    steps = run.metrics["step"]
    known = keep_probabilities(run, steps)
    names = [(place["block"], place["site"], str(place["index"])) for place in whole.inventory.names()]
    theta = np.stack([known.get(name, np.ones(len(steps))) for name in names], axis=1)
    expected = np.array([[whole.macs(row), whole.params(row)] for row in theta])
    counted = np.stack([run.metrics["macs"], run.metrics["params"]], axis=1)

    compact = load(run.folder)
    total = count(compact, example)
    measured = _flops(compact, example)
    layers = {}
    for name in dict.fromkeys(term.name for term in whole.terms):
        if isinstance(model.get_submodule(name), (torch.nn.Conv2d, torch.nn.Linear)):
            terms = [term for term in whole.terms if term.name == name]
            own = Complexity(terms, whole.inventory)
            layers[name] = own.macs(np.ones(whole.size)), own.macs(theta[-1]), measured.get(name, 0)
    for name, (_, should, is_) in layers.items():
        if should != is_:
            raise ValueError(f"`{name}` must have the expected {should:g} MACs at the end; got {is_} in {run.folder}.")
    for what, should, values in (
        ("MACs", expected[-1, 0], (total.macs, counted[-1, 0])),
        ("parameters", expected[-1, 1], (total.params, counted[-1, 1])),
    ):
        if any(value != should for value in values):
            raise ValueError(
                f"the network must have the expected {should:g} {what} at the end; got {values} in {run.folder}."
            )
    dense = np.array([whole.macs(np.ones(whole.size)), whole.params(np.ones(whole.size))])
    return Check(steps, expected, counted, dense, layers)


def _flops(model: torch.nn.Module, example: torch.Tensor) -> dict[str, int]:
    """MACs of every module, counted by PyTorch while the network runs."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(example)
    root = type(model).__name__ + "."
    return {name.removeprefix(root): sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}


def make(data: Data) -> Made:
    """Draw the first seed; check every one."""
    runs = data.reports("pruned")
    checks = [check(run) for run in runs]
    first, run = checks[0], runs[0]
    figure = new_figure(10.0, 7.4)
    with house_style():
        grid = figure.add_gridspec(2, 2)
        axes = [figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, :])]
        epoch = np.r_[0.0, run.metrics["epoch"]]
        for i, (ax, what) in enumerate(zip(axes, ("MACs", "parameters"), strict=False)):
            for one in checks[1:]:
                ax.plot(
                    epoch, np.r_[1.0, one.expected[:, i] / one.dense[i]], color=PALETTE["blue"], alpha=0.25, linewidth=1
                )
                ax.plot(
                    epoch,
                    np.r_[1.0, one.counted[:, i] / one.dense[i]],
                    color=PALETTE["vermillion"],
                    alpha=0.25,
                    linewidth=1,
                    drawstyle="steps-post",
                )
            ax.plot(
                epoch,
                np.r_[1.0, first.counted[:, i] / first.dense[i]],
                color=PALETTE["vermillion"],
                drawstyle="steps-post",
                label="counted, network as it stands",
            )
            ax.plot(
                epoch,
                np.r_[1.0, first.expected[:, i] / first.dense[i]],
                "--",
                color=PALETTE["blue"],
                label="expected under θ",
            )
            ax.set_title(f"{what[0].upper()}{what[1:]} of the whole network")
            ax.set_xlabel("epoch")
            ax.set_xlim(0, epoch[-1])
            ax.set_ylim(0, 1.04)
            percent(ax.yaxis)
            ax.legend(loc="upper right")
        axes[0].set_ylabel("share of the dense network")
        ax = axes[2]
        values = np.array(list(first.layers.values())) / 1e3
        x = np.arange(len(values))
        ax.bar(x, values[:, 0], width=0.8, color="#E3E3E3", label="dense")
        ax.bar(
            x,
            values[:, 2],
            width=0.8,
            color=PALETTE["vermillion"],
            alpha=0.75,
            label="counted while the compact network runs",
        )
        ax.plot(
            x,
            values[:, 1],
            "D",
            color=PALETTE["blue"],
            markeredgecolor="white",
            markersize=6,
            label="expected from the final θ",
        )
        ax.set_xticks(x, list(first.layers), rotation=60, ha="right", rotation_mode="anchor")
        ax.set_xlim(-0.7, len(x) - 0.3)
        ax.grid(visible=False, axis="x")
        ax.set_ylim(0, 1.22 * values.max())
        ax.set_ylabel("thousand MACs per image")
        ax.set_title("Convolution by convolution at the end")
        ax.legend(loc="upper left", ncols=3)
        letter(axes)
    gaps = [np.abs(one.expected - one.counted) / one.dense for one in checks]
    seeds = [r.config["seed"] for r in runs]
    caption = (
        "The polynomial in θ whose gradient is the price, against counts of the network as it physically stands. (a, "
        f"b) Along training, ResNet-20 on the digits, {seeds_text(seeds)} (the first drawn boldly): what is expected "
        f"runs ahead of what is removed, by at most {100 * max(g[:, 0].max() for g in gaps):.0f} % of the dense MACs "
        f"and {100 * max(g[:, 1].max() for g in gaps):.0f} % of the parameters, and both meet once everything is "
        "decided. (c) At the end every convolution and the classifier have exactly the MACs that the polynomial "
        f"gives, counted independently by torch.utils.flop_counter; all {sum(len(one.layers) for one in checks)} "
        f"layers of the {len(checks)} runs were compared, and whole networks in MACs and parameters, norms included. "
        "The figure is not made unless all are equal."
    )
    return Made("Expected against counted complexity", caption, figure)

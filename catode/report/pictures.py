"""The pictures of a run's report: accuracy, keep probabilities, final structure, complexity.

Each function returns None if the run has nothing to draw. The phase portrait is in `catode.report.phase`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.ticker import MaxNLocator, PercentFormatter

from catode.report.history import Run, SiteWidth, final_sites
from catode.report.looks import EDGE, KIND_TITLES, LOOKS, Picture, fate_legend
from catode.structures.fates import FATES, REMOVED, UNDECIDED
from catode.theory.plotting import PALETTE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["accuracy_picture", "complexity_picture", "structure_picture", "theta_panel", "theta_picture"]


HELD_OUT = ("validation", "test")
UNEVEN = 12
"""Ratio of the largest width to the smallest from which widths are drawn as shares of themselves."""
"""What the accuracy of every epoch may be measured on: validation images, or test images before 0.2."""
_CAPTIONS = {
    "validation": "Every epoch's accuracy is on the validation images; the test images were read once, after the last epoch.",
    "test": "The result of the run is the last test accuracy, not the best.",
    None: "All training images were trained on, none held out for validation; the test images were read once, at the end.",
}


def accuracy_picture(run: Run) -> Picture | None:
    """Accuracy and loss by epoch, with the images that they are measured on."""
    metrics = run.metrics
    if not metrics["step"].size:
        return None
    figure = new_figure(10.0, 3.8)
    left, right = figure.subplots(1, 2)
    epoch = run.epochs(metrics["step"])
    marker = "o" if epoch.size <= 3 else None
    left.plot(epoch, metrics["train_accuracy"], color=PALETTE["sky"], marker=marker, label="training images")
    shown = next((name for name in HELD_OUT if f"{name}_accuracy" in metrics), None)
    if shown is not None:
        accuracy = metrics[f"{shown}_accuracy"]
        left.plot(epoch, accuracy, color=PALETTE["blue"], marker=marker, label=f"{shown} images")
    left.set_title("Accuracy")
    left.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    left.legend(loc="lower right")
    validated = "validation_loss" in metrics
    losses = {"training": metrics["loss"], **({"validation": metrics["validation_loss"]} if validated else {})}
    for name, loss in losses.items():
        colour = PALETTE["sky" if name == "training" and validated else "blue"]
        right.plot(epoch, loss, color=colour, marker=marker, label=f"{name} images")
    right.set_title("Loss" if validated else "Training loss")
    if validated:
        right.legend(loc="upper right")
    right.set_ylabel("nats per image")
    every = np.concatenate(list(losses.values()))
    if (every > 0).all() and every.max() > 20 * every.min():
        right.set_yscale("log")
    for ax in (left, right):
        _epoch_axis(ax, run)
    caption = (
        "Share of the images that are classified correctly, and loss, after every pass "
        "over the training images (epoch). Training values are measured while the network still changes and, in "
        "a run with gates, while structures are switched on and off at random, so training accuracy may be below "
        f"that on other images. {_CAPTIONS[shown]}"
    )
    return Picture("accuracy", "Accuracy and loss", caption, figure)


def _epoch_axis(ax: Axes, run: Run) -> None:
    ax.set_xlabel("epoch" if run.metrics["step"].size else "step")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if run.metrics["step"].size:
        ax.set_xlim(0.0, float(run.epochs(run.metrics["step"])[-1]))


def theta_picture(run: Run) -> Picture | None:
    """Keep probabilities by epoch, layers and units side by side."""
    if not run.traces:
        return None
    kinds = [kind for kind in KIND_TITLES if run.of(kind)]
    figure = new_figure(10.0, 4.6)
    for ax, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        theta_panel(ax, run, kind)
        _epoch_axis(ax, run)
    figure.axes[0].set_ylabel("keep probability θ")
    fate_legend(figure, run.traces)
    meaning = (
        "The method removes structures before θ reaches 0: below its tolerance θ will reach 0, up to the stated risk."
    )
    if run.config.get("tol") is not None:
        meaning = f"The tolerance was fixed at {run.config['tol']} in this run; no risk is guaranteed for it."
    caption = (
        "Each line is one structure that training may remove: a whole residual block (left) or a single channel "
        "inside one (right). Its height is the probability θ with which the structure is switched on: 1 is always, "
        "0 is never. Training increases θ where the structure lowers the loss by more than its price, and "
        "decreases it otherwise. The colour shows the structure's fate, and a marker shows "
        f"where a line ends because the structure was removed. {meaning}"
    )
    if len(kinds) == 1:
        caption = caption.replace(" (left)", "").replace(" (right)", "")
        caption += f" Only {kinds[0]}s had gates in this run."
    return Picture("theta", "Keep probabilities during training", caption, figure)


def theta_panel(ax: Axes, run: Run, kind: str) -> None:
    """Draw the keep probabilities of one kind of structure by epoch, coloured by fate."""
    traces = run.of(kind)
    alpha = float(np.clip(5.0 / math.sqrt(len(traces)), 0.2, 0.9))
    end = run.epochs(np.array([np.inf]))
    gone = {
        layer.block: run.epochs(layer["step"])[layer.removed_at]
        for layer in run.of("layer")
        if layer.removed_at is not None
    }
    few = len(traces) <= 40
    for fate in sorted(FATES, key=lambda fate: fate in REMOVED):  # the removed are drawn over the kept
        look, lines, ends = LOOKS[fate], [], []
        for trace in traces:
            if trace.fate != fate:
                continue
            x, y = run.epochs(trace["step"][trace.rows]), trace["keep_prob"][trace.rows]
            if fate != UNDECIDED and not trace.removed:  # from then on its gate is fixed at 1 and not recorded
                x, y = np.r_[x, x[-1], end], np.r_[y, 1.0, 1.0]
            elif trace.removed_at is not None:
                ends.append((x[-1], y[-1]))
            elif trace.removed and trace.block in gone:  # kept, later removed with its block
                x, y = np.r_[x, x[-1], gone[trace.block]], np.r_[y, 1.0, 1.0]
                ends.append((x[-1], y[-1]))
            lines.append(np.column_stack([x, y]))
        width = 1.6 if few else 1.0
        ax.add_collection(
            LineCollection(lines, colors=look.color, alpha=alpha, linewidths=width, rasterized=True, clip_on=False)
        )
        if ends:
            ax.scatter(
                *np.array(ends).T,
                s=26 if few else 14,
                color=look.color,
                marker=look.marker,
                alpha=max(alpha, 0.6),
                linewidths=0.3,
                edgecolors=EDGE,
                zorder=3,
                clip_on=False,
                rasterized=True,
            )
    ax.set_ylim(-0.02, 1.02)
    ax.set_title(f"{KIND_TITLES[kind]}: {len(traces)}")


def structure_picture(run: Run) -> Picture | None:
    """Final width of every site and block."""
    if not run.traces:
        return None
    sites = final_sites(run)
    sized = [site for site in sites if site.total is not None]
    if sized and len(sized) < len(sites):
        sites = [
            site if site.total is not None else SiteWidth(site.block, site.site, 0, 0, site.alive) for site in sites
        ]
    one_each = len({site.block for site in sites}) == len(sites)
    traced = any(":" in site.block for site in sites)  # named by an addition, which says less than the width's module
    labels = [site.block if (one_each and not traced) or not site.site else site.site for site in sites]
    total = np.array([1 if site.total is None else site.total for site in sites])
    kept = np.array([int(site.alive) if site.kept is None else site.kept for site in sites])

    figure = new_figure(float(np.clip(1.5 + 0.42 * len(sites), 7.0, 15.0)), 4.2)
    ax = figure.subplots()
    x = np.arange(len(sites))
    shares = bool(sized) and total.max() > UNEVEN * total[total > 0].min()
    whole = np.where(shares, np.maximum(total, 1), 1)
    total, kept = total / whole, kept / whole
    dead = np.array([not site.alive for site in sites])
    ax.bar(x, total, width=0.75, color="#E3E3E3", edgecolor="#BDBDBD", linewidth=0.8, label="at the start")
    ax.bar(x, kept, width=0.75, color=PALETTE["blue"], label="at the end")
    if dead.any():
        ax.bar(
            x[dead],
            total[dead],
            width=0.75,
            color="#F6DDCD",
            edgecolor=PALETTE["vermillion"],
            hatch="///",
            linewidth=0.8,
            label="whole block removed",
        )
    crowded = len(sites) > (12 if shares else 26)
    if sized:
        offset = 0.012 * float(total.max())
        for position, site in zip(x, sites, strict=True):
            if site.total:
                text = f"{site.kept}" if crowded and not shares else f"{site.kept}/{site.total}"
                text = text if site.alive else "out"
                ax.text(
                    position,
                    total[position] + offset,
                    text,
                    ha="center",
                    va="bottom",
                    fontsize=7 if crowded else 8,
                    rotation=90 if crowded else 0,
                )
        ax.set_ylabel("share of the width" if shares else "channels")
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=not shares))
        ax.set_ylim(0, float(total.max()) * (1.3 if crowded and shares else 1.1))
    else:
        ax.set_ylabel("block in the network")
        ax.set_yticks([0, 1], ["no", "yes"])
    longest = max(len(label) for label in labels)
    steep = longest * len(labels) > 85
    ax.set_xticks(
        x,
        labels,
        rotation=90 if crowded else 40 if steep else 0,
        ha="right" if steep and not crowded else "center",
        rotation_mode="anchor" if steep and not crowded else "default",
    )
    ax.tick_params(axis="x", labelsize=7 if crowded else 9)
    ax.set_xlim(-0.7, len(sites) - 0.3)
    ax.grid(visible=False, axis="x")
    blocks = {site.block: site.alive for site in sites}
    counts = run.result.get("layers_kept", sum(blocks.values())), run.result.get("layers_total", len(blocks))
    ax.set_title(f"Blocks left: {counts[0]} of {counts[1]}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    caption = (
        "The final network, from its input (left) to its output (right), and what lies in no residual block at the end. Grey is "
        "a hidden width before training, blue the channels, units or attention heads that remain. A hatched bar is a block "
        "that was removed as a whole: only its shortcut remains."
    )
    return Picture("structure", "Final widths and layers", caption, figure)


def complexity_picture(run: Run) -> Picture | None:
    """Expected complexity, and counted MACs and parameters, by epoch."""
    metrics, result = run.metrics, run.result
    if not run.traces or not metrics["step"].size:
        return None
    figure = new_figure(8.6, 4.2)
    ax = figure.subplots()
    epoch = run.epochs(metrics["step"])
    curves = [("expected, removable part (J)", metrics["expected_complexity"], PALETTE["blue"], "-", "o")]
    for name, text, color, style in (
        ("macs", "counted MACs", PALETTE["vermillion"], "-"),
        ("params", "counted parameters", PALETTE["green"], "--"),
    ):
        dense = result.get(f"{name}_dense")
        if dense:
            curves.append((text, metrics[name] / dense, color, style, None))
    for text, values, color, style, marker in curves:
        if np.isfinite(values).any():
            last = values[np.isfinite(values)][-1]
            every = max(1, epoch.size // 15)
            x = epoch
            if marker is None and epoch[0] > 0:  # at the start the counts are those of the dense network
                x, values = np.r_[0.0, epoch], np.r_[1.0, values]
            ax.plot(
                x,
                values,
                color=color,
                linestyle=style,
                marker=marker,
                markersize=4,
                markevery=every,
                label=f"{text}: {100 * last:.1f} % at the end",
            )
    ax.set_ylim(0.0, 1.05)
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    ax.set_ylabel("share of the dense network")
    _epoch_axis(ax, run)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    beta = run.config.get("beta")
    counted = "the measured step time" if run.config.get("cost") == "latency" else "operations"
    mixture = (
        f" (here β = {beta}: 0 counts {counted} alone, 1 parameters alone)" if isinstance(beta, (int, float)) else ""
    )
    caption = (
        "The index J that training minimises is computed from the keep probabilities and covers only what can be "
        f"removed{mixture}. The counts are those of the whole network at that step: "
        "multiply-accumulate operations (MACs) for one image, and parameters. They fall in steps, each time "
        "structures are removed. Once all structures are decided, J and the counts describe the same network; they then "
        "differ by the parts that cannot be removed (first layer, shortcuts, classifier), which are in "
        f"the counts and not in J, and by the weighting of {counted} against parameters."
    )
    return Picture("complexity", "Expected against actual complexity", caption, figure)

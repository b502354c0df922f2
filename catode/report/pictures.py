"""The pictures of a run's report, each with its title and the caption that explains it.

A maker of a picture returns None for a run that has nothing to draw for it. To name or draw a state otherwise, edit `LOOKS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from catode.report.history import SYSTEM_COLUMNS, Run, SiteWidth, Trace, comparison_system, final_sites
from catode.theory.plotting import PALETTE, new_figure, phase_portrait
from catode.theory.systems import BenefitSystem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "LOOKS",
    "Look",
    "Picture",
    "accuracy_picture",
    "complexity_picture",
    "phase_picture",
    "structure_picture",
    "theta_panel",
    "theta_picture",
]

MAX_PATHS = 30


@dataclass(frozen=True)
class Look:
    """How a state is named and drawn; the marker at the removal spares colour being the only sign."""

    text: str
    color: str
    marker: str


LOOKS = {
    "committed": Look("kept (committed)", PALETTE["blue"], "^"),
    "undecided": Look("still undecided", PALETTE["grey"], "."),
    "pruned_tolerance": Look("removed: reached its tolerance", PALETTE["vermillion"], "v"),
    "pruned_zero": Look("removed: reached θ = 0", PALETTE["orange"], "o"),
    "promoted": Look("removed: went with its site or block", PALETTE["purple"], "D"),
    "forced": Look("not decided, rounded at the end (forced)", PALETTE["black"], "s"),
}
_OWN_STATES = ("pruned_tolerance", "pruned_zero")
_KINDS = {"layer": "Layers (whole residual blocks)", "unit": "Units (channels inside a block)"}


@dataclass(frozen=True)
class Picture:
    """A figure with what the report says around it."""

    name: str
    title: str
    caption: str
    figure: Figure


def accuracy_picture(run: Run) -> Picture | None:
    """Accuracy and training loss by epoch."""
    metrics = run.metrics
    if not metrics["step"].size:
        return None
    figure = new_figure(10.0, 3.8)
    left, right = figure.subplots(1, 2)
    epoch = run.epochs(metrics["step"])
    marker = "o" if epoch.size <= 3 else None
    left.plot(epoch, metrics["train_accuracy"], color=PALETTE["sky"], marker=marker, label="training images")
    left.plot(epoch, metrics["test_accuracy"], color=PALETTE["blue"], marker=marker, label="test images")
    left.set_title("Accuracy")
    left.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    left.legend(loc="lower right")
    right.plot(epoch, metrics["loss"], color=PALETTE["blue"], marker=marker)
    right.set_title("Training loss")
    right.set_ylabel("nats per image")
    if (metrics["loss"] > 0).all() and metrics["loss"].max() > 20 * metrics["loss"].min():
        right.set_yscale("log")
    for ax in (left, right):
        _epoch_axis(ax, run)
    caption = (
        "Share of the images that are classified correctly, and the loss that training lowers, after every pass "
        "over the training images (epoch). Training figures are measured while the network still changes and, in "
        "a run with gates, while structures are switched on and off at random, so they may lie below the test "
        "figures. The number that counts is the last test accuracy, not the best."
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
    kinds = [kind for kind in _KINDS if run.of(kind)]
    figure = new_figure(10.0, 4.6)
    for ax, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        theta_panel(ax, run, kind)
        _epoch_axis(ax, run)
    figure.axes[0].set_ylabel("keep probability θ")
    _state_legend(figure, run.traces)
    meaning = (
        "Removal above θ = 0 is the point of the method: below its tolerance a structure is on its way out, up to the "
        "stated risk, and need not be waited for."
    )
    if run.config.get("tol") is not None:
        meaning = f"The tolerance was fixed by hand at {run.config['tol']} in this run; no risk is guaranteed for it."
    caption = (
        "Each line is one structure that training may remove: a whole residual block (left) or a single channel "
        "inside one (right). Its height is the probability θ with which the structure is switched on. θ = 1 means "
        "certainly in the network, θ = 0 certainly out; training moves θ up where the structure lowers the loss "
        "by more than it costs, and down otherwise. Colour tells how the structure ended, and a marker shows "
        f"where a line stops because the structure was physically removed. {meaning}"
    )
    if len(kinds) == 1:
        caption = caption.replace(" (left)", "").replace(" (right)", "")
        caption += f" Only {kinds[0]}s had gates in this run."
    return Picture("theta", "Keep probabilities during training", caption, figure)


def theta_panel(ax: Axes, run: Run, kind: str) -> None:
    """Draw the keep probabilities of one kind of structure against the epoch, coloured by what became of them."""
    traces = run.of(kind)
    alpha = float(np.clip(5.0 / math.sqrt(len(traces)), 0.2, 0.9))
    end = run.epochs(np.array([np.inf]))
    gone = {
        layer.block: run.epochs(layer["step"])[layer.removed_at]
        for layer in run.of("layer")
        if layer.removed_at is not None
    }
    few = len(traces) <= 40
    for state, look in LOOKS.items():  # the removed are drawn over the kept
        lines, ends = [], []
        for trace in traces:
            if trace.state != state:
                continue
            x, y = run.epochs(trace["step"][trace.rows]), trace["keep_prob"][trace.rows]
            if state == "committed":  # its gate is fixed at 1 from then on, and no more recorded
                x, y = np.r_[x, x[-1], end], np.r_[y, 1.0, 1.0]
            elif trace.removed_at is not None:
                ends.append((x[-1], y[-1]))
            elif trace.removed and trace.block in gone:  # committed once, then gone with its block
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
                linewidths=0,
                zorder=3,
                clip_on=False,
                rasterized=True,
            )
    ax.set_ylim(-0.02, 1.02)
    ax.set_title(f"{_KINDS[kind]}: {len(traces)}")


def _state_legend(figure: Figure, traces: list[Trace], extra: Sequence[Any] = ()) -> None:
    """Put one legend below the panels: the states that occur, with their numbers by kind."""
    handles = []
    for state, look in LOOKS.items():
        counts = [(kind, sum(trace.state == state and trace.kind == kind for trace in traces)) for kind in _KINDS]
        text = ", ".join(f"{count} {kind}{'s' if count != 1 else ''}" for kind, count in counts if count)
        if text:
            marker = None if state in ("committed", "undecided") else look.marker
            handles.append(Line2D([], [], color=look.color, marker=marker, markersize=5, label=f"{look.text}: {text}"))
    figure.legend(handles=[*handles, *extra], loc="outside lower center", ncols=2, frameon=False)


def structure_picture(run: Run) -> Picture | None:
    """What is left of every site and block."""
    if not run.traces:
        return None
    sites = final_sites(run)
    sized = [site for site in sites if site.total is not None]
    if sized and len(sized) < len(sites):
        sites = [
            site if site.total is not None else SiteWidth(site.block, site.site, 0, 0, site.alive) for site in sites
        ]
    one_each = len({site.block for site in sites}) == len(sites)
    labels = [site.block if one_each or not site.site else site.site for site in sites]
    total = np.array([1 if site.total is None else site.total for site in sites])
    kept = np.array([int(site.alive) if site.kept is None else site.kept for site in sites])

    figure = new_figure(float(np.clip(1.5 + 0.42 * len(sites), 7.0, 15.0)), 4.2)
    ax = figure.subplots()
    x = np.arange(len(sites))
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
    crowded = len(sites) > 26
    if sized:
        offset = 0.012 * float(total.max())
        for position, site in zip(x, sites, strict=True):
            if site.total:
                text = "out" if not site.alive else f"{site.kept}" if crowded else f"{site.kept}/{site.total}"
                ax.text(
                    position,
                    site.total + offset,
                    text,
                    ha="center",
                    va="bottom",
                    fontsize=7 if crowded else 8,
                    rotation=90 if crowded else 0,
                )
        ax.set_ylabel("channels")
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        ax.set_ylim(0, float(total.max()) * 1.1)
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
    ax.set_title(f"Blocks left: {sum(blocks.values())} of {len(blocks)}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    caption = (
        "What is left of the network, from its input (left) to its output (right). Grey is the hidden width of a "
        "residual block before training, blue the channels that remain. A hatched bar is a block that was removed "
        "as a whole: the signal passes it by on the shortcut."
    )
    return Picture("structure", "Final widths and layers", caption, figure)


def complexity_picture(run: Run) -> Picture | None:
    """Expected complexity against the counted MACs and parameters."""
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
            if marker is None and epoch[0] > 0:  # the counts of the start are those of the dense network
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
        f"removed{mixture}. The counts are those of the whole network as it physically stands at that moment: "
        "multiply-accumulate operations (MACs) for one image, and parameters. They fall in steps, each time "
        "structures are removed. Once all is decided, J and the counts describe the same network; what then "
        "remains between them are the parts that can never go (first layer, shortcuts, classifier), which are in "
        f"the counts and not in J, and the weighting of {counted} against parameters."
    )
    return Picture("complexity", "Expected against actual complexity", caption, figure)


def phase_picture(run: Run) -> Picture | None:
    """Paths of structures over the phase portrait of one of them."""
    if not run.traces:
        return None
    kinds = [kind for kind in _KINDS if any(_measured(trace).any() for trace in run.of(kind))]
    if not kinds:
        run.notes.append(
            "No benefit was measured in this run: there is no picture of the paths over the phase portrait."
        )
        return None
    figure = new_figure(5.2 * len(kinds) + (0.0 if len(kinds) > 1 else 2.0), 5.4)
    chosen: list[Trace] = []
    told = []
    extra: dict[str, Any] = {}
    for ax, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        shown = _choose(run.of(kind))
        chosen += shown
        told.append(_phase_panel(ax, run, kind, shown))
        for handle, text in zip(*ax.get_legend_handles_labels(), strict=True):
            extra.setdefault(text, handle)
    for ax in figure.axes[1:]:
        ax.set_ylabel("")
    for text, handle in extra.items():
        handle.set_label(text)
    _state_legend(figure, chosen, list(extra.values()))
    caption = (
        "Every coloured line is the measured path of one structure during training: to the right, what it is "
        "worth (the loss it saves, divided by the price of its complexity; at the dashed line it just pays), "
        "upwards the probability of keeping it. Grey arrows are the flow that the theory predicts for the "
        "structure named below, from its own measured constants. In the shaded region D the theory guarantees "
        "that the structure will be driven out; its upper edge is the separatrix. A large marker shows where a "
        "structure was removed, a dot where its record ends. Each structure has its own D, and the derived "
        "tolerance keeps an extra distance from it to allow for noise, so other paths may end a little above or "
        "well below the edge that is drawn. What lies beyond the left or right edge is cut off. "
        "The legend counts the paths shown."
    )
    caption = " ".join([caption, *filter(None, told)])
    return Picture("phase", "Paths over the phase portrait", caption, figure)


def _measured(trace: Trace) -> np.ndarray:
    """Say in which rows up to the removal the benefit and a positive price are known; shape as the rows."""
    rows = trace.rows
    with np.errstate(invalid="ignore"):
        return np.isfinite(trace["benefit"][rows]) & (trace["price"][rows] > 0) & np.isfinite(trace["keep_prob"][rows])


def _choose(traces: list[Trace]) -> list[Trace]:
    """Choose at most MAX_PATHS structures, each group spread evenly over the order of the file.

    Those removed on their own account get what those that went with their block and those that stayed leave over.
    """
    usable = [trace for trace in traces if _measured(trace).any()]
    own = [trace for trace in usable if trace.state in _OWN_STATES]
    others = [trace for trace in usable if trace.removed and trace.state not in _OWN_STATES]
    kept = [trace for trace in usable if not trace.removed]
    others = _spread(others, MAX_PATHS // 6)
    kept = _spread(kept, MAX_PATHS // 3)
    return kept + others + _spread(own, MAX_PATHS - len(kept) - len(others))


def _spread(items: list[Trace], count: int) -> list[Trace]:
    if len(items) <= count:
        return items
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


def _system(trace: Trace) -> BenefitSystem | None:
    """Build the comparison system of a structure, with benefits in units of its price.

    The constants are the medians over the rows that have a tolerance, or over all if none has.
    """
    rows = np.arange(len(trace.states))[trace.rows]
    judged = rows[np.isfinite(trace["tolerance"][rows])]
    rows = judged if judged.size else rows
    values = {}
    for name in SYSTEM_COLUMNS:
        column = trace[name][rows]
        column = column[np.isfinite(column)]
        if not column.size:
            return None
        values[name] = float(np.median(column))
    return comparison_system(values)


def _representative(traces: list[Trace]) -> tuple[Trace, BenefitSystem] | None:
    """Return the structure with the median D, of those removed by tolerance if there are any, with its system."""
    found = [(trace, system) for trace in traces if (system := _system(trace)) is not None]
    for wanted in (("pruned_tolerance",), ("pruned_zero",), tuple(LOOKS)):
        for empty in (False, True):
            some = [pair for pair in found if pair[0].state in wanted and pair[1].empty == empty]
            if some:
                some.sort(key=lambda pair: float(pair[1].separatrix(0.0)))
                return some[len(some) // 2]
    return None


def _phase_panel(ax: Axes, run: Run, kind: str, traces: list[Trace]) -> str:
    """Draw one kind of structure; return the sentence that says whose flow is in the background."""
    paths, ends = [], []
    for trace in traces:
        good = _measured(trace)
        rows = trace.rows
        paths.append((trace["benefit"][rows][good] / trace["price"][rows][good], trace["keep_prob"][rows][good]))
    colors = [LOOKS[trace.state].color for trace in traces]
    low, high = _window(traces, paths)
    ax.set_title(_KINDS[kind])
    representative = _representative(run.of(kind))
    if representative is None:
        for (x, theta), color in zip(paths, colors, strict=True):
            ax.plot(x, theta, color=color, linewidth=1.1, alpha=0.8)
        ax.axvline(1.0, color=PALETTE["grey"], linestyle="--", linewidth=1.3, label="price")
        ax.set_xlim(low, high)
        ax.set_ylim(-0.02, 1.02)
        ax.set_ylabel("keep probability θ")
        run.notes.append(
            f"For no {kind} were all the constants of the phase portrait measured: its paths are shown without flow "
            "and separatrix."
        )
        sentence = ""
    else:
        example, system = representative
        phase_portrait(ax, system, paths=paths, path_colors=colors, benefit_min=low, benefit_max=high, legend=False)
        name = f"unit {example.index} of {example.site}" if kind == "unit" else f"block {example.block}"
        sentence = f"Background for {kind}s: {name} ({LOOKS[example.state].text})."
        if system.empty:
            sentence += f" At its measured drift the theory guarantees nothing: D is empty for this {kind}."
    for trace, (x, theta) in zip(traces, paths, strict=True):
        if trace.removed_at is not None and low <= x[-1] <= high:
            ends.append((x[-1], theta[-1], trace))
    for x, theta, trace in ends:
        look = LOOKS[trace.state]
        ax.plot(
            x,
            theta,
            marker=look.marker,
            color=look.color,
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.6,
            linestyle="none",
            zorder=6,
            clip_on=False,
        )
    ax.set_xlabel("benefit / price")
    return sentence


def _window(traces: list[Trace], paths: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Choose the range of benefit / price that shows the removed paths and some of what lies right of the price."""
    removed = [x for trace, (x, _) in zip(traces, paths, strict=True) if trace.state in _OWN_STATES]
    x = np.concatenate(removed or [x for x, _ in paths])
    low, high = np.quantile(x, [0.02, 0.98])
    return float(np.clip(1.1 * low, -3.0, -0.1)), float(np.clip(1.1 * high, 2.5, 5.0))

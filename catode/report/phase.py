"""Picture of the measured paths in the plane of benefit and keep probability, with the domain D of the theory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D

from catode.report.history import SYSTEM_COLUMNS, Run, Trace, comparison_system
from catode.report.looks import KIND_TITLES, LOOKS, Picture, fate_legend
from catode.structures.fates import FATES, PRUNED_TOLERANCE, PRUNED_ZERO
from catode.theory.plotting import PALETTE, new_figure, phase_portrait
from catode.theory.systems import BenefitSystem

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_field", "field_handles", "measured_field", "phase_picture"]

MAX_PATHS = 30
ARROW = 0.06  # length, as a share of the window
MEASURED = "mean direction of all measured paths"
WORST = "worst case (comparison system)"
OWN = (PRUNED_TOLERANCE, PRUNED_ZERO)


def phase_picture(run: Run) -> Picture | None:
    """Paths of structures over the phase portrait of one of them; None if there is nothing to draw."""
    if not run.traces:
        return None
    kinds = [kind for kind in KIND_TITLES if any(_measured(trace).any() for trace in run.of(kind))]
    if not kinds:
        run.notes.append(
            "No benefit was measured in this run: there is no picture of the paths over the phase portrait."
        )
        return None
    figure = new_figure(5.2 * len(kinds) + (0.0 if len(kinds) > 1 else 2.0), 6.0)
    chosen: list[Trace] = []
    backgrounds = []
    extra: dict[str, Any] = {}
    for ax, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        shown = _choose(run.of(kind))
        chosen += shown
        backgrounds.append(_phase_panel(ax, run, kind, shown))
        for handle, text in zip(*ax.get_legend_handles_labels(), strict=True):
            extra.setdefault(text, handle)
    for ax in figure.axes[1:]:
        ax.set_ylabel("")
    for text, handle in extra.items():
        handle.set_label(text)
    fate_legend(figure, chosen, [*extra.values(), *field_handles()])
    caption = (
        "Every coloured line is the measured path of one structure during training. Horizontal: its benefit (the loss it "
        "saves) divided by its price; at the dashed line they are equal. Vertical: its keep probability. Black arrows are "
        "measured: the mean direction of all measured structures of the kind. Grey arrows are the worst case and not a "
        "prediction: the flow of the comparison system, in which the benefit grows as fast as the measured bounds of the "
        "structure named below allow; real paths cross them. Only the shaded region D has a guarantee: a structure in it "
        "must end at θ = 0 as long as the bounds hold; its upper edge is the separatrix. A large marker shows where a "
        "structure was removed, a dot where its record ends. Each structure has its own D, and the derived "
        "tolerance keeps a margin from it to allow for noise, so other paths may end a little above or "
        "well below the edge that is drawn. Paths are clipped at the left and right edge. "
        "The legend counts the paths shown."
    )
    caption = " ".join([caption, *filter(None, backgrounds)])
    return Picture("phase", "Measured paths, and the domain D of the worst case", caption, figure)


def measured_field(
    paths: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    window: tuple[tuple[float, float], tuple[float, float]],
    bins: tuple[int, int] = (9, 8),
    least: int = 3,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean velocity of measured paths in the bins of a window.

    A segment between two checks counts in the bin of its midpoint, so that noise of the benefit does not bias the arrows
    towards the most frequent values.

    Args:
        paths: Step, benefit over price and keep probability of each path, arrays of shape (n,).
        window: Lower and upper end of benefit over price, and of the keep probability.
        bins: Numbers of bins along the two axes.
        least: Smallest number of segments of a bin that is not left empty.

    Returns:
        Centres of the bins with enough segments, and mean velocities there, in shares of the window per step, both of shape
        (m, 2).
    """
    size = np.array([high - low for low, high in window])
    middles, speeds = [np.empty((0, 2))], [np.empty((0, 2))]
    for step, benefit, theta in paths:
        points, taken = np.stack([benefit, theta], axis=1), np.diff(step) > 0
        middles.append(((points[1:] + points[:-1]) / 2)[taken])
        speeds.append(np.diff(points, axis=0)[taken] / size / np.diff(step)[taken, None])
    middle, speed = np.concatenate(middles), np.concatenate(speeds)
    place = np.floor((middle - [low for low, _ in window]) / size * bins).astype(int)
    place = np.where(middle == [high for _, high in window], np.array(bins) - 1, place)
    inside = ((place >= 0) & (place < bins)).all(axis=1)
    number = np.ravel_multi_index(tuple(place[inside].T), bins)
    count = np.bincount(number, minlength=bins[0] * bins[1])
    total = np.stack([np.bincount(number, w, bins[0] * bins[1]) for w in speed[inside].T], axis=1)
    full = np.flatnonzero(count >= least)
    centres = (np.stack(np.unravel_index(full, bins), axis=1) + 0.5) / bins * size + [low for low, _ in window]
    return centres, total[full] / count[full, None]


def draw_field(ax: Axes, centres: np.ndarray, velocities: np.ndarray, window: Sequence[tuple[float, float]]) -> None:
    """Draw the directions of a `measured_field` as arrows of equal length; a dot where the mean velocity is 0.

    Args:
        ax: Where to draw.
        centres: Centres of the bins, shape (m, 2).
        velocities: Mean velocities, in shares of the window per step, shape (m, 2).
        window: As for `measured_field`.
    """
    norm = np.linalg.norm(velocities, axis=1)
    moving = norm > 0
    size = np.array([high - low for low, high in window])
    arrows = ARROW * velocities[moving] / norm[moving, None] * size
    color = PALETTE["black"]
    look = {"angles": "xy", "scale_units": "xy", "scale": 1.0, "pivot": "mid", "zorder": 5}
    if moving.any():
        ax.quiver(*centres[moving].T, *arrows.T, color=color, width=0.005, headwidth=4.5, alpha=0.75, **look)
    if not moving.all():
        ax.plot(*centres[~moving].T, ".", color=color, markersize=3, alpha=0.75)


def field_handles() -> list[Line2D]:
    """Legend entries of the two kinds of arrows."""
    return [
        Line2D(
            [], [], color=PALETTE["black"], marker=r"$\rightarrow$", markersize=13, linestyle="none", label=MEASURED
        ),
        Line2D([], [], color="#B5B5B5", marker=r"$\rightarrow$", markersize=13, linestyle="none", label=WORST),
    ]


def _measured(trace: Trace) -> np.ndarray:
    """Whether benefit, keep probability and a positive price are known, for each row up to the removal, shape (n,)."""
    rows = trace.rows
    with np.errstate(invalid="ignore"):
        return np.isfinite(trace["benefit"][rows]) & (trace["price"][rows] > 0) & np.isfinite(trace["keep_prob"][rows])


def _path(trace: Trace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step, benefit over price and keep probability in the rows where all are known, each of shape (m,)."""
    rows, good = trace.rows, _measured(trace)
    step, benefit, price, theta = (trace[name][rows][good] for name in ("step", "benefit", "price", "keep_prob"))
    return step, benefit / price, theta


def _choose(traces: list[Trace]) -> list[Trace]:
    """Choose at most MAX_PATHS structures, each group spaced evenly in the order of the file.

    At most a sixth are structures removed with their block and a third kept ones; the others were removed by themselves.
    """
    usable = [trace for trace in traces if _measured(trace).any()]
    own = [trace for trace in usable if trace.fate in OWN]
    others = [trace for trace in usable if trace.removed and trace.fate not in OWN]
    kept = [trace for trace in usable if not trace.removed]
    others = _spread(others, MAX_PATHS // 6)
    kept = _spread(kept, MAX_PATHS // 3)
    return kept + others + _spread(own, MAX_PATHS - len(kept) - len(others))


def _spread(items: list[Trace], count: int) -> list[Trace]:
    if len(items) <= count:
        return items
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


def _system(trace: Trace) -> BenefitSystem | None:
    """Comparison system of a structure, with benefits in units of its price; None if a constant was never measured.

    The constants are the medians over the rows that have a tolerance, or over all if none has.
    """
    rows = np.arange(len(trace.fates))[trace.rows]
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
    """The structure with the median D and its system; of those removed by tolerance if there are any."""
    found = [(trace, system) for trace in traces if (system := _system(trace)) is not None]
    for wanted in ((PRUNED_TOLERANCE,), (PRUNED_ZERO,), FATES):
        for empty in (False, True):
            some = [pair for pair in found if pair[0].fate in wanted and pair[1].empty == empty]
            if some:
                some.sort(key=lambda pair: float(pair[1].separatrix(0.0)))
                return some[len(some) // 2]
    return None


def _phase_panel(ax: Axes, run: Run, kind: str, traces: list[Trace]) -> str:
    """Draw one kind of structure; returns the caption's sentence that names the structure of the phase portrait."""
    paths, ends = [], []
    for trace in traces:
        _, x, theta = _path(trace)
        paths.append((x, theta))
    colors = [LOOKS[trace.fate].color for trace in traces]
    low, high = _window(traces, paths)
    window = (low, high), (0.0, 1.0)
    draw_field(ax, *measured_field([_path(trace) for trace in run.of(kind)], window), window)
    ax.set_title(KIND_TITLES[kind])
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
        sentence = f"Background for {kind}s: {name} ({LOOKS[example.fate].text})."
        if system.empty:
            sentence += f" At its measured drift the theory guarantees nothing: D is empty for this {kind}."
    for trace, (x, theta) in zip(traces, paths, strict=True):
        if trace.removed_at is not None and low <= x[-1] <= high:
            ends.append((x[-1], theta[-1], trace))
    for x, theta, trace in ends:
        look = LOOKS[trace.fate]
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
    """Range of benefit / price that shows the removed paths and some of the region above the price."""
    removed = [x for trace, (x, _) in zip(traces, paths, strict=True) if trace.fate in OWN]
    x = np.concatenate(removed or [x for x, _ in paths])
    low, high = np.quantile(x, [0.02, 0.98])
    return float(np.clip(1.1 * low, -3.0, -0.1)), float(np.clip(1.1 * high, 2.5, 5.0))

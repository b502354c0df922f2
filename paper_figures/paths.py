"""Measured paths of single structures, each over the worst case of its own measured constants and the mean of all paths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.lines import Line2D

from catode.decisions import shadow
from catode.records import structure_key
from catode.report import compare, history
from catode.report.phase import draw_field, field_handles, measured_field
from catode.structures.fates import COMMITTED
from catode.theory.plotting import PALETTE, house_style, new_figure, phase_portrait
from catode.theory.systems import BenefitSystem
from paper_figures._common import Made, letter
from paper_figures.runs import Data

NEEDS = ("shadow",)
PANELS = 6


@dataclass(frozen=True)
class Path:
    """A structure's path in a shadow run.

    Args:
        name: Its name in the figure.
        kind: "layer" or "unit".
        step: Training steps of the checks, shape (n,).
        benefit: Benefit over price at the checks, shape (n,).
        theta: Keep probability at the checks, shape (n,).
        decided: Place of the decision by the derived tolerance among them; None without one.
        end: Where theta went in the end: confirmed, regret, or kept.
        system: Its comparison system, at the decision if there was one.
        lead: Steps from the decision to the end of its observation.
    """

    name: str
    kind: str
    step: np.ndarray
    benefit: np.ndarray
    theta: np.ndarray
    decided: int | None
    end: str
    system: BenefitSystem
    lead: int

    @property
    def states(self) -> np.ndarray:
        """States of the comparison system, shape (n, 2)."""
        return np.stack([self.benefit, self.theta], axis=1)


def make(data: Data) -> Made:
    """Draw six structures of the shadow runs."""
    paths = [path for run in data.own_shadows() for path in _paths(run)]
    chosen = _choose(paths)
    figure = new_figure(10.0, 7.4)
    with house_style():
        axes = figure.subplots(2, 3, sharey=True)
        for ax, (why, path) in zip(axes.flat, chosen, strict=False):
            _panel(ax, path, [p for p in paths if p.kind == path.kind])
            ax.set_title(f"{why}", fontsize=10)
        for ax in axes.flat[len(chosen) :]:
            ax.set_axis_off()
        for ax in axes[:, 1:].flat:
            ax.set_ylabel("")
        letter(axes.flat[: len(chosen)])
        handles = {}
        for ax in axes.flat:
            for handle, text in zip(*ax.get_legend_handles_labels(), strict=True):
                handles.setdefault(text, handle)
        grey = {"color": PALETTE["grey"], "linestyle": "none", "markersize": 5}
        handles["start of a path"] = Line2D([], [], marker="o", markerfacecolor="white", **grey)
        handles["its end"] = Line2D([], [], marker="o", **grey)
        handles |= {handle.get_label(): handle for handle in field_handles()}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    decided = [path for path in paths if path.decided is not None]
    left = sum(not path.system.contains(path.states[path.decided :]).all() for path in decided)
    regrets = sum(path.end == shadow.REGRET for path in decided)
    told = "; ".join(f"({sign}) {path.name}, {_fate(path)}" for sign, (_, path) in zip("abcdef", chosen, strict=False))
    half = compare.rules(data.own_shadows())[f"fixed {max(shadow.FIXED):g}"]
    caption = (
        "The measured way of single structures through the plane of benefit and keep probability, in shadow runs, "
        "where nothing is removed before θ is 0. Black arrows say what happened: the mean direction in which all structures "
        "of the kind, layers or units, moved there. Grey arrows are the worst case and not a prediction: the comparison system "
        "of the structure's own measured price, gain, decay, rate ratio and drift (those at the decision where there was one, "
        "marked ▼, else their medians), in which the benefit grows as fast as the bounds admit. Real paths cross them. Only in "
        "the yellow domain D they bind: there the theory guarantees that a structure is driven out as long as the bounds hold. "
        f"The tolerance lies below the edge of D by a margin for noise. Of {len(decided)} decided paths, {left} were outside the "
        f"D of their decision at a later check, and {regrets} came back to 1, in runs where hardly anything comes back: of all "
        f"{half.decisions} θ that sank to one half {half.regrets} did. Benefits are estimates from a window of probes, "
        f"noisy where the window is young. {told}."
    )
    return Made("Measured paths over the worst case of their bounds", caption, figure)


def _fate(path: Path) -> str:
    if path.decided is None:
        return "never decided, kept" if path.end == "kept" else "never decided before θ = 0"
    if path.end == shadow.REGRET:
        return f"a regret: θ came back to 1 after {path.lead} steps"
    return f"decided at θ = {path.theta[path.decided]:.2f}, at 0 after another {path.lead} steps"


def _paths(run: compare.Run) -> list[Path]:
    """All structures of a run of which the benefit and the constants are known."""
    traces: dict[tuple, list[dict[str, str]]] = {}
    for row in run.rows:
        traces.setdefault(structure_key(row), []).append(row)
    derived = {d.structure: d for d in run.decisions if d.rule == shadow.DERIVED}
    zero = {d.structure: d.step for d in run.decisions if d.rule == shadow.ZERO}
    found = []
    for key, rows in traces.items():
        numbers = {
            n: np.array([float(r[n] or "nan") for r in rows])
            for n in ("step", "keep_prob", "benefit", *history.SYSTEM_COLUMNS)
        }
        good = np.isfinite(numbers["benefit"]) & (numbers["price"] > 0)
        if not good.any():
            continue
        numbers = {n: v[good] for n, v in numbers.items()}
        decision = derived.get(key)
        at = None
        if decision is not None:
            if decision.outcome not in (shadow.CONFIRMED, shadow.REGRET) or decision.step not in numbers["step"]:
                continue
            at = int(np.searchsorted(numbers["step"], decision.step))
        elif key not in zero and rows[-1]["fate"] != COMMITTED:
            continue
        middle = {n: numbers[n][at] if at is not None else np.nanmedian(numbers[n]) for n in history.SYSTEM_COLUMNS}
        system = history.comparison_system(middle) if all(np.isfinite(v) for v in middle.values()) else None
        if system is None:
            continue
        end = decision.outcome if decision is not None else shadow.CONFIRMED if key in zero else "kept"
        step, theta, benefit = numbers["step"], numbers["keep_prob"], numbers["benefit"] / numbers["price"]
        if end == shadow.CONFIRMED and theta[-1] > 0:
            step, theta, benefit = np.r_[step, zero[key]], np.r_[theta, 0.0], np.r_[benefit, benefit[-1]]
        kind, block, site, index = key
        name = f"block {block}" if kind == "layer" else f"unit {index} of {site}"
        name += f", seed {run.config['seed']}"
        lead = decision.outcome_step - decision.step if decision is not None else 0
        found.append(Path(name, kind, step, benefit, theta, at, end, system, lead))
    return found


def _choose(paths: list[Path]) -> list[tuple[str, Path]]:
    """Structures that show different things, each once, with what they show."""
    layers = [p for p in paths if p.kind == "layer"]
    units = [p for p in paths if p.kind == "unit"]
    decided = [p for p in units if p.decided is not None and p.end == shadow.CONFIRMED]
    median = np.median([p.lead for p in decided]) if decided else 0
    wanted = (
        ("A layer that was decided", [p for p in layers if p.decided is not None], lambda p: p.lead),
        ("A layer that stayed", [p for p in layers if p.end == "kept"], lambda p: -p.theta.min()),
        (
            "The unit decided earliest",
            [p for p in units if p.end == shadow.CONFIRMED and p.decided is not None],
            lambda p: p.lead,
        ),
        ("A regret", [p for p in units if p.end == shadow.REGRET], lambda p: p.lead),
        ("The unit that came back from lowest", [p for p in units if p.end == "kept"], lambda p: -p.theta.min()),
        (
            "A unit at θ = 0 undecided",
            [p for p in units if p.end == shadow.CONFIRMED and p.decided is None],
            lambda p: len(p.theta),
        ),
        ("A unit decided at the median lead", decided, lambda p: -abs(p.lead - median)),
    )
    chosen: list[tuple[str, Path]] = []
    for why, some, key in wanted:
        some = [p for p in some if all(p is not other for _, other in chosen)]
        if some and len(chosen) < PANELS:
            chosen.append((why, max(some, key=key)))
    return chosen


def _panel(ax, path: Path, alike: list[Path]) -> None:
    """Draw one path over its worst case, and the mean direction of all paths of its kind."""
    low = float(np.clip(1.15 * path.benefit.min(), -2.0, -0.1))
    high = float(np.clip(1.1 * np.quantile(path.benefit, 0.95), 1.6, 6.0))
    color = {shadow.CONFIRMED: "vermillion", shadow.REGRET: "purple"}.get(path.end, "blue")
    phase_portrait(
        ax,
        path.system,
        paths=[(path.benefit, path.theta)],
        path_colors=[PALETTE[color]],
        benefit_min=low,
        benefit_max=high,
        legend=False,
        density=0.55,
    )
    window = (low, high), (0.0, 1.0)
    draw_field(ax, *measured_field([(p.step, p.benefit, p.theta) for p in alike], window), window)
    ax.set_xlabel("benefit / price")
    ax.plot(
        [],
        [],
        color=PALETTE[color],
        label={"vermillion": "path to θ = 0", "purple": "path back to θ = 1", "blue": "path, kept"}[color],
    )
    ax.plot(
        path.benefit[0],
        path.theta[0],
        "o",
        color=PALETTE[color],
        markerfacecolor="white",
        markersize=5,
        zorder=6,
        clip_on=False,
    )
    if path.decided is not None:
        at = path.benefit[path.decided], path.theta[path.decided]
        ax.plot(
            *at,
            "v",
            color=PALETTE["black"],
            markersize=8,
            markeredgecolor="white",
            zorder=7,
            linestyle="none",
            label="decided here",
        )

"""One run as an animation: every structure in the plane of benefit and keep probability, and the widths left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter

from catode.report import history
from catode.report.looks import LOOKS
from catode.structures.fates import COMMITTED
from catode.theory.plotting import PALETTE, house_style, new_figure

FRAMES_PER_SECOND = 8
WINDOW = -2.0, 6.0  # of benefit over price


def write(run: history.Run, path: Path, frames: int = 90) -> None:
    """Write a run as an animated GIF.

    Args:
        run: A run with gates.
        path: The file.
        frames: Most frames; checks are left out evenly.
    """
    checks = np.unique(np.concatenate([trace["step"] for trace in run.traces]))
    shown = checks[np.unique(np.linspace(0, len(checks) - 1, frames).round().astype(int))]
    sites = history.final_sites(run)
    groups = [[t for t in run.of("unit") if (t.block, t.site) == (site.block, site.site)] for site in sites]
    layers = {trace.block: trace for trace in run.of("layer")}
    figure = new_figure(9.0, 4.4)
    with house_style():
        left, right = figure.subplots(1, 2)
        dots = {
            kind: left.scatter(
                [], [], s=size, marker=marker, linewidths=0.6, edgecolors="white", zorder=3, clip_on=False, label=kind
            )
            for kind, size, marker in (("unit", 16, "o"), ("layer", 90, "s"))
        }
        left.axvline(1.0, color=PALETTE["grey"], linestyle="--", linewidth=1.3)
        left.set_xlim(*WINDOW)
        left.set_ylim(-0.02, 1.02)
        left.set_xlabel("benefit / price, cut at the edges")
        left.set_ylabel("keep probability θ")
        total = [len(group) for group in groups]
        right.bar(range(len(sites)), total, color="#E3E3E3")
        bars = right.bar(range(len(sites)), total, color=PALETTE["blue"])
        right.set_xticks(
            range(len(sites)), [site.block for site in sites], rotation=40, ha="right", rotation_mode="anchor"
        )
        right.set_ylabel("channels left")
        right.grid(visible=False, axis="x")

    def draw(step: float) -> list:
        for kind, dot in dots.items():
            there = [(t, int(np.searchsorted(t["step"], step, side="right")) - 1) for t in run.of(kind)]
            there = [(t, k) for t, k in there if k >= 0 and not _gone(t, layers, step) and np.isfinite(t["benefit"][k])]
            points = [
                (t["benefit"][k] / t["price"][k], 1.0 if t.fates[k] == COMMITTED else t["keep_prob"][k])
                for t, k in there
            ]
            dot.set_offsets(np.clip(points, (WINDOW[0], 0.0), (WINDOW[1], 1.0)) if points else np.empty((0, 2)))
            dot.set_facecolors([LOOKS[t.fate].color for t, _ in there] or "none")
        for bar, group in zip(bars, groups, strict=True):
            bar.set_height(sum(not _gone(t, layers, step) for t in group))
        figure.suptitle(f"epoch {float(run.epochs(np.array(step))):.1f}", x=0.02, ha="left")
        return [*dots.values(), *bars]

    draw(shown[-1])
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # keep this layout, or every frame would compute it again
    moving = FuncAnimation(figure, draw, frames=[*shown, shown[-1]], blit=False)
    moving.save(path, writer=PillowWriter(fps=FRAMES_PER_SECOND))


def _gone(trace: history.Trace, layers: dict[str, history.Trace], step: float) -> bool:
    """Whether a structure had been removed after a step."""
    end = trace.gone_at(layers)
    return end is not None and step >= end

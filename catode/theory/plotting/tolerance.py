"""The tolerance of one structure against what one can choose: the accepted risk and the batch size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from catode.theory.plotting.style import PALETTE
from catode.theory.tolerance.derivation import derive

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def tolerance_over_risk(ax: Axes, inputs: dict[str, Any]) -> Axes:
    """Draw the tolerance against the accepted risk, at 0 where nothing can be removed safely.

    Args:
        ax: Where to draw.
        inputs: Arguments of `catode.theory.tolerance.derive` as numbers; the risk among them is marked.

    Returns:
        `ax`.
    """
    risk = np.geomspace(1e-4, 0.499, 200)
    ax.set_xscale("log")
    return _tolerance_curve(ax, inputs, risk, {"risk": risk}, inputs["risk"], "accepted risk")


def tolerance_over_batch_size(ax: Axes, inputs: dict[str, Any]) -> Axes:
    """Draw the tolerance against the batch size, relative to the one at which the noises were measured.

    A batch k times as large has noises smaller by sqrt(k).

    Args:
        ax: Where to draw.
        inputs: Arguments of `catode.theory.tolerance.derive` as numbers.

    Returns:
        `ax`.
    """
    factor = np.geomspace(1.0 / 16.0, 64.0, 200)
    noises = {name: inputs[name] / np.sqrt(factor) for name in ("noise", "benefit_noise")}
    ax.set_xscale("log", base=2)
    return _tolerance_curve(ax, inputs, factor, noises, 1.0, "batch size / measured one")


def _tolerance_curve(
    ax: Axes, inputs: dict[str, Any], x: np.ndarray, changed: dict[str, np.ndarray], here: float, label: str
) -> Axes:
    curve, point = derive(**{**inputs, **changed}), derive(**inputs)
    ax.plot(x, np.clip(curve.values, 0.0, 1.0), color=PALETTE["blue"], label="tolerance")
    separatrix = float(point.separatrix)
    if 0.0 <= separatrix <= 1.0:
        ax.axhline(separatrix, color=PALETTE["black"], linewidth=1.2, label="separatrix (no noise)")
    ax.plot(here, np.clip(float(point), 0.0, 1.0), "v", color=PALETTE["vermillion"], label="here", zorder=5)
    unsafe = curve.values <= 0.0
    if unsafe.any():
        ax.fill_between(x, 0, 1, where=unsafe, color=PALETTE["grey"], alpha=0.15, linewidth=0, label="nothing is safe")
    top = max(np.clip(curve.values, 0.0, 1.0).max(), min(max(separatrix, 0.0), 1.0))
    ax.set_ylim(0.0, 1.15 * top if top > 0.0 else 1.0)
    ax.set_xlabel(label)
    ax.set_ylabel("tolerance on θ")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    return ax

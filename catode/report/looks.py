"""The `Picture` of a report, and the markers of fates; names and colours are in `catode.structures.fates`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D

from catode.report.history import Trace
from catode.structures import fates
from catode.theory.plotting import PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EDGE", "KIND_TITLES", "LOOKS", "Look", "Picture", "fate_handle", "fate_legend"]


@dataclass(frozen=True)
class Look:
    """Name, colour and marker of a fate; the marker at the removal makes fates distinct without colour."""

    text: str
    color: str
    marker: str


_MARKERS = {
    fates.UNDECIDED: ".",
    fates.COMMITTED: "^",
    fates.PRUNED_TOLERANCE: "v",
    fates.PRUNED_ZERO: "o",
    fates.REMOVED_WITH_BLOCK: "D",
    fates.KEPT_OUT_OF_TIME: "s",
    fates.REMOVED_OUT_OF_TIME: "X",
    fates.KEPT_FOR_WIDTH: "P",
    fates.KEPT_AT_TARGET: "p",
    fates.KEPT_AS_LAST: "*",
    fates.KEPT_AT_LEAST: "h",
}
EDGE = "#444444"
"""Colour of the thin edge of all markers, so that overlapping ones are distinct."""

LOOKS = {
    fate: Look(text.replace("theta", "θ"), PALETTE[fates.COLORS[fate]], _MARKERS[fate])
    for fate, text in fates.MEANINGS.items()
}
KIND_TITLES = {"layer": "Layers (whole residual blocks)", "unit": "Units (channels inside a block)"}


@dataclass(frozen=True)
class Picture:
    """A figure with its file name, title and caption in the report."""

    name: str
    title: str
    caption: str
    figure: Figure


def fate_handle(fate: str, label: str) -> Line2D:
    """Legend entry of one fate, with its marker if it is a removal."""
    look = LOOKS[fate]
    marker = look.marker if fate in fates.REMOVED else None
    return Line2D(
        [], [], color=look.color, marker=marker, markersize=5, markeredgecolor=EDGE, markeredgewidth=0.4, label=label
    )


def fate_legend(figure: Figure, traces: Sequence[Trace], extra: Sequence[Any] = ()) -> None:
    """Add one legend below the panels: the fates that occur, with their counts by kind.

    Args:
        figure: Figure with its panels.
        traces: The structures that are drawn.
        extra: Further legend handles.
    """
    handles = []
    for fate, look in LOOKS.items():
        counts = [(kind, sum(trace.fate == fate and trace.kind == kind for trace in traces)) for kind in KIND_TITLES]
        text = ", ".join(f"{count} {kind}{'s' if count != 1 else ''}" for kind, count in counts if count)
        if text:
            handles.append(fate_handle(fate, f"{look.text}: {text}"))
    figure.legend(handles=[*handles, *extra], loc="outside lower center", ncols=2, frameon=False)

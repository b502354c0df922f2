"""What came back in a shadow run: of the thetas that sank to a threshold, how many went on to 0, and how many returned to 1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from catode.decisions import shadow
from catode.records import read_decisions, read_structures, structure_key
from catode.structures.fates import COMMITTED

THRESHOLDS = (0.05, 0.5, 0.9)
CONFIRMED, RETURNED, OPEN = "confirmed", "returned", "open"
OWN = "its own condition"
"""A tolerance and an upper limit of the benefit below the price; the thresholds look at theta alone."""
OUTCOMES = (CONFIRMED, RETURNED, OPEN)


def outcome(thetas: Iterable[tuple[float, bool]], threshold: float) -> str | None:
    """What became of one structure that a rule would have removed at a threshold.

    Args:
        thetas: Its theta at every check, in order, and whether it was committed there.
        threshold: Theta at or below which the rule removes.

    Returns:
        One of `OUTCOMES`, by what comes first after the first theta at or below the threshold: 0, or 1 or a commitment. None if
        no theta is.
    """
    sunk = False
    for theta, committed in thetas:
        sunk = sunk or theta <= threshold
        if sunk and theta <= 0.0:
            return CONFIRMED
        if sunk and (theta >= 1.0 or committed):
            return RETURNED
    return OPEN if sunk else None


def counted(folder: Path, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, dict[str, int]]:
    """Numbers of structures by outcome, for the run's own condition and for each threshold, of a finished shadow run."""
    header, rows = read_structures(folder)
    traces: dict[tuple[str, ...], list[tuple[float, bool]]] = {}
    for values in rows:
        row = dict(zip(header, values, strict=True))
        traces.setdefault(structure_key(row), []).append((float(row["keep_prob"]), row["fate"] == COMMITTED))
    found = {f"fixed {t:g}": _tally(outcome(trace, t) for trace in traces.values()) for t in thresholds}
    decisions = [line for line in read_decisions(folder, ("rule", "outcome")) if line["rule"] == shadow.DERIVED]
    return {OWN: _tally(_own(line) for line in decisions)} | found


def _own(line: Mapping[str, str]) -> str:
    return {shadow.CONFIRMED: CONFIRMED, shadow.REGRET: RETURNED}.get(line["outcome"], OPEN)


def _tally(outcomes: Iterable[str | None]) -> dict[str, int]:
    found = [one for one in outcomes if one is not None]
    return {one: found.count(one) for one in OUTCOMES}

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
"""A tolerance and an upper limit of the benefit below the price."""
BELOW = "benefit below price"
"""The same limit beside a threshold; without it a threshold looks at theta alone."""
OUTCOMES = (CONFIRMED, RETURNED, OPEN)


def outcome(checks: Iterable[tuple[float, bool, bool]], threshold: float) -> str | None:
    """What became of one structure that a rule would have removed at a threshold.

    Args:
        checks: Of every check, in order: its theta, whether it was committed, and whether the rule admits it whatever its theta.
        threshold: Theta at or below which the rule removes.

    Returns:
        One of `OUTCOMES`, by what comes first from the first check on that removes it: 0, or 1 or a commitment. None if none does.
    """
    sunk = False
    for theta, committed, admitted in checks:
        sunk = sunk or (admitted and theta <= threshold)
        if sunk and theta <= 0.0:
            return CONFIRMED
        if sunk and (theta >= 1.0 or committed):
            return RETURNED
    return OPEN if sunk else None


def counted(folder: Path, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, dict[str, int]]:
    """Numbers of structures by outcome, for the run's own condition and for each threshold, of a finished shadow run."""
    header, rows = read_structures(folder, ("keep_prob", "benefit_upper", "price"))
    traces: dict[tuple[str, ...], list[tuple[float, bool, bool]]] = {}
    for values in rows:
        row = dict(zip(header, values, strict=True))
        below = float(row["benefit_upper"] or "nan") < float(row["price"] or "nan")
        traces.setdefault(structure_key(row), []).append((float(row["keep_prob"]), row["fate"] == COMMITTED, below))
    found = {}
    for threshold in thresholds:
        theta_alone = [[(theta, committed, True) for theta, committed, _ in trace] for trace in traces.values()]
        for name, checks in ((f"fixed {threshold:g}", theta_alone), (f"fixed {threshold:g}, {BELOW}", traces.values())):
            found[name] = _tally(outcome(trace, threshold) for trace in checks)
    decisions = [line for line in read_decisions(folder, ("rule", "outcome")) if line["rule"] == shadow.DERIVED]
    return {OWN: _tally(_own(line) for line in decisions)} | found


def _own(line: Mapping[str, str]) -> str:
    return {shadow.CONFIRMED: CONFIRMED, shadow.REGRET: RETURNED}.get(line["outcome"], OPEN)


def _tally(outcomes: Iterable[str | None]) -> dict[str, int]:
    found = [one for one in outcomes if one is not None]
    return {one: found.count(one) for one in OUTCOMES}

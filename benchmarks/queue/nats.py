"""What structures were worth and what they cost in the course of a run: sums of their benefits and prices, in nats of its loss."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catode.records import read_structures, structure_key
from catode.structures.fates import UNDECIDED

MOST = 12
"""Checks that are kept of a run, evenly spaced."""


def course(folder: Path) -> list[dict[str, Any]]:
    """Sums over all undecided structures of a kind at the checks that list every one of them.

    Args:
        folder: A run with gates.

    Returns:
        For each such check and kind, in order: `step`, `kind`, `number` of structures, their `benefit` and their `price`, nats, and
        the number whose benefit is `below` their price. At most `MOST` of each kind.
    """
    header, rows = read_structures(folder, ("step", "benefit", "price"))
    return summed([dict(zip(header, row, strict=True)) for row in rows])


def summed(rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The same, from rows of structures.csv in their order."""
    ends: dict[tuple[str, ...], int] = {}  # a unit that is to stay may still go with its block, long after its decision
    for row in rows:
        if row["fate"] != UNDECIDED:
            ends.setdefault(structure_key(row), int(row["step"]))
    rows = [row for row in rows if int(row["step"]) <= ends.get(structure_key(row), math.inf)]
    kinds = Counter(key[0] for key in dict.fromkeys(map(structure_key, rows)))
    decided = Counter((step, key[0]) for key, step in ends.items())
    checks: dict[tuple[int, str], list[Mapping[str, str]]] = {}
    for row in rows:
        checks.setdefault((int(row["step"]), row["kind"]), []).append(row)
    found = []
    for kind, number in kinds.items():
        open_, full = number, []
        for step, own in ((step, own) for (step, name), own in checks.items() if name == kind):
            if len(own) == open_:
                pairs = [(float(row["benefit"]), float(row["price"])) for row in own]
                sums = {"benefit": sum(b for b, _ in pairs), "price": sum(p for _, p in pairs)}
                full.append(
                    {"step": step, "kind": kind, "number": open_, **sums, "below": sum(b < p for b, p in pairs)}
                )
            open_ -= decided[step, kind]
        found += [full[i] for i in _spread(len(full))]
    return sorted(found, key=lambda one: (one["step"], one["kind"]))


def _spread(count: int, most: int = MOST) -> list[int]:
    """At most so many numbers below a count, evenly spaced, the first and last among them."""
    return list(range(count)) if count <= most else sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})

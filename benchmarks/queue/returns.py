"""What came back in a shadow run: of the thetas that a rule would have removed, how many went to 0, and how many back to 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from catode.decisions import shadow
from catode.report import compare

OWN = "its own condition"
RULES = {shadow.DERIVED: OWN} | {rule: f"--tol {number:g}" for rule, number in shadow.AT_TOLERANCE.items()}
"""Rules that are counted: the run's own, and what a run with a fixed tolerance would have removed, by name."""


def counted(folder: Path) -> dict[str, dict[str, Any]]:
    """Decisions of each rule in a finished shadow run, by what became of them.

    Args:
        folder: Of the run.

    Returns:
        By rule that the run watched: `decisions`; of these `confirmed`, whose theta reached 0, `returned`, whose theta came back
        to 1 first, and `open`, which did neither; `zeros`, the thetas that reached 0 in all, and `foreseen`, those of them that
        were decided before; `lead`, steps from decision to theta = 0, median of the confirmed; None without one.
    """
    run = compare.read(folder)
    zeros = sum(decision.rule == shadow.ZERO for decision in run.decisions)
    scores = compare.rules([run])
    found = {}
    watched = any(decision.rule in shadow.AT_TOLERANCE for decision in run.decisions)  # not by version 0.1
    for rule, name in RULES.items() if watched else [(shadow.DERIVED, OWN)]:
        score = scores.get(rule)
        found[name] = {
            "decisions": score.decisions if score else 0,
            "confirmed": score.confirmed if score else 0,
            "returned": score.regrets if score else 0,
            "open": score.open if score else 0,
            "zeros": zeros,
            "foreseen": round(score.recall * zeros) if score and zeros else 0,
            "lead": float(np.median(score.leads)) if score and len(score.leads) else None,
        }
    return found

"""How the rules of shadow runs did: regrets and leads, calibration, and which assumed limits held.

Source: docs/conventions.md, "A run's folder" (regret); docs/mathematics.md sections 5 and 6.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from catode.decisions import shadow
from catode.records import number, structure_key
from catode.report.compare.runs import ASSUMED, MEASURED, Decision, Run
from catode.structures.fates import REMOVED_WITH_BLOCK

BINS = (0.0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0)
"""Edges of the bins of the predicted probability of an escape."""

BY_SIZE = (shadow.FILTER, shadow.SCALE)
"""Rules that decide without looking at theta, so that a return to 1 says nothing about them."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """How a rule did.

    Attributes:
        decisions: Number of structures that met its condition with theta above 0.
        confirmed: Of these, theta reached 0 before it came back to 1.
        regrets: It came back to 1 first.
        open: Neither until the end, or until the site or block went.
        low: Lower end of the interval of the regret rate, of the regrets alone.
        high: Its upper end, where all that is open counts as a regret.
        precision: Share of the decisions whose theta reached 0 in the end, those that went with site or block left out.
        recall: Share of all structures whose theta reached 0 that were decided before.
        leads: Steps from each confirmed decision to theta = 0. By a rule by size, which does not look at theta, every
            decision whose theta reached 0 in the end counts.
        checks: Number of different checks, of a run each, at which the decisions were taken.
        regretted: Number of runs with at least one regret.
    """

    decisions: int
    confirmed: int
    regrets: int
    open: int
    low: float
    high: float
    precision: float
    recall: float
    leads: NDArray[np.int64]
    checks: int
    regretted: int


def interval(events: int, trials: int) -> tuple[float, float]:
    """Clopper-Pearson interval of a probability, two-sided, at `CONFIDENCE`; (0, 1) without trials.

    Args:
        events: How often it happened.
        trials: Of how many, independent of each other.
    """
    from scipy.stats import binomtest

    if not trials:
        return 0.0, 1.0
    found = binomtest(events, trials).proportion_ci(CONFIDENCE, method="exact")
    return float(found.low), float(found.high)


def rules(runs: Sequence[Run], kind: str | None = None) -> dict[str, Score]:
    """How every rule did over all runs, in the order of `catode.decisions.shadow.RULES`.

    Args:
        runs: Shadow runs.
        kind: Count "layer" or "unit" alone; None for both together.
    """
    counted = [d for run in runs for d in run.decisions if kind in (None, d.structure[0])]
    zero = {(d.run, d.structure): d.step for d in counted if d.rule == shadow.ZERO}
    found = {}
    for rule in shadow.RULES[:-1]:
        own = [d for d in counted if d.rule == rule]
        confirmed, regrets = (sum(d.outcome == o for d in own) for o in (shadow.CONFIRMED, shadow.REGRET))
        left = len(own) - confirmed - regrets
        gone = [d for d in own if zero.get((d.run, d.structure), -1) >= d.step]
        led = gone if rule in BY_SIZE else [d for d in gone if d.outcome == shadow.CONFIRMED]
        judged = len(own) - sum(d.outcome == REMOVED_WITH_BLOCK for d in own)
        found[rule] = Score(
            decisions=len(own),
            confirmed=confirmed,
            regrets=regrets,
            open=left,
            low=interval(regrets, len(own))[0],
            high=interval(regrets + left, len(own))[1],
            precision=len(gone) / judged if judged else float("nan"),
            recall=len(gone) / len(zero) if zero else float("nan"),
            leads=np.array([zero[d.run, d.structure] - d.step for d in led], dtype=np.int64),
            checks=len({(d.run, d.step) for d in own}),
            regretted=len({d.run for d in own if d.outcome == shadow.REGRET}),
        )
    return found


def calibration(runs: Sequence[Run]) -> list[tuple[float, float, float, int, int, int]]:
    """Predicted against observed escapes in bins of the prediction.

    Of the decisions of all rules that look at theta, a bin takes each structure's first whose prediction lies in it, so that
    within a bin every structure of a run counts once. A structure may be in several bins.

    Returns:
        Lower and upper end of each bin that has decisions, its mean prediction, structures, regrets and those left open.
    """
    looks = set(shadow.RULES) - {shadow.ZERO, *BY_SIZE}
    own = [d for run in runs for d in run.decisions if d.rule in looks and np.isfinite(d.numbers["escape"])]
    own.sort(key=lambda d: d.step)
    found = []
    for low, high in pairwise(BINS):
        first: dict[tuple, Decision] = {}
        for d in own:
            if low <= d.numbers["escape"] < high or (high == 1.0 == d.numbers["escape"]):
                first.setdefault((d.run, d.structure), d)
        if first:
            regrets = sum(d.outcome == shadow.REGRET for d in first.values())
            left = sum(d.outcome in (shadow.OPEN, REMOVED_WITH_BLOCK) for d in first.values())
            mean = float(np.mean([d.numbers["escape"] for d in first.values()]))
            found.append((low, high, mean, len(first), regrets, left))
    return found


def assumptions(runs: Sequence[Run]) -> dict[str, tuple[int, int, int, float]]:
    """Which bounds taken at the derived decisions were exceeded before the observation ended.

    Returns:
        By bound: decisions that were seen at a later check, those that exceeded it, regrets among these, and the median
        of the largest excess (measured over bound) of those that did. `benefit` is whether its upper limit
        came to the price.
    """
    found: dict[str, list[tuple[float, bool]]] = {name: [] for name in (*ASSUMED, "benefit")}
    for run in runs:
        traces: dict[tuple, list[dict[str, str]]] = {}
        for row in run.rows:
            traces.setdefault(structure_key(row), []).append(row)
        for d in run.decisions:
            if d.rule != shadow.DERIVED:
                continue
            end = d.outcome_step or sys.maxsize
            rows = [row for row in traces.get(d.structure, []) if d.step <= float(row["step"]) <= end]
            if len(rows) < 2 or float(rows[0]["step"]) != d.step:
                continue
            regret = d.outcome == shadow.REGRET
            path = run.folder / "structures.csv"
            values = {name: np.array([number(path, name, row[name]) for row in rows]) for name in MEASURED}
            for name in ASSUMED:
                bound, later = values[name][0], np.fmax.reduce(values[name][1:])
                found[name].append((later / bound if bound > 0 else (np.inf if later > 0 else 0.0), regret))
            found["benefit"].append((np.fmax.reduce(values["benefit_upper"][1:] / values["price"][1:]), regret))
    return {
        name: (
            len(pairs),
            int(sum(x > 1.0 for x, _ in pairs)),
            sum(regret for x, regret in pairs if x > 1.0),
            float(np.median([x for x, _ in pairs if x > 1.0])) if any(x > 1.0 for x, _ in pairs) else float("nan"),
        )
        for name, pairs in found.items()
    }

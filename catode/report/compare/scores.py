"""Scores of the rules in shadow runs: regrets, leads, calibration, and which assumed limits held.

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
"""Rules that do not use theta, so a return of theta to 1 is not a regret of theirs."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """Score of a rule.

    Attributes:
        decisions: Number of structures that met its condition with theta above 0.
        confirmed: Of these, theta reached 0 before it returned to 1.
        regrets: Of these, theta returned to 1 first.
        open: Neither by the end of the run or the removal of the site or block.
        low: Lower end of the interval of the regret rate, counting regrets only.
        high: Upper end, counting every open decision as a regret.
        precision: Share of the decisions whose theta reached 0 in the end, without those removed with site or block.
        recall: Share of all structures whose theta reached 0 that were decided before.
        leads: Steps from each confirmed decision to theta = 0, shape (n,). For rules in `BY_SIZE`, from every decision
            whose theta reached 0 in the end.
        checks: Number of different checks (pairs of run and step) of the decisions.
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
    """Two-sided Clopper-Pearson interval of a probability at `CONFIDENCE`; (0, 1) without trials.

    Args:
        events: Number of events.
        trials: Number of independent trials.
    """
    from scipy.stats import binomtest

    if not trials:
        return 0.0, 1.0
    found = binomtest(events, trials).proportion_ci(CONFIDENCE, method="exact")
    return float(found.low), float(found.high)


def rules(runs: Sequence[Run], kind: str | None = None) -> dict[str, Score]:
    """Score of every rule over all runs, in the order of `catode.decisions.shadow.RULES`.

    Fixed tolerances without a decision are left out: version 0.1 did not watch them.

    Args:
        runs: Shadow runs.
        kind: "layer" or "unit" to count only these; None for both.
    """
    counted = [d for run in runs for d in run.decisions if kind in (None, d.structure[0])]
    zeros = {(d.run, d.structure): d.step for d in counted if d.rule == shadow.ZERO}
    watching = {d.run for d in counted if d.rule in shadow.AT_TOLERANCE}
    found = {}
    for rule in shadow.RULES[:-1]:
        fixed = rule in shadow.AT_TOLERANCE
        zero = {place: step for place, step in zeros.items() if place[0] in watching} if fixed else zeros
        own = [d for d in counted if d.rule == rule]
        if fixed and not own:
            continue
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
    """Predicted and observed escapes in bins of the prediction.

    A bin counts, for each structure of a run, its first decision in that bin by any rule that uses theta, but those at a
    fixed tolerance. A structure may be in several bins.

    Returns:
        Lower and upper end of each bin that has decisions, its mean prediction, numbers of structures, regrets and open decisions.
    """
    looks = set(shadow.RULES) - {shadow.ZERO, *BY_SIZE, *shadow.AT_TOLERANCE}
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
    """Which bounds assumed at the decisions of the derived rule were exceeded before the outcome.

    Returns:
        By bound: decisions with a later check, those of them that exceeded the bound, regrets among these, and the median
        over these of the largest ratio of measured value to bound. For `benefit` the ratio is its upper limit to the
        price.
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

"""Record of a shadow run, where nothing is removed before theta is 0: what rules would have removed, and the outcomes.

A decision is the first check at which a structure meets a rule's condition. It ends at the first passage of theta
after it: at 0 (confirmed), or at 1, by commitment too (a regret). A structure that reaches neither stays
open, or is removed with its site or block.

Source: docs/conventions.md, "A run's folder" (regret); docs/mathematics.md section 6, item 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

import numpy as np
from numpy.typing import NDArray

from catode.decisions.limits import Limits
from catode.structures.fates import REMOVED_WITH_BLOCK, UNDECIDED
from catode.theory import tolerance

FILE = "shadow.csv"
DERIVED, FILTER, SCALE, ZERO = "derived", "filter norm", "norm scale", "zero"
RISKS = (0.4, 0.3, 0.2, 0.1, 0.02, 0.005)
FIXED = (0.001, 0.05, 0.5)
TOLERANCES = (0.05, 0.5, 0.9)
AT_RISK, AT_THETA, AT_TOLERANCE = (
    {f"{name}{number:g}": number for number in numbers}
    for name, numbers in ((f"{DERIVED}@", RISKS), ("fixed ", FIXED), ("tol ", TOLERANCES))
)
RULES = (DERIVED, *AT_RISK, *AT_THETA, *AT_TOLERANCE, FILTER, SCALE, ZERO)
OPEN, CONFIRMED, REGRET = UNDECIDED, "confirmed", "regret"
OUTCOMES = (OPEN, CONFIRMED, REGRET, REMOVED_WITH_BLOCK)
NUMBERS = ("time", "keep_prob", "benefit", "benefit_upper", "price", "tolerance", "escape")
FIELDS = ("rule", "kind", "block", "site", "index", "step", *NUMBERS, "outcome", "outcome_step", "outcome_time")


@dataclass(eq=False)
class Shadow:
    """Decisions of several rules about the same structures, watched without being carried out.

    `derived` is the run's own condition at the run's risk; the same at other risks; theta at or below a fixed number,
    whatever else is known; the condition of a run with a fixed tolerance, which looks at the benefit too; as many units as
    `derived` takes at the same check, by the smallest norm of the filter that makes them or the smallest scale of its norm
    layer; and theta = 0.

    Args:
        size: Number of structures.
    """

    size: InitVar[int]
    step: NDArray = field(init=False)  # of the decision, 0 for none, shape (rules, n) as all here
    outcome: NDArray = field(init=False)  # index into `OUTCOMES`
    outcome_step: NDArray = field(init=False)
    outcome_time: NDArray = field(init=False)
    numbers: NDArray = field(init=False)  # `NUMBERS` at the decision, shape (numbers, rules, n)

    def __post_init__(self, size: int) -> None:
        shape = len(RULES), size
        self.step, self.outcome, self.outcome_step = np.zeros((3, *shape), dtype=np.int64)
        self.outcome_time = np.full(shape, np.nan)
        self.numbers = np.full((len(NUMBERS), *shape), np.nan)

    def decide(
        self,
        step: int,
        time: float,
        limits: Limits,
        known: NDArray[np.bool_],
        *,
        safe: NDArray[np.bool_],
        tolerance_values: NDArray,
        sizes: dict[str, NDArray],
    ) -> None:
        """Record which structures meet which rule's condition for the first time.

        Args:
            step: Training step of this check.
            time: ODE time.
            limits: Measured quantities.
            known: Structures with enough evidence and theta above 0, shape (n,).
            safe: Those of them that meet the run's own condition.
            tolerance_values: The run's own tolerances.
            sizes: Norms of the units by `FILTER` and `SCALE`; infinite for layers and removed units.
        """
        if not known.any():
            return
        theta = limits.keep_prob
        below = known & (limits.benefit_upper < limits.price)
        inputs = limits.tolerance_arguments(known)
        escape = np.full(len(known), np.nan)
        escape[known] = tolerance.escape_probability(keep_prob=theta[known], **inputs)
        bounds = {DERIVED: tolerance_values}
        for rule, risk in AT_RISK.items():
            bounds[rule] = np.full(len(known), np.nan)
            bounds[rule][known] = tolerance.derive(**inputs, risk=risk).values
        bounds |= {rule: np.full(len(known), number) for rule, number in (AT_THETA | AT_TOLERANCE).items()}
        count = int((safe & np.isfinite(sizes[FILTER]) & (self.step[0] == 0)).sum())
        for number, rule in enumerate(RULES[:-1]):
            new = known & (self.step[number] == 0)
            limit = bounds.get(rule, np.full(len(known), np.nan))
            if rule == DERIVED:
                new &= safe
            elif rule in bounds:
                new &= (theta <= limit) if rule in AT_THETA else below & (theta <= limit)
            else:
                size = np.where(new, sizes[rule], np.inf)
                least = np.argsort(size, kind="stable")[: min(count, int(np.isfinite(size).sum()))]
                new = np.isin(np.arange(len(new)), least)
            values = [np.full(len(known), time), theta, limits.benefit, limits.benefit_upper, limits.price]
            self.step[number, new] = step
            self.numbers[:, number, new] = np.stack([*values, limit, escape])[:, new]

    def passed(self, step: int, time: float, keep_prob: NDArray, moved: NDArray[np.bool_]) -> None:
        """Record first passages.

        Args:
            step: Training step.
            time: ODE time.
            keep_prob: Every theta, shape (n,).
            moved: Those that moved in this step.
        """
        zero = moved & (keep_prob == 0.0)
        new = zero & (self.step[-1] == 0)
        self.step[-1, new] = step
        self.numbers[:2, -1, new] = np.array([[time], [0.0]])
        self.end(CONFIRMED, zero, step, time)
        self.end(REGRET, moved & (keep_prob == 1.0), step, time)

    def watching(self) -> NDArray[np.bool_]:
        """Structures with a decision, by a rule that looks at theta, whose observation is open, shape (n,)."""
        looks = np.array([rule not in (FILTER, SCALE) for rule in RULES])
        return ((self.step > 0) & (self.outcome == OUTCOMES.index(OPEN)))[looks].any(0)

    def end(self, outcome: str, which: NDArray[np.bool_], step: int, time: float) -> None:
        """End the observation of what was decided and is still open.

        Args:
            outcome: One of `OUTCOMES`.
            which: Structures concerned, shape (n,).
            step: Training step.
            time: ODE time.
        """
        ended = which & (self.step > 0) & (self.outcome == OUTCOMES.index(OPEN))
        self.outcome[ended], self.outcome_step[ended] = OUTCOMES.index(outcome), step
        self.outcome_time[ended] = time

    def rows(self, names: Sequence[dict]) -> list[dict]:
        """One record for every decision, keys `FIELDS`.

        Args:
            names: kind, block, site and index of every structure.
        """
        found = []
        for number, rule in enumerate(RULES):
            for s in np.flatnonzero(self.step[number]):
                at = number, s
                numbers = {name: float(v) for name, v in zip(NUMBERS, self.numbers[:, number, s], strict=True)}
                end = {"outcome": OUTCOMES[self.outcome[at]], "outcome_step": "", "outcome_time": ""}
                if self.outcome[at]:
                    end |= {"outcome_step": int(self.outcome_step[at]), "outcome_time": float(self.outcome_time[at])}
                found.append({"rule": rule, **names[s], "step": int(self.step[at]), **numbers, **end})
        return found

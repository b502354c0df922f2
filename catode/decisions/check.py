"""One check: from measurements to the fate of every structure.

Source: docs/mathematics.md sections 3 to 5; docs/conventions.md item 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from catode.decisions import rules
from catode.decisions.limits import Limits
from catode.decisions.outcomes import Outcome, Outcomes
from catode.decisions.shadow import REGRET, Shadow
from catode.structures import fates


@dataclass(frozen=True, eq=False)
class Moment:
    """State of a run at a check; arrays of shape (n,).

    Attributes:
        fate: Fate of every structure before the check.
        kept: Structures in the network.
        zero: Undecided structures whose theta was absorbed at 0.
        enough: Structures with enough evidence to decide.
        slope: Growth of the benefits and its standard error, nats/time.
        done: Training steps.
        time: ODE time.
        step_time: ODE time of a step.
        progress: Share of the deciding phase that is over.
        steps_left: Steps until it ends; below 1 beyond its end, in a shadow run.
        final: Whether everything must be decided now.
        watching: Whether a shadow run may keep watching.
    """

    fate: NDArray[np.str_]
    kept: NDArray[np.bool_]
    zero: NDArray[np.bool_]
    enough: NDArray[np.bool_]
    slope: tuple[NDArray, NDArray]
    done: int
    time: float
    step_time: float
    progress: float
    steps_left: int
    final: bool
    watching: bool


@dataclass(frozen=True, eq=False)
class Verdict:
    """Result of a check; arrays of shape (n,).

    Attributes:
        outcome: Fate of every structure, and what follows from it.
        separatrix: Separatrix on theta, NaN where nothing is known.
        tolerance: Tolerance on theta, NaN where nothing is known.
        decided: Structures that a shadow run decided to remove, but keeps.
    """

    outcome: Outcome
    separatrix: NDArray
    tolerance: NDArray
    decided: NDArray[np.bool_]


@dataclass(frozen=True)
class Checks:
    """The rules of a run, applied one after the other.

    Args:
        outcomes: The rules by which structures leave or stay together.
        risk: Accepted probability that a removed structure would have recovered.
        tolerance: A fixed tolerance on theta in place of the derived ones.
        commits: Whether structures may be committed, which is valid under the flattening prior alone.
    """

    outcomes: Outcomes
    risk: float
    tolerance: float | None = None
    commits: bool = True

    def settle(
        self, limits: Limits, moment: Moment, shadow: Shadow | None = None, sizes: dict[str, NDArray] | None = None
    ) -> Verdict:
        """Decide what can be decided.

        Args:
            limits: Measured quantities.
            moment: State of the run.
            shadow: Record of a shadow run, which is extended; None where decisions are carried out.
            sizes: Norms of the units for the shadow's rules by size, by rule.
        """
        inventory, open_ = self.outcomes.complexity.inventory, moment.fate == fates.UNDECIDED
        separatrix, tolerance = rules.tolerances(limits, open_ & moment.enough, risk=self.risk, fixed=self.tolerance)
        known, zero = open_ & ~np.isnan(separatrix), open_ & moment.zero
        safe = known & ~zero & rules.safe(limits, tolerance)
        none = np.zeros_like(safe)
        decided = none
        if shadow is not None:
            decided = safe
            if moment.steps_left >= 0:  # no decisions after the deciding phase
                shadow.decide(
                    moment.done,
                    moment.time,
                    limits,
                    known & ~zero,
                    safe=safe,
                    tolerance_values=tolerance,
                    sizes=sizes or {},
                )
            safe = none
        elif not moment.final:
            left = inventory.left(moment.kept)
            safe = rules.ration(safe, limits, inventory.is_layer, left, self.outcomes.multiples)
        certain = none
        if self.commits:
            certain = rules.certain(
                limits,
                known,
                slope=moment.slope,
                progress=moment.progress,
                steps_left=max(moment.steps_left, 1),
                step_time=moment.step_time,
                risk=self.risk,
            )
        outcome = self.outcomes.settle(
            moment.fate,
            moment.kept,
            limits,
            zero=zero,
            safe=safe,
            certain=certain,
            watching=shadow.watching() if shadow is not None and moment.watching else none,
            final=moment.final,
        )
        if shadow is not None:
            shadow.end(REGRET, outcome.certain, moment.done, moment.time)
            gone = outcome.fate == fates.REMOVED_WITH_BLOCK
            shadow.end(fates.REMOVED_WITH_BLOCK, gone, moment.done, moment.time)
        return Verdict(outcome, separatrix, tolerance, decided)

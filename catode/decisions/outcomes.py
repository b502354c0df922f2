"""What becomes of every structure at one check: who leaves, who stays for good, who waits for others, who is forced.

`catode.decisions.rules` says what the benefit of each structure speaks for. Here stands what depends on the others as well:
widths go in whole groups (`round_to`), nothing leads past a target, blocks go with the last unit of a site, and where the
deciding phase ends everything must end up on one side.

Source: THEORY sections 2 (promotion) and 3; groups and targets are derived here, see docs/theory.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from catode.decisions import rules
from catode.decisions.target import Target
from catode.structures.complexity import Complexity

UNDECIDED, COMMITTED, FORCED, PROMOTED = "undecided", "committed", "forced", "promoted"
PRUNED_TOLERANCE, PRUNED_ZERO = "pruned_tolerance", "pruned_zero"
STATES = (COMMITTED, UNDECIDED, PRUNED_TOLERANCE, PRUNED_ZERO, PROMOTED, FORCED)


@dataclass(frozen=True)
class Outcome:
    """What a check ends with; arrays of shape (n,).

    Attributes:
        state: One of the states above for every structure.
        kept: Those that stay in the network.
        certain: Those that are decided to stay at this check, by a rule or because the target is met.
        folded: Those that would have gone, had there been a whole group: they stay, scaled by their keep probability.
        watched: Those that stay undecided beyond the deciding phase, because a shadow run watches what becomes of them.
        everything: Whether nothing would have been left. Then all that was undecided is forced to stay instead.
    """

    state: NDArray[np.str_]
    kept: NDArray[np.bool_]
    certain: NDArray[np.bool_]
    folded: NDArray[np.bool_]
    watched: NDArray[np.bool_]
    everything: bool = False


@dataclass(frozen=True)
class Outcomes:
    """The rules by which structures leave or stay together.

    Args:
        complexity: The network's complexity.
        round_to: What the widths of sites end as multiples of.
        target: A share of the network to end at, or None.
    """

    complexity: Complexity
    round_to: int = 1
    target: Target | None = None

    def of(
        self,
        state: NDArray[np.str_],
        kept: NDArray[np.bool_],
        found: dict[str, NDArray],
        *,
        zero: NDArray[np.bool_],
        safe: NDArray[np.bool_],
        certain: NDArray[np.bool_],
        watching: NDArray[np.bool_],
        final: bool,
    ) -> Outcome:
        """Settle one check.

        Args:
            state: State of every structure before it, shape (n,), as all arrays here.
            kept: Those that are in the network.
            found: What was measured, a `catode.decisions.evidence.summary`.
            zero: Undecided structures whose keep probability was absorbed at 0.
            safe: Other undecided ones that may leave by their tolerance.
            certain: Those that are certain to stay by `decide.certain`; a target has its own rule in its place.
            watching: Those that a shadow run still watches.
            final: Whether the deciding phase ends here, so that all others are rounded.
        """
        open_, going = state == UNDECIDED, zero | safe
        left, waits = self._without(kept, going, open_, found)
        refused = going & left & ~waits  # they would lead past the target
        if self.target is not None:  # the price may still rise: nothing is certain to stay before the target is met
            certain = np.zeros_like(open_) if self._more_may_go(left, open_ & left) else open_ & left
        certain = refused | (certain & ~going)
        watched = watching & open_ & ~going & ~certain
        rest = open_ & ~(going & ~left) & ~certain & ~watched
        down = np.zeros_like(open_)
        if final:
            down = rest if self.target is not None else rest & (waits | (found["keep_prob"] < 0.5))
            left, waits = self._without(left, down, open_, found)
            certain |= rest & left & ~waits & (self.target is not None)
        if not left[self.complexity.is_layer].any():
            none = np.zeros_like(open_)
            return Outcome(np.where(open_, FORCED, state), kept.copy(), none, none, none, everything=True)
        folded = waits & left & (final | self._stuck(open_ & left & ~certain, waits & zero))
        forced = folded | (final & rest & ~certain & (left | down))  # what is neither went with its site or block
        if self.target is not None:  # what stays only because the target is met was not decided by its benefit
            forced |= certain & (found["keep_prob"] < rules.NEARLY_ONE)
        ends = {PRUNED_ZERO: zero & ~left, PRUNED_TOLERANCE: safe & ~left, FORCED: forced}
        ends |= {PROMOTED: kept & ~left, COMMITTED: certain}
        return Outcome(np.select(list(ends.values()), list(ends), state), left, certain, folded, watched)

    def _without(
        self, kept: NDArray[np.bool_], going: NDArray[np.bool_], open_: NDArray[np.bool_], found: dict[str, NDArray]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """What stays if these go in whole groups, those of the least worth first, and not past the target.

        Returns:
            Those that stay, and those of `going` that wait for others to make a group.
        """
        waits = rules.hold_back(kept & going, found, self._left(kept), self.round_to)
        going = kept & going & ~waits
        if self.target is None:
            return self.complexity.close(kept & ~going), waits
        worth = found["benefit_upper"] / found["price"]
        groups = [np.array([s]) for s in np.flatnonzero(going & self.complexity.is_layer)]
        for left in self._left(kept):
            units = left[going[left]]
            units = units[np.argsort(worth[units], kind="stable")]
            ends = range(self._group(len(left)), len(units), self.round_to)
            groups += [group for group in np.split(units, ends) if len(group)]
        return self.target.remove(kept, going, kept & open_, worth, groups), waits

    def _more_may_go(self, kept: NDArray[np.bool_], open_: NDArray[np.bool_]) -> bool:
        """Whether any of the undecided may still go on the way to the target, with as many as must go with it."""
        sizes = np.where(self.complexity.is_layer, 1.0, np.inf)
        for left in self._left(kept):
            group = self._group(len(left))
            if open_[left].sum() >= group:
                sizes[left] = group
        return bool(self.target.may_go(kept, open_, sizes).any())

    def _stuck(self, open_: NDArray[np.bool_], waits: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Units of the sites where everything that is `open_` waits, so that no group can come together any more."""
        stuck = np.zeros_like(open_)
        for units in self.complexity.sites:
            stuck[units] = not (open_ & ~waits)[units].any()
        return stuck

    def _group(self, width: int) -> int:
        """Units that must leave a site of this width together, so that its width becomes a multiple of `round_to`."""
        return width % self.round_to or self.round_to

    def _left(self, kept: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
        """Numbers of the units that are left at each site."""
        return [units[kept[units]] for units in self.complexity.sites]

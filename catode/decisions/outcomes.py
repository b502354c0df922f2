"""Fate of every structure at one check: removed, certain to stay, waiting for its group, or out of time.

`catode.decisions.rules` judges each structure by its own benefit. This module adds what depends on the others: units are
removed in whole groups (`round_to`), no removal passes a target or the least of a width, a block is removed with the last unit
of a site, and everything is decided when the deciding phase ends.

Source: docs/mathematics.md sections 2 (removal with the block) and 3; groups and targets are derived in docs/theory.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from catode.decisions import rules
from catode.decisions.limits import Limits
from catode.decisions.target import Target
from catode.structures import fates
from catode.structures.complexity import Complexity
from catode.structures.layout import units_in


@dataclass(frozen=True)
class Outcome:
    """Fates after a check; arrays of shape (n,).

    Attributes:
        fate: One of `catode.structures.fates.FATES` for every structure.
        kept: Those that stay in the network.
        certain: Those that are decided to stay at this check, by a rule or because the target is met.
        folded: Units that stay only because their group is not complete or their width is at its least, scaled by their keep
            probability.
        watched: Those that stay undecided beyond the deciding phase, because a shadow run watches them.
        everything: Whether nothing would have been left. Then all that was undecided is kept instead.
    """

    fate: NDArray[np.str_]
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
        round_to: Final widths of sites are multiples of this, in entries of their tensors.
        target: A share of the network to end at, or None.
    """

    complexity: Complexity
    round_to: int = 1
    target: Target | None = None

    @cached_property
    def multiples(self) -> list[int]:
        """Units of each site that make up a width of `round_to`."""
        return [units_in(self.round_to, place.site) for place in self.complexity.inventory.places]

    def settle(
        self,
        fate: NDArray[np.str_],
        kept: NDArray[np.bool_],
        limits: Limits,
        *,
        zero: NDArray[np.bool_],
        safe: NDArray[np.bool_],
        certain: NDArray[np.bool_],
        watching: NDArray[np.bool_],
        final: bool,
    ) -> Outcome:
        """Settle one check.

        Args:
            fate: Fate of every structure before it, shape (n,), as all arrays here.
            kept: Those that are in the network.
            limits: Measured quantities.
            zero: Undecided structures whose keep probability was absorbed at 0.
            safe: Other undecided ones that may be removed by their tolerance.
            certain: Those that are certain to stay by `rules.certain`; a target replaces this rule.
            watching: Those that a shadow run still watches.
            final: Whether the deciding phase ends here, so that all others are rounded.
        """
        open_, going = fate == fates.UNDECIDED, zero | safe
        last = self._last(kept, going, limits)
        going = going & ~last
        left, waits = self._without(kept, going, open_, limits)
        last |= self._rest(left, open_) & ~waits & ~certain
        refused = going & left & ~waits  # their removal would pass the target
        if self.target is not None:  # the price may still rise: nothing is certain to stay before the target is met
            certain = np.zeros_like(open_) if self._more_may_go(left, open_ & left & ~last) else open_ & left
        certain = (refused | (certain & ~going)) & ~last
        watched = watching & open_ & ~going & ~certain & ~last
        rest = open_ & ~(going & ~left) & ~certain & ~watched & ~last
        down = np.zeros_like(open_)
        if final:
            down = rest if self.target is not None else rest & (waits | (limits.keep_prob < 0.5))
            more = self._last(left, down, limits)
            last, rest, down = last | more, rest & ~more, down & ~more
            left, waits = self._without(left, down, open_, limits)
            certain |= rest & left & ~waits & (self.target is not None)
        if not left[self.complexity.inventory.is_layer].any():
            none = np.zeros_like(open_)
            return Outcome(np.where(open_, fates.KEPT_AS_LAST, fate), kept.copy(), none, none, none, everything=True)
        if self.target is not None:  # others of the site stay, too
            several = last & ~self.complexity.inventory.at_least(left, self.multiples)
            certain, last = certain | several, last & ~several
        certain &= ~last
        last &= left
        given = last & self._given
        for_width = (
            waits & left & (final | self._rest(left, open_) | self._stuck(open_ & left & ~certain, waits & zero))
        )
        timeless = final & rest & ~certain
        low = limits.keep_prob < rules.NEARLY_ONE
        ends = {
            fates.KEPT_AT_LEAST: given,
            fates.KEPT_AS_LAST: last,
            fates.PRUNED_ZERO: zero & ~left,
            fates.PRUNED_TOLERANCE: safe & ~left,
            fates.KEPT_FOR_WIDTH: for_width,
            fates.KEPT_OUT_OF_TIME: timeless & left,
            fates.REMOVED_OUT_OF_TIME: timeless & down & ~left,
            # what stays only because the target is met was not decided by its benefit
            fates.KEPT_AT_TARGET: certain & low & (self.target is not None),
            fates.REMOVED_WITH_BLOCK: kept & ~left,
            fates.COMMITTED: certain,
        }
        return Outcome(np.select(list(ends.values()), list(ends), fate), left, certain, for_width | given, watched)

    def _last(self, kept: NDArray[np.bool_], going: NDArray[np.bool_], limits: Limits) -> NDArray[np.bool_]:
        """The units that a site's least needs, those of the largest keep probability (then of the largest benefit for their price).

        Args:
            kept: Structures in the network, shape (n,).
            going: Those that would be removed, shape (n,).
            limits: Measured quantities.
        """
        last = np.zeros_like(kept)
        for units, number in self.complexity.inventory.short(kept, going):
            order = np.lexsort((rules.worth(limits)[units], limits.keep_prob[units]))
            last[units[order[-number:]]] = True
        return last

    @cached_property
    def _given(self) -> NDArray[np.bool_]:
        """Units of the sites that a description gives a least."""
        inventory = self.complexity.inventory
        given = np.array([place.site.least > 0 for place in inventory.places], dtype=bool)
        return np.concatenate([~inventory.is_layer[inventory.is_layer], given[inventory.unit_site]])

    def _rest(self, kept: NDArray[np.bool_], open_: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Undecided units of the sites that have come down to a given least, which nothing can take away any more."""
        return open_ & self._given & self.complexity.inventory.at_least(kept, self.multiples)

    def _without(
        self, kept: NDArray[np.bool_], going: NDArray[np.bool_], open_: NDArray[np.bool_], limits: Limits
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Remove structures in whole groups, those of the least worth first, not past the target.

        Returns:
            Those that stay, and those of `going` that wait for others to make a group.
        """
        inventory = self.complexity.inventory
        waits = rules.hold_back(kept & going, limits, inventory.left(kept), self.multiples)
        going = kept & going & ~waits
        if self.target is None:
            return inventory.close(kept & ~going), waits
        worth = limits.benefit_upper / limits.price
        groups = [np.array([s]) for s in np.flatnonzero(going & inventory.is_layer)]
        for left, multiple in zip(inventory.left(kept), self.multiples, strict=True):
            units = left[going[left]]
            units = units[np.argsort(worth[units], kind="stable")]
            ends = range(len(left) % multiple or multiple, len(units), multiple)
            groups += [group for group in np.split(units, ends) if len(group)]
        return self.target.remove(kept, going, kept & open_, worth, groups), waits

    def _more_may_go(self, kept: NDArray[np.bool_], open_: NDArray[np.bool_]) -> bool:
        """Whether any undecided structure, with its group, may still be removed before the target is met."""
        inventory = self.complexity.inventory
        sizes = np.where(inventory.is_layer, 1.0, np.inf)
        for left, least, multiple in zip(inventory.left(kept), inventory.least, self.multiples, strict=True):
            group = len(left) % multiple or multiple  # units that must leave together, so that a multiple is left
            if open_[left].sum() >= group and len(left) - group >= least:
                sizes[left] = group
        return bool(self.target.may_go(kept, open_, sizes).any())

    def _stuck(self, open_: NDArray[np.bool_], waits: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Units of the sites where everything that is `open_` waits, so that no group can be completed."""
        stuck = np.zeros_like(open_)
        for units in self.complexity.inventory.units:
            stuck[units] = not (open_ & ~waits)[units].any()
        return stuck

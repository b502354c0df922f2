"""Ending at a given share of the network's MACs or parameters: how the price level follows, and where removal stops.

The structures that pay for themselves at a price level nu are those with benefit > nu * (price at nu = 1). The level at
which they alone make up a given share of the network is computed from the measured benefits at each check. That share
falls from 1 to the target over the first part of the deciding phase, so that the least useful are removed first; where
the network lags behind, the level grows further. A removal is judged at the price level of its check.

Source: derived here; the prices are those of docs/mathematics.md section 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from catode._validate import check_choice, check_interval, fail
from catode.structures.complexity import Complexity

QUANTITIES = ("macs", "params")
RAMP = 0.5  # share of the deciding phase over which the expected share falls to the target
LAG = 0.3  # share of the deciding phase by which the counted share may lag behind it
SLACK = 0.01  # how far past the target one removal may lead, where there are smaller ones
HEADROOM = 1.5  # over the level at which the marginal structure breaks even; exactly there it would never be removed


def missed(share: float, left: float) -> bool:
    """Whether a network of which `left` is left missed a target: by more than `SLACK`, which is 1 point."""
    return left > share + SLACK


@dataclass(frozen=True)
class Target:
    """A share of the whole network's MACs or parameters.

    Args:
        complexity: The network's complexity.
        quantity: One of `QUANTITIES`.
        share: Share to end at, in (0, 1).
        gated: Which structures have gates, so that they can go by themselves, shape (n,); None: all.

    Raises:
        ValueError: if the share is not in (0, 1), or below what is left without everything that can go.
    """

    complexity: Complexity
    quantity: str
    share: float
    gated: NDArray[np.bool_] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_choice("quantity", self.quantity, QUANTITIES)
        inventory = self.complexity.inventory
        stays = inventory.close(np.zeros(self.complexity.size, dtype=bool) if self.gated is None else ~self.gated)
        name, least = f"target_{self.quantity}", self.of(stays.astype(float))
        hint = f"Without any block the network keeps {least:.4f}."
        if (stays[inventory.is_layer] & inventory.removable[inventory.is_layer]).any():
            hint = f"Without all that can go the network keeps {least:.4f}."
        check_interval(name, self.share, least, 1.0, low_open=True, high_open=True, hint=hint)

    @classmethod
    def choose(
        cls,
        complexity: Complexity,
        macs: float | None,
        params: float | None,
        gated: NDArray[np.bool_] | None = None,
    ) -> Target | None:
        """The target of the one share that is given; None if neither is.

        Args:
            complexity: The network's complexity.
            macs: Share of its MACs, or None.
            params: Share of its parameters, or None.
            gated: Which structures have gates, shape (n,); None: all.

        Raises:
            ValueError: if both are.
        """
        if macs is not None and params is not None:
            fail("target_macs", "be left out with target_params", macs, hint="Give one of the two.")
        if macs is None and params is None:
            return None
        return cls(complexity, "macs", macs, gated) if params is None else cls(complexity, "params", params, gated)

    def of(self, kept: NDArray) -> float:
        """Share of the whole network in a mask or in keep probabilities, shape (n,)."""
        count = getattr(self.complexity, self.quantity)
        return count(kept) / count(np.ones(self.complexity.size))

    def due(self, progress: float) -> float:
        """Expected share due when `progress` of the deciding phase is over: it falls from 1 to the target."""
        return 1.0 - (1.0 - self.share) * min(max(progress / RAMP, 0.0), 1.0)

    def lags(self, keep_prob: NDArray, kept: NDArray[np.bool_], progress: float) -> bool:
        """Whether the expected share or the physical one is above the share due.

        Args:
            keep_prob: theta, shape (n,).
            kept: Structures in the network, shape (n,).
            progress: Share of the deciding phase that is over.
        """
        return self.of(keep_prob) > self.due(progress) or self.of(kept) > self.due(progress - LAG)

    def parts(self, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Share of the whole network that removing each structure alone saves, shape (n,)."""
        gradient = self.complexity.gradient(kept.astype(float), float(self.quantity == "params"))
        removable = getattr(self.complexity, f"removable_{self.quantity}")
        return gradient * removable / getattr(self.complexity, self.quantity)(np.ones(self.complexity.size))

    def may_go(
        self, kept: NDArray[np.bool_], open_: NDArray[np.bool_], sizes: NDArray | None = None
    ) -> NDArray[np.bool_]:
        """Undecided structures whose removal alone brings the share nearer, past the target by the slack at most.

        Args:
            kept: Structures in the network, shape (n,).
            open_: Those of them that are undecided, shape (n,).
            sizes: Number of units to remove with each, itself counted; infinite where it cannot be. None: 1.
        """
        sizes = np.ones(len(kept)) if sizes is None else sizes
        open_ = open_ & np.isfinite(sizes)
        if not open_.any():
            return open_
        excess = self.of(kept) - self.share
        parts = self.parts(kept) * np.where(open_, sizes, 1.0)
        slack = max(SLACK, float(parts[open_].min()))
        return open_ & (parts < np.minimum(2.0 * excess, excess + slack))

    def remove(
        self,
        kept: NDArray[np.bool_],
        going: NDArray[np.bool_],
        open_: NDArray[np.bool_],
        worth: NDArray,
        groups: Sequence[NDArray[np.int64]] | None = None,
    ) -> NDArray[np.bool_]:
        """Remove structures, those of the least worth first, down to the target.

        Args:
            kept: Structures in the network, closed under removal with the block, shape (n,).
            going: Those of them to remove, shape (n,).
            open_: Those of them that are undecided, `going` among them, shape (n,).
            worth: Benefit over price, or another order, shape (n,).
            groups: Structures of `going` that are removed together or not at all, each of one kind and site. None: each alone.

        Returns:
            Structures that stay, closed like `kept`, shape (n,).
        """
        close = self.complexity.inventory.close
        everything = close(kept & ~going)
        if self.of(everything) >= self.share:
            return everything
        if groups is None:
            groups = list(np.flatnonzero(going)[:, None])
        for place in np.argsort([worth[group].mean() for group in groups], kind="stable"):
            if self.of(kept) <= self.share:
                break
            group = groups[place]
            sizes = np.ones(len(kept))
            sizes[group] = len(group)
            if kept[group].all() and self.may_go(kept, open_ & kept, sizes)[group].all():
                kept = kept.copy()
                kept[group] = False
                kept = close(kept)
        return kept

    def level(self, kept: NDArray[np.bool_], open_: NDArray[np.bool_], worth: NDArray, progress: float) -> float | None:
        """Price level nu at which the structures that pay for themselves make up the share due, times `HEADROOM`.

        Args:
            kept: Structures in the network, shape (n,).
            open_: Those of them that are undecided, shape (n,).
            worth: Benefit over price at nu = 1, nats, shape (n,); not finite where unknown, which counts as staying.
            progress: Share of the deciding phase that is over.

        Returns:
            The level; None if the share due is reached, or out of reach with what is known.
        """
        due = self.due(progress)
        known = np.flatnonzero(open_ & kept & np.isfinite(worth))
        order = known[np.argsort(worth[known], kind="stable")]

        def reaches(number: int) -> bool:
            without = kept.copy()
            without[order[:number]] = False
            return self.of(self.complexity.inventory.close(without)) <= due

        low, high = 0, len(order)
        if not reaches(high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if reaches(middle) else (middle + 1, high)
        return None if low == 0 else HEADROOM * max(float(worth[order[low - 1]]), 0.0)

    def update_price(
        self,
        nu: float,
        kept: NDArray[np.bool_],
        open_: NDArray[np.bool_],
        worth: NDArray,
        keep_prob: NDArray,
        *,
        progress: float,
        growth: float,
    ) -> float:
        """The new price level: the one for the share due, or more where the network lags behind it.

        Args:
            nu: The level so far.
            kept: Structures in the network, shape (n,).
            open_: Those of them that are undecided and known, shape (n,).
            worth: Benefit over price at nu = 1, nats, shape (n,).
            keep_prob: theta, shape (n,).
            progress: Share of the deciding phase that is over.
            growth: Logarithm of the factor by which the level may grow beyond that, 1 at most.
        """
        level = self.level(kept, open_, worth, progress)
        if self.lags(keep_prob, kept, progress):
            level = max(level or 0.0, nu * math.exp(min(growth, 1.0)))
        return level or nu

"""How fast an optimizer's steps make the benefit of every structure grow: two estimates, and the limit that both permit.

Source: docs/theory.md section 8.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field

import numpy as np
from numpy.typing import NDArray

from catode._saved import UNSAVED
from catode.decisions.evidence import LEAST_EVIDENCE, Pool


@dataclass(eq=False)
class GrowthPools:
    """Growth of the benefits per keep probability, and their decay; arrays have shape (n,).

    Args:
        size: Number of structures.
        window: Memory of the pools, in observations.
        law: The growth at theta is at most ``gain * (theta + law * theta_0)``, theta_0 where it was measured: 0 where it
            falls like theta, 1/4 where it falls like its square root or faster, 1 where nothing is known.
        products_known: Whether products of gradients tell the growth; displacements alone do where nobody knows what a step
            does with its gradient.
        moving: Whether the weights move between the gradients that are multiplied.

    Attributes:
        gain: Pool of the products of gradients from above, nats/time, of weights that move in between.
        gain_below: The same from below.
        answer: Pool of what a step's own gradient takes off the next one's product with it, over the step's time, nats/time^2.
        reach: Pool of the ODE time of the steps between two gradients, those of a gradient that momentum repeats included.
        displaced: Pool of the growth by the displacement that past gradients caused, nats/time.
        share: Pool of the share of those gradients in which the structure was on, in [0, 1].
        pull: Pool of the growth by weight decay, nats/time.
    """

    size: InitVar[int]
    window: InitVar[float]
    law: float = field(metadata=UNSAVED, default=0.0)
    products_known: bool = field(metadata=UNSAVED, default=True)
    moving: bool = field(metadata=UNSAVED, default=True)
    gain: Pool = field(init=False)
    gain_below: Pool = field(init=False)
    answer: Pool = field(init=False)
    reach: Pool = field(init=False)
    displaced: Pool = field(init=False)
    share: Pool = field(init=False)
    pull: Pool = field(init=False)

    def __post_init__(self, size: int, window: float) -> None:
        self.gain, self.gain_below, self.answer, self.reach = (Pool(size, window) for _ in range(4))
        self.displaced, self.share, self.pull = (Pool(size, window) for _ in range(3))

    @property
    def count(self) -> NDArray:
        """Effective number of observations of the growth; one of the answer, which varies less, counts as two of products."""
        if not self.products_known:
            return self.displaced.count
        return np.minimum(self.gain.count, 2.0 * self.answer.count) if self.moving else self.gain.count

    def upper(self, z: float) -> NDArray:
        """The larger of the upper limits of products and displacement, nats/time; infinite where unknown.

        Args:
            z: Quantile of the normal distribution.
        """
        by_steps, known = self.by_displacement(z)
        if not self.products_known:
            return np.where(known, by_steps, np.inf)
        return np.maximum(self.by_products(z), np.where(known, by_steps, 0.0))

    def by_products(self, z: float) -> NDArray:
        """Upper limit of the growth by products of gradients at the same weights, nats/time; infinite where unknown."""
        if not self.moving:
            return np.maximum(self.gain.mean, 0.0) + z * self.gain.error
        reach = self.reach.mean
        error = np.multiply(reach, self.answer.error, out=np.zeros_like(reach), where=reach > 0.0)
        error = np.hypot(self.gain.error, error)
        known = np.isfinite(error)
        limit = np.maximum(self.gain.mean + reach * self.answer.mean, 0.0) + z * np.where(known, error, 0.0)
        return np.where(known, limit, np.inf)

    def by_displacement(self, z: float) -> tuple[NDArray, NDArray[np.bool_]]:
        """Upper limit of the displacement's growth per keep probability, nats/time, and where it is known.

        Sums are divided by sums: a ratio of single observations has no mean. Past gradients of the same epoch make it low
        as they do products, so that it is corrected by as much, which is too much for those of the epoch before.
        """
        known = (self.displaced.count >= LEAST_EVIDENCE) & (self.share.mean > 0.0)
        share = np.where(known, self.share.mean, 1.0)
        found = self.displaced.mean / share + self.gain.mean - self.gain_below.mean
        return np.maximum(found, 0.0) + z * np.where(known, self.displaced.error, 0.0) / share, known

    def lower(self, z: float) -> NDArray:
        """Lower limit of the growth per keep probability, nats/time; 0 where unknown."""
        if not self.products_known:
            return np.zeros_like(self.share.mean)  # a displacement contains the step's own batch, which is too much
        low = np.maximum(self.gain_below.mean - z * self.gain_below.error, 0.0)
        return np.where(np.isfinite(low), low, 0.0)

    def decay(self, z: float) -> NDArray:
        """Lower limit of what weight decay takes off the benefits, nats/time, not negative."""
        return np.maximum(-(self.pull.mean + z * self.pull.error), 0.0)

    def clear(self, where: NDArray[np.bool_]) -> None:
        """Begin anew for structures some of whose weights began to learn."""
        for pool in (self.gain, self.gain_below, self.answer, self.reach, self.displaced, self.share, self.pull):
            pool.clear(where)

"""Evidence about the benefit of every structure: pooled mean with confidence limits, noise, trend, diffusion.

Arrays have shape (n,) in the numbering of `catode.structures.inventory`. All pools are exponentially weighted,
because the network changes while it is measured.

Source: docs/theory.md section 1; docs/mathematics.md section 5.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from catode._saved import UNSAVED

LEAST_EVIDENCE = 8.0  # effective observations of benefit and gain before a theta moves or anything is decided


@dataclass(eq=False)
class Pool:
    """Exponentially weighted mean and variance of repeated observations of n quantities.

    Args:
        size: Number of quantities.
        window: Observations after which a weight has fallen to 1/e, one number or shape (n,).

    Attributes:
        weight: Sum of the weights, shape (n,): the number of observations at first, the window in the end.
        weight_squares: Sum of the squared weights, shape (n,).
        total: Weighted sum of the observations, shape (n,).
        squares: Weighted sum of their squares, shape (n,).
    """

    size: InitVar[int]
    window: InitVar[float | NDArray]
    forget: float | NDArray = field(metadata=UNSAVED, init=False)
    weight: NDArray = field(init=False)
    weight_squares: NDArray = field(init=False)
    total: NDArray = field(init=False)
    squares: NDArray = field(init=False)

    def __post_init__(self, size: int, window: float | NDArray) -> None:
        self.forget = 1.0 - 1.0 / window
        self.weight, self.weight_squares, self.total, self.squares = np.zeros((4, size))

    def add(self, values: NDArray, seen: NDArray[np.bool_]) -> None:
        """Add one observation of each quantity in `seen`.

        Args:
            values: Observations, shape (n,).
            seen: Which quantities were observed, shape (n,).
        """
        for sums, value in ((self.weight, 1.0), (self.total, values), (self.squares, np.square(values))):
            np.copyto(sums, self.forget * sums + value, where=seen)
        np.copyto(self.weight_squares, self.forget**2 * self.weight_squares + 1.0, where=seen)

    def clear(self, where: NDArray[np.bool_]) -> None:
        """Forget the observations of the quantities in `where`, shape (n,)."""
        for sums in (self.weight, self.weight_squares, self.total, self.squares):
            sums[where] = 0.0

    @property
    def count(self) -> NDArray:
        """Effective number of observations, at most about twice the window."""
        none = np.zeros_like(self.weight)
        return np.divide(self.weight**2, self.weight_squares, out=none, where=self.weight_squares > 0)

    @property
    def mean(self) -> NDArray:
        """Weighted mean; 0 where nothing was seen."""
        return np.divide(self.total, self.weight, out=np.zeros_like(self.weight), where=self.weight > 0)

    @property
    def variance(self) -> NDArray:
        """Variance of one observation; infinite below two effective observations."""
        count = self.count
        mean_square = np.divide(self.squares, self.weight, out=np.zeros_like(self.weight), where=self.weight > 0)
        spread = mean_square - self.mean**2
        enough = count > 1.5
        return np.where(enough, np.maximum(spread, 0.0) * count / np.maximum(count - 1.0, 0.5), np.inf)

    @property
    def error(self) -> NDArray:
        """Standard error of the mean, observations taken as independent; infinite where unknown."""
        return np.sqrt(self.variance / np.maximum(self.count, 1e-12))


@dataclass(eq=False)
class Evidence:
    """Benefits from estimates of L1 - L0: level, noise, trend and diffusion.

    Args:
        window: Memory of each structure's pools, in estimates, shape (n,).
        curvature_window: Memory of the curvature's pool, in probes.
        corrected: Structures whose estimates contain half the pooled curvature, shape (n,).
        risk: Risk of the confidence limits.

    Attributes:
        z: Quantile of the normal distribution at that risk.
        curvature: Pool of d2L/dxi2, filled by the probes.
    """

    window: InitVar[NDArray]
    curvature_window: InitVar[float]
    corrected: NDArray[np.bool_] = field(metadata=UNSAVED)
    risk: InitVar[float]
    z: float = field(metadata=UNSAVED, init=False)
    curvature: Pool = field(init=False)
    _benefit: Pool = field(init=False)
    _slow: Pool = field(init=False)  # the same over three times the memory
    _when: Pool = field(init=False)  # times of the observations in `_benefit`
    _slow_when: Pool = field(init=False)
    _elapsed: Pool = field(init=False)
    _estimate: Pool = field(init=False)
    _successive: Pool = field(init=False)  # products of successive estimates
    _last: NDArray = field(init=False)  # previous estimate; NaN for none

    def __post_init__(self, window: NDArray, curvature_window: float, risk: float) -> None:
        n = len(window)
        self.z = -float(ndtri(risk))
        self._benefit, self._when, self._elapsed, self._estimate, self._successive = (Pool(n, window) for _ in range(5))
        self._slow, self._slow_when = Pool(n, 3 * window), Pool(n, 3 * window)
        self._last = np.full(n, np.nan)
        self.curvature = Pool(n, curvature_window)

    def add(self, estimate: NDArray, seen: NDArray[np.bool_], time: float, elapsed: NDArray) -> None:
        """Add one estimate of L1 - L0 of each structure in `seen`.

        Args:
            estimate: Estimates, nats, shape (n,).
            seen: Which structures have one, shape (n,).
            time: ODE time.
            elapsed: ODE time since each structure's last estimate, shape (n,).
        """
        self._estimate.add(estimate, seen)
        follows = seen & ~np.isnan(self._last)
        self._successive.add(np.where(follows, estimate * self._last, 0.0), follows)
        self._last = np.where(seen, estimate, self._last)
        self._elapsed.add(elapsed, seen)
        now = np.full_like(elapsed, time)
        for pool, value in (
            (self._benefit, -estimate),
            (self._slow, -estimate),
            (self._when, now),
            (self._slow_when, now),
        ):
            pool.add(value, seen)

    @property
    def enough(self) -> NDArray[np.bool_]:
        """Whether there are enough estimates to act on, shape (n,)."""
        return self._benefit.count >= LEAST_EVIDENCE

    @property
    def benefit(self) -> NDArray:
        """Pooled benefit, nats."""
        return self._benefit.mean

    @property
    def step_time(self) -> NDArray:
        """Mean ODE time between two estimates."""
        return self._elapsed.mean

    def memory(self) -> NDArray:
        """Time constant of the pooled benefit, ODE time."""
        return self._estimate.weight * self._elapsed.mean

    def limits(self) -> tuple[NDArray, NDArray]:
        """Lower and upper limits of the benefits at the stated risk, shape (n,) each."""
        error = np.sqrt(self._benefit.error**2 + np.where(self.corrected, 0.25 * self.curvature.error**2, 0.0))
        return self._benefit.mean - self.z * error, self._benefit.mean + self.z * error

    def variance(self) -> NDArray:
        """Upper limit of the variance of one estimate."""
        return self._estimate.variance * (1.0 + self.z * np.sqrt(2.0 / np.maximum(self._estimate.count, 1.0)))

    def correlation(self) -> NDArray:
        """Correlation of successive estimates, in [0, 0.99]; 0 where unknown."""
        variance = np.where(np.isfinite(self._estimate.variance), self._estimate.variance, 0.0)
        common = np.where(variance > 0.0, self._successive.mean - self._estimate.mean**2, 0.0)
        return np.clip(np.divide(common, variance, out=np.zeros_like(common), where=variance > 0.0), 0.0, 0.99)

    def benefit_noise(self) -> NDArray:
        """Upper limit of the benefit's own diffusion sigma_b, nats per sqrt(time), from successive estimates.

        The draws' noise is independent from step to step, the benefit is not: the covariance of successive estimates is
        the variance of the benefit within the pool's memory T, sigma_b^2 T / 2 for a random walk. It includes the
        effect of the noise of *all* weights.
        """
        wander = self._successive.mean - self._estimate.mean**2 + self.z * self._successive.error
        elapsed = self._elapsed.mean
        return np.sqrt(2.0 * np.maximum(wander, 0.0) / np.maximum(self._estimate.weight * elapsed, 1e-12))

    def slope(self) -> tuple[NDArray, NDArray]:
        """Growth of the benefits, nats/time, and its standard error, from a fast and a slow pool."""
        span = self._when.mean - self._slow_when.mean
        known = span > 0.0
        span = np.where(known, span, 1.0)
        error = np.where(known, np.hypot(self._benefit.error, self._slow.error) / span, np.inf)
        return np.where(known, (self._benefit.mean - self._slow.mean) / span, 0.0), error

"""What training tells about every structure: pooled means with confidence limits, gradient products, drift.

Numbers of structures are those of `catode.structures.complexity`; arrays have shape (n,). Everything forgets exponentially, because
the network changes while it is measured.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri

LEAST_EVIDENCE = 8.0  # effective observations of benefit and gain before a theta moves or anything is decided


class Pool:
    """Exponentially weighted mean and variance of repeated observations of n quantities.

    Args:
        size: Number of quantities.
        window: Observations after which a weight has fallen to 1/e, one number or shape (n,).
    """

    def __init__(self, size: int, window: float | NDArray):
        self._forget = 1.0 - 1.0 / window
        self._w, self._w2, self._s, self._s2 = np.zeros((4, size))

    def state(self) -> torch.Tensor:
        """Everything remembered, shape (4, n)."""
        return torch.from_numpy(np.stack([self._w, self._w2, self._s, self._s2]))

    def restore(self, state: torch.Tensor) -> None:
        """Take up a `state`."""
        self._w, self._w2, self._s, self._s2 = state.numpy().copy()

    def add(self, values: NDArray, seen: NDArray[np.bool_]) -> None:
        """Take in one observation of each quantity in `seen`."""
        for total, value in ((self._w, 1.0), (self._s, values), (self._s2, np.square(values))):
            np.copyto(total, self._forget * total + value, where=seen)
        np.copyto(self._w2, self._forget**2 * self._w2 + 1.0, where=seen)

    @property
    def count(self) -> NDArray:
        """Effective number of observations, at most about twice the window."""
        return np.divide(self._w**2, self._w2, out=np.zeros_like(self._w), where=self._w2 > 0)

    @property
    def weight(self) -> NDArray:
        """Memory in observations: as many as were seen at first, the window in the end."""
        return self._w

    @property
    def mean(self) -> NDArray:
        """Weighted mean; 0 where nothing was seen."""
        return np.divide(self._s, self._w, out=np.zeros_like(self._w), where=self._w > 0)

    @property
    def variance(self) -> NDArray:
        """Variance of one observation; infinite below two effective observations."""
        count = self.count
        spread = np.divide(self._s2, self._w, out=np.zeros_like(self._w), where=self._w > 0) - self.mean**2
        enough = count > 1.5
        return np.where(enough, np.maximum(spread, 0.0) * count / np.maximum(count - 1.0, 0.5), np.inf)

    @property
    def error(self) -> NDArray:
        """Standard error of the mean, observations taken as independent; infinite where unknown."""
        return np.sqrt(self.variance / np.maximum(self.count, 1e-12))


class Evidence:
    """What the estimates of L1 - L0 tell about the benefits: level, noise, trend and wandering.

    Args:
        window: Memory of each structure's pools, in estimates, shape (n,).
        curvature_window: Memory of the curvature's pool, in probes.
        corrected: Structures whose estimates contain half the pooled curvature, shape (n,).
        risk: Risk of the confidence limits.

    Attributes:
        curvature: Pool of d2L/dxi2, filled by the probes.
    """

    def __init__(self, window: NDArray, *, curvature_window: float, corrected: NDArray[np.bool_], risk: float):
        n = len(window)
        self.z = float(ndtri(1.0 - risk))
        self.corrected = corrected
        self._benefit, self._slow, self._when, self._slow_when = (
            Pool(n, w) for w in (window, 3 * window, window, 3 * window)
        )
        self._elapsed = Pool(n, window)
        self._estimate, self._successive = Pool(n, window), Pool(n, window)
        self._last = np.full(n, np.nan)
        self.curvature = Pool(n, curvature_window)

    def _pools(self) -> list[Pool]:
        level, trend = [self._benefit, self._slow], [self._when, self._slow_when]
        return [*level, *trend, self._elapsed, self._estimate, self._successive, self.curvature]

    def state(self) -> dict:
        """Everything remembered."""
        return {"pools": [pool.state() for pool in self._pools()], "last": torch.from_numpy(self._last.copy())}

    def restore(self, state: dict) -> None:
        """Take up a `state`."""
        for pool, own in zip(self._pools(), state["pools"], strict=True):
            pool.restore(own)
        self._last = state["last"].numpy().copy()

    def add(self, estimate: NDArray, seen: NDArray[np.bool_], time: float, elapsed: NDArray) -> None:
        """Take in one estimate of L1 - L0 of each structure in `seen`.

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
        """Whether there are estimates enough to act on."""
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

    def benefit_noise(self) -> NDArray:
        """Upper limit of the benefit's own diffusion sigma_b, nats per sqrt(time), from its realised wandering.

        The draws' noise is independent from step to step, the benefit is not: the covariance of successive estimates is
        the variance of the benefit within the pool's memory T, sigma_b^2 T / 2 for a random walk. It contains what the
        noise of *all* weights does to the benefit.
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

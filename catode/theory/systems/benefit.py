"""The comparison system in benefit coordinates, `BenefitSystem`: the one that training uses, since its size is measurable.

Source: docs/mathematics.md sections 4.3 and 4.4.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from catode._validate import check_interval, check_real, check_state, fail
from catode.theory.systems.planar import PlanarSystem, check_fields, drift_reaches_decay, growth_rate, linear_rest

__all__ = ["BenefitSystem"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenefitSystem(PlanarSystem):
    """A structure in benefit coordinates (b, theta): b' = q theta - a b + delta, theta' = rho (b - g).

    This is the form to use in training, because b, the loss that the structure saves, is measurable. A negative benefit
    counts as zero (b+). The equations bound a real structure from above; with `gain_lower` and `decay_upper` the system
    also knows b' >= q_low theta - a_high b - delta for 0 <= b <= g, and hence what is certain to be kept.

    D is the set from which theta reaches 0. It also stays there where delta < a g (or a = delta = 0). Where a = 0 and
    delta > 0 the claim is only that theta reaches 0 in `time_to_zero`, at which the trainer removes the structure.

    Source: docs/mathematics.md sections 4.3 and 4.4.

    Args:
        price: Complexity cost g of keeping the structure, nats.
        gain: Upper bound q on the squared gradient norm over all its weights, nats/time.
        rate_ratio: Speed rho of theta, 1/(nats time).
        decay: Lower limit a on the decay of the benefit, 1/time.
        drift: Bound delta on the growth of the benefit from curvature and the rest of the network, nats/time.
        gain_lower: Lower bound q_low on the squared gradient norm, nats/time, or None where unknown.
        decay_upper: Upper limit a_high on the decay of the benefit, 1/time, or None where unknown.

    Raises:
        ValueError: if a parameter is not finite or out of range, if `gain_lower` exceeds `gain`, if `decay_upper` is
            below `decay`, or if only one of the two is given.

    Example:
        >>> system = BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0, decay=0.05)
        >>> system.saddle
        (0.1, 0.010000000000000002)
        >>> round(float(system.separatrix(0.0)), 4)
        0.1465
    """

    price: float
    gain: float
    rate_ratio: float
    decay: float = 0.0
    drift: float = 0.0
    gain_lower: float | None = None
    decay_upper: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, "price", "gain", "rate_ratio")
        check_fields(self, "decay", "drift", zero=True)
        if (self.gain_lower is None) != (self.decay_upper is None):
            missing = "gain_lower" if self.gain_lower is None else "decay_upper"
            fail(missing, "be a real number", None, hint="Give `gain_lower` and `decay_upper` together, or neither.")
        if self.gain_lower is not None:
            object.__setattr__(self, "gain_lower", check_interval("gain_lower", self.gain_lower, 0.0, self.gain))
            upper = check_interval("decay_upper", self.decay_upper, self.decay, np.inf)
            object.__setattr__(self, "decay_upper", upper)

    @property
    def saddle(self) -> tuple[float, float]:
        return self.price, (self.decay * self.price - self.drift) / self.gain

    @property
    def growth_rate(self) -> float:
        return float(growth_rate(self.decay, self.rate_ratio, self.gain))

    @property
    def empty(self) -> bool:
        """Whether D is empty: drift too strong for the decay (with decay), or for the price (without)."""
        if self.decay > 0.0:
            return bool(drift_reaches_decay(self.drift, self.decay, self.price))
        return self.drift >= self.growth_rate * self.price

    def field(self, state: Any) -> np.ndarray:
        state = np.asarray(state, dtype=np.float64)
        b, theta = state[..., 0], state[..., 1]
        return np.stack(
            [self.gain * theta - self.decay * b + self.drift, self.rate_ratio * (b - self.price)],
            axis=-1,
        )

    def jacobian(self, state: Any) -> np.ndarray:
        matrix = [[-self.decay, self.gain], [self.rate_ratio, 0.0]]
        return np.broadcast_to(matrix, (*np.shape(state)[:-1], 2, 2)).copy()

    def separatrix(self, size: Any) -> np.ndarray:
        benefit = np.maximum(np.asarray(size, dtype=np.float64), 0.0)
        b, theta = self.saddle
        return theta + self.growth_rate * (b - benefit) / self.gain

    def contains(self, state: Any) -> np.ndarray:
        inside = super().contains(state)
        return np.zeros_like(inside) if self.empty else inside

    def in_basin(self, state: Any) -> np.ndarray:
        """Whether the projected ODE of this very system carries a state to theta = 0, where it then stays.

        It is D where 0 <= theta* <= 1, the whole box where theta* > 1, and empty where theta* < 0.

        Args:
            state: States (benefit, theta), shape (..., 2).

        Returns:
            Booleans, shape (...).
        """
        inside = super().in_basin(state)
        return np.zeros_like(inside) if self.saddle[1] < 0.0 else inside

    def time_to_zero(self, state: Any) -> np.ndarray:
        """Upper bound T = log(V* / (V* - V0)) / mu on the time at which theta first reaches 0.

        Source: docs/mathematics.md section 4.3, from V = mu b+ + q theta and V' <= mu (V - V*).

        Args:
            state: States (benefit, theta), shape (..., 2).

        Returns:
            Times, shape (...); `inf` outside D.
        """
        inside = self.contains(state)
        state = self.project(state)
        rate, gain = self.growth_rate, self.gain
        value = rate * state[..., 0] + gain * state[..., 1]
        level = rate * self.price + (self.decay * self.price - self.drift)
        ratio = np.where(inside, value / level if level > 0.0 else 0.0, 0.0)
        return np.where(inside, -np.log1p(-np.minimum(ratio, 1.0 - 2.0**-53)) / rate, np.inf)

    def mirror_separatrix(self, size: Any) -> np.ndarray:
        b = check_real("size", size, array=True)
        theta, rate = self._mirror()
        if not theta < 1.0:
            return np.full(b.shape, np.inf)
        below = theta + rate * (self.price - b) / self.gain_lower
        return np.where(b < 0.0, np.inf, np.where(b <= self.price, below, theta))

    def contains_mirror(self, state: Any) -> np.ndarray:
        """Whether a structure in this state is certain to be kept: theta never falls again once b >= g.

        Source: docs/mathematics.md section 4.4.

        Args:
            state: States (benefit, theta), shape (..., 2); here a negative benefit is never certain.

        Returns:
            Booleans, shape (...); all False without `gain_lower`, or where theta*_low >= 1.
        """
        state = check_state("state", state)
        return self._in_box(state) & (state[..., 1] > self.mirror_separatrix(state[..., 0])) & (state[..., 0] >= 0.0)

    def rest(self, state: Any) -> np.ndarray:
        state = np.asarray(state, dtype=np.float64)
        return linear_rest(state[..., 0], self.gain * state[..., 1] + self.drift, self.decay)

    def _mirror(self) -> tuple[float, float]:
        """Keep probability theta*_low of the mirror saddle (`inf` where unknown) and its growth rate."""
        if not self.gain_lower:
            return np.inf, 0.0
        theta = (self.decay_upper * self.price + self.drift) / self.gain_lower
        return theta, float(growth_rate(self.decay_upper, self.rate_ratio, self.gain_lower))

    def _in_box(self, state: np.ndarray) -> np.ndarray:
        return (state[..., 1] >= 0.0) & (state[..., 1] <= 1.0)

"""What the planar comparison systems, whose stable manifolds bound the domain of attraction of a removed structure, share.

Each system describes one structure (a layer or a unit) by two numbers: a size (a weight norm, or the loss that the
structure saves) and the keep probability theta of its gate. A state is an array of shape (..., 2), size first, and
every method is vectorised over the leading axes. The size and theta drive each other up (the systems are cooperative),
so a saddle separates what goes to theta = 0 by itself from what does not, and its stable manifold, `separatrix`, is
known in closed form. The systems themselves are in `catode.theory.systems.norms` and `catode.theory.systems.benefit`.

Source: docs/mathematics.md section 4.
"""

from __future__ import annotations

import abc
from typing import Any

import numpy as np

from catode._validate import check_nonnegative, check_positive, check_state

__all__ = [
    "PlanarSystem",
    "check_fields",
    "drift_reaches_decay",
    "growth_rate",
    "linear_rest",
    "outside_range",
    "scaled_growth_rate",
]

_TINY = 1e-290  # a product below this, or above its inverse, has lost digits or soon will


def growth_rate(decay: Any, rate_ratio: Any, gain: Any, memory: Any = 0.0) -> Any:
    """Unstable eigenvalue mu at the saddle: the positive root of mu (mu + a) (1 + T mu) = rho q.

    Without memory, T = 0, it is mu(a) = (-a + sqrt(a^2 + 4 rho q)) / 2, computed without cancellation.

    Source: docs/mathematics.md section 4; with memory docs/theory.md.

    Args:
        decay: Decay a of the size, 1/time, non-negative.
        rate_ratio: Speed rho of theta, 1/(nats time).
        gain: Product q of the two couplings, nats/time.
        memory: Time constant T of the pool through which theta sees the benefit, time; 0 for none.

    Returns:
        mu in 1/time, broadcast over the arguments; 0 where the gain is 0.
    """
    with np.errstate(over="ignore", under="ignore"):
        product = np.multiply(rate_ratio, gain)
    extreme = outside_range(rate_ratio, gain)
    if np.any(extreme):
        unit, ratio = scaled_growth_rate(decay, rate_ratio, gain, memory)
        safe = growth_rate(decay, np.where(extreme, 1.0, rate_ratio), np.where(extreme, 1.0, gain), memory)
        with np.errstate(under="ignore"):
            return np.where(extreme, unit * ratio, safe)
    total = decay + np.hypot(decay, 2.0 * np.sqrt(product))
    rate = 2.0 * product / np.where(total > 0.0, total, 1.0)
    if not np.any(memory):
        return rate
    for _ in range(60):  # Newton on a convex increasing cubic, from above: monotone, and quadratic in the end
        value = rate * (rate + decay) * (1.0 + memory * rate) - product
        slope = (2.0 * rate + decay) * (1.0 + memory * rate) + memory * rate * (rate + decay)
        step = np.divide(value, slope, out=np.zeros_like(slope), where=slope > 0.0)
        rate = rate - step
        if np.all(np.abs(step) <= 1e-15 * rate):
            break
    return np.maximum(rate, 0.0)


def outside_range(rate_ratio: Any, gain: Any) -> Any:
    """Whether the product rho q of two positive numbers leaves the range in which floats keep their digits."""
    with np.errstate(over="ignore", under="ignore"):
        product = np.multiply(rate_ratio, gain)
    return (np.asarray(rate_ratio) > 0.0) & (np.asarray(gain) > 0.0) & ((product < _TINY) | (product > 1.0 / _TINY))


def scaled_growth_rate(decay: Any, rate_ratio: Any, gain: Any, memory: Any = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The growth rate as a product of two numbers, neither of which needs rho q: mu = sqrt(rho q) m.

    m solves m (m + A) (1 + S m) = 1 with A = a / sqrt(rho q) and S = T sqrt(rho q).

    Source: docs/mathematics.md section 4, in units of sqrt(rho q).

    Args:
        decay: Decay a of the size, 1/time, non-negative.
        rate_ratio: Speed rho of theta, 1/(nats time), positive.
        gain: Product q of the two couplings, nats/time, positive.
        memory: Time constant T of the pool, time.

    Returns:
        sqrt(rho q) in 1/time, and m.
    """
    with np.errstate(all="ignore"):
        unit = np.sqrt(rate_ratio) * np.sqrt(gain)
        ratio = 2.0 * unit / (decay + np.hypot(decay, 2.0 * unit))
        delay = np.multiply(memory, unit)
        for _ in range(60 if np.any(memory) else 0):
            square = ratio * ratio + ratio * np.divide(decay, unit)
            value = square * (1.0 + delay * ratio) - 1.0
            slope = (2.0 * ratio + np.divide(decay, unit)) * (1.0 + delay * ratio) + delay * square
            step = np.where(np.isfinite(value) & np.isfinite(slope), value / slope, 0.0)
            ratio = ratio - step
            if np.all(np.abs(step) <= 1e-15 * ratio):
                break
    return unit, ratio


def drift_reaches_decay(drift: Any, decay: Any, price: Any) -> Any:
    """Whether the drift reaches decay times price, so that nothing holds the benefit below the price.

    Equality counts as reached even where the three numbers were rounded on the way: .005 reaches .05 times .1.
    """
    with np.errstate(under="ignore"):
        level = np.multiply(decay, price) * (1.0 - 4.0 * np.finfo(np.float64).eps)
    return (np.asarray(decay) > 0.0) & (np.asarray(drift) > 0.0) & (np.asarray(drift) >= level)


class PlanarSystem(abc.ABC):
    """What the integrator, the tests and the plots need to know of a system with states (size, theta).

    A subclass supplies the raw field, its Jacobian, the saddle and the closed forms; projection and membership follow.
    """

    @abc.abstractmethod
    def field(self, state: Any) -> np.ndarray:
        """Raw (not projected) velocity.

        Args:
            state: States (size, theta), shape (..., 2).

        Returns:
            Time derivatives, shape (..., 2).
        """

    @abc.abstractmethod
    def jacobian(self, state: Any) -> np.ndarray:
        """Derivative of `field`; entry [..., i, j] is that of component i with respect to coordinate j.

        Args:
            state: States (size, theta), shape (..., 2).

        Returns:
            Jacobians, shape (..., 2, 2).
        """

    @property
    @abc.abstractmethod
    def saddle(self) -> tuple[float, float]:
        """The equilibrium (size*, theta*) of the raw field; theta* may lie outside [0, 1]."""

    @property
    @abc.abstractmethod
    def growth_rate(self) -> float:
        """Unstable eigenvalue mu at the saddle, 1/time."""

    @abc.abstractmethod
    def separatrix(self, size: Any) -> np.ndarray:
        """Keep probability on the stable manifold of the saddle.

        Args:
            size: First coordinates, any shape.

        Returns:
            theta_sep, same shape; may lie outside [0, 1].
        """

    @abc.abstractmethod
    def rest(self, state: Any) -> np.ndarray:
        """Limit of the first coordinate as time goes to infinity if theta stayed as it is; monotone on the way.

        Args:
            state: States (size, theta), shape (..., 2).

        Returns:
            Limits, shape (...); `inf` where it grows without bound.
        """

    @abc.abstractmethod
    def contains_mirror(self, state: Any) -> np.ndarray:
        """Whether a state is certain never to reach theta = 0.

        Args:
            state: States (size, theta), shape (..., 2).

        Returns:
            Booleans, shape (...).
        """

    @abc.abstractmethod
    def mirror_separatrix(self, size: Any) -> np.ndarray:
        """Keep probability above which a structure is certain to be kept.

        Args:
            size: First coordinates, any shape.

        Returns:
            theta_keep, same shape; `inf` where nothing is certain.
        """

    def project(self, state: Any) -> np.ndarray:
        """Nearest state with a size that is not negative and theta in [0, 1].

        Args:
            state: States (size, theta), shape (..., 2).

        Returns:
            States of the same shape.
        """
        state = check_state("state", state)
        return np.stack([np.maximum(state[..., 0], 0.0), np.clip(state[..., 1], 0.0, 1.0)], axis=-1)

    def projected_field(self, state: Any) -> np.ndarray:
        """Velocity of the projected ODE: no theta-speed out of [0, 1], no speed of the size below 0.

        Source: docs/mathematics.md section 3.

        Args:
            state: States (size, theta), shape (..., 2); projected first, so that a negative benefit counts as 0.

        Returns:
            Time derivatives, shape (..., 2).
        """
        state = self.project(state)
        speed = self.field(state)
        size, theta = state[..., 0], state[..., 1]
        outward = ((theta <= 0.0) & (speed[..., 1] < 0.0)) | ((theta >= 1.0) & (speed[..., 1] > 0.0))
        below = (size <= 0.0) & (speed[..., 0] < 0.0)
        return np.where(np.stack([below, outward], axis=-1), 0.0, speed)

    def contains(self, state: Any) -> np.ndarray:
        """Whether a state lies in the domain of attraction D of the removed state, which is open.

        D is exactly the basin in the box where 0 <= theta* <= 1; where theta* > 1 it lies inside the basin, see
        `in_basin`.

        Source: docs/mathematics.md section 4.

        Args:
            state: States (size, theta), shape (..., 2).

        Returns:
            Booleans, shape (...); False outside the box.
        """
        state = check_state("state", state)
        return self._in_box(state) & (state[..., 1] < self.separatrix(state[..., 0]))

    def in_basin(self, state: Any) -> np.ndarray:
        """Whether the projected ODE of this very system carries a state to theta = 0, where it then stays.

        It is D where 0 <= theta* <= 1, and the whole box where theta* > 1.

        Args:
            state: States (size, theta), shape (..., 2).

        Returns:
            Booleans, shape (...).
        """
        state = check_state("state", state)
        return self._in_box(state) if self.saddle[1] > 1.0 else self.contains(state)

    def _in_box(self, state: np.ndarray) -> np.ndarray:
        return (state[..., 0] >= 0.0) & (state[..., 1] >= 0.0) & (state[..., 1] <= 1.0)


def check_fields(system: PlanarSystem, *names: str, zero: bool = False) -> None:
    """Validate and convert the named fields of a frozen system."""
    for name in names:
        value = getattr(system, name)
        hint = "A structure without a price has no gate; give no system for it." if name == "price" else None
        value = check_nonnegative(name, value) if zero else check_positive(name, value, hint=hint)
        object.__setattr__(system, name, value)


def linear_rest(x: np.ndarray, source: np.ndarray, decay: float) -> np.ndarray:
    """Limit of x' = source - decay x for a non-negative source."""
    if decay > 0.0:
        with np.errstate(over="ignore"):
            return source / decay
    return np.where(source > 0.0, np.inf, x)

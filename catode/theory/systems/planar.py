"""The three planar comparison systems whose stable manifolds bound the domain of attraction of a removed structure.

Each system describes one structure (a layer or a unit) by two numbers: a size (a weight norm, or the loss that the
structure saves) and the keep probability theta of its gate. A state is an array of shape (..., 2), size first, and
every method is vectorised over the leading axes. The size and theta drive each other up (the systems are cooperative),
so a saddle separates what goes to theta = 0 by itself from what does not, and its stable manifold, `separatrix`, is
known in closed form.

Source: THEORY section 4; the domains D_B and D_U are Theorems 3.2 and 3.3 of arXiv:2411.09127, these forms are derived.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import numpy as np

from catode._validate import check_interval, check_nonnegative, check_positive, check_real, check_state, fail

__all__ = ["BenefitSystem", "LayerSystem", "PlanarSystem", "UnitSystem", "growth_rate"]


def growth_rate(decay: Any, rate_ratio: Any, gain: Any, memory: Any = 0.0) -> Any:
    """Unstable eigenvalue mu at the saddle: the positive root of mu (mu + a) (1 + T mu) = rho q.

    Without memory, T = 0, it is mu(a) = (-a + sqrt(a^2 + 4 rho q)) / 2, computed without cancellation.

    Source: THEORY section 4; with memory docs/theory.md.

    Args:
        decay: Decay a of the size, 1/time, non-negative.
        rate_ratio: Speed rho of theta, 1/(nats time).
        gain: Product q of the two couplings, nats/time.
        memory: Time constant T of the pool through which theta sees the benefit, time; 0 for none.

    Returns:
        mu in 1/time, broadcast over the arguments; 0 where the gain is 0.
    """
    product = np.multiply(rate_ratio, gain)
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


def _excess(d: np.ndarray) -> np.ndarray:
    """Return d - log(1 + d), accurately near d = 0 and +inf at d = -1."""
    near = np.abs(d) < 0.01
    small = np.where(near, d, 0.0)
    series = np.zeros_like(small)
    for k in range(10, 1, -1):
        series = series * small + (1.0 if k % 2 == 0 else -1.0) / k
    with np.errstate(divide="ignore"):
        return np.where(near, small * small * series, d - np.log1p(d))


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

        Source: THEORY section 3.

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

        Source: THEORY section 4.

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


class _NormSystem(PlanarSystem):
    """Mirror domain of a system in norm coordinates: the complement of the closed D, if theta* <= 1.

    It holds for this system as written. A real structure satisfies its equations only as upper bounds, so for that no
    size makes keeping certain: use the mirror domain of `BenefitSystem`.
    """

    def mirror_separatrix(self, size: Any) -> np.ndarray:
        size = check_real("size", size, array=True)
        return self.separatrix(size) if self.saddle[1] <= 1.0 else np.full(size.shape, np.inf)

    def contains_mirror(self, state: Any) -> np.ndarray:
        state = check_state("state", state)
        return self._in_box(state) & (state[..., 1] > self.mirror_separatrix(state[..., 0]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSystem(_NormSystem):
    """A layer in norm coordinates (r, theta): r' = -lambda r + eta theta, theta' = rho (kappa r - g).

    r = |w| is the norm of the layer's weights, with |grad L1| <= eta and |b(w)| <= kappa r.

    Source: THEORY 4.1; the domain D_B of Theorem 3.2 of arXiv:2411.09127, this form derived.

    Args:
        price: Complexity cost g of keeping the layer, nats.
        weight_decay: Coefficient lambda of the L2 penalty, 1/time.
        rate_ratio: Speed rho of theta, 1/(nats time).
        grad_bound: Bound eta on the gradient norm, weight/time.
        benefit_slope: Bound kappa on the benefit per norm, nats/weight.

    Raises:
        ValueError: if a parameter is not finite, is negative, or is zero (which only `weight_decay` may be).

    Example:
        >>> system = LayerSystem(price=0.1, weight_decay=0.1, rate_ratio=1.0, grad_bound=1.0, benefit_slope=0.5)
        >>> system.contains([[0.0, 0.05], [0.5, 0.5]]).tolist()
        [True, False]
    """

    price: float
    weight_decay: float
    rate_ratio: float
    grad_bound: float
    benefit_slope: float

    def __post_init__(self) -> None:
        _check(self, "price", "rate_ratio", "grad_bound", "benefit_slope")
        _check(self, "weight_decay", zero=True)

    @property
    def saddle(self) -> tuple[float, float]:
        r = self.price / self.benefit_slope
        return r, self.weight_decay * r / self.grad_bound

    @property
    def growth_rate(self) -> float:
        return float(growth_rate(self.weight_decay, self.rate_ratio, self.benefit_slope * self.grad_bound))

    def field(self, state: Any) -> np.ndarray:
        state = np.asarray(state, dtype=np.float64)
        r, theta = state[..., 0], state[..., 1]
        return np.stack(
            [
                self.grad_bound * theta - self.weight_decay * r,
                self.rate_ratio * (self.benefit_slope * r - self.price),
            ],
            axis=-1,
        )

    def jacobian(self, state: Any) -> np.ndarray:
        matrix = [[-self.weight_decay, self.grad_bound], [self.rate_ratio * self.benefit_slope, 0.0]]
        return np.broadcast_to(matrix, (*np.shape(state)[:-1], 2, 2)).copy()

    def separatrix(self, size: Any) -> np.ndarray:
        r, theta = self.saddle
        return theta + self.growth_rate * (r - np.asarray(size, dtype=np.float64)) / self.grad_bound

    def rest(self, state: Any) -> np.ndarray:
        state = np.asarray(state, dtype=np.float64)
        return _linear_rest(state[..., 0], self.grad_bound * state[..., 1], self.weight_decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitSystem(_NormSystem):
    """A unit in norm coordinates (u, theta): u' = 2 u (kappa theta - lambda), theta' = rho (kappa u / 2 - g).

    u = |w_in|^2 + |w_out|^2, with |b| <= kappa |w_in| |w_out| and each gradient at most kappa times the other norm.

    Source: THEORY 4.2; the domain D_U of Theorem 3.3 of arXiv:2411.09127, this form derived.

    Args:
        price: Complexity cost g of keeping the unit, nats.
        weight_decay: Coefficient lambda of the L2 penalty, 1/time.
        rate_ratio: Speed rho of theta, 1/(nats time).
        benefit_slope: Bound kappa on the benefit per product of norms, nats/weight^2 (and 1/time).

    Raises:
        ValueError: if a parameter is not finite, is negative, or is zero (which only `weight_decay` may be).

    Example:
        >>> system = UnitSystem(price=0.1, weight_decay=0.1, rate_ratio=1.0, benefit_slope=0.5)
        >>> float(system.separatrix(0.0)), system.saddle
        (inf, (0.4, 0.2))
    """

    price: float
    weight_decay: float
    rate_ratio: float
    benefit_slope: float

    def __post_init__(self) -> None:
        _check(self, "price", "rate_ratio", "benefit_slope")
        _check(self, "weight_decay", zero=True)

    @property
    def saddle(self) -> tuple[float, float]:
        return 2.0 * self.price / self.benefit_slope, self.weight_decay / self.benefit_slope

    @property
    def growth_rate(self) -> float:
        return float(np.sqrt(2.0 * self.rate_ratio * self.benefit_slope * self.price))

    def field(self, state: Any) -> np.ndarray:
        state = np.asarray(state, dtype=np.float64)
        u, theta = state[..., 0], state[..., 1]
        return np.stack(
            [
                2.0 * u * (self.benefit_slope * theta - self.weight_decay),
                self.rate_ratio * (0.5 * self.benefit_slope * u - self.price),
            ],
            axis=-1,
        )

    def jacobian(self, state: Any) -> np.ndarray:
        state = np.asarray(state, dtype=np.float64)
        u, theta = state[..., 0], state[..., 1]
        matrix = np.zeros((*u.shape, 2, 2))
        matrix[..., 0, 0] = 2.0 * (self.benefit_slope * theta - self.weight_decay)
        matrix[..., 0, 1] = 2.0 * self.benefit_slope * u
        matrix[..., 1, 0] = 0.5 * self.rate_ratio * self.benefit_slope
        return matrix

    def separatrix(self, size: Any) -> np.ndarray:
        u, theta = self.saddle
        d = np.maximum((np.asarray(size, dtype=np.float64) - u) / u, -1.0)
        depth = np.sqrt(self.rate_ratio * self.price / self.benefit_slope * np.maximum(_excess(d), 0.0))
        return theta - np.sign(d) * depth

    def rest(self, state: Any) -> np.ndarray:
        state = np.asarray(state, dtype=np.float64)
        u, rate = state[..., 0], self.benefit_slope * state[..., 1] - self.weight_decay
        return np.where((rate == 0.0) | (u == 0.0), u, np.where(rate > 0.0, np.inf, 0.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenefitSystem(PlanarSystem):
    """A structure in benefit coordinates (b, theta): b' = q theta - a b + delta, theta' = rho (b - g).

    This is the form to use in training, because b, the loss that the structure saves, is measurable. A negative benefit
    counts as zero (b+). The equations bound a real structure from above; with `gain_lower` and `decay_upper` the system
    also knows b' >= q_low theta - a_high b - delta for 0 <= b <= g, and hence what is certain to be kept.

    D is the set from which theta reaches 0. It also stays there where delta < a g (or a = delta = 0). Where a = 0 and
    delta > 0 the claim is only that theta reaches 0 in `time_to_zero`, at which the trainer removes the structure.

    Source: THEORY 4.3 and 4.4.

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
        _check(self, "price", "gain", "rate_ratio")
        _check(self, "decay", "drift", zero=True)
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
            return self.drift >= self.decay * self.price
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

        Source: THEORY 4.3, from V = mu b+ + q theta and V' <= mu (V - V*).

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

        Source: THEORY 4.4.

        Args:
            state: States (benefit, theta), shape (..., 2); here a negative benefit is never certain.

        Returns:
            Booleans, shape (...); all False without `gain_lower`, or where theta*_low >= 1.
        """
        state = check_state("state", state)
        return self._in_box(state) & (state[..., 1] > self.mirror_separatrix(state[..., 0])) & (state[..., 0] >= 0.0)

    def rest(self, state: Any) -> np.ndarray:
        state = np.asarray(state, dtype=np.float64)
        return _linear_rest(state[..., 0], self.gain * state[..., 1] + self.drift, self.decay)

    def _mirror(self) -> tuple[float, float]:
        """Keep probability theta*_low of the mirror saddle (`inf` where unknown) and its growth rate."""
        if not self.gain_lower:
            return np.inf, 0.0
        theta = (self.decay_upper * self.price + self.drift) / self.gain_lower
        return theta, float(growth_rate(self.decay_upper, self.rate_ratio, self.gain_lower))

    def _in_box(self, state: np.ndarray) -> np.ndarray:
        return (state[..., 1] >= 0.0) & (state[..., 1] <= 1.0)


def _check(system: PlanarSystem, *names: str, zero: bool = False) -> None:
    """Validate and convert the named fields of a frozen system."""
    for name in names:
        value = getattr(system, name)
        hint = "A structure without a price has no gate; give no system for it." if name == "price" else None
        value = check_nonnegative(name, value) if zero else check_positive(name, value, hint=hint)
        object.__setattr__(system, name, value)


def _linear_rest(x: np.ndarray, source: np.ndarray, decay: float) -> np.ndarray:
    """Limit of x' = source - decay x for a non-negative source."""
    if decay > 0.0:
        with np.errstate(over="ignore"):
            return source / decay
    return np.where(source > 0.0, np.inf, x)

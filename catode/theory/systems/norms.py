"""The comparison systems in norm coordinates: `LayerSystem` (norm of a layer's weights) and `UnitSystem` (of a unit's).

Source: docs/mathematics.md sections 4.1 and 4.2; the domains D_B and D_U are Theorems 3.2 and 3.3 of arXiv:2411.09127,
these forms are derived.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from catode._validate import check_real, check_state
from catode.theory.systems.planar import PlanarSystem, check_fields, growth_rate, linear_rest

__all__ = ["LayerSystem", "UnitSystem"]


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

    Source: docs/mathematics.md section 4.1; the domain D_B of Theorem 3.2 of arXiv:2411.09127, this form derived.

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
        check_fields(self, "price", "rate_ratio", "grad_bound", "benefit_slope")
        check_fields(self, "weight_decay", zero=True)

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
        return linear_rest(state[..., 0], self.grad_bound * state[..., 1], self.weight_decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitSystem(_NormSystem):
    """A unit in norm coordinates (u, theta): u' = 2 u (kappa theta - lambda), theta' = rho (kappa u / 2 - g).

    u = |w_in|^2 + |w_out|^2, with |b| <= kappa |w_in| |w_out| and each gradient at most kappa times the other norm.

    Source: docs/mathematics.md section 4.2; the domain D_U of Theorem 3.3 of arXiv:2411.09127, this form derived.

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
        check_fields(self, "price", "rate_ratio", "benefit_slope")
        check_fields(self, "weight_decay", zero=True)

    @property
    def saddle(self) -> tuple[float, float]:
        return 2.0 * self.price / self.benefit_slope, self.weight_decay / self.benefit_slope

    @property
    def growth_rate(self) -> float:
        product = 2.0 * self.rate_ratio * self.benefit_slope * self.price
        if 1e-290 < product < 1e290:
            return float(np.sqrt(product))
        return float(np.sqrt(2.0 * self.rate_ratio) * np.sqrt(self.benefit_slope) * np.sqrt(self.price))

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


def _excess(d: np.ndarray) -> np.ndarray:
    """Return d - log(1 + d), accurately near d = 0 and +inf at d = -1."""
    near = np.abs(d) < 0.01
    small = np.where(near, d, 0.0)
    series = np.zeros_like(small)
    for k in range(10, 1, -1):
        series = series * small + (1.0 if k % 2 == 0 else -1.0) / k
    with np.errstate(divide="ignore"):
        return np.where(near, small * small * series, d - np.log1p(d))

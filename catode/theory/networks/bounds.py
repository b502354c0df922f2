"""Proven constants of small real networks, and the domains that follow from them by the comparison systems.

A structure (the whole block, or one unit of it) of a `GatedNetwork` of one block adds M(x) = W_out f(W_in x) to the
output, where |f(z)| <= |z| and |f'| <= 1. Write s = |W_in|, t = |W_out|, r^2 = s^2 + t^2 <= R^2 (so s t <= r^2/2), e0
for the derivative of the loss by the output without the structure, e1 with it, and H for the Lipschitz constant of that
derivative: 1 for the squared loss, 1/4 for the logistic. Then, averaged over examples and over the gates of the others,

    |M(x)| <= s t |x|,   |e1| <= |e0| + H s t |x|,   |grad_in L1| <= kappa t,   |grad_out L1| <= kappa s,
    kappa = A + (H/2) R^2 m,   A = mean |e0| |x|,   m = mean |x|^2

(for the identity A may be the spectral norm of mean e0 x^T). Everything that docs/mathematics.md section 4 asks for
follows:

* 4.1 |grad L1| <= kappa R = eta, and |b| <= A s t + (H/2) m (s t)^2 <= (R/2)(A + (H/4) R^2 m) r.
* 4.2 |b| <= kappa s t.
* 4.3 q = eta^2. For f homogeneous, w.grad L1 = 2 dL/dxi at xi = 1, at most -2 b + H mean |M|^2: hence a = 2 lambda and
  delta = lambda H m R^4 / 4. For tanh, 0 <= f - z f' <= min(z, 2 z^3 / 3) for z > 0 adds to delta.

At the kink of the relu every slope in [0, 1] satisfies all of this. Each is a sum of products of non-negative numbers,
raised by 1e-12 of itself; e0, the one difference, is raised by 1e-12 of the sizes it is the difference of. That is far
above the rounding error. That the real flow stays in the ball r <= R follows from the comparison solution: see
`Bounds.certifies`.

Source: docs/mathematics.md section 4; the constants are derived here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from catode._validate import check_choice, check_positive, fail
from catode.theory.networks.structure import UP, Structure, box_grid, box_starts
from catode.theory.systems.benefit import BenefitSystem
from catode.theory.systems.norms import LayerSystem, UnitSystem
from catode.theory.systems.planar import PlanarSystem

__all__ = ["COORDINATES", "Bounds", "bounds", "natural_radius"]

COORDINATES = ("layer", "unit", "benefit")
"""The comparison systems of docs/mathematics.md sections 4.1 to 4.3; a block with weights on both sides satisfies all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Proven constants of a structure on the ball r <= radius, and the domain that follows from them.

    Args:
        structure: What they describe.
        coordinates: Which comparison system they are meant for, one of `COORDINATES`.
        radius: Radius R of the ball.
        level: Highest cost of a start, nats, where the rest moves: it bounds the rest, |W|^2 <= 2 level / lambda.
        grad_bound: eta, at least |grad L1|.
        norm_slope: kappa of 4.1, at least |b| / r; also b <= A r^2 / 2.
        unit_slope: kappa of 4.2, at least |b| / (s t), |grad_in L1| / t and |grad_out L1| / s.
        gain: q, at least |grad L1|^2.
        decay: a of 4.3, 2 lambda.
        drift: delta of 4.3: lambda w.grad L1 <= -a b + delta. `inf` where the rest moves.
    """

    structure: Structure
    coordinates: str
    radius: float
    level: float | None
    grad_bound: float
    norm_slope: float
    unit_slope: float
    gain: float
    decay: float
    drift: float

    @functools.cached_property
    def system(self) -> PlanarSystem:
        """The comparison system with these constants.

        Raises:
            ValueError: in benefit coordinates where the rest moves, for then the drift has no bound here.
        """
        network = self.structure.network
        common = {"price": self.structure.price, "rate_ratio": network.rate_ratio}
        if self.coordinates == "benefit":
            if math.isinf(self.drift):
                fail("structure", "stand alone for benefit coordinates", self.coordinates, hint="Give `frozen`.")
            return BenefitSystem(**common, gain=self.gain, decay=self.decay, drift=self.drift)
        common["weight_decay"] = network.weight_decay
        if self.coordinates == "unit":
            return UnitSystem(**common, benefit_slope=self.unit_slope)
        return LayerSystem(**common, grad_bound=self.grad_bound, benefit_slope=self.norm_slope)

    def certifies(self, states: Any) -> np.ndarray:
        """Whether the real flow provably carries states of the network to theta = 0, where theta stays.

        True in the domain D of `system` where the comparison solution also keeps the weights in the ball, so that the
        constants hold all the way. With V, V* and mu of 4.1, r <= V_0 / mu. In 4.2, u stays below the larger of u_0 and
        its turning point, where H has its first value at theta = lambda / kappa. In 4.3, q theta <= V_t and
        V_t = V* - (V* - V_0) e^(mu t) until T, so that r <= r_0 + (eta / q)(V* T - V_0 / mu).

        Args:
            states: States of the network, shape (..., d).

        Returns:
            Booleans, shape (...).
        """
        structure, system = self.structure, self.system
        states = structure.check_states("states", states)
        size, theta = structure.norm(states), states[..., structure.theta]
        within = np.ones(size.shape, dtype=bool)
        if self.level is not None:
            within = structure.network.value(states) <= self.level
        if self.coordinates != "benefit":
            return within & self._certifies(size, theta)
        state = np.stack([structure.benefit(states), theta], axis=-1)
        mu, price = system.growth_rate, system.price
        value = mu * np.maximum(state[..., 0], 0.0) + self.gain * theta
        top = price * (mu + self.decay) - self.drift
        inside = system.contains(state)
        path = np.where(inside, top * np.where(inside, system.time_to_zero(state), 0.0) - value / mu, np.inf)
        return inside & (size + path * self.grad_bound / self.gain <= self.radius)

    def _certifies(self, size: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """The same from the norm r and theta, in the coordinates "layer" and "unit"."""
        system = self.system
        if self.coordinates == "layer":
            reach = size + system.grad_bound * theta / system.growth_rate
            return system.contains(np.stack([size, theta], axis=-1)) & (reach <= self.radius)
        kappa, g, limit = self.unit_slope, system.price, self.radius**2
        u, rise = size**2, np.maximum(theta - system.saddle[1], 0.0)
        with np.errstate(divide="ignore"):
            room = system.rate_ratio * (0.5 * kappa * (u - limit) - g * np.log(u / limit))
        stays = (limit >= system.saddle[0]) | (kappa * rise**2 <= room)
        return system.contains(np.stack([u, theta], axis=-1)) & (u <= limit) & stays

    def share(self, n: int = 400, *, seed: int = 0) -> float:
        """Certified share of the box r <= `networks.usual_norm`, 0 <= theta <= 1.

        Args:
            n: Points along each side of the grid of midpoints.
            seed: Seed of the directions, which matter in benefit coordinates only.
        """
        if self.coordinates == "benefit":
            return float(np.mean(self.certifies(box_starts(self.structure, n, seed))))
        return float(np.mean(self._certifies(*box_grid(self.structure, n))))


def bounds(
    structure: Structure, coordinates: str | None = None, *, radius: float | None = None, level: float | None = None
) -> Bounds:
    """Compute the constants eta, kappa, q, a and delta of a structure, each a proven bound on a ball.

    Source: docs/mathematics.md section 4; derived in the docstring of this module.

    Args:
        structure: What to bound.
        coordinates: "layer", "unit" or "benefit"; None for what the structure is.
        radius: Radius R of the ball; None for `natural_radius`.
        level: Highest cost at which a start counts, nats; needed where the rest moves, and only there.

    Returns:
        The bounds.

    Raises:
        ValueError: if an argument is out of range, or the rest moves without a level or without weight decay.

    Example:
        >>> from catode.theory.networks.gated import GatedNetwork
        >>> network = GatedNetwork(inputs=[[1.0]], targets=[[2.0]], widths=(1,), prices=0.1, gated="layers")
        >>> found = bounds(Structure(network), radius=1.0)
        >>> round(found.grad_bound, 6), round(found.norm_slope, 6), found.radius
        (1.5, 0.625, 1.0)
    """
    default = structure.network.gated[:-1]
    coordinates = default if coordinates is None else check_choice("coordinates", coordinates, COORDINATES)
    if radius is None:
        radius = natural_radius(structure, coordinates, level=level)
    radius = check_positive("radius", radius)
    network = structure.network
    decay, curvature = network.weight_decay, structure.curvature
    pull, square, cube, fourth = structure.moments(_rest(structure, level))
    half = 0.5 * radius**2
    slope = pull + curvature * half * square
    drift = decay * curvature * square * half**2
    if network.activation == "tanh":  # mean |e1| |W_out (f - z f')|, where s^3 t <= 3 sqrt(3) R^4 / 16
        bend = math.sqrt(3.0) / 8.0 * radius**4 * (cube + curvature * half * fourth)
        drift += decay * min(slope * half, bend)
    return Bounds(
        structure=structure,
        coordinates=coordinates,
        radius=radius,
        level=level,
        grad_bound=UP * slope * radius,
        norm_slope=UP * 0.5 * radius * (pull + 0.5 * curvature * half * square),
        unit_slope=UP * slope,
        gain=UP**3 * (slope * radius) ** 2,
        decay=2.0 * decay,
        drift=UP * drift if structure.isolated else math.inf,
    )


def _rest(structure: Structure, level: float | None) -> float:
    """Bound on the squared norm of all weights that move: (lambda/2) |W|^2 is part of the cost, as are terms >= 0."""
    if structure.isolated:
        if level is not None:
            fail("level", "be None where nothing else moves", level)
        return 0.0
    if level is None:
        fail("level", "be a number where the rest moves", None, hint="Give the highest cost of a start.")
    decay = structure.network.weight_decay
    if decay == 0.0:
        fail("weight_decay", "be positive where the rest moves", decay, hint="Without it nothing bounds the rest.")
    return 2.0 * check_positive("level", level) / decay


def natural_radius(structure: Structure, coordinates: str, *, level: float | None = None) -> float:
    """Radius of the ball that the domain fills.

    For the layer V* / mu = R, for the unit u* = R^2: the least ball that holds every state which the comparison
    solution visits from D. In benefit coordinates half of the ball is for the start and half for the way of one with
    b = 0, V_0 = V* / 2: (eta / q)(V* / mu)(log 2 - 1/2) = R / 2; or, where smaller, the ball with delta = a g / 2, for D
    is empty from delta = a g. Each left side falls with R and delta rises, so there is one such R. A smaller ball would
    cut the domain off, a larger one make the constants worse.

    Args:
        structure: What to bound.
        coordinates: One of `COORDINATES`.
        level: Highest cost of a start, as in `bounds`.

    Returns:
        The radius, raised by at most a relative 1e-9.
    """
    low, high = 1e-9, 1e9
    while high > low * (1.0 + 1e-9):
        radius = math.sqrt(low * high)
        found = bounds(structure, coordinates, radius=radius, level=level)
        size, theta = found.system.saddle
        if coordinates == "unit":
            filled = math.sqrt(size)
        elif coordinates == "layer":
            filled = size + found.grad_bound * theta / found.system.growth_rate
        elif found.drift > 0.5 * found.decay * found.system.price:
            filled = 0.0
        else:
            filled = (2.0 * math.log(2.0) - 1.0) / found.grad_bound
            filled *= size + found.gain * theta / found.system.growth_rate
        low, high = (radius, high) if filled > radius else (low, radius)
    return high

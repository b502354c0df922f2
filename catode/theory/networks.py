"""Small real networks against the comparison systems: proven constants, proven domains, and how cautious they are.

A structure (the whole block, or one unit of it) of a `GatedNetwork` of one block adds M(x) = W_out f(W_in x) to the
output, where |f(z)| <= |z| and |f'| <= 1. Write s = |W_in|, t = |W_out|, r^2 = s^2 + t^2 <= R^2 (so s t <= r^2/2), e0
for the derivative of the loss by the output without the structure, e1 with it, and H for the Lipschitz constant of that
derivative: 1 for the squared loss, 1/4 for the logistic. Then, averaged over examples and over the gates of the others,

    |M(x)| <= s t |x|,   |e1| <= |e0| + H s t |x|,   |grad_in L1| <= kappa t,   |grad_out L1| <= kappa s,
    kappa = A + (H/2) R^2 m,   A = mean |e0| |x|,   m = mean |x|^2

(for the identity A may be the spectral norm of mean e0 x^T). Everything that THEORY section 4 asks for follows:

* 4.1 |grad L1| <= kappa R = eta, and |b| <= A s t + (H/2) m (s t)^2 <= (R/2)(A + (H/4) R^2 m) r.
* 4.2 |b| <= kappa s t.
* 4.3 q = eta^2. For f homogeneous, w.grad L1 = 2 dL/dxi at xi = 1, at most -2 b + H mean |M|^2: hence a = 2 lambda and
  delta = lambda H m R^4 / 4. For tanh, 0 <= f - z f' <= min(z, 2 z^3 / 3) for z > 0 adds to delta.

At the kink of the relu every slope in [0, 1] satisfies all of this. Each is a sum of products of non-negative numbers,
raised by 1e-12 of itself; e0, the one difference, is raised by 1e-12 of the sizes it is the difference of. That is far
above the rounding error. That the real flow stays in the ball r <= R follows from the comparison solution: see
`Bounds.certifies`.

Source: THEORY section 4; the constants are derived here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from scipy.special import expit

from catode._validate import (
    check_choice,
    check_int,
    check_positive,
    check_real,
    check_shape,
    fail,
)
from catode.theory.symbolic import GatedNetwork
from catode.theory.systems import BenefitSystem, LayerSystem, PlanarSystem, UnitSystem

__all__ = [
    "COORDINATES",
    "Bounds",
    "Coverage",
    "Runs",
    "Structure",
    "bounds",
    "coverage",
    "draw",
    "follow",
    "natural_radius",
    "usual_norm",
]

COORDINATES = ("layer", "unit", "benefit")
"""The comparison systems of THEORY 4.1, 4.2 and 4.3. A block with weights on both sides satisfies all three."""

_ACTIVATIONS = {"identity": lambda z: z, "tanh": np.tanh, "relu": lambda z: np.maximum(z, 0.0)}
_CURVATURE = {"squared": 1.0, "logistic": 0.25}
_LONGEST = 200.0  # time in which a useless structure of a drawn network goes, at most
_ROUNDING = 1e-12  # more than the relative rounding error of a few dozen operations on non-negative numbers
_UP = 1.0 + _ROUNDING


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """One gated structure of a network of one block: the block itself, or one unit. A `flow.Flow` where the rest stands.

    Its states are (weights of the structure, theta); those of the network hold everything.

    Args:
        network: One block, gated in its "layers" or its "units".
        gate: Position of the structure's gate in `network.keep_probs`.
        frozen: State of the network at which everything outside the structure stands still; None lets it move.

    Raises:
        ValueError: if the assumptions of the theorems do not hold (an activation that is not Lipschitz), the network
            has two blocks or both kinds of gates, or a state is not one of the network.
    """

    network: GatedNetwork
    gate: int = 0
    frozen: Any = None

    def __post_init__(self) -> None:
        network = self.network
        check_choice("activation", network.activation, _ACTIVATIONS, mend="The bounds need a Lipschitz activation.")
        check_choice("gated", network.gated, ("layers", "units"), mend="Gate either the block or its units.")
        if len(network.widths) != 1:
            fail("widths", "describe one block", network.widths)
        object.__setattr__(self, "gate", check_int("gate", self.gate, low=0, high=len(network.keep_probs) - 1))
        if self.frozen is not None:
            frozen = self.check_states("frozen", self.frozen)
            check_shape("frozen", frozen, f"({len(network.state)},)", frozen.ndim == 1)
            object.__setattr__(self, "frozen", frozen)

    @functools.cached_property
    def weights(self) -> np.ndarray:
        """Positions of the structure's weights in the network's state: W_in row by row, then W_out."""
        width, d = self.network.widths[0], len(self.network.inputs[0])
        inward = np.arange(width * d).reshape(width, d)
        outward = width * d + np.arange(width * d).reshape(d, width)
        if self.network.gated == "units":
            inward, outward = inward[self.gate], outward[:, self.gate]
        return np.concatenate([inward.ravel(), outward.ravel()])

    @property
    def theta(self) -> int:
        """Position of the structure's keep probability in the network's state."""
        return len(self.network.weights) + self.gate

    @property
    def price(self) -> float:
        """Complexity cost g of keeping the structure, nats."""
        return self.network.prices[self.gate]

    @functools.cached_property
    def moves(self) -> np.ndarray:
        """Which entries of the network's state move, shape (d,)."""
        moves = np.ones(len(self.network.state), dtype=bool)
        if self.frozen is not None:
            moves[:] = False
            moves[[*self.weights, self.theta]] = True
        return moves

    @property
    def isolated(self) -> bool:
        """Whether nothing outside the structure moves."""
        return int(self.moves.sum()) == len(self.weights) + 1

    def check_states(self, name: str, states: Any) -> np.ndarray:
        """Return `states` as states of the network, shape (..., d), keep probabilities in [0, 1].

        Raises:
            ValueError: if they are not.
        """
        states, d, k = check_real(name, states, array=True), len(self.network.state), len(self.network.weights)
        check_shape(name, states, f"(..., {d})", states.ndim > 0 and states.shape[-1] == d)
        outside = np.argwhere((states[..., k:] < 0.0) | (states[..., k:] > 1.0))
        if outside.size:
            index = (*map(int, outside[0][:-1]), k + int(outside[0][-1]))
            fail(name, "hold keep probabilities in [0, 1]", states[index], index=index)
        return states

    def embed(self, weights: Any, theta: Any) -> np.ndarray:
        """States of the network with these weights and keep probability of the structure, the rest where it stands.

        Args:
            weights: Shape (..., k).
            theta: Shape (...).

        Returns:
            States, shape (..., d).

        Raises:
            ValueError: if the rest moves.
        """
        if not self.isolated:
            fail("frozen", "be a state of the network here", None, mend="Only then is the rest known.")
        weights, theta = np.asarray(weights, dtype=np.float64), np.asarray(theta, dtype=np.float64)
        rest = np.zeros(len(self.network.state)) if self.frozen is None else self.frozen
        states = np.tile(rest, (*weights.shape[:-1], 1))
        states[..., self.weights], states[..., self.theta] = weights, theta
        return states

    def norm(self, states: Any) -> np.ndarray:
        """Norm r of the structure's weights in states of the network, shape (...)."""
        return np.sqrt(np.sum(np.asarray(states)[..., self.weights] ** 2, axis=-1))

    def benefit(self, states: Any) -> np.ndarray:
        """Expected loss without minus with the structure, nats, shape (...)."""
        without = np.array(states, dtype=np.float64)
        kept = without.copy()
        without[..., self.theta], kept[..., self.theta] = 0.0, 1.0
        return self.network.value(without) - self.network.value(kept) + self.price

    def field(self, state: Any) -> np.ndarray:
        """Raw velocity of (weights, theta), shape (..., k + 1); the rest stands."""
        return self.network.field(self._whole(state))[..., [*self.weights, self.theta]]

    def jacobian(self, state: Any) -> np.ndarray:
        """Derivative of `field`, shape (..., k + 1, k + 1)."""
        mine = [*self.weights, self.theta]
        return self.network.jacobian(self._whole(state))[..., mine, :][..., mine]

    def project(self, state: Any) -> np.ndarray:
        """Nearest state of (weights, theta) with theta in [0, 1]."""
        state = np.array(state, dtype=np.float64)
        state[..., -1] = np.clip(state[..., -1], 0.0, 1.0)
        return state

    def rest(self, state: Any) -> np.ndarray:
        """Limit of the weights at theta = 0; at theta = 1 it is unknown, and 0 never claims that a state is kept."""
        state = np.asarray(state, dtype=np.float64)
        still = (self.network.weight_decay == 0.0) & (state[..., -1:] == 0.0)
        return np.where(still, state[..., :-1], 0.0)

    def _whole(self, state: Any) -> np.ndarray:
        state = np.asarray(state, dtype=np.float64)
        return self.embed(state[..., :-1], state[..., -1])

    def moments(self, rest: float = 0.0) -> tuple[float, float, float, float]:
        """Upper bounds on A, m, mean |e0| |x|^3 and mean |x|^4, over all that the others may do.

        Args:
            rest: Bound on the squared norm of the other weights where they move.
        """
        network = self.network
        x = np.asarray(network.inputs)
        size = np.linalg.norm(x, axis=1)
        slopes = self._slopes
        others = self._others @ self._others  # units add at most half of their squared norm times |x| to the output
        error = _ROUNDING * (size * (1.0 + 0.5 * others) + np.linalg.norm(network.targets, axis=1))
        pull = self._odds @ np.linalg.norm(slopes, axis=-1) + error
        if not self.isolated:
            pull += 0.5 * _CURVATURE[network.loss] * rest * size
        first = np.mean(pull * size)
        if self.isolated and network.activation == "identity":
            slope = np.tensordot(self._odds, slopes, 1)
            first = np.linalg.norm(slope.T @ x, 2) / len(x) + np.mean(error * size)
        return tuple(_UP * float(value) for value in (first, *(np.mean(v) for v in (size**2, pull * size**3, size**4))))

    @property
    def _others(self) -> np.ndarray:
        """All weights where they stand still; zeros where they move."""
        k = len(self.network.weights)
        return np.zeros(k) if self.frozen is None else self.frozen[:k]

    def _slope(self, output: np.ndarray) -> np.ndarray:
        """Derivative of the loss of each example by its output."""
        target = np.asarray(self.network.targets)
        if self.network.loss == "squared":
            return output - target
        return -target * expit(-target * output)

    @property
    def _patterns(self) -> np.ndarray:
        """Gate patterns of the others, this gate at 0; a single one where they move or there are none."""
        patterns = self.network.patterns[self.network.patterns[:, self.gate] == 0.0]
        return patterns[:1] if self.frozen is None else patterns

    @property
    def _odds(self) -> np.ndarray:
        """Probability of each of these patterns."""
        if self.frozen is None:
            return np.ones(1)
        theta = self.frozen[len(self.network.weights) :]
        odds = np.where(self._patterns == 1.0, theta, 1.0 - theta)
        return np.prod(np.delete(odds, self.gate, axis=1), axis=1)

    @functools.cached_property
    def _slopes(self) -> np.ndarray:
        """e0 of each pattern and each example, shape (patterns, n, d); the others count as empty where they move."""
        x = np.asarray(self.network.inputs)
        (width,), d = self.network.widths, x.shape[1]
        inward, outward = self._others.reshape(2, -1)
        hidden = _ACTIVATIONS[self.network.activation](x @ inward.reshape(width, d).T)
        # In a gated block the only pattern is (0), which broadcasts over all units.
        return np.stack([self._slope(x + (hidden * gates) @ outward.reshape(d, width).T) for gates in self._patterns])


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
                fail("structure", "stand alone for benefit coordinates", self.coordinates, mend="Give `frozen`.")
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
        """Certified share of the box r <= `usual_norm`, 0 <= theta <= 1.

        Args:
            n: Points along each side of the grid of midpoints.
            seed: Seed of the directions, which matter in benefit coordinates only.
        """
        if self.coordinates == "benefit":
            return float(np.mean(self.certifies(_starts(self.structure, n, seed))))
        return float(np.mean(self._certifies(*_box(self.structure, n))))


def bounds(
    structure: Structure, coordinates: str | None = None, *, radius: float | None = None, level: float | None = None
) -> Bounds:
    """Compute the constants eta, kappa, q, a and delta of a structure, each a proven bound on a ball.

    Source: THEORY section 4; derived in the docstring of this module.

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
    decay, curvature = network.weight_decay, _CURVATURE[network.loss]
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
        grad_bound=_UP * slope * radius,
        norm_slope=_UP * 0.5 * radius * (pull + 0.5 * curvature * half * square),
        unit_slope=_UP * slope,
        gain=_UP**3 * (slope * radius) ** 2,
        decay=2.0 * decay,
        drift=_UP * drift if structure.isolated else math.inf,
    )


def _rest(structure: Structure, level: float | None) -> float:
    """Bound on the squared norm of all weights that move: (lambda/2) |W|^2 is part of the cost, as are terms >= 0."""
    if structure.isolated:
        if level is not None:
            fail("level", "be None where nothing else moves", level)
        return 0.0
    if level is None:
        fail("level", "be a number where the rest moves", None, mend="Give the highest cost of a start.")
    decay = structure.network.weight_decay
    if decay == 0.0:
        fail("weight_decay", "be positive where the rest moves", decay, mend="Without it nothing bounds the rest.")
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


def usual_norm(structure: Structure) -> float:
    """Twice the root mean square of r = |w| under Glorot's initialisation, variance 2 / (d + width) of each weight.

    The side of the box on which domains are measured: it knows nothing of the data, the price or the bounds, and holds
    the initial state and, in the networks of the tests, the trained ones.
    """
    d = len(structure.network.inputs[0])
    return 2.0 * math.sqrt(len(structure.weights) * 2.0 / (d + structure.network.widths[0]))


@dataclasses.dataclass(frozen=True, eq=False)
class Runs:
    """How the real projected flow ended from many starts.

    Args:
        labels: 1 pruned, 0 not, -1 undecided at the horizon, shape (n,).
        ends: Last states of the network, shape (n, d).
        times: Their times, shape (n,).
        widest: Largest norm r on the way, shape (n,).
    """

    labels: np.ndarray
    ends: np.ndarray
    times: np.ndarray
    widest: np.ndarray


def follow(structure: Structure, states: Any, horizon: float = 1e3, *, rtol: float = 1e-5, settle: bool = True) -> Runs:
    """Follow the real projected flow of the network, all its moving weights and keep probabilities, from many starts.

    Runge-Kutta 5(4), each start with its own step. A start ends as pruned once theta = 0 and A r^2 / 2 < g: there b < g,
    r no longer grows, and so theta stays (for weight decay > 0 the weights then go to 0). Where nothing else moves it
    ends as not pruned once its cost is below that of the removed state, for the cost never rises. Up to the error of
    integration both are proofs. A state with theta = 1 that has come to rest, every speed below ten times `rtol` (its
    steps reach no smaller one), also counts as not pruned. The relu gets steps of at least 0.2, or half a time
    constant: along its kinks the flow slides, which steps can only follow by crossing to and fro.

    Args:
        structure: The structure to watch.
        states: Starts, states of the network, shape (n, d).
        horizon: Time at which a start is given up as undecided.
        rtol: Relative tolerance, also absolute.
        settle: Stop a start at its proof; otherwise go on to the horizon, and judge the last state.

    Returns:
        Labels, last states and times.

    Raises:
        ValueError: if the starts are not states of the network, or a number is not positive.
    """
    from scipy.integrate import RK45

    states = structure.check_states("states", states)
    check_shape("states", states, f"(n, {len(structure.network.state)})", states.ndim == 2)
    horizon, rtol = check_positive("horizon", horizon), check_positive("rtol", rtol)
    network, moves, theta = structure.network, structure.moves, structure.theta
    faces = slice(len(network.weights), None)
    rest = 0.0
    if not structure.isolated and network.weight_decay > 0.0:
        rest = 2.0 * float(network.value(states).max()) / network.weight_decay
    pull, square = structure.moments(rest)[:2]
    removed = np.inf
    if structure.isolated:
        removed = float(network.value(structure.embed(np.zeros(len(structure.weights)), 0.0))) - 1e-6
    provable = structure.isolated or network.weight_decay > 0.0

    def clip(y: np.ndarray) -> np.ndarray:
        y[:, faces] = np.clip(y[:, faces], 0.0, 1.0)
        return y

    def floor(y: np.ndarray) -> np.ndarray:
        if network.activation != "relu":
            return np.full(len(y), 1e-6)
        curvature = pull + 1.5 * _CURVATURE[network.loss] * square * structure.norm(y) ** 2
        return np.minimum(0.2, 0.5 / (network.weight_decay + curvature))

    def judge(y: np.ndarray, speed: np.ndarray) -> np.ndarray:
        label = np.full(len(y), -1)
        label[(y[:, theta] == 1.0) & np.all(np.abs(speed) < 10.0 * rtol, axis=1)] = 0
        if structure.isolated:
            label[network.value(y) < removed] = 0
        label[(y[:, theta] == 0.0) & (0.5 * pull * structure.norm(y) ** 2 < structure.price) & provable] = 1
        return label

    labels, ends, times = np.full(len(states), -1), states.copy(), np.zeros(len(states))
    widest = structure.norm(states)
    active = np.arange(len(states))
    y, step = states.copy(), np.full(len(states), 1e-3)
    speed = moves * network.projected_field(y)
    while active.size:
        h = np.minimum(step, horizon - times[active])
        stages = np.empty((7, *y.shape))
        stages[0] = speed
        for i in range(1, 7):
            row = RK45.A[i, :i] if i < 6 else RK45.B
            z = y + h[:, None] * np.tensordot(row, stages[:i], 1)
            stages[i] = moves * network.projected_field(clip(z))
        error = h * np.max(np.abs(np.tensordot(RK45.E, stages, 1)) / (rtol * (1.0 + np.abs(y))), axis=1)
        good = (error <= 1.0) | (h <= floor(y))
        y, speed = np.where(good[:, None], (z, stages[6]), (y, speed))
        times[active] += np.where(good, h, 0.0)
        step = np.maximum(h * np.clip(0.9 * np.maximum(error, 1e-10) ** -0.2, 0.2, 5.0), floor(y))
        widest[active] = np.maximum(widest[active], structure.norm(y))
        late = times[active] >= horizon * (1.0 - 1e-12)
        found = judge(y, speed) if settle or late.any() else np.full(len(y), -1)
        over = late | (settle & (found >= 0))
        labels[active[over]], ends[active[over]] = found[over], y[over]
        active, y, speed, step = (array[~over] for array in (active, y, speed, step))
    return Runs(labels, ends, times, widest)


@dataclasses.dataclass(frozen=True, eq=False)
class Coverage:
    """How much of what really converges the closed form certifies, in the box r <= `usual_norm`, 0 <= theta <= 1.

    Args:
        bounds: The bounds on trial.
        starts: States of the network: a grid of midpoints in (r, theta), each with a direction at random, shape (n, d).
        certified: Which starts the bounds certify, shape (n,).
        runs: How the real flow ended from each.
    """

    bounds: Bounds
    starts: np.ndarray
    certified: np.ndarray
    runs: Runs

    def under(self, other: Bounds) -> Coverage:
        """The same runs with other bounds of the same structure on trial."""
        return dataclasses.replace(self, bounds=other, certified=other.certifies(self.starts))

    @property
    def certified_share(self) -> float:
        """Share of the box that is certified."""
        return float(np.mean(self.certified))

    @property
    def pruned_share(self) -> float:
        """Share of the box from which the structure really goes."""
        return float(np.mean(self.runs.labels == 1))

    @property
    def undecided_share(self) -> float:
        """Share of the box undecided at the horizon; it counts as not pruned."""
        return float(np.mean(self.runs.labels == -1))

    @property
    def ratio(self) -> float:
        """Certified share over pruned share, 1 for a bound that loses nothing; 0 where nothing is pruned."""
        return self.certified_share / self.pruned_share if self.pruned_share > 0.0 else 0.0

    @property
    def violations(self) -> int:
        """Starts that are certified but did not converge: 0 unless a bound is wrong or the horizon too short."""
        return int(np.sum(self.certified & (self.runs.labels != 1)))


def coverage(found: Bounds, *, n: int = 20, seed: int = 0, horizon: float = 1e3) -> Coverage:
    """Compare the certified domain with the set of starts that the real projected flow prunes.

    Args:
        found: Bounds from `bounds`, of a structure with nothing else that moves.
        n: Grid points along each side of the box.
        seed: Seed of the directions.
        horizon: Time at which a start is given up as undecided.

    Returns:
        The comparison.

    Raises:
        ValueError: if the rest moves, or a number is out of range.
    """
    structure = found.structure
    if not structure.isolated:
        fail("found", "bound a structure with nothing else that moves", found.coordinates, mend="Give `frozen`.")
    starts = _starts(structure, n, seed)
    return Coverage(found, starts, found.certifies(starts), follow(structure, starts, horizon))


def _box(structure: Structure, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Norms r and keep probabilities on a grid of midpoints of the box, each of shape (n^2,)."""
    grid = (np.arange(check_int("n", n, low=1)) + 0.5) / n
    r, theta = np.meshgrid(grid * usual_norm(structure), grid)
    return r.ravel(), theta.ravel()


def _starts(structure: Structure, n: int, seed: int) -> np.ndarray:
    """States of the network on that grid, each with weights in a direction at random, shape (n^2, d)."""
    r, theta = _box(structure, n)
    directions = np.random.default_rng(check_int("seed", seed, low=0)).normal(size=(n * n, len(structure.weights)))
    directions *= (r / np.linalg.norm(directions, axis=1))[:, None]
    return structure.embed(directions, theta)


def draw(seed: int, kind: str = "layer", *, width: int | None = None) -> Structure:
    """Draw a small network and one structure of it at random.

    Sizes, activation and loss are uniform over what `GatedNetwork` admits (at most 4 examples, Lipschitz activations);
    inputs are normal, targets those of a network of the same shape with Glorot weights and a noise of 0.1 (their signs
    for the logistic loss). The weight decay is log-uniform in [0.01, 0.3], the rate ratio in [0.3, 3], the price in
    [0.03, 0.3] of the loss of the empty network; where a useless structure would take longer than 200 to go from 1 to
    0, 1 / (rho g), the rate ratio is raised so that it takes 200. The other units stand at the weights of that network,
    with keep probabilities that are 1 or uniform.

    Args:
        seed: Seed of everything.
        kind: "layer", the whole block, or "unit", the first of its units.
        width: Hidden units; None for 1 to 3 at random.

    Returns:
        The structure in its network.

    Raises:
        ValueError: if an argument is out of range.
    """
    rng = np.random.default_rng(check_int("seed", seed, low=0))
    kind = check_choice("kind", kind, ("layer", "unit"))
    drawn = int(rng.integers(1, 4))
    width = drawn if width is None else check_int("width", width, low=1, high=3)
    d, n = int(rng.integers(1, 3)), int(rng.integers(2, 5))
    activation, loss = str(rng.choice(list(_ACTIVATIONS))), str(rng.choice(list(_CURVATURE)))
    inputs = rng.normal(size=(n, d)).round(2)
    weights = rng.normal(size=2 * width * d) * math.sqrt(2.0 / (d + width))
    inward, outward = weights[: width * d].reshape(width, d), weights[width * d :].reshape(d, width)
    targets = inputs + _ACTIVATIONS[activation](inputs @ inward.T) @ outward.T
    targets = (targets + 0.1 * rng.normal(size=(n, d))).round(2)
    if loss == "logistic":
        targets = np.where(targets >= 0.0, 1.0, -1.0)
        empty = np.logaddexp(0.0, -targets * inputs).sum(axis=1).mean()
    else:
        empty = 0.5 * np.sum((inputs - targets) ** 2, axis=1).mean()
    decay, ratio, price = np.exp(rng.uniform(np.log([0.01, 0.3, 0.03]), np.log([0.3, 3.0, 0.3])))
    network = GatedNetwork(
        inputs=inputs,
        targets=targets,
        widths=(width,),
        prices=float(price * empty),
        weight_decay=float(decay),
        rate_ratio=float(max(ratio, 1.0 / (_LONGEST * price * empty))),
        activation=activation,
        loss=loss,
        gated=f"{kind}s",
    )
    theta = np.where(rng.random(width) < 0.5, 1.0, rng.random(width))
    return Structure(network, 0, np.append(weights, theta[: len(network.keep_probs)]))

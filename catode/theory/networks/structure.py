"""Small real networks: one structure of a `GatedNetwork`, the box of its states, and networks drawn at random.

A structure (the whole block, or one unit of it) of a `GatedNetwork` of one block adds M(x) = W_out f(W_in x) to the
output, where |f(z)| <= |z| and |f'| <= 1. What is proven of it, from `Structure.moments` on, is in `network_bounds`; what
its real flow does, in `network_runs`.

Source: docs/mathematics.md section 4.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from scipy.special import expit

from catode._validate import check_choice, check_int, check_real, check_shape, fail
from catode.theory.networks.gated import GatedNetwork

__all__ = ["UP", "Structure", "box_grid", "box_starts", "draw", "usual_norm"]

_ACTIVATIONS = {"identity": lambda z: z, "tanh": np.tanh, "relu": lambda z: np.maximum(z, 0.0)}
_CURVATURE = {"squared": 1.0, "logistic": 0.25}
_LONGEST = 200.0  # time in which a useless structure of a drawn network goes, at most
_ROUNDING = 1e-12  # more than the relative rounding error of a few dozen operations on non-negative numbers
UP = 1.0 + _ROUNDING
"""Factor that lifts a computed bound above its rounding error."""


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
        check_choice("activation", network.activation, _ACTIVATIONS, hint="The bounds need a Lipschitz activation.")
        check_choice("gated", network.gated, ("layers", "units"), hint="Gate either the block or its units.")
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

    @property
    def curvature(self) -> float:
        """Lipschitz constant H of the derivative of the loss by the output."""
        return _CURVATURE[self.network.loss]

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
            fail("frozen", "be a state of the network here", None, hint="Only then is the rest known.")
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
        """Upper bounds on A, m (see `network_bounds`), mean |e0| |x|^3 and mean |x|^4, over all that the others may do.

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
            pull += 0.5 * self.curvature * rest * size
        first = np.mean(pull * size)
        if self.isolated and network.activation == "identity":
            slope = np.tensordot(self._odds, slopes, 1)
            first = np.linalg.norm(slope.T @ x, 2) / len(x) + np.mean(error * size)
        return tuple(UP * float(value) for value in (first, *(np.mean(v) for v in (size**2, pull * size**3, size**4))))

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


def usual_norm(structure: Structure) -> float:
    """Twice the root mean square of r = |w| under Glorot's initialisation, variance 2 / (d + width) of each weight.

    The side of the box on which domains are measured: it knows nothing of the data, the price or the bounds, and holds
    the initial state and, in the networks of the tests, the trained ones.
    """
    d = len(structure.network.inputs[0])
    return 2.0 * math.sqrt(len(structure.weights) * 2.0 / (d + structure.network.widths[0]))


def box_grid(structure: Structure, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Norms r and keep probabilities on a grid of midpoints of the box r <= `usual_norm`, 0 <= theta <= 1, each (n^2,)."""
    grid = (np.arange(check_int("n", n, low=1)) + 0.5) / n
    r, theta = np.meshgrid(grid * usual_norm(structure), grid)
    return r.ravel(), theta.ravel()


def box_starts(structure: Structure, n: int, seed: int) -> np.ndarray:
    """States of the network on `box_grid`, each with weights in a direction at random, shape (n^2, d)."""
    r, theta = box_grid(structure, n)
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

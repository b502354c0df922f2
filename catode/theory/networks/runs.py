"""The real flow of small networks, followed from many starts, and how much of what converges the bounds certify.

Source: docs/mathematics.md sections 3 (the projected flow) and 4 (the domains on trial).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from catode._validate import check_int, check_positive, check_shape, fail
from catode.theory.networks.bounds import Bounds
from catode.theory.networks.structure import Structure, box_starts

__all__ = ["Coverage", "Runs", "coverage", "follow"]


@dataclasses.dataclass(frozen=True, eq=False)
class Runs:
    """How the real projected flow ended from many starts.

    Args:
        labels: 1 pruned, 0 not, -1 undecided at the horizon or when its steps were used up, shape (n,).
        ends: Last states of the network, shape (n, d).
        times: Their times, shape (n,); below the horizon where the steps were used up.
        widest: Largest norm r on the way, shape (n,).
    """

    labels: np.ndarray
    ends: np.ndarray
    times: np.ndarray
    widest: np.ndarray


def follow(
    structure: Structure,
    states: Any,
    horizon: float = 1e3,
    *,
    rtol: float = 1e-5,
    settle: bool = True,
    max_steps: int = 100_000,
) -> Runs:
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
        max_steps: Steps, those tried in vain included, after which a start is given up as undecided.

    Returns:
        Labels, last states and times.

    Raises:
        ValueError: if the starts are not states of the network, or a number is not positive.
    """
    from scipy.integrate import RK45

    states = structure.check_states("states", states)
    check_shape("states", states, f"(n, {len(structure.network.state)})", states.ndim == 2)
    horizon, rtol = check_positive("horizon", horizon), check_positive("rtol", rtol)
    max_steps = check_int("max_steps", max_steps, low=1)
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
        curvature = pull + 1.5 * structure.curvature * square * structure.norm(y) ** 2
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
    for count in range(1, max_steps + 1):
        if not active.size:
            break
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
        over = late | (settle & (found >= 0)) | (count == max_steps)
        labels[active[over]], ends[active[over]] = found[over], y[over]
        active, y, speed, step = (array[~over] for array in (active, y, speed, step))
    return Runs(labels, ends, times, widest)


@dataclasses.dataclass(frozen=True, eq=False)
class Coverage:
    """How much of what really converges the closed form certifies, in the box r <= `networks.usual_norm`, 0 <= theta <= 1.

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
        found: Bounds from `network_bounds.bounds`, of a structure with nothing else that moves.
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
        fail("found", "bound a structure with nothing else that moves", found.coordinates, hint="Give `frozen`.")
    starts = box_starts(structure, n, seed)
    return Coverage(found, starts, found.certifies(starts), follow(structure, starts, horizon))

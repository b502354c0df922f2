"""The iterates of stochastic gradient descent themselves, their noise, and how far they are from the ODE.

One step of size tau of a comparison system, theta last in the state:

    size  <- size + tau F_size + sqrt(tau) sigma_b eta
    theta <- clip( theta + tau F_theta + sqrt(tau) sigma xi, 0, 1 )

with xi and eta of mean 0 and variance 1. For the update `clip(theta - tau rho (price + G_hat), 0, 1)` of
docs/mathematics.md section 3, F_theta = rho (b - price) and `sigma = sqrt(tau) rho sd(G_hat)`: one step moves theta by
noise of standard deviation sqrt(tau) sigma = tau rho sd(G_hat). These are the `noise` and `benefit_noise` of
`catode.theory.tolerance.derive`.

Source: docs/mathematics.md sections 3 (iterates and their limit) and 6.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from catode._validate import (
    check_bool,
    check_choice,
    check_int,
    check_interval,
    check_nonnegative,
    check_positive,
    check_real,
    check_shape,
    fail,
)
from catode.theory.flow.paths import integrate

__all__ = ["NORMAL", "Iterates", "Noise", "OdeError", "copies", "iterate", "ode_error", "skewed", "student_t"]


@dataclasses.dataclass(frozen=True)
class Noise:
    """A distribution of one step's noise, with mean 0 and variance 1.

    Args:
        name: What tables call it.
        sample: Function of a numpy Generator and a shape that returns independent draws.
    """

    name: str
    sample: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]

    def clipped(self, limit: float) -> Noise:
        """Return this noise clipped to at most `limit` standard deviations either way.

        The variance falls. The mean stays 0 for a symmetric noise; a skewed one is shifted against its long tail, which
        acts like a change of the price.

        Args:
            limit: Largest size of a draw, positive.

        Raises:
            ValueError: if `limit` is not positive.
        """
        limit = check_positive("limit", limit)
        return Noise(f"{self.name} clipped at {limit:g}", functools.partial(_draw_clipped, self.sample, limit))


# Functions of the module and not closures, so that a Noise can be pickled and sent to another process.


def _draw_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape)


def _draw_clipped(sample: Any, limit: float, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.clip(sample(rng, shape), -limit, limit)


def _draw_t(scale: float, degrees: float, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return scale * rng.standard_t(degrees, shape)


def _draw_jump(p: float, jump: float, rest: float, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.where(rng.random(shape) < p, jump, rest)


NORMAL = Noise("normal", _draw_normal)
"""Normal noise: what the bound with Phi assumes."""


def student_t(degrees: float) -> Noise:
    """Student's t noise, scaled to variance 1: heavy tails on both sides.

    Args:
        degrees: Degrees of freedom, above 2 (the variance is infinite otherwise).

    Raises:
        ValueError: if `degrees` does not exceed 2.
    """
    degrees = check_interval("degrees", degrees, 2.0, np.inf, True, True, hint="The variance is infinite otherwise.")
    scale = math.sqrt((degrees - 2.0) / degrees)
    return Noise(f"t({degrees:g})", functools.partial(_draw_t, scale, degrees))


def skewed(probability: float, side: int = 1) -> Noise:
    """Rare skewed noise: a jump sqrt((1-p)/p) with probability p, and -sqrt(p/(1-p)) otherwise.

    Args:
        probability: Probability p of a jump, in (0, 1).
        side: 1 for jumps of theta upwards (towards escape), -1 for downwards.

    Raises:
        ValueError: if an argument is out of range.
    """
    p = check_interval("probability", probability, 0.0, 1.0, True, True)
    side = check_choice("side", side, (1, -1))
    jump, rest = side * math.sqrt((1.0 - p) / p), -side * math.sqrt(p / (1.0 - p))
    return Noise(f"jumps {'up' if side > 0 else 'down'}, p={p:g}", functools.partial(_draw_jump, p, jump, rest))


@dataclasses.dataclass(frozen=True, eq=False)
class Iterates:
    """What `iterate` computed.

    Args:
        times: Times of the records, from 0 to the end, shape (m,).
        states: States at those times, theta last, shape (m, n, d); an absorbed replica keeps its last state.
        absorbed_at: Time at which theta reached 0, shape (n,); `inf` where it did not, or where it reflects there.
        status: "complete", or "failed" where states are not finite.
        message: One sentence that says the same, with numbers.
    """

    times: np.ndarray
    states: np.ndarray
    absorbed_at: np.ndarray
    status: str
    message: str

    @property
    def end(self) -> np.ndarray:
        """Last states, shape (n, d)."""
        return self.states[-1]


def iterate(
    system: Any,
    starts: Any,
    *,
    step_time: float,
    steps: int,
    noise: float = 0.0,
    benefit_noise: float = 0.0,
    correlation: float = 0.0,
    distribution: Noise = NORMAL,
    absorbing: bool = True,
    floor: bool = False,
    every: int | None = None,
    seed: int = 0,
) -> Iterates:
    """Run the stochastic iterates of many replicas at once.

    Source: docs/mathematics.md section 3; the module's docstring has the step and the scale of the noise.

    Args:
        system: A system with `field` and `project`, theta last in its states.
        starts: One state for each replica, shape (n, d), theta in [0, 1]; sizes outside the system's box are projected.
        step_time: ODE time tau of one step.
        steps: Number of steps.
        noise: Diffusion sigma of theta, time^-1/2.
        benefit_noise: Diffusion sigma_b of every other coordinate, in its unit times time^-1/2.
        correlation: Correlation of the two noises in one step, in [-1, 1]; 1 is the worst case of `derive`.
        distribution: Distribution of the standardised noise.
        absorbing: Stop a replica for good once its theta is 0; otherwise theta is clipped there and goes on.
        floor: Clip the sizes to the system's box as well, as the projected ODE does (a negative benefit becomes 0).
            Otherwise only theta is clipped, as the algorithm does: noise may carry a benefit below 0.
        every: Record the states every so many steps, and at the end; None for the first and last only.
        seed: Seed of the numpy Generator.

    Returns:
        The iterates. Overflow is a status, never an exception; sizes are capped at the largest float.

    Raises:
        ValueError: if `starts` are not finite states with theta in [0, 1], or a number is out of range.

    Example:
        >>> from catode.theory import BenefitSystem
        >>> system = BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0)
        >>> run = iterate(system, [[0.0, 0.05], [0.0, 0.5]], step_time=0.01, steps=1000)
        >>> run.absorbed_at.round(2).tolist()
        [0.53, inf]
    """
    starts = check_real("starts", starts, array=True)
    check_shape(
        "starts", starts, "(n, d) with n >= 1 and d >= 2", starts.ndim == 2 and starts.shape[0] >= 1 < starts.shape[1]
    )
    check_interval("theta of starts", starts[:, -1], 0.0, 1.0, array=True)
    tau = check_positive("step_time", step_time)
    steps = check_int("steps", steps, low=1)
    sigma, sigma_b = check_nonnegative("noise", noise), check_nonnegative("benefit_noise", benefit_noise)
    shared = check_interval("correlation", correlation, -1.0, 1.0)
    absorbing, floor = check_bool("absorbing", absorbing), check_bool("floor", floor)
    if not isinstance(distribution, Noise):
        fail("distribution", "be a Noise", distribution, hint="Choose e.g. NORMAL or student_t(3).")
    every = steps if every is None else check_int("every", every, low=1)
    rng = np.random.default_rng(check_int("seed", seed, low=0))

    huge = np.full(starts.shape[1], np.finfo(np.float64).max)
    low, high = (np.array(system.project(end)) if floor else end.copy() for end in (-huge, huge))
    low[-1], high[-1] = 0.0, 1.0
    full = np.array(system.project(starts), dtype=np.float64)
    absorbed_at = np.where(absorbing & (full[:, -1] <= 0.0), 0.0, np.inf)
    alive = np.flatnonzero(np.isinf(absorbed_at))
    state = full[alive]
    times, records = [0.0], [full.copy()]
    step, step_b = math.sqrt(tau) * sigma, math.sqrt(tau) * sigma_b
    with np.errstate(all="ignore"):
        for k in range(1, steps + 1):
            if state.size:
                move = tau * system.field(state)
                if step or step_b:
                    draw = distribution.sample(rng, (len(state),))
                    move[:, -1] += step * draw
                if step_b:
                    other = distribution.sample(rng, (len(state), state.shape[1] - 1))
                    move[:, :-1] += step_b * (shared * draw[:, None] + math.sqrt(1.0 - shared * shared) * other)
                state = state + move
                for column, bottom, top in zip(state.T, low.tolist(), high.tolist(), strict=True):
                    np.clip(column, bottom, top, out=column)  # scalar limits: several times as fast as arrays
                gone = state[:, -1] <= 0.0
                if absorbing and gone.any():
                    full[alive[gone]], absorbed_at[alive[gone]] = state[gone], k * tau
                    alive, state = alive[~gone], state[~gone]
            if k % every == 0 or k == steps:
                full[alive] = state
                times.append(k * tau)
                records.append(full.copy())
    failed = int(np.sum(~np.isfinite(full).all(axis=1)))
    status = "failed" if failed else "complete"
    message = (
        f"{failed} of {len(full)} replicas left the range of floats."
        if failed
        else f"{int(np.isfinite(absorbed_at).sum())} of {len(full)} replicas were absorbed by time {steps * tau:.6g}."
    )
    return Iterates(np.array(times), np.stack(records), absorbed_at, status, message)


@dataclasses.dataclass(frozen=True, eq=False)
class OdeError:
    """Distance of the iterates from the projected ODE as the step shrinks.

    Args:
        step_times: Step sizes tau, falling, shape (k,).
        errors: Root mean square over replicas of the largest distance at the check points, shape (k,).
        standard_errors: Standard errors of `errors` from the spread over replicas, shape (k,).
        order: Fitted exponent p of error ~ tau^p.
        order_error: Its standard error from `standard_errors`.
        status: "complete" or "failed".
        message: One sentence that says the same, with numbers.
    """

    step_times: np.ndarray
    errors: np.ndarray
    standard_errors: np.ndarray
    order: float
    order_error: float
    status: str
    message: str


def ode_error(
    system: Any,
    start: Any,
    *,
    horizon: float,
    steps: Iterable[int] = (64, 128, 256, 512, 1024),
    deviation: float = 0.0,
    benefit_deviation: float = 0.0,
    distribution: Noise = NORMAL,
    replicas: int = 200,
    seed: int = 0,
) -> OdeError:
    """Measure how fast the iterates approach the projected ODE: order tau without noise, sqrt(tau) with it.

    The noise of one draw stays the same as tau falls, so the diffusion is sqrt(tau) times the deviation. Theta
    reflects at 0 and sizes stay in the system's box, as in the ODE. A start on the separatrix has no such limit.

    Source: docs/mathematics.md section 6.

    Args:
        system: A system that `flow.integrate` accepts.
        start: Initial state, shape (d,).
        horizon: Time over which to compare.
        steps: Numbers of steps over the horizon, at least two different ones, each a multiple of 16.
        deviation: Standard deviation of one draw of theta's speed, rho sd(G_hat), 1/time.
        benefit_deviation: Standard deviation of one draw of the other speeds, in their unit over time.
        distribution: Distribution of the standardised noise.
        replicas: Number of replicas (one suffices, and is used, where there is no noise).
        seed: Seed of the numpy Generator.

    Returns:
        The errors and the fitted order. A numerical failure is a status.

    Raises:
        ValueError: if an argument is out of range.
    """
    points = 16
    horizon = check_positive("horizon", horizon)
    counts = sorted({check_int("steps", count, low=points) for count in steps})
    if len(counts) < 2 or any(count % points for count in counts):
        fail("steps", f"hold at least two different multiples of {points}", tuple(counts))
    scale = check_nonnegative("deviation", deviation), check_nonnegative("benefit_deviation", benefit_deviation)
    replicas = check_int("replicas", replicas, low=2) if any(scale) else 1
    exact, state, failures = [], start, []
    for _ in range(points):
        piece = integrate(system, state, horizon / points, events=False)
        state = piece.end
        exact.append(state)
        failures += [piece.message] if piece.status == "failed" else []
    step_times, errors, spreads = horizon / np.array(counts, dtype=np.float64), [], []
    for tau, count in zip(step_times, counts, strict=True):
        run = iterate(
            system,
            copies(start, replicas),
            step_time=float(tau),
            steps=count,
            noise=math.sqrt(tau) * scale[0],
            benefit_noise=math.sqrt(tau) * scale[1],
            distribution=distribution,
            absorbing=False,
            floor=True,
            every=count // points,
            seed=seed,
        )
        failures += [run.message] if run.status == "failed" else []
        squares = np.square(np.abs(run.states[1:] - np.array(exact)[:, None]).max(axis=(0, 2)))
        errors.append(math.sqrt(squares.mean()))
        spreads.append(squares.std() / math.sqrt(replicas) / (2.0 * errors[-1]) if errors[-1] else 0.0)
    errors, spreads = np.array(errors), np.array(spreads)
    if failures or not errors.all():
        why = failures[0] if failures else "The start is an equilibrium: the errors are 0 and have no order."
        return OdeError(step_times, errors, spreads, math.nan, math.nan, "failed", why)
    x = np.log(step_times) - np.log(step_times).mean()
    weights = x / np.sum(x * x)
    order, uncertain = float(weights @ np.log(errors)), float(np.linalg.norm(weights * spreads / errors))
    return OdeError(
        step_times, errors, spreads, order, uncertain, "complete", f"error ~ tau^{order:.3f}, +- {uncertain:.3f}."
    )


def copies(start: Any, replicas: int) -> np.ndarray:
    """The same start for every replica, shape (replicas, d)."""
    start = check_real("start", start, array=True)
    check_shape("start", start, "(d,) with d >= 2", start.ndim == 1 and start.size >= 2)
    return np.tile(start, (replicas, 1))

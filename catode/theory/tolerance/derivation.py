"""How small a keep probability must be for a structure to be removed safely, from measured quantities.

One function, `derive`, serves the trainer, the command lines, the notebooks and the figures. Beside it stand the bounds
on what it risks: `escape_probability` for a removal, `commit_alarm` for a commitment.

Source: docs/mathematics.md sections 3 (`commit_alarm`), 4.3 and 5; the deterministic part rests on Theorems 3.2 and 3.3
of arXiv:2411.09127, everything else is derived.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from catode._validate import check_broadcast, check_interval, check_nonnegative, check_positive, check_real
from catode.theory.systems.planar import drift_reaches_decay, growth_rate, outside_range, scaled_growth_rate
from catode.theory.tolerance.result import Tolerance, frozen

__all__ = ["commit_alarm", "derive", "escape_probability"]

_INPUTS = (
    "benefit",
    "price",
    "gain",
    "decay",
    "rate_ratio",
    "noise",
    "benefit_noise",
    "drift",
    "step_time",
    "memory",
    "pooled",
)


def derive(
    *,
    benefit: Any,
    price: Any,
    gain: Any,
    decay: Any,
    rate_ratio: Any,
    noise: Any,
    benefit_noise: Any,
    drift: Any,
    step_time: Any,
    memory: Any = 0.0,
    pooled: Any = None,
    risk: Any = 0.05,
) -> Tolerance:
    """Keep probability below which removing a structure is safe, with a failure probability of at most `risk`.

    theta_tol = theta_sep(b) - z_{1-risk} s_V / (q sqrt(mu (2 + tau mu))),
    theta_sep(b) = [g (mu + a) - delta - mu b+] / q.

    Where theta moves by a pooled estimate instead of a single draw (`memory` T > 0: an exponential average B of the
    benefit, standing at `pooled` now), the pool is a third state. It slows the escape and filters the noise:

    theta_sep = [ mu (g - b+) + (mu + a) T mu (g - B+) + a g - delta ] / q,   mu (mu + a) (1 + T mu) = rho q,

    and s_V keeps its form with this smaller mu (docs/theory.md). T = 0 is the formula above.

    The covariance of the two noises is not measured, so s_V takes its largest value, q sigma + mu sigma_b
    (Cauchy-Schwarz). Pass upper limits for benefit, gain, noise and drift, and lower limits for decay and price.

    A tolerance that is not positive is an answer: nothing can be removed safely. It is `-inf` where the claim does not
    hold at all: the benefit reaches the price, or the drift reaches decay times price (with decay). With a gain of 0
    both numbers are limits for gain -> 0; the separatrix may then be infinite. The tolerance is 1 at most.

    Source: docs/mathematics.md sections 4.3 and 5 (discrete-step form), derived there; the deterministic part is
    Theorem 3.2 and 3.3 of arXiv:2411.09127.

    Args:
        benefit: Upper limit of the loss b saved by keeping each structure, nats; may be negative. Scalar or array; all
            arguments broadcast.
        price: Complexity cost g of keeping it, nats, positive.
        gain: Bound q on the squared gradient norm over its weights, nats/time.
        decay: Lower limit a on the decay of the benefit, 1/time; 0 when unknown.
        rate_ratio: Speed rho of theta, 1/(nats time), positive.
        noise: Diffusion sigma of theta, time^-1/2; sigma^2 = tau rho^2 Var[G_hat].
        benefit_noise: Diffusion sigma_b of the benefit, nats time^-1/2.
        drift: Bound delta on the growth of the benefit, nats/time.
        step_time: ODE time tau of one step, lr/(1 - momentum); 0 gives the limit of small steps.
        memory: Time constant T of the pool through which theta sees the benefit; 0 where it sees single draws.
        pooled: Where the pool stands, nats; None for `benefit`.
        risk: Accepted probability that a removed structure would not have gone by itself, in (0, 0.5).

    Returns:
        The tolerance, its arrays of the broadcast shape.

    Raises:
        ValueError: if an argument is not finite or out of range (a price of 0: such a structure has no gate), or the
            shapes do not broadcast.

    Example:
        >>> tolerance = derive(benefit=0.0, price=0.1, gain=0.5, decay=0.05, rate_ratio=1.0, noise=0.01,
        ...                    benefit_noise=0.0, drift=0.0, step_time=0.01)
        >>> round(float(tolerance), 4)
        0.1325
        >>> tolerance.reason()
        'Safe to remove at or below 0.132456: the separatrix 0.1465 less a noise margin of 0.01405 at risk 0.05.'
    """
    inputs = _inputs(
        benefit=benefit,
        price=price,
        gain=gain,
        decay=decay,
        rate_ratio=rate_ratio,
        noise=noise,
        benefit_noise=benefit_noise,
        drift=drift,
        step_time=step_time,
        memory=memory,
        pooled=benefit if pooled is None else pooled,
    )
    from scipy.special import ndtri

    inputs["risk"] = check_interval("risk", risk, 0.0, 0.5, True, True, array=True, hint="Choose e.g. 0.05.")
    inputs = _broadcast(inputs)
    separatrix, spread, unit, hopeless = _boundary(**{name: inputs[name] for name in _INPUTS})
    with np.errstate(invalid="ignore", over="ignore"):
        values = np.minimum((separatrix + ndtri(inputs["risk"]) * spread) / unit, 1.0)
        separatrix = separatrix / unit
    values = np.where(hopeless, -np.inf, values)
    return Tolerance(frozen(values), frozen(separatrix), inputs, "derived")


def escape_probability(
    *,
    keep_prob: Any,
    benefit: Any,
    price: Any,
    gain: Any,
    decay: Any,
    rate_ratio: Any,
    noise: Any,
    benefit_noise: Any,
    drift: Any,
    step_time: Any,
    memory: Any = 0.0,
    pooled: Any = None,
) -> np.ndarray:
    """Upper bound on the probability that theta, left alone, is not absorbed at 0.

    Phi(-(V* - V0) sqrt(mu (2 + tau mu)) / s_V), s_V as in `derive`: at the tolerance it equals the risk. It is 1 where
    the claim does not hold (see `derive`).

    Source: docs/mathematics.md section 5.

    Args:
        keep_prob: Keep probability theta now, in [0, 1].
        benefit: Upper limit of the benefit b, nats. This and all that follow are as in `derive`.
        price: Complexity cost g, nats.
        gain: Bound q on the squared gradient norm, nats/time.
        decay: Lower limit a on the decay of the benefit, 1/time.
        rate_ratio: Speed rho of theta, 1/(nats time).
        noise: Diffusion sigma of theta, time^-1/2.
        benefit_noise: Diffusion sigma_b of the benefit, nats time^-1/2.
        drift: Bound delta on the growth of the benefit, nats/time.
        step_time: ODE time tau of one step.
        memory: Time constant T of the pool through which theta sees the benefit.
        pooled: Where the pool stands, nats; None for `benefit`.

    Returns:
        Probabilities, of the broadcast shape.

    Raises:
        ValueError: if an argument is not finite or out of range, or the shapes do not broadcast.
    """
    inputs = _inputs(
        benefit=benefit,
        price=price,
        gain=gain,
        decay=decay,
        rate_ratio=rate_ratio,
        noise=noise,
        benefit_noise=benefit_noise,
        drift=drift,
        step_time=step_time,
        memory=memory,
        pooled=benefit if pooled is None else pooled,
    )
    from scipy.special import ndtr

    inputs["keep_prob"] = check_interval("keep_prob", keep_prob, 0.0, 1.0, array=True)
    inputs = _broadcast(inputs)
    theta = inputs.pop("keep_prob")
    separatrix, spread, unit, hopeless = _boundary(**inputs)
    distance = separatrix - theta * unit
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        exact = np.where(distance > 0.0, np.inf, -np.inf)
        score = np.where(np.isinf(separatrix) | (spread == 0.0), exact, distance / spread)
    return np.where(hopeless, 1.0, ndtr(-score))


def commit_alarm(
    *,
    benefit: Any,
    price: Any,
    rate_ratio: Any,
    noise: Any,
    step_time: Any,
    steps_left: Any,
) -> np.ndarray:
    """Upper bound on the probability that a theta at 1 reaches 0 by noise alone before the run ends.

    min(1, N exp(-2 rho (b - g) / sigma^2)), N steps left: theta reflecting at 1 is a one-sided (Page) CUSUM, each step
    may begin an excursion, and an excursion of a Gaussian walk with drift rho (b - g) and diffusion sigma ever covers
    the distance 1 with probability at most exp(-2 rho (b - g) / sigma^2). With sigma^2 = tau rho^2 Var[G_hat] this is
    the rate exp(-2 (b - g) / (tau rho Var)) of docs/mathematics.md section 3.

    Args:
        benefit: Lower limit of the benefit b, nats, for the rest of the run. All arguments broadcast.
        price: Complexity cost g, nats, positive.
        rate_ratio: Speed rho of theta, 1/(nats time), positive.
        noise: Diffusion sigma of theta, time^-1/2; an upper limit.
        step_time: ODE time tau of one step. It enters through `noise` alone, and is checked for completeness.
        steps_left: Steps until the end of the run, non-negative.

    Returns:
        Probabilities, of the broadcast shape; 1 where the benefit does not exceed the price.

    Raises:
        ValueError: if an argument is not finite or out of range, or the shapes do not broadcast.
    """
    inputs = {
        "benefit": check_real("benefit", benefit, array=True),
        "price": _price(price),
        "rate_ratio": check_positive("rate_ratio", rate_ratio, array=True),
        "noise": check_nonnegative("noise", noise, array=True),
        "step_time": check_nonnegative("step_time", step_time, array=True),
        "steps_left": check_nonnegative("steps_left", steps_left, array=True),
    }
    inputs = _broadcast(inputs)
    gap = inputs["benefit"] - inputs["price"]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        exponent = -2.0 * inputs["rate_ratio"] * gap / np.square(inputs["noise"])
        lost = (np.square(inputs["noise"]) < 1e-290) | (np.abs(inputs["rate_ratio"] * gap) < 1e-290)
        careful = -2.0 * (inputs["rate_ratio"] / inputs["noise"]) * (gap / inputs["noise"])
        exponent = np.where(lost, careful, exponent)
        alarm = np.minimum(inputs["steps_left"] * np.exp(exponent), 1.0)
    return np.where(gap > 0.0, alarm, 1.0)


def _price(price: Any) -> np.ndarray:
    hint = "A structure without a price has no gate and needs no tolerance; leave it out."
    return check_positive("price", price, array=True, hint=hint)


def _inputs(**given: Any) -> dict[str, np.ndarray]:
    """Validate the arguments that `derive` and `escape_probability` share."""
    checked = {
        "benefit": check_real("benefit", given["benefit"], array=True),
        "pooled": check_real("pooled", given["pooled"], array=True),
        "price": _price(given["price"]),
        "rate_ratio": check_positive("rate_ratio", given["rate_ratio"], array=True),
    }
    for name in _INPUTS:
        if name not in checked:
            checked[name] = check_nonnegative(name, given[name], array=True)
    return {name: checked[name] for name in _INPUTS}


def _broadcast(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return read-only views of one common shape."""
    shape = check_broadcast(inputs)
    for value in inputs.values():
        value.setflags(write=False)  # these are copies already
    return {name: value if value.shape == shape else np.broadcast_to(value, shape) for name, value in inputs.items()}


def _boundary(
    *,
    benefit: np.ndarray,
    price: np.ndarray,
    gain: np.ndarray,
    decay: np.ndarray,
    rate_ratio: np.ndarray,
    noise: np.ndarray,
    benefit_noise: np.ndarray,
    drift: np.ndarray,
    step_time: np.ndarray,
    memory: np.ndarray,
    pooled: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Separatrix, standard deviation of its crossing, the unit of both (in theta), and where no claim can be made at all.

    The unit is 1, and the gain where rate ratio times gain is out of the range of floats.

    The spread is s_V / (q sqrt(mu (2 + tau mu))). For gain = 0 both are limits for gain -> 0, where any positive gain
    is a valid bound; the separatrix grows (or falls) faster than the spread unless decay = 0 and the benefit is noisy.
    """
    rate = growth_rate(decay, rate_ratio, gain, memory)
    room = decay * price - drift
    gap = price - np.maximum(benefit, 0.0) + (rate + decay) * memory * (price - np.maximum(pooled, 0.0))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        total = rate * gap + room
        total = np.where(
            np.abs(total) <= 4.0 * np.finfo(np.float64).eps * (np.abs(rate * gap) + decay * price + drift), 0.0, total
        )
        separatrix = total / gain
        seen = (
            rate * (rate + decay) / (rate_ratio * gain)
        )  # share of the noise of theta that passes the pool: 1 / (1 + T mu)
        spread = (seen * noise + rate * benefit_noise / gain) / np.sqrt(rate * (2.0 + step_time * rate))
    flat = gain == 0.0
    if np.any(flat):
        wide = np.where(decay > 0.0, room, np.where(drift > 0.0, -1.0, gap)) > 0.0
        separatrix = np.where(flat, np.where(wide, np.inf, -np.inf), separatrix)
        spread = np.where(flat, 0.0, spread)
    unit = np.ones_like(gain)
    extreme = outside_range(rate_ratio, gain)
    if np.any(extreme):
        with np.errstate(all="ignore"):
            root, ratio = scaled_growth_rate(decay, rate_ratio, gain, memory)
            pace = np.sqrt(root) * np.sqrt(ratio)  # sqrt(mu), also where mu itself is too small for a float
            share = 1.0 / (1.0 + memory * root * ratio)
            noisy = (share * noise * gain / pace + pace * benefit_noise) / np.sqrt(2.0 + step_time * rate)
        separatrix, spread = np.where(extreme, total, separatrix), np.where(extreme, noisy, spread)
        unit = np.where(extreme, gain, unit)
    hopeless = (benefit >= price) | drift_reaches_decay(drift, decay, price)
    hopeless |= flat & (decay == 0.0) & (benefit_noise > 0.0)
    return separatrix, spread, unit, hopeless

"""How often theta, left alone in noise, is not absorbed at 0: measured, bounded, and where the bounds break.

*Escape* is: theta has not been absorbed at 0 within the horizon. It counts what is undecided then, so its probability
is at least that of never being absorbed, which the bound of `tolerance.escape_probability` is about. The iterates and
their noise are those of `stochastic`.

Source: docs/mathematics.md section 5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from catode._validate import check_int, check_interval, check_nonnegative, check_positive, check_real, check_shape, fail
from catode.theory.flow.stochastic import NORMAL, Noise, copies, iterate
from catode.theory.systems.benefit import BenefitSystem
from catode.theory.tolerance.derivation import derive, escape_probability

__all__ = [
    "Case",
    "Escape",
    "cantelli_risk",
    "escape_bounds",
    "escape_frequency",
    "heavy_tails",
    "large_steps",
]

_LONG = 10.0  # default horizon in units of 1/mu: about e^-10 of the replicas are still undecided then
_FAR = 37.0  # standard deviations beyond which the normal distribution function underflows


@dataclasses.dataclass(frozen=True)
class Escape:
    """How often theta was not absorbed at 0 within the horizon.

    Args:
        start: Initial state, theta last.
        replicas: Number of independent replicas.
        escaped: How many of them were not absorbed.
        lower: Lower end of the Clopper-Pearson interval for the probability.
        upper: Upper end.
        confidence: Confidence of that interval.
        horizon: Time of observation.
        step_time: ODE time tau of one step.
        noise: Diffusion of theta, time^-1/2.
        benefit_noise: Diffusion of the other coordinates.
        distribution: Name of the noise.
        bound: Upper bound Phi(-k) for normal noise; None where the system has none.
        cantelli: Upper bound 1/(1 + k^2) for any noise of that variance; None likewise.
    """

    start: tuple[float, ...]
    replicas: int
    escaped: int
    lower: float
    upper: float
    confidence: float
    horizon: float
    step_time: float
    noise: float
    benefit_noise: float
    distribution: str
    bound: float | None
    cantelli: float | None

    @property
    def frequency(self) -> float:
        """Share of the replicas that escaped."""
        return self.escaped / self.replicas


def escape_frequency(
    system: Any,
    start: Any,
    *,
    step_time: float,
    noise: float,
    benefit_noise: float = 0.0,
    correlation: float = 0.0,
    distribution: Noise = NORMAL,
    floor: bool = False,
    horizon: float | None = None,
    replicas: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Escape:
    """Measure how often theta, left alone, is not absorbed at 0 within the horizon.

    Source: docs/mathematics.md section 5.

    Args:
        system: A system of `catode.theory.systems`, or any with `field` and `project` (then give the horizon). Bounds
            are given for a `BenefitSystem`.
        start: Initial state, shape (d,).
        step_time: ODE time tau of one step.
        noise: Diffusion sigma of theta, time^-1/2.
        benefit_noise: Diffusion sigma_b of the other coordinates.
        correlation: Correlation of the two noises.
        distribution: Distribution of the standardised noise.
        floor: Clip the sizes as well. The bounds do *not* hold for a noisy benefit that is clipped at 0, since clipping
            raises its mean (measured: 0.40 against a bound of 0.28).
        horizon: Time of observation, rounded up to whole steps; None for 10 growth times 1/mu of the system.
        replicas: Number of replicas.
        confidence: Confidence of the Clopper-Pearson interval, in (0, 1).
        seed: Seed of the numpy Generator.

    Returns:
        The frequency with its interval and the bounds.

    Raises:
        ValueError: if an argument is out of range.
        FloatingPointError: if a replica left the range of floats.

    Example:
        >>> system = BenefitSystem(price=0.1, gain=0.5, rate_ratio=1.0, decay=0.05)
        >>> escape = escape_frequency(system, [0.0, 0.02], step_time=0.01, noise=0.1, replicas=2000)
        >>> escape.lower < 0.021 < escape.upper < escape.bound
        True
    """
    from scipy.stats import binomtest  # a third of a second, for this function alone

    tau = check_positive("step_time", step_time)
    if horizon is None and not hasattr(system, "growth_rate"):
        fail("horizon", "be given for a system without a growth rate", horizon)
    horizon = check_positive("horizon", _LONG / system.growth_rate if horizon is None else horizon)
    starts = copies(start, check_int("replicas", replicas, low=1))
    confidence = check_interval("confidence", confidence, 0.0, 1.0, True, True)
    steps = math.ceil(horizon / tau * (1.0 - 1e-12))
    run = iterate(
        system,
        starts,
        step_time=tau,
        steps=steps,
        noise=noise,
        benefit_noise=benefit_noise,
        correlation=correlation,
        distribution=distribution,
        floor=floor,
        seed=seed,
    )
    if run.status == "failed":
        raise FloatingPointError(run.message)
    escaped = int(np.isinf(run.absorbed_at).sum())
    interval = binomtest(escaped, len(starts)).proportion_ci(confidence)
    scale = {"step_time": tau, "noise": float(noise), "benefit_noise": float(benefit_noise)}
    bounds = escape_bounds(system, starts[0], **scale) if isinstance(system, BenefitSystem) else (None, None)
    return Escape(
        start=tuple(starts[0].tolist()),
        replicas=len(starts),
        escaped=escaped,
        lower=float(interval.low),
        upper=float(interval.high),
        confidence=confidence,
        horizon=steps * tau,
        distribution=distribution.name,
        bound=bounds[0],
        cantelli=bounds[1],
        **scale,
    )


def escape_bounds(
    system: BenefitSystem, start: Any, *, step_time: float, noise: float, benefit_noise: float = 0.0
) -> tuple[float, float]:
    """Upper bounds on the probability that theta is never absorbed at 0.

    With k = (V* - V0) sqrt(mu (2 + tau mu)) / s_V: Phi(-k) for normal noise (`tolerance.escape_probability`), and
    Cantelli's 1/(1 + k^2) for any noise of mean 0 and that variance; both are 1 where no claim holds.

    Source: docs/mathematics.md section 5.

    Args:
        system: The comparison system.
        start: State (benefit, theta).
        step_time: ODE time tau of one step.
        noise: Diffusion sigma of theta, time^-1/2.
        benefit_noise: Diffusion sigma_b of the benefit.

    Returns:
        The two bounds. Cantelli's is not given below 7e-4 (k = 37), except as 0 without noise inside the domain.

    Raises:
        ValueError: if an argument is out of range.
    """
    start = check_real("start", start, array=True)
    check_shape("start", start, "(2,)", start.shape == (2,))
    scale = {"step_time": step_time, "noise": noise, "benefit_noise": benefit_noise}
    phi = float(escape_probability(keep_prob=start[1], benefit=start[0], **_inputs(system), **scale))
    if not (noise or benefit_noise):
        return phi, phi
    k = min(-float(ndtri(phi)), _FAR)
    return phi, 1.0 / (1.0 + k * k) if k > 0.0 else 1.0


def cantelli_risk(risk: float) -> float:
    """Risk to ask `tolerance.derive` for so that its tolerance holds at `risk` for noise of any shape.

    Phi(-k) with k = sqrt(1/risk - 1), so that the margin of `derive` is the one of Cantelli's inequality.

    Source: docs/mathematics.md section 5.

    Args:
        risk: Accepted probability, in [0.001, 0.5); at less the normal distribution function underflows.

    Returns:
        The smaller risk.

    Raises:
        ValueError: if `risk` is out of range.

    Example:
        >>> f"{cantelli_risk(0.05):.2g}"
        '6.5e-06'
    """
    risk = check_interval("risk", risk, 1e-3, 0.5, False, True)
    return float(ndtr(-math.sqrt(1.0 / risk - 1.0)))


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of a table: a tolerance, and how often theta escaped from it.

    Args:
        rule: How the tolerance was chosen.
        risk: Risk that it promises.
        tolerance: The keep probability; not positive where the rule says that nothing is safe.
        escape: Measured from there; None where the tolerance is not positive.
    """

    rule: str
    risk: float
    tolerance: float
    escape: Escape | None

    @property
    def holds(self) -> bool:
        """Whether the measurement is compatible with the risk: the interval does not lie above it."""
        return self.escape is None or self.escape.lower <= self.risk


def heavy_tails(
    system: BenefitSystem,
    *,
    benefit: float = 0.0,
    step_time: float,
    noise: float,
    benefit_noise: float = 0.0,
    risk: float = 0.05,
    distributions: Iterable[Noise],
    replicas: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Case, ...]:
    """Table of what noise that is not normal does to the tolerance.

    Every distribution has the same variance, and is run from the tolerance for normal noise (rule "normal") and from
    Cantelli's (rule "cantelli"), which holds for all of them.

    Source: docs/mathematics.md section 5.

    Args:
        system: The comparison system.
        benefit: Benefit at the start, nats.
        step_time: ODE time tau of one step.
        noise: Diffusion sigma of theta, time^-1/2.
        benefit_noise: Diffusion sigma_b of the benefit.
        risk: Risk of both tolerances, in [0.001, 0.5).
        distributions: Noises to try.
        replicas: Number of replicas for each row.
        confidence: Confidence of the intervals.
        seed: Seed of the numpy Generator, the same for every row.

    Returns:
        Two rows for each distribution.

    Raises:
        ValueError: if an argument is out of range.
    """
    scale = {"step_time": step_time, "noise": noise, "benefit_noise": benefit_noise}
    rules = {
        rule: float(derive(benefit=benefit, risk=value, **_inputs(system), **scale))
        for rule, value in (("cantelli", cantelli_risk(risk)), ("normal", risk))
    }
    options = {**scale, "replicas": replicas, "confidence": confidence, "seed": seed}
    return tuple(
        _case(system, rule, risk, benefit, value, distribution=distribution, **options)
        for distribution in distributions
        for rule, value in sorted(rules.items(), reverse=True)
    )


def large_steps(
    system: BenefitSystem,
    *,
    benefit: float = 0.0,
    step_times: Iterable[float],
    deviation: float,
    risk: float = 0.05,
    distribution: Noise = NORMAL,
    replicas: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Case, ...]:
    """Table of what large steps do to the tolerance, the noise of one draw staying the same.

    The diffusion grows as sqrt(tau), so the tolerance falls. Every step size is run from its own tolerance (rule
    "derived") and from that of the smallest step (rule "kept"), which promises too much.

    Source: docs/mathematics.md section 5.

    Args:
        system: The comparison system.
        benefit: Benefit at the start, nats.
        step_times: ODE times tau of one step.
        deviation: Standard deviation of one draw of theta's speed, rho sd(G_hat), 1/time.
        risk: Risk of the tolerances, in (0, 0.5).
        distribution: Distribution of the standardised noise.
        replicas: Number of replicas for each row.
        confidence: Confidence of the intervals.
        seed: Seed of the numpy Generator, the same for every row.

    Returns:
        Two rows for each step size, in rising order.

    Raises:
        ValueError: if an argument is out of range.
    """
    taus = sorted(check_positive("step_times", tau) for tau in step_times)
    if not taus:
        fail("step_times", "hold at least one step size", ())
    deviation = check_nonnegative("deviation", deviation)
    options = {"distribution": distribution, "replicas": replicas, "confidence": confidence, "seed": seed}
    cases, kept = [], None
    for tau in taus:
        scale = {"step_time": tau, "noise": math.sqrt(tau) * deviation}
        own = float(derive(benefit=benefit, risk=risk, benefit_noise=0.0, **_inputs(system), **scale))
        kept = own if kept is None else kept
        cases.append(_case(system, "derived", risk, benefit, own, **scale, **options))
        cases.append(_case(system, "kept", risk, benefit, kept, **scale, **options))
    return tuple(cases)


def _case(system: BenefitSystem, rule: str, risk: float, benefit: float, tolerance: float, **options: Any) -> Case:
    escape = escape_frequency(system, [benefit, tolerance], **options) if tolerance > 0.0 else None
    return Case(rule, risk, tolerance, escape)


def _inputs(system: BenefitSystem) -> dict[str, float]:
    """What `derive` and `escape_probability` need to know of a system."""
    return {name: getattr(system, name) for name in ("price", "gain", "decay", "rate_ratio", "drift")}

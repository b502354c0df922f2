"""Inputs of a decision about each structure: measurements with confidence limits at the evidence's risk.

Source: docs/mathematics.md section 5.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from catode.decisions.evidence import Evidence
from catode.decisions.growth import GrowthPools
from catode.theory.tolerance import measured


@dataclass(frozen=True, eq=False)
class Limits:
    """Measured quantities of every structure, each of shape (n,), by their names in structures.csv; infinite where unknown.

    Attributes:
        keep_prob: theta.
        benefit: Pooled benefit, nats.
        benefit_upper: Its upper limit.
        benefit_lower: Its lower limit.
        price: Price, nats, positive.
        gain: Upper limit of the squared gradient norm, nats/time.
        decay: Lower limit of the benefit's decay, 1/time; 0 is always valid.
        rate_ratio: Speed of theta, 1/(nats time).
        noise: Upper limit of the diffusion of theta, time^-1/2.
        benefit_noise: Upper limit of the diffusion of the benefit, nats time^-1/2.
        drift: Upper limit of the benefit's growth beyond what the gain explains, nats/time; what an optimizer that scales
            gradients makes of it as theta falls included.
        step_time: ODE time between two estimates.
        memory: Time constant of the pooled benefit, ODE time.
    """

    keep_prob: NDArray
    benefit: NDArray
    benefit_upper: NDArray
    benefit_lower: NDArray
    price: NDArray
    gain: NDArray
    decay: NDArray
    rate_ratio: NDArray
    noise: NDArray
    benefit_noise: NDArray
    drift: NDArray
    step_time: NDArray
    memory: NDArray

    def columns(self) -> dict[str, NDArray]:
        """All quantities by name."""
        return {name: getattr(self, name) for name in QUANTITIES}

    @property
    def known(self) -> NDArray[np.bool_]:
        """Structures with all quantities finite, shape (n,)."""
        return np.all([np.isfinite(values) for values in self.columns().values()], axis=0)

    def tolerance_arguments(self, where: NDArray[np.bool_]) -> dict[str, NDArray]:
        """Arguments of `catode.theory.tolerance.derive` for the structures in `where`, all `known`."""
        part = {name: values[where] for name, values in self.columns().items()}
        del part["keep_prob"], part["benefit_lower"]
        return measured.arguments(**part)


QUANTITIES = tuple(field.name for field in fields(Limits))


def measure(
    evidence: Evidence, growth: GrowthPools, *, keep_prob: NDArray, price: NDArray, rate_ratio: NDArray
) -> Limits:
    """Limits from the pools, at the evidence's risk.

    Args:
        evidence: About the benefits.
        growth: What the optimizer's steps do to the benefits.
        keep_prob: theta, shape (n,).
        price: Positive prices, nats, shape (n,).
        rate_ratio: Speeds of theta, 1/(nats time), shape (n,).
    """
    z, (lower, upper), (slope, slope_error) = evidence.z, evidence.limits(), evidence.slope()
    gain, decay = growth.upper(z), growth.decay(z) / np.maximum(upper, price)
    # growth of the benefit beyond what the gain of its own weights explains
    drift = np.maximum(slope + z * slope_error - keep_prob * growth.lower(z), 0.0)
    if growth.law > 0.0:  # growth falls more slowly than theta: its tangent, docs/theory.md section 8
        here = keep_prob > 0.0
        drift = drift + growth.law * keep_prob * np.where(here, gain, 0.0)
    elapsed = evidence.step_time
    return Limits(
        keep_prob=keep_prob,
        benefit=evidence.benefit,
        benefit_upper=upper,
        benefit_lower=lower,
        price=price,
        gain=gain,
        decay=np.where(decay * price > drift, decay, 0.0),  # 0 is always a valid lower limit
        rate_ratio=rate_ratio,
        noise=rate_ratio * np.sqrt(np.where(elapsed > 0.0, elapsed, 1.0) * evidence.variance()),
        benefit_noise=evidence.benefit_noise(),
        drift=drift,
        step_time=elapsed,
        memory=evidence.memory(),
    )

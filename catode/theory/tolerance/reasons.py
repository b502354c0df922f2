"""Why a tolerance is what it is, and what would help where nothing is safe: one sentence about one structure."""

from __future__ import annotations

import numpy as np

from catode.theory.systems.planar import drift_reaches_decay

__all__ = ["explain"]


def explain(
    value: float,
    separatrix: float,
    *,
    benefit: float,
    price: float,
    gain: float,
    decay: float,
    rate_ratio: float,
    noise: float,
    benefit_noise: float,
    drift: float,
    step_time: float,
    memory: float,
    pooled: float,
    risk: float,
) -> str:
    """One sentence about one structure."""
    if benefit >= price:
        return (
            f"Not safe: the benefit may be {benefit:.4g} nats, not below the price {price:.4g}; "
            "measure the benefit more precisely, or raise the price."
        )
    if drift_reaches_decay(drift, decay, price):
        return (
            f"Not safe: the drift {drift:.4g} is not below decay times price, {decay * price:.4g}, so no domain of "
            "attraction is certain; measure the drift once it has fallen, or give decay=0 for the claim that theta "
            "reaches 0 at least once."
        )
    if gain == 0.0:
        if value > 0.0:
            return "Safe at every keep probability: without gain the benefit cannot grow to the price."
        if drift > 0.0:
            return "Not safe: with no gain and no decay the drift raises the benefit for ever; lower the drift."
        return (
            "Not safe: with no gain and no decay the noise of the benefit is not damped; give an upper limit for gain."
        )
    if separatrix <= 0.0:
        return (
            f"Not safe: the drift {drift:.4g} leaves no domain of attraction at benefit {benefit:.4g} and price "
            f"{price:.4g}; lower the drift or raise the rate ratio or the price."
        )
    from scipy.special import ndtri

    z = -float(ndtri(risk))
    if value >= 1.0:
        return (
            f"Safe at every keep probability: the separatrix {separatrix:.4g} exceeds 1 by more than the noise margin."
        )
    if value > 0.0:
        return (
            f"Safe to remove at or below {value:.6g}: the separatrix {separatrix:.4g} less a noise margin of "
            f"{separatrix - value:.4g} at risk {risk:g}."
        )
    scale = rate_ratio**0.25 * gain**0.25
    needed = z * (noise / rate_ratio * scale / np.sqrt(2.0) + benefit_noise / np.sqrt(2.0) / scale)
    return (
        f"Not safe: the noise margin {separatrix - value:.4g} at risk {risk:g} is not below the separatrix "
        f"{separatrix:.4g}; average more draws, lower the rate ratio or the step time, accept more risk, or raise the "
        f"price (with benefit, decay and drift at 0 it would have to exceed {needed:.4g} nats)."
    )

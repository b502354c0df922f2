"""Everything that a decision needs, conservative at the evidence's risk."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from catode.decisions.evidence import Evidence


def summary(
    evidence: Evidence,
    products: GradientProducts,  # noqa: F821
    *,
    keep_prob: NDArray,
    price: NDArray,
    rate_ratio: NDArray,
    weight_decay: float,
) -> dict[str, NDArray]:
    """Every quantity of THEORY section 5 that a decision needs, conservative at the evidence's risk.

    Args:
        evidence: About the benefits.
        products: About the gradients.
        keep_prob: theta, shape (n,).
        price: Positive prices, nats, shape (n,).
        rate_ratio: Speeds of theta, 1/(nats time), shape (n,).
        weight_decay: The least of the optimizer's groups, 1/time.

    Returns:
        Arrays of shape (n,) by the names of a run's structures.csv; infinite where nothing is known yet.
    """
    z, (lower, upper), (slope, slope_error) = evidence.z, evidence.limits(), evidence.slope()
    gain = np.maximum(products.gain.mean, 0.0) + z * products.gain.error
    # growth of the benefit beyond what the gain of its own weights explains
    own = keep_prob * np.maximum(products.gain.mean - z * products.gain.error, 0.0)
    drift = np.maximum(slope + z * slope_error - np.where(np.isfinite(own), own, 0.0), 0.0)
    pull = products.weight_gradient
    decay = weight_decay * np.maximum(-(pull.mean + z * pull.error), 0.0) / np.maximum(upper, price)
    elapsed = evidence.step_time
    return {
        "keep_prob": keep_prob,
        "benefit": evidence.benefit,
        "benefit_upper": upper,
        "benefit_lower": lower,
        "price": price,
        "gain": gain,
        "decay": np.where(decay * price > drift, decay, 0.0),  # a lower limit; 0 is always one
        "rate_ratio": rate_ratio,
        "noise": rate_ratio * np.sqrt(np.where(elapsed > 0.0, elapsed, 1.0) * evidence.variance()),
        "benefit_noise": evidence.benefit_noise(),
        "drift": drift,
        "step_time": elapsed,
    }

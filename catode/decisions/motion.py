"""How fast thetas move; a step of them is in `catode.decisions.priors`.

Source: docs/mathematics.md sections 2 and 3; docs/conventions.md item 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from catode.structures.complexity import Complexity

LEAST_OF_MEAN = 0.05  # of the mean price of its kind: below it, a structure's theta is slower than `theta_speed`


def rate_ratios(complexity: Complexity, *, nu: float, alpha: float, beta: float, theta_speed: float) -> NDArray:
    """Rate ratio of every structure at the start: useless ones sink from 1 to 0 in 1 / `theta_speed`, shape (n,).

    Args:
        complexity: The network's complexity.
        nu: Nats that the whole network may cost.
        alpha: Layers (1) against units (0).
        beta: Parameters (1) against MACs (0).
        theta_speed: 1/time.

    Raises:
        ValueError: if a price is too small to be divided by.
    """
    full = complexity.prices(np.ones(complexity.size), nu=nu, alpha=alpha, beta=beta)
    is_layer = complexity.inventory.is_layer
    for kind in (is_layer, ~is_layer):  # a price near 0 must not make a theta jump
        full[kind] = np.maximum(full[kind], LEAST_OF_MEAN * full[kind].mean())
    with np.errstate(over="ignore"):
        ratios = np.divide(theta_speed, full, out=np.ones(complexity.size), where=full > 0)
    if not np.isfinite(ratios).all():
        raise ValueError(
            f"`nu` must give every gated structure a price that rate_ratio can be divided by; got nu={nu:g}, "
            f"alpha={alpha:g}, rate_ratio={theta_speed:g}. Use a larger nu, or 0 or 1 for an alpha next to them."
        )
    return ratios

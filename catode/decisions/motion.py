"""How fast thetas move; a step of them is in `catode.decisions.priors`.

Source: docs/mathematics.md sections 2 and 3; docs/conventions.md item 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from catode._saved import UNSAVED
from catode.structures.complexity import Complexity

LEAST_OF_MEAN = 0.05  # of the mean price of its kind: below it, a structure's theta is slower than `theta_speed`

CROSSINGS = 10.0  # times that a theta could go from 1 to 0 if every step took the base time


@dataclass(eq=False)
class ThetaSpeed:
    """Speed of every theta in ODE time: the one that was asked for, or a tenth of the steps for the way from 1 to 0.

    The tenth is of steps at the *base time*, the largest ODE time of a step that the learning rates' schedule names or took
    so far, so that it does not hang on the learning rate of one moment. While that still rises, the speed falls.

    Args:
        asked: The speed that was asked for, 1/time; None for a tenth of the steps.
        steps: Steps of the deciding phase.

    Attributes:
        base: The base time; 0 before the first step.
        risen: Step at which it last rose.
    """

    asked: float | None = field(metadata=UNSAVED)
    steps: int = field(metadata=UNSAVED)
    base: float = 0.0
    risen: int = 0

    def see(self, base: float, done: int) -> None:
        """Take note of the base time that the optimizer's groups tell at a step.

        Args:
            base: The base time.
            done: Steps so far, this one included.
        """
        if base > self.base:
            self.risen = done if self.base > 0.0 else self.risen
            self.base = base

    def settled(self, done: int, steps: int) -> bool:
        """Whether the speed has not fallen within the last `steps` steps, so that a decision may count on it."""
        return self.asked is not None or (self.base > 0.0 and (self.risen == 0 or done - self.risen >= steps))

    @property
    def at_unit(self) -> float:
        """The speed where the base time is 1, 1/time."""
        return CROSSINGS / self.steps if self.asked is None else float(self.asked)

    @property
    def per_unit(self) -> float:
        """The speed over that at base time 1; 0 before any ODE time passed."""
        if self.asked is not None:
            return 1.0
        return 1.0 / self.base if self.base > 0.0 else 0.0

    @property
    def value(self) -> float:
        """The speed, 1/time."""
        return self.at_unit * self.per_unit


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
    for kind in (own for own in (is_layer, ~is_layer) if own.any()):  # a price near 0 must not make a theta jump
        full[kind] = np.maximum(full[kind], LEAST_OF_MEAN * full[kind].mean())
    with np.errstate(over="ignore"):
        ratios = np.divide(theta_speed, full, out=np.ones(complexity.size), where=full > 0)
    if not np.isfinite(ratios).all():
        raise ValueError(
            f"`nu` must give every gated structure a price that rate_ratio can be divided by; got nu={nu:g}, "
            f"alpha={alpha:g}, rate_ratio={theta_speed:g}. Use a larger nu, or 0 or 1 for an alpha next to them."
        )
    return ratios

"""One step of theta under the flattening hyper-prior and under its rivals, all at the same price and speed.

The loss is a mean over the training images, so a prior's term is divided by their number. Of each structure
with benefit b and price g, in nats of the mean loss:

| prior | force on theta | how theta moves |
|---|---|---|
| `flattening` | b - g | projected to [0, 1]: it reaches 0 and 1 |
| `bernoulli` | b - g - logit(theta) / images: a fixed Bernoulli prior of log-odds -g * images | rests at sigmoid(images (b - g)) |
| `concrete` | b - g | through theta = sigmoid(u), as hard-concrete L0 gates do: never at 0 or 1 |

Source: docs/mathematics.md section 1; `catode.theory.priors.priors` has their regularisers, flows and rest points.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

_BISECTIONS = 100
_INVERSE_MOBILITY = 16.0  # 1 / mobility at theta = 1/2 under `concrete`: all priors move at the same speed there


def flattening(theta: NDArray, force: NDArray, step: NDArray, images: int | None) -> NDArray:
    """Projected Euler step.

    Args:
        theta: Keep probabilities, shape (n,).
        force: Benefit minus price, nats, shape (n,).
        step: Rate ratio times ODE time, 1/nats, shape (n,).
        images: Number of training images; not used.

    Returns:
        The new keep probabilities, shape (n,).
    """
    return np.clip(theta + step * force, 0.0, 1.0)


def bernoulli(theta: NDArray, force: NDArray, step: NDArray, images: int | None) -> NDArray:
    """Implicit Euler step, because the entropy's slope is infinite at 0 and 1; arguments as in `flattening`.

    It solves theta' + step * logit(theta') / images = theta + step * force for the logit, by bisection.
    """
    stiffness, goal = step / images, theta + step * force
    high = np.maximum(np.abs(goal), 1.0) / stiffness + 1.0  # the left side exceeds every goal there
    low = -high
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        below = expit(middle) + stiffness * middle < goal
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return expit(0.5 * (low + high))


def concrete(theta: NDArray, force: NDArray, step: NDArray, images: int | None) -> NDArray:
    """Euler step of the logit, scaled to the speed of `flattening` at theta = 1/2; arguments as there."""
    return expit(logit(theta) + _INVERSE_MOBILITY * step * theta * (1.0 - theta) * force)


PRIORS = {"flattening": flattening, "bernoulli": bernoulli, "concrete": concrete}

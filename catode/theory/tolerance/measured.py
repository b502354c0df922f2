"""From what a run measured to the arguments of the tolerance.

Source: docs/mathematics.md sections 4.3 and 5; docs/theory.md section 1 for the pool and its memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

LEAST_PRICE = 1e-12  # nats; below it a price is that of a unit whose layer is all but gone
LEAST_MEMORY = 200
SHORTEST_MEMORY = 10  # in the shortest runs
MEMORIES = 10  # of the pools, in a deciding phase that is not too short
SHORT_PHASE = 6240  # steps of a deciding phase for which the least memory suffices: 20 epochs of CIFAR-10


def arguments(
    *,
    benefit: Any,
    benefit_upper: Any,
    price: Any,
    gain: Any,
    decay: Any,
    rate_ratio: Any,
    noise: Any,
    benefit_noise: Any,
    drift: Any,
    step_time: Any,
    memory: Any,
) -> dict[str, Any]:
    """Arguments of `catode.theory.tolerance.derive`, all but the risk, from measured arrays.

    Theta moves by the pooled benefit plus its margin, as if a pool without margin saw a price that is lower by it.

    Args:
        benefit: Pooled benefit, nats; scalar or shape (n,), as all that follow.
        benefit_upper: Its upper limit at the stated risk, nats.
        price: Complexity cost of keeping the structure, nats.
        gain: Upper limit of the squared gradient norm over its weights, nats/time.
        decay: Lower limit of the decay of the benefit, 1/time.
        rate_ratio: Speed of theta, 1/(nats time).
        noise: Diffusion of theta, time^-1/2.
        benefit_noise: Diffusion of the benefit, nats time^-1/2.
        drift: Bound on the growth of the benefit, nats/time.
        step_time: ODE time of one step.
        memory: Time constant of the pool, ODE time.
    """
    margin = np.subtract(benefit_upper, benefit)
    return {
        "benefit": benefit_upper,
        "pooled": benefit,
        "price": np.maximum(np.subtract(price, margin), LEAST_PRICE),
        "gain": gain,
        "decay": decay,
        "rate_ratio": rate_ratio,
        "noise": noise,
        "benefit_noise": benefit_noise,
        "drift": drift,
        "step_time": step_time,
        "memory": memory,
    }


def pool_memory(deciding_steps: int) -> int:
    """Steps over which measurements are pooled where no setting says it.

    How fast benefits change is known to within memory^(-3/2) and is extrapolated over the rest of the run, so that a
    memory in proportion to length^(2/3) leaves a run of any length in the same doubt.

    Args:
        deciding_steps: Steps until the deciding phase ends.
    """
    return max(LEAST_MEMORY, round(LEAST_MEMORY * (deciding_steps / SHORT_PHASE) ** (2 / 3)))


def fitting_memory(deciding_steps: int, warmup: int) -> int:
    """`pool_memory`, but at most what the deciding phase holds `MEMORIES` times, though that be too few draws to decide much.

    Args:
        deciding_steps: Steps until the deciding phase ends.
        warmup: Those of them before it begins.
    """
    return max(min(pool_memory(deciding_steps), (deciding_steps - warmup) // MEMORIES), SHORTEST_MEMORY)


def check_steps(memory: int) -> int:
    """Steps between checks where no setting says it: a quarter of the memory of the pools, in steps."""
    return max(memory // 4, 1)

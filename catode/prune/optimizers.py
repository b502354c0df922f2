"""What the pruner needs of an optimizer: the ODE time of its steps."""

from __future__ import annotations

import torch


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse optimizers whose steps have no single ODE time.

    Raises:
        ValueError: for anything but SGD with one learning rate and momentum, without dampening or maximize.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(
            f"`optimizer` must be torch.optim.SGD, whose steps have an ODE time; got {type(optimizer).__name__}. Use SGD."
        )
    for name in ("dampening", "maximize"):
        if any(group[name] for group in optimizer.param_groups):
            raise ValueError(
                f"`optimizer` must have no {name}, which ODE time does not describe; got one with it. Leave it out."
            )
    for name in ("lr", "momentum"):
        values = {float(group[name]) for group in optimizer.param_groups}
        if len(values) > 1:
            raise ValueError(f"`optimizer` must have one {name}; got {sorted(values)}. Use the same in every group.")


def check_owner(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Refuse an optimizer of another model.

    Raises:
        ValueError: if it holds none of the model's parameters.
    """
    own = set(model.parameters())
    if not any(parameter in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            "`optimizer` must hold the model's parameters; got one that holds none of them. Build it from model.parameters(), "
            "after the model has been moved or copied."
        )


def ode_time(optimizer: torch.optim.Optimizer) -> float:
    """ODE time of one step at the present learning rate, lr / (1 - momentum)."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) / (1.0 - group["momentum"])


MOST_IDLE = 100  # steps of the pruner without one of the optimizer; a gradient scaler skips a few dozen


class Clock:
    """ODE time of the optimizer's steps, in whatever order the user's lines come.

    Args:
        optimizer: The optimizer.

    Attributes:
        elapsed: ODE time since the last `take`.
        steps: The optimizer's steps since then.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.elapsed, self.steps, self._idle = 0.0, 0, 0
        self._hook = optimizer.register_step_post_hook(self._stepped)

    def __getstate__(self) -> dict:
        return {"elapsed": 0.0, "steps": 0, "_idle": 0, "_hook": None}

    def _stepped(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self.elapsed += ode_time(optimizer)
        self.steps += 1

    def take(self) -> tuple[float, int]:
        """ODE time and number of the steps since the last call.

        Raises:
            RuntimeError: at the 100th call in a row without a step.
        """
        self._idle = 0 if self.steps else self._idle + 1
        if self._idle >= MOST_IDLE:
            raise RuntimeError(
                f"`optimizer` must be the one whose step() is called; got {MOST_IDLE} steps of the pruner without one of it. Give "
                "the pruner the optimizer that trains the model."
            )
        taken = self.elapsed, self.steps
        self.elapsed, self.steps = 0.0, 0
        return taken


def theta_speed(rate_ratio: float | None, steps: int, optimizer: torch.optim.Optimizer) -> float:
    """Speed of every theta, 1/time.

    Args:
        rate_ratio: The speed that was asked for; None for a tenth of the steps from 1 to 0 at the present learning rate.
        steps: Steps of the deciding phase.
        optimizer: The optimizer.

    Raises:
        ValueError: if none was asked for and the learning rate is 0.
    """
    if rate_ratio is not None:
        return float(rate_ratio)
    if ode_time(optimizer) == 0.0:
        raise ValueError(
            "`rate_ratio` must be given where the learning rate begins at 0; got None. Try 10 / (ODE time)."
        )
    return 10.0 / (steps * ode_time(optimizer))

"""What the pruner needs of an optimizer: the ODE time of its steps, and what a step does with a gradient.

Source: docs/theory.md section 8.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn, optim

SGD_LAW, ADAPTIVE_LAW, UNKNOWN_LAW = 0.0, 0.25, 1.0  # most that theta^p exceeds theta by: p = 1, p >= 1/2, p >= 0
USUAL_MOMENTUM = 0.9  # of optimizers that do not tell theirs


@dataclass(frozen=True)
class Update:
    """What an optimizer's step does with the gradient g of one parameter: it moves by ``-rate * clock * mean / scale``.

    ``mean`` is a weighted mean of this and past gradients, ``scale`` is ``sqrt(old * second + own * g^2) + eps``, 1 where
    `second` is None. The tensors are the optimizer's own, which its step changes.

    Attributes:
        rate: ODE time of its group's steps over the clock's.
        momentum: Multiple of the mean of the past gradients; None where it has none.
        momentum_factor: What `momentum` is multiplied with to be their mean.
        momentum_scaled: Whether every gradient in it was divided by its own scale.
        second: Mean of the past squared gradients, of the parameter's shape, or a multiple of it; None if not scaled.
        old: Factor of `second`.
        own: Factor of the step's own squared gradient.
        fresh: Weight of the step's own gradient in `mean`.
        eps: Added to the square root.
        decay: Weight decay.
        coupled: Whether the decay is a part of the gradient.
    """

    rate: float
    momentum: torch.Tensor | None = None
    momentum_factor: float | torch.Tensor = 1.0
    momentum_scaled: bool = False
    second: torch.Tensor | None = None
    old: float | torch.Tensor = 1.0
    own: float | torch.Tensor = 0.0
    fresh: float | torch.Tensor = 1.0
    eps: float = 0.0
    decay: float = 0.0
    coupled: bool = True

    def scaled(self, values: torch.Tensor) -> torch.Tensor:
        """Values over the scale before the step; 0 where no gradient has come yet."""
        if self.second is None:
            return values
        scale = (self.second * self.old).clamp_(min=0.0).sqrt_().add_(self.eps)
        return torch.where(self.second > 0.0, values / scale, torch.zeros_like(values))

    def caused(self, gradient: torch.Tensor) -> torch.Tensor:
        """What the step's own gradient moves the weights by, downwards, over the clock."""
        moved = gradient * (self.rate * self.fresh)
        if self.second is None:
            return moved
        scale = (self.second * self.old + self.own * gradient.square()).clamp_(min=0.0).sqrt_().add_(self.eps)
        return torch.where(gradient == 0.0, torch.zeros_like(moved), moved / scale)


@dataclass(frozen=True)
class Family:
    """Optimizers that do the same with a gradient.

    Attributes:
        classes: Names of the classes in ``torch.optim``.
        update: What a step does: takes a parameter's group and state.
        momentum: Name of the momentum in a group: ``momentum``, or ``betas`` whose first number it is.
        sums: Whether momentum adds to the gradient (SGD), so that a step moves 1 / (1 - momentum) times as far in the end.
        law: Most by which the growth of a benefit exceeds ``theta / theta_0``, of that at theta_0.
    """

    classes: tuple[str, ...]
    update: Callable[[dict, dict], dict[str, Any]]
    momentum: str
    sums: bool
    law: float


def _sgd(group: dict, state: dict) -> dict[str, Any]:
    buffer, kept = state.get("momentum_buffer"), 1.0 - group["momentum"]
    found = {"fresh": kept * (1.0 + group["momentum"] * group["nesterov"])}
    if group["momentum"] == 0.0 or buffer is None:
        return found
    return found | {"momentum": buffer, "momentum_factor": kept / (1.0 - group["dampening"])}


def _adam(group: dict, state: dict) -> dict[str, Any]:
    first, second = group["betas"]
    if "exp_avg_sq" not in state:
        return {}
    step = _number(state["step"])
    values = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    after = 1.0 - second ** (step + 1.0)
    found = {"second": values, "old": second / after, "own": (1.0 - second) / after, "eps": group["eps"]}
    if "mu_product" in state:  # NAdam
        found["fresh"] = 1.0 - _nadam_momentum(group, step + 1.0) + (1.0 - first) * _nadam_momentum(group, step + 2.0)
    else:
        found["fresh"] = (1.0 - first) * _unbiased(first, step + 1.0)
    return found | {"momentum": state["exp_avg"], "momentum_factor": _unbiased(first, step)}


def _nadam_momentum(group: dict, step: torch.Tensor | float) -> torch.Tensor | float:
    return group["betas"][0] * (1.0 - 0.5 * 0.96 ** (step * group["momentum_decay"]))


def _adamax(group: dict, state: dict) -> dict[str, Any]:
    first, second = group["betas"]
    if "exp_inf" not in state:
        return {}
    step = _number(state["step"])
    mean = {"momentum": state["exp_avg"], "momentum_factor": _unbiased(first, step)}
    mean["fresh"] = (1.0 - first) * _unbiased(first, step + 1.0)
    return mean | {"second": state["exp_inf"].square(), "old": second**2, "own": 1.0 - second, "eps": group["eps"]}


def _rmsprop(group: dict, state: dict) -> dict[str, Any]:
    if "square_avg" not in state:
        return {}
    second, own = state["square_avg"], 1.0 - group["alpha"]
    if group["centered"]:
        second = second - state["grad_avg"].square()
    found = {"second": second, "old": group["alpha"], "own": own, "eps": group["eps"], "fresh": 1.0 - group["momentum"]}
    if group["momentum"] > 0.0:
        buffer = {"momentum": state["momentum_buffer"], "momentum_factor": 1.0 - group["momentum"]}
        found |= buffer | {"momentum_scaled": True}
    return found


def _adagrad(group: dict, state: dict) -> dict[str, Any]:
    return {"second": state["sum"], "own": 1.0, "eps": group["eps"]} if "sum" in state else {}


FAMILIES = (
    Family(("SGD",), _sgd, "momentum", True, SGD_LAW),
    Family(("Adam", "AdamW", "NAdam", "RAdam"), _adam, "betas", False, ADAPTIVE_LAW),
    Family(("Adamax",), _adamax, "betas", False, ADAPTIVE_LAW),
    Family(("RMSprop",), _rmsprop, "momentum", True, ADAPTIVE_LAW),
    Family(("Adagrad",), _adagrad, "", False, ADAPTIVE_LAW),
)


def _unbiased(momentum: float, step: torch.Tensor | float) -> torch.Tensor | float:
    """What a mean of past gradients that began at 0 is divided by its bias with; it is still 0 where the first step was skipped."""
    return 1.0 / (1.0 - momentum ** (step.clamp(min=1.0) if isinstance(step, torch.Tensor) else max(step, 1.0)))


def _number(step: torch.Tensor | float) -> torch.Tensor | float:
    """A step count; it stays a tensor on a device, which nobody waits for."""
    return float(step) if not isinstance(step, torch.Tensor) or step.device.type == "cpu" else step


def family_of(optimizer: optim.Optimizer) -> Family | None:
    """The family of an optimizer; None for one whose steps are not known."""
    own = inspect.unwrap(type(optimizer).step)
    for family in FAMILIES:
        for name in family.classes:
            known = getattr(optim, name)
            if isinstance(optimizer, known) and own is inspect.unwrap(known.step):
                return family
    return None


def check_optimizer(optimizer: optim.Optimizer) -> None:
    """Refuse optimizers whose steps are not one small move down the gradient of one backward pass.

    Raises:
        ValueError: for LBFGS, for what maximizes, and for what has no learning rate.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, optim.Optimizer):
        raise ValueError(f"`optimizer` must be a torch.optim.Optimizer; got {name}. Pass the one that steps the model.")
    if isinstance(optimizer, optim.LBFGS):
        raise ValueError(
            f"`optimizer` must take one gradient a step; got {name}, which evaluates its closure several times. Use another."
        )
    if isinstance(optimizer, optim.Adafactor):
        raise ValueError(
            f"`optimizer` must have a state that can be cut; got {name}, whose state is factored. Use AdamW."
        )
    if any("lr" not in group for group in optimizer.param_groups):
        raise ValueError(f"`optimizer` must have a learning rate `lr` in every group; got {name} without. Use another.")
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError("`optimizer` must minimize the loss; got one with maximize. Negate the loss in its place.")
    for group in optimizer.param_groups:
        if not 0.0 <= _momentum(family_of(optimizer), group) < 1.0:
            raise ValueError(
                f"`optimizer` must have a momentum in [0, 1); got {_momentum(family_of(optimizer), group):g}. Use 0.9."
            )


def check_state(optimizer: optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse optimizers whose state cannot follow a cut; it is there after the first step.

    Args:
        optimizer: The optimizer.
        parameters: Those that may be cut.

    Raises:
        ValueError: if a part of a parameter's state is neither one number nor of the parameter's shape.
    """
    for parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            listed = isinstance(value, (list, tuple)) and any(isinstance(part, torch.Tensor) for part in value)
            if listed or (isinstance(value, torch.Tensor) and value.numel() > 1 and value.shape != parameter.shape):
                what = "a list" if listed else f"of shape {tuple(value.shape)}"
                raise ValueError(
                    f"`optimizer` must have a state that can be cut; got {type(optimizer).__name__}, whose {key!r} of a weight of "
                    f"shape {tuple(parameter.shape)} is {what}. Use AdamW."
                )


def check_owner(optimizer: optim.Optimizer, model: nn.Module, branches: Iterable[nn.Parameter] = ()) -> None:
    """Refuse an optimizer of another model, and one of several.

    Args:
        optimizer: The optimizer.
        model: The model.
        branches: Parameters of what can be removed.

    Raises:
        ValueError: if it holds none of the model's parameters, or not all of those in branches that learn.
    """
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    names = {parameter: name for name, parameter in model.named_parameters()}
    if not held & names.keys():
        raise ValueError(
            "`optimizer` must hold the model's parameters; got one that holds none of them. Build it from model.parameters(), "
            "after the model has been moved or copied."
        )
    missing = [parameter for parameter in branches if parameter.requires_grad and parameter not in held]
    if missing:
        raise ValueError(
            f"`optimizer` must hold every parameter of the blocks that learns; got one without `{names[missing[0]]}`. Give one "
            "optimizer all of them, or set requires_grad=False where nothing is to be learnt."
        )


def _momentum(family: Family | None, group: dict) -> float:
    """Momentum of a group."""
    if family is None:
        given = group.get("momentum", group.get("betas", USUAL_MOMENTUM))
        return float(given[0] if isinstance(given, (tuple, list)) else given)
    if not family.momentum:
        return 0.0
    return float(group["betas"][0] if family.momentum == "betas" else group["momentum"])


def _step_time(family: Family | None, group: dict, lr: float, momentum: float) -> float:
    """ODE time of a group's step at some learning rate and momentum."""
    if family is None or not family.sums:
        return lr
    return lr * (1.0 - group.get("dampening", 0.0)) / (1.0 - momentum)


class Updates:
    """What an optimizer's steps do with gradients, relative to its clock: the group that learns fastest.

    Args:
        optimizer: The optimizer.

    Attributes:
        family: Its family; None if its steps are not known.
    """

    def __init__(self, optimizer: optim.Optimizer):
        self.optimizer, self.family = optimizer, family_of(optimizer)
        self._groups: dict[nn.Parameter, tuple[dict, float]] = {}
        self._time = 0.0

    @property
    def law(self) -> float:
        """Most by which the growth of a benefit exceeds ``theta / theta_0``, of that at theta_0."""
        return UNKNOWN_LAW if self.family is None else self.family.law

    @property
    def momentum(self) -> float:
        """Largest momentum of a group."""
        return max(_momentum(self.family, group) for group in self.optimizer.param_groups)

    @property
    def repeated(self) -> float:
        """Share of what its own gradient moves the weights by that the next step repeats, the largest of a group."""
        found = []
        for group in self.optimizer.param_groups:
            momentum = _momentum(self.family, group)
            found.append(momentum**2 / (1.0 + momentum) if group.get("nesterov") else momentum)
        return max(found)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of all groups."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def step_time(self) -> float:
        """ODE time of one step at the present learning rates."""
        return max((self._time_of(group) for group in self._learning()), default=0.0)

    def base_time(self) -> float:
        """ODE time of one step at the learning rates that the schedule starts from, or goes up to, or has now."""
        found = [0.0]
        for group in self._learning():
            lr = max(float(group.get(name) or 0.0) for name in ("lr", "initial_lr", "max_lr"))
            momentum = float(group.get("base_momentum", _momentum(self.family, group)))
            found.append(_step_time(self.family, group, lr, momentum))
        return max(found)

    def read(self) -> None:
        """Note the groups as they are now."""
        self._time = self.step_time()
        self._groups, learning = {}, {id(group) for group in self._learning()}
        for group in self.optimizer.param_groups:
            rate = self._time_of(group) / self._time if self._time > 0.0 else float(id(group) in learning)
            self._groups |= {parameter: (group, rate) for parameter in group["params"]}

    @property
    def clock(self) -> float:
        """ODE time of one step when the groups were noted."""
        return self._time

    def learns(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter was learning when the groups were noted."""
        return parameter.requires_grad and self._groups.get(parameter, ({}, 0.0))[1] > 0.0

    def of(self, parameter: nn.Parameter) -> Update:
        """What the next step does with a parameter that learns; before the step."""
        group, rate = self._groups[parameter]
        decay = float(group.get("weight_decay", 0.0))
        decoupled = group.get("decoupled_weight_decay", isinstance(self.optimizer, optim.AdamW)) or self.family is None
        state = self.optimizer.state.get(parameter, {})
        found = self.family.update(group, state) if self.family else {}
        if self.family and self.family.law > 0.0 and not found:
            rate = 0.0  # its first step: nothing is known of its scale
        return Update(rate, decay=decay, coupled=not decoupled, **found)

    def _learning(self) -> list[dict]:
        """Groups with a parameter that learns; all if none has one."""
        groups = self.optimizer.param_groups
        return [group for group in groups if any(p.requires_grad for p in group["params"])] or groups

    def _time_of(self, group: dict) -> float:
        return _step_time(self.family, group, float(group["lr"]), _momentum(self.family, group))


def ode_time(optimizer: optim.Optimizer) -> float:
    """ODE time of one step at the present learning rates, that of the group that learns fastest.

    lr / (1 - momentum) where momentum adds to the gradient (SGD, RMSprop), else lr.
    """
    return Updates(optimizer).step_time()


MOST_IDLE = 100  # steps of the pruner without one of the optimizer; a gradient scaler skips a few dozen


class Clock:
    """ODE time of the optimizer's steps, in whatever order the user's lines come.

    Args:
        optimizer: The optimizer.

    Attributes:
        elapsed: ODE time since the last `take`.
        steps: The optimizer's steps since then.
        base: Largest ODE time of one step that the schedules named or took so far; 0 before the first step.
    """

    def __init__(self, optimizer: optim.Optimizer):
        self.elapsed, self.steps, self.base, self._idle = 0.0, 0, 0.0, 0
        self._overflow: torch.Tensor | None = None  # of the last step, on the device
        self._hook = optimizer.register_step_post_hook(self._stepped)

    def __getstate__(self) -> dict:
        return {"elapsed": 0.0, "steps": 0, "base": self.base, "_idle": 0, "_overflow": None, "_hook": None}

    def state_dict(self) -> dict[str, float | int]:
        """What has passed since the last `take`: nothing where the pruner's step comes after the optimizer's."""
        return {"elapsed": self.elapsed, "steps": self.steps}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Restore what `state_dict` saved; nothing has passed where it is empty.

        Raises:
            ValueError: for anything else.
        """
        elapsed, steps = state.get("elapsed", 0.0), state.get("steps", 0)
        if type(elapsed) is not float or type(steps) is not int or not 0.0 <= elapsed < math.inf or steps < 0:
            raise ValueError(
                f"`state` must hold the ODE time and number of the optimizer's last steps; got {elapsed!r} and {steps!r}. "
                "Restore it from the run."
            )
        self.elapsed, self.steps = elapsed, steps

    def _stepped(self, optimizer: optim.Optimizer, args: tuple, kwargs: dict) -> None:
        updates = Updates(optimizer)
        self.elapsed += updates.step_time()
        self.base = max(self.base, updates.base_time())
        self.steps += 1
        # a scaler calls a fused optimizer also when it is to skip
        self._overflow = getattr(optimizer, "found_inf", None)

    def close(self) -> None:
        """Count no more."""
        self._hook.remove()

    def take(self) -> tuple[float, bool | torch.Tensor]:
        """ODE time of the steps since the last call, and whether there was none, or the last one was skipped by the optimizer.

        Raises:
            RuntimeError: at the 100th call in a row without a step.
        """
        self._idle = 0 if self.steps else self._idle + 1
        if self._idle >= MOST_IDLE:
            raise RuntimeError(
                f"`optimizer` must be the one whose step() is called; got {MOST_IDLE} steps of the pruner without one of it. Give "
                "the pruner the optimizer that trains the model."
            )
        idle = self.steps == 0 if self._overflow is None else self._overflow.reshape(()) > 0
        taken = self.elapsed, idle
        self.elapsed, self.steps, self._overflow = 0.0, 0, None
        return taken

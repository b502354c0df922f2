"""Optimizer, mixed precision and pruner of a run."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from catode.prune.checking import PruningWarning
from catode.prune.describe.executed import Uncounted
from catode.prune.measure.measuring import NotFinite
from catode.prune.pruner import Pruner
from catode.train.models.sources import is_foreign
from catode.train.settings.config import Config, ConfigError

if TYPE_CHECKING:
    from catode.train.loop.setup import Setup

REHEARSED = 32
"""Most images of the step that is tried before a run."""
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """SGD or AdamW, with weight decay on every parameter, the norm layers' too (the theory needs it), or on matrices alone.

    With fp16 it is fused: it skips a step whose gradient overflowed without synchronising with the host.
    """
    fp16 = config.amp == "fp16"
    common = dict(lr=config.lr, weight_decay=config.weight_decay, fused=True if fp16 else None)
    groups = _matrices_apart(model) if config.decay_on == "matrices" else model.parameters()
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **common)
    optimizer = torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, **common)
    if fp16 and config.momentum > 0:
        for parameter in model.parameters():  # a skipped first step would leave the fused buffers uninitialised
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _matrices_apart(model: nn.Module) -> list[dict]:
    """Parameter groups: weights of more than one dimension, and all else without weight decay."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: tuple[list, list] = [], []
    for name, parameter in model.named_parameters():
        decays = name.endswith("weight") and parameter.dim() > 1 and id(parameter) not in tables
        groups[not decays].append(parameter)
    return [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}]


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors that an optimizer keeps for each parameter, by the parameter's name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    states = {names[parameter]: own for parameter, own in optimizer.state.items()}
    found = {name: {key: value for key, value in own.items() if value is not None} for name, own in states.items()}
    return {name: own for name, own in found.items() if own}


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Restore an `optimizer_state`; the optimizer is fresh.

    Raises:
        ValueError: if it is of other parameters or of another kind of optimizer, or a number is not finite or negative where
            it cannot be.
    """
    adaptive = isinstance(optimizer, torch.optim.AdamW)
    expected = {"step", "exp_avg", "exp_avg_sq"} if adaptive else {"momentum_buffer"}
    parameters = dict(model.named_parameters())
    for name, own in state.items():
        parameter = parameters.get(name)
        if parameter is None or own.keys() != expected:
            raise ValueError(f"its optimizer's state of {name} is of another network or optimizer")
        for key, value in own.items():
            usual = (parameter.shape, (parameter.dtype,))
            shape, dtypes = ((), (torch.float32, torch.float64)) if key == "step" else usual
            if value.shape != shape or value.dtype not in dtypes or not bool(value.isfinite().all()):
                raise ValueError(f"its optimizer's {key} of {name} has another shape or type or is not finite")
            if key in ("step", "exp_avg_sq") and bool((value < 0).any()):
                raise ValueError(f"its optimizer's {key} of {name} is negative")
        # a count of steps is kept on the host, but by a fused optimizer
        host = {"step": torch.device("cpu")} if not optimizer.defaults.get("fused") else {}
        optimizer.state[parameter] = {
            key: value.to(host.get(key, parameter.device), copy=True) for key, value in own.items()
        }


def make_scaler(config: Config) -> torch.amp.GradScaler:
    """The scaler of the loss, which does nothing without fp16."""
    return torch.amp.GradScaler(torch.device(config.device).type, enabled=config.amp == "fp16")


def autocast(device: torch.device | str, dtype: torch.dtype | None) -> torch.autocast:
    """Automatic mixed precision in `dtype`; off with None."""
    return torch.autocast(torch.device(device).type, dtype or torch.bfloat16, enabled=dtype is not None)


def take_gradient(
    forward: Callable[[torch.Tensor], torch.Tensor],
    batch: tuple[torch.Tensor, torch.Tensor],
    scaler: torch.amp.GradScaler,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the gradient of a batch's mean loss to the parameters', in ``config.accumulate`` equal parts.

    Args:
        forward: The network.
        batch: Images, shape (n, C, H, W), and labels, shape (n,) or (n, classes); n is a multiple of the parts.
        scaler: The scaler of the loss.
        config: The configuration.

    Returns:
        The mean loss, detached, and the number of right predictions, on the device, shape () each.
    """
    losses, right = [], []
    for x, y in zip(*(tensor.chunk(config.accumulate) for tensor in batch), strict=True):
        with autocast(x.device, AMP[config.amp]):
            logits = forward(x)
            loss = F.cross_entropy(logits, y, label_smoothing=config.label_smoothing) / config.accumulate
        scaler.scale(loss).backward()
        losses.append(loss.detach())
        right.append((logits.detach().argmax(1) == (y if y.ndim == 1 else y.argmax(1))).sum())
    return sum(losses), sum(right)


def mean_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], label_smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy of a batch of images, shape (n, C, H, W), and labels, shape (n,) or (n, classes)."""
    return F.cross_entropy(model(batch[0]).float(), batch[1], label_smoothing=label_smoothing)


def make_pruner(setup: Setup, optimizer: torch.optim.Optimizer) -> Pruner | None:
    """The pruner of a run; None without gates (nu = 0)."""
    if setup.config.nu == 0:
        return None
    with said_in_lines(), refusals():  # of the network, such as what the self-check found
        if is_foreign(setup.config.arch) and setup.state is None:
            _rehearse(setup)
        return _pruner(setup, setup.model, optimizer)


@contextmanager
def said_in_lines() -> Iterator[None]:
    """Leave out the warnings that a run prints as lines of its own."""
    with warnings.catch_warnings():
        for kind in (PruningWarning, Uncounted):
            warnings.simplefilter("ignore", kind)
        yield


@contextmanager
def refusals(where: str = "") -> Iterator[None]:
    """What the pruner refuses of a network, raised as a `ConfigError`; not what is a fault, which has no argument's name.

    Args:
        where: What to add to it, at a step; empty where a pruner is made, all of whose ValueErrors are refusals.
    """
    try:
        yield
    except NotFinite:
        raise
    except (ValueError, RuntimeError) as error:
        if (where or isinstance(error, RuntimeError)) and not str(error).startswith("`"):
            raise
        raise ConfigError(f"{error}{where}") from error


def _rehearse(setup: Setup) -> None:
    """One step with all gates, of a copy of the network, on noise: what cannot be measured is refused before hours are lost.

    Raises:
        ValueError: if the pruner refuses it.
        RuntimeError: likewise.
    """
    config, device = setup.config, setup.config.device
    model = copy.deepcopy(setup.model).train()
    optimizer = make_optimizer(model, config)
    pruner = _pruner(setup, model, optimizer, warmup=0, self_check=False)
    part = config.batch_size // config.accumulate // setup.group.size
    images = torch.randn(min(part, REHEARSED), *setup.example.shape[1:], generator=torch.Generator().manual_seed(0))
    images = images.to(device)
    with torch.random.fork_rng([device] if device.startswith("cuda") else []):
        with autocast(device, AMP[config.amp]):
            logits = model(images).float()
        labels = logits.detach().argmax(1)  # a network that masks classes returns -inf for others
        F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing).backward()
        optimizer.step()
        with suppress(NotFinite):
            pruner.step((images, labels))
    del model, optimizer, pruner
    gc.collect()  # they hold each other
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _pruner(setup: Setup, model: nn.Module, optimizer: torch.optim.Optimizer, **changes: Any) -> Pruner:
    config = setup.config
    given = dict(
        blocks=setup.blocks,
        loss=partial(mean_loss, label_smoothing=config.label_smoothing),
        nu=config.nu,
        alpha=config.alpha,
        beta=config.beta,
        risk=config.risk,
        tolerance=config.tol,
        prior=config.prior,
        images=len(setup.images.train_labels),
        epoch_steps=len(setup.images.train_labels) / config.batch_size,
        target_macs=config.target_macs,
        target_params=config.target_params,
        rate_ratio=config.rate_ratio,
        steps=setup.decide_steps,
        warmup=setup.warmup_steps,
        initial_keep_prob=config.initial_keep_prob,
        estimator=config.estimator,
        layer_estimator=config.layer_estimator,
        per_example=config.per_example_gates,
        probe_size=config.probe_size,
        layers_per_probe=config.layers_per_probe,
        measure_every=config.measure_every,
        check_every=config.check_every,
        read_every=config.read_every,
        memory=config.memory,
        width_multiple=config.width_multiple,
        round_to=config.round_to,
        max_norm=config.max_norm,
        shadow=len(setup.schedule) if config.shadow else None,
        step_times=setup.step_times,
        seed=config.seed,
        group=setup.group,
    )
    return Pruner(model, setup.example, optimizer=optimizer, **{**given, **changes})

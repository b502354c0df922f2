"""Optimizer, mixed precision, pruner and evaluation of a run."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from catode.prune.devices import distributed
from catode.prune.pruner import Pruner
from catode.train.settings.config import Config

if TYPE_CHECKING:
    from catode.train.loop.setup import Setup

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """SGD with weight decay on every parameter, including the norm layers' (the theory needs it).

    With fp16 it is fused: it skips a step whose gradient overflowed without synchronising with the host.
    """
    fp16 = config.amp == "fp16"
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True if fp16 else None,
    )
    if fp16 and config.momentum > 0:
        for parameter in model.parameters():  # a skipped first step would leave the fused buffers uninitialised
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def make_scaler(config: Config) -> torch.amp.GradScaler:
    """The scaler of the loss, which does nothing without fp16."""
    return torch.amp.GradScaler(torch.device(config.device).type, enabled=config.amp == "fp16")


def autocast(device: torch.device | str, dtype: torch.dtype | None) -> torch.autocast:
    """Automatic mixed precision in `dtype`; off with None."""
    return torch.autocast(torch.device(device).type, dtype or torch.bfloat16, enabled=dtype is not None)


def mean_loss(
    model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], label_smoothing: float = 0.0
) -> torch.Tensor:
    """Mean cross-entropy of a batch of images, shape (n, C, H, W), and labels, shape (n,) or (n, classes)."""
    return F.cross_entropy(model(batch[0]).float(), batch[1], label_smoothing=label_smoothing)


def make_pruner(setup: Setup, optimizer: torch.optim.Optimizer) -> Pruner | None:
    """The pruner of a run; None without gates (nu = 0)."""
    config = setup.config
    if config.nu == 0:
        return None
    return Pruner(
        setup.model,
        setup.example,
        optimizer=optimizer,
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
        shadow=len(setup.schedule) if config.shadow else None,
        step_times=setup.step_times,
        seed=config.seed,
        group=setup.group,
    )


@torch.no_grad()
def evaluate(
    model: nn.Module, batches, amp: torch.dtype | None = None, group: distributed.Group | None = None
) -> float:
    """Accuracy in eval mode, with gates replaced by theta; NaN if a logit is not finite.

    Args:
        model: The network.
        batches: Pairs of images (n, C, H, W) and labels (n,); with several processes, this process' part.
        amp: Type of automatic mixed precision; None for off.
        group: Processes that evaluate together; None for this process only.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    right, total, finite = torch.zeros((), dtype=torch.long, device=device), 0, torch.ones((), dtype=torch.bool)
    finite = finite.to(device)
    for x, y in batches:
        with autocast(x.device, amp):
            logits = model(x)
        right += (logits.argmax(1) == y).sum()
        finite &= logits.isfinite().all()
        total += len(y)
    model.train(training)
    counts = torch.stack([right, torch.full_like(right, total), (~finite).long()])
    right, total, bad = (group or distributed.Group()).sum(counts).cpu().tolist()
    return math.nan if bad else right / total

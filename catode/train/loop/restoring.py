"""What a checkpoint restores: network, optimizer, loss scaler, pruner and random generators; and whether one can be."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from catode.prune.pruner import Pruner
from catode.train.loop.average import Average
from catode.train.loop.optimization import make_optimizer, make_pruner, make_scaler, restore_optimizer

if TYPE_CHECKING:
    from catode.train.loop.setup import Setup


def restore(
    state: dict,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    pruner: Pruner | None,
    device: str,
    *,
    average: Average | None = None,
) -> None:
    """Restore the parts of a run from a checkpoint of `Trainer.save_state`; the parts are fresh.

    Raises:
        ValueError: if the checkpoint holds what these parts cannot take up.
        Exception: of PyTorch, for tensors of the wrong shapes.
    """
    if pruner is not None:
        pruner.load_state_dict(state["pruner"])
        if pruner.state.done != state["step"] and not pruner.finished:
            raise ValueError(f"its pruner is at step {pruner.state.done}")
    else:
        odd = [n for n, t in model.state_dict().items() if n in state["model"] and t.dtype != state["model"][n].dtype]
        odd += [name for name, tensor in state["model"].items() if not bool(tensor.isfinite().all())]
        if odd:
            raise ValueError(f"its model's {odd[0]} has another type or is not finite")
        model.load_state_dict(state["model"])
    if average is not None:
        if odd := [name for name, tensor in state["average"].items() if not bool(tensor.isfinite().all())]:
            raise ValueError(f"its average's {odd[0]} is not finite")
        average.model.load_state_dict(state["average"])
    restore_optimizer(model, optimizer, state["optimizer"])
    scale = scaler.state_dict()
    if scale.keys() != state["scaler"].keys() or not all(
        type(value) in (int, float) and math.isfinite(value) and value >= 0 for value in state["scaler"].values()
    ):
        raise ValueError("its scaler must hold what PyTorch's does")
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"]["cpu"])
    if "cuda" in state["rng"] and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(state["rng"]["cuda"], device)


def check(setup: Setup, model: nn.Module, state: dict) -> None:
    """Make sure that a checkpoint can be taken up, by doing so with parts of its own.

    Args:
        setup: The prepared run; nothing of it is changed.
        model: Another network like the run's, used up.
        state: The checkpoint.

    Raises:
        ValueError: if not; the reason in one line.
    """
    optimizer = make_optimizer(model, setup.config)
    average = Average(model, setup.config.ema) if setup.config.ema else None
    pruner = make_pruner(replace(setup, model=model), optimizer)
    if average and pruner:
        pruner.on_cut(average.cut)
    try:
        restore(state, model, optimizer, make_scaler(setup.config), pruner, setup.config.device, average=average)
    except (torch.OutOfMemoryError, OSError):
        raise
    except Exception as error:  # whatever wrong contents make PyTorch and the pruner stumble over
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the run cannot take it up ({type(error).__name__}: {reason})") from error

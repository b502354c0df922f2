"""Running statistics of batch norms, computed anew after a removal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from catode.prune.describe.costs import called
from catode.prune.devices.distributed import Group


@torch.no_grad()
def recalibrate_norms(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    group: Group | None = None,
) -> None:
    """Compute the running statistics of all batch norms anew, as `torch.optim.swa_utils.update_bn` does.

    They become the plain means over the batches. Modes, momenta and everything else stay as they are, and so do batch norms in
    eval mode inside a model in train mode, which are frozen.

    Args:
        model: The network, without gates; changed in place.
        batches: Training batches: what `loss` takes; without one inputs of the model, or tuples and lists that begin with one.
        loss: ``loss(model, batch)``, called for its forward pass alone.
        group: Processes that each give batches of their own, as many as the others; the statistics become the means over all.

    Raises:
        ValueError: if there are batch norms, but no batches; the statistics are then as before.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        and m.running_mean is not None
        and (m.training or not model.training)
    ]
    if not norms:
        return
    modes, momenta = [(module, module.training) for module in model.modules()], [norm.momentum for norm in norms]
    before = [[buffer.clone() for buffer in norm.buffers(recurse=False)] for norm in norms]
    seen, complete = 0, False
    try:
        if not model.training:
            model.train()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
        for batch in batches:
            if loss is not None:
                loss(model, batch)
            else:
                called(model, batch[0] if isinstance(batch, (tuple, list)) else batch)
            seen += 1
        complete = seen > 0
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum, own in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            if not complete:
                for buffer, value in zip(norm.buffers(recurse=False), own, strict=True):
                    buffer.copy_(value)
    if not seen:
        raise ValueError(
            "`recalibrate` must hold at least one training batch; got none. Leave it out to train on instead."
        )
    for norm in norms:
        for buffer in (norm.running_mean, norm.running_var):
            buffer.copy_((group or Group()).mean(buffer))

"""Accuracy and loss of a network on images that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from catode.prune.devices import distributed
from catode.prune.devices.transfer import exact, read
from catode.train.loop.optimization import autocast


class Score(NamedTuple):
    """How well a network does on a set of images.

    Attributes:
        accuracy: Share of right predictions; NaN if a logit is not finite.
        loss: Mean cross-entropy without label smoothing, nats; NaN if a logit is not finite.
    """

    accuracy: float
    loss: float


def evaluated_at_once(part: int) -> int:
    """Images of a batch in evaluation: 256 or those of a part of a training batch, but at most four times the latter, since nothing
    is kept for a backward pass."""
    return min(max(part, 256), 4 * part)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    amp: torch.dtype | None = None,
    group: distributed.Group | None = None,
    weights: Sequence[Callable[[], AbstractContextManager]] = (nullcontext,),
) -> list[Score]:
    """Scores in eval mode, with gates replaced by theta, in one pass over the images.

    Args:
        model: The network.
        batches: Pairs of images (n, C, H, W) and labels (n,); with several processes, this process' part.
        amp: Type of automatic mixed precision; None for off.
        group: Processes that evaluate together; None for this process only.
        weights: For each score a context in which the network has the weights to measure; one for the network as it is.
    """
    training, group = model.training, group or distributed.Group()
    model.eval()
    device = next(model.parameters()).device
    counts = torch.zeros(len(weights), 3, dtype=torch.long, device=device)  # right, all, batches with a bad logit
    losses = torch.zeros(len(weights), dtype=exact(device), device=device)
    for x, y in batches:
        for k, applied in enumerate(weights):
            with applied(), autocast(x.device, amp):
                logits = model(x).float()
            counts[k, 0] += (logits.argmax(1) == y).sum()
            counts[k, 1] += len(y)
            counts[k, 2] += ~logits.isfinite().all()
            losses[k] += F.cross_entropy(logits, y, reduction="sum")
    model.train(training)
    counts, losses = (part.tolist() for part in read([group.sum(counts), group.sum(losses)]))
    return [
        Score(math.nan, math.nan) if bad else Score(right / total, loss / total)
        for (right, total, bad), loss in zip(counts, losses, strict=True)
    ]

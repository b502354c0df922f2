"""Targets of a training step's loss, recovered from the logits and their gradient."""

from __future__ import annotations

import torch


def recovered_targets(
    logits: torch.Tensor, gradient: torch.Tensor, scale: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Target distribution behind a mean softmax cross-entropy: softmax(z) - N dL/dz.

    Args:
        logits: Logits z, shape (m, classes).
        gradient: dL/dz as the backward pass left it, of that shape.
        scale: N over the factor that the loss was multiplied with.

    Returns:
        The targets, shape (m, classes), and whether they are a distribution, which they are not with another loss.
    """
    targets = logits.float().softmax(1) - gradient.float() * scale
    tolerance = 0.05 if logits.dtype != torch.float32 else 1e-3
    fit = ((targets.sum(1) - 1.0).abs().max() <= 10 * tolerance) & (targets.min() >= -tolerance)
    targets = targets.clamp_min(0.0)
    return targets / targets.sum(1, keepdim=True), fit

"""What a network answers to two fixed images: tells whether the code that makes it is still what it was."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

NUMBERS = 32
"""Most numbers of an answer."""
CLOSE = 0.01
"""Largest difference of equal networks on other devices, in units of the largest number."""


def answer(model: nn.Module, shape: Sequence[int]) -> list[float]:
    """The first numbers that a network returns, in eval mode, for two images of fixed noise.

    Args:
        model: The network; it and the random generators stay as they are.
        shape: Shape (C, H, W) of an image.
    """
    like = next(model.parameters())
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([like.device] if like.device.type == "cuda" else []):
            return model(images).float().flatten()[:NUMBERS].tolist()
    finally:
        for module, flag in training:
            module.training = flag


def alike(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two answers are those of one network, but for rounding."""
    if len(one) != len(other):
        return False
    here, there = torch.tensor(one), torch.tensor(other)
    finite = there.isfinite()
    if not torch.equal(finite, here.isfinite()):
        return False
    here, there = here[finite], there[finite]
    return not len(there) or bool((here - there).abs().max() <= CLOSE * there.abs().max())

"""What a network answers to two fixed images: tells whether the code that makes it is still what it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from catode.prune.describe.executed import inference
from catode.prune.describe.trial import cuda_devices, randomise
from catode.prune.devices.precision import tf32

NUMBERS = 32
"""Most numbers of an answer."""
CLOSE = 0.01
"""Largest difference of equal networks on other devices, in units of the largest number."""


def answer(model: nn.Module, shape: Sequence[int]) -> list[float]:
    """The first numbers that a network returns, in eval mode, for two images of fixed noise; none if they tell nothing.

    They do not where it draws random numbers, returns what is not finite, fails for such images, or computes in few bits.

    Args:
        model: The network; it and the random generators stay as they are.
        shape: Shape (C, H, W) of an image.
    """
    like = next(model.parameters())
    if like.dtype not in (torch.float32, torch.float64):
        return []
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    devices, told = cuda_devices(model), []
    with inference(model), tf32(False) if devices else nullcontext(), torch.random.fork_rng(devices):
        for seed in range(2):
            torch.manual_seed(seed)
            try:
                told.append(model(images).float().flatten()[:NUMBERS].tolist())
            except Exception:  # of the network's own code, which may need other images, or another device
                return []
    return told[0] if told[0] == told[1] and all(map(math.isfinite, told[0])) else []


def answer_of_any(model: nn.Module, shape: Sequence[int]) -> list[float]:
    """The `answer` of a copy of a network whose weights are random by a fixed seed, which hide nothing that it computes."""
    try:
        other = copy.deepcopy(model).requires_grad_(False)
        randomise(other, 0)
    except Exception:  # it cannot be copied
        return []
    return answer(other, shape)


def alike(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two answers can be those of one network, but for rounding; so can any two of which one tells nothing."""
    if not one or not other:
        return True
    if len(one) != len(other):
        return False
    here, there = torch.tensor(one), torch.tensor(other)
    return bool((here - there).abs().max() <= CLOSE * there.abs().max())

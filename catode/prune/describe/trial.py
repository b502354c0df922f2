"""Running copies of a network with random numbers in place of its parameters, and comparing what they return."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from catode.prune.measure import nests

BatchNorm, Dropout = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Give all parameters and running statistics random values, as after some training.

    Args:
        model: The network; changed in place.
        seed: Seed of the values.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)

    for name, tensor in model.named_parameters():
        if tensor.dim() > 1:
            fans = tuple(
                range(1, tensor.dim())
            )  # without a mean, or units behind a ReLU are on or off for every input alike
            random = normal(tensor)
            tensor.copy_(
                (random - random.mean(fans, keepdim=True) * (tensor[0].numel() > 4)) / max(tensor[0].numel(), 1) ** 0.5
            )
        elif name.rpartition(".")[2] == "bias":
            tensor.copy_(0.3 * normal(tensor))
        else:
            tensor.copy_(1.0 + 0.3 * normal(tensor).clamp(-2, 2))
    for name, tensor in model.named_buffers():
        if name.endswith("running_mean"):
            tensor.copy_(0.3 * normal(tensor))
        elif name.endswith("running_var"):
            tensor.copy_(1.0 + 0.3 * normal(tensor).clamp(-2, 2))


def floats(output: Any) -> list[torch.Tensor]:
    """The tensors of floating-point numbers in what a model returned, in order."""
    if hasattr(output, "__dataclass_fields__") and not hasattr(output, "items"):
        output = vars(output)
    return [tensor for tensor in nests.tensors(output) if tensor.is_floating_point()]


def evaluating(model: nn.Module) -> None:
    """Put a model into eval mode."""
    model.eval()


def training(model: nn.Module) -> None:
    """Put a model into train mode, but for its dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, Dropout):
            module.eval()


def training_norms(model: nn.Module) -> None:
    """Put a model into eval mode, but for its batch norms."""
    model.eval()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.train()


class Lowest(TorchDispatchMode):
    """Notes the lowest precision below double that anything is computed in.

    Attributes:
        dtype: The type; None if everything is computed in double precision.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtype: torch.dtype | None = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
                coarser = self.dtype is None or torch.finfo(tensor.dtype).eps > torch.finfo(self.dtype).eps
                self.dtype = tensor.dtype if coarser else self.dtype
        return found


@contextmanager
def failing_module(model: nn.Module) -> Iterator[list[str]]:
    """Yields a list that holds the innermost module that runs; after an error, the one that raised it."""
    running: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.insert(0, name)))
            hooks.append(module.register_forward_hook(lambda *_: running.pop(0) and None))
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()


def difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Largest difference relative to the largest entry of the second; infinite for other shapes or numbers that are not finite."""
    if [tensor.shape for tensor in one] != [tensor.shape for tensor in other]:
        return float("inf")
    most = 0.0
    for a, b in zip(one, other, strict=True):
        scale = b.abs().max().clamp_min(torch.finfo(b.dtype).tiny) if b.numel() else 1.0
        most = max(most, float(((a - b).abs().max() / scale).nan_to_num(float("inf"))) if a.numel() else 0.0)
    return most


def memory(model: nn.Module) -> int:
    """Memory of the parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))

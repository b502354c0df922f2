"""Running copies of a network with random numbers in place of its parameters, and comparing what they return."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from catode.prune.measure import nests

BatchNorm, Dropout = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd
MANY = 1_000_000
EXAMPLES, SMALL_EXAMPLES, FEATURE_EXAMPLES = 2, 4, 16  # of images and sequences, small images, rows of features
SMALL = 2**13  # numbers in a small image, for which a batch norm may average over as few as there are examples


@torch.no_grad()
def randomise(model: nn.Module, seed: int, again: bool = False) -> None:
    """Give all parameters and running statistics random values, as after some training.

    Args:
        model: The network; changed in place.
        seed: Seed of the values.
        again: Whether it has such values already: then weights of more than `MANY` entries change signs by rows alone, which
            takes much less time.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)

    for name, tensor in model.named_parameters():
        if again and tensor.dim() > 1 and tensor.numel() > MANY:
            signs = torch.randint(2, (len(tensor), *[1] * (tensor.dim() - 1)), generator=generator) * 2 - 1
            tensor.mul_(signs.to(tensor))
        elif tensor.dim() > 1:
            fans = tuple(
                range(1, tensor.dim())
            )  # without a mean, or units behind a ReLU are on or off for every input alike
            random = torch.randn(
                tensor.shape, generator=generator, dtype=torch.float32
            )  # in place and in 32 bits: the largest take long
            if tensor[0].numel() > 4:
                random -= random.mean(fans, keepdim=True)
            tensor.copy_(random.mul_(max(tensor[0].numel(), 1) ** -0.5))
        elif name.rpartition(".")[2] == "bias":
            tensor.copy_(0.3 * normal(tensor))
        else:
            tensor.copy_(1.0 + 0.3 * normal(tensor).clamp(-2, 2))
    for name, tensor in model.named_buffers():
        if name.endswith("running_mean"):
            tensor.copy_(0.3 * normal(tensor))
        elif name.endswith("running_var"):
            tensor.copy_(1.0 + 0.3 * normal(tensor).clamp(-2, 2))


def random_like(example: Any, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    """Random examples of the form of the one given; what is no floating-point number is drawn from the one given.

    Args:
        example: The example.
        dtype: Type of the floating-point numbers.
        device: Their device.
        seed: Seed of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {len(tensor) for tensor in nests.tensors(example) if tensor.dim()}
    tensors = list(nests.tensors(example))
    images = any(t.dim() > 2 or not t.is_floating_point() for t in tensors)
    small = all(t.dim() > 3 and np.prod(t.shape[1:]) < SMALL for t in tensors)
    count = (SMALL_EXAMPLES if small else EXAMPLES) if images else FEATURE_EXAMPLES
    count = count if len(sizes) == 1 else None

    def change(tensor: torch.Tensor) -> torch.Tensor:
        shape = tensor.shape if count is None or not tensor.dim() else (count, *tensor.shape[1:])
        if tensor.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=dtype).to(device)
        chosen = torch.randint(tensor.numel(), (int(np.prod(shape)),), generator=generator)
        return tensor.detach().cpu().reshape(-1)[chosen].reshape(shape).to(device)

    return nests.mapped(example, change)


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


def first_line(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:150]}" if lines else type(error).__name__


def bytes_of(model: nn.Module) -> int:
    """Memory of the parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def cuda_devices(model: nn.Module) -> list[torch.device]:
    """CUDA devices of a model."""
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


def drew(devices: Sequence[torch.device]) -> bool:
    """Whether random numbers were drawn since the seed was set to 0, as stochastic depth does, which may change nothing."""
    states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    torch.manual_seed(0)
    after = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    return not all(map(torch.equal, states, after))

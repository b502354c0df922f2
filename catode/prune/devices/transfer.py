"""Copies between host and device. Only a copy to the host makes the host wait for the device.

An accelerator works asynchronously through its queue; the trainer and the pruner therefore defer their reads and do
them together, in order, every few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from numpy.typing import NDArray


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device; the host does not wait. The tensor itself where the device is the host, or has it already."""
    if device.type == "cpu":
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":  # only memory of the host can be pinned
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "mps")  # MPS would read memory that is already freed


def read(tensors: Sequence[torch.Tensor]) -> list[NDArray]:
    """Values of device tensors on the host, float64, in one copy; the host waits for it.

    Args:
        tensors: Tensors of any shapes, all on one device.

    Returns:
        Arrays of their shapes.
    """
    tensors = [tensor.detach() for tensor in tensors]
    if not tensors or tensors[0].device.type == "cpu":
        return [tensor.double().numpy() for tensor in tensors]
    wide = exact(tensors[0].device)
    flat = torch.cat([tensor.reshape(-1).to(wide) for tensor in tensors]).cpu().double()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape).numpy() for part, tensor in zip(parts, tensors, strict=True)]


def floats(numbers: Sequence[float | torch.Tensor]) -> list[float]:
    """Numbers of which some are tensors of shape (), perhaps on a device; the host waits once for those."""
    there = iter(read([n for n in numbers if isinstance(n, torch.Tensor) and n.device.type != "cpu"]))
    return [float(next(there)) if isinstance(n, torch.Tensor) and n.device.type != "cpu" else float(n) for n in numbers]


def exact(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def at_once(take: Callable[..., None], *tensors: torch.Tensor) -> None:
    """Read tensors and call ``take`` with their arrays."""
    take(*read(tensors))


class DeferredReads:
    """Deferred reads: tensors to be read together, each with the function that takes its values."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Callable[..., None], tuple[torch.Tensor, ...]]] = []

    def put(self, take: Callable[..., None], *tensors: torch.Tensor) -> None:
        """Defer a read; ``take`` will be called with the arrays. The tensors must not be changed until then."""
        self._waiting.append((take, tensors))

    def read(self) -> None:
        """Read all in one copy, and call the functions in order."""
        waiting, self._waiting = self._waiting, []
        arrays = iter(read([tensor for _, tensors in waiting for tensor in tensors]))
        for take, tensors in waiting:
            take(*(next(arrays) for _ in tensors))

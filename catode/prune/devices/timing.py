"""Name of the processor, memory kept between steps, and measured latencies."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

WARM_UP, LEAST_ROUNDS = 2, 7
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory between steps instead of returning it to the system and faulting it in again.

    A ResNet-20 step on 128 images takes about 5 % less CPU time with it. Returns False, without effect, on other systems.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28))
    return all([mallopt(option, value) == 1 for option, value in settings])


def processor() -> str:
    """Name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def check_compile(device: str) -> None:
    """Make sure that torch.compile works here; it needs a compiler that PyTorch does not include.

    Raises:
        ValueError: if it does not.
    """
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.zeros(8, device=device))
    except Exception as error:  # compiler, linker and PyTorch raise errors of many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"`compile` must be left out where torch.compile does not work; got compile=True on {device} and: {reason}. "
            "Install a C++ compiler, or leave --compile out."
        ) from error


@torch.no_grad()
def latency_ms(
    networks: Sequence[nn.Module], example: torch.Tensor, *, batches: tuple[int, ...] = (1, 128), seconds: float = 0.5
) -> list[list[float]]:
    """Median time of one forward pass in eval mode, milliseconds, one list for each batch size, one number a network.

    The networks take turns, one pass each a round, so that other load on the machine affects all of them alike.

    Args:
        networks: On one device.
        example: One input batch on that device; its shape behind the first dimension is used.
        batches: Batch sizes.
        seconds: Time to spend on each batch size, after two rounds to warm up; at least seven rounds are measured.
    """
    training = [network.training for network in networks]
    medians = []
    try:
        for size in batches:
            inputs = [
                _like_weights(torch.randn(size, *example.shape[1:], device=example.device), n.eval()) for n in networks
            ]
            times, begin = [], time.perf_counter()
            while len(times) < WARM_UP + LEAST_ROUNDS or time.perf_counter() - begin < seconds:
                times.append(
                    [passing_ms(lambda n=n, x=x: n(x), x.device) for n, x in zip(networks, inputs, strict=True)]
                )
            medians.append([statistics.median(column) for column in zip(*times[WARM_UP:], strict=True)])
    finally:
        for network, flag in zip(networks, training, strict=True):
            network.train(flag)
    return medians


def passing_ms(work: Callable[[], object], device: torch.device) -> float:
    """Time that some work takes, the device's queue included, milliseconds."""
    _finish(device)
    begin = time.perf_counter()
    work()
    _finish(device)
    return 1e3 * (time.perf_counter() - begin)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _like_weights(x: torch.Tensor, network: nn.Module) -> torch.Tensor:
    """The images in the memory format of the network's weights."""
    weight = next(network.parameters())
    channels_last = x.dim() == 4 and weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x

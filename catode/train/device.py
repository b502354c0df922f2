"""What the machine underneath needs: memory that is not handed back at every step, and honest latencies."""

from __future__ import annotations

import ctypes
import platform
import time

import torch
from torch import nn

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Let glibc keep the activations' memory between steps instead of returning it to the system and faulting it in again.

    A ResNet-20 step on 128 images takes about 5 % less CPU time for it. Does nothing (and says so by returning False) elsewhere.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28))
    return all([mallopt(option, value) == 1 for option, value in settings])


def check_compile(device: str) -> None:
    """Make sure that torch.compile works here; it needs a compiler that PyTorch does not bring along.

    Raises:
        ValueError: if it does not.
    """
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.zeros(8, device=device))
    except Exception as error:  # whatever the compiler, the linker or PyTorch has to say
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"`compile` must be left out where torch.compile does not work; got compile=True on {device} and: {reason}. "
            "Install a C++ compiler, or leave --compile out."
        ) from error


@torch.no_grad()
def latency_ms(
    model: nn.Module, example: torch.Tensor, *, batches: tuple[int, ...] = (1, 128), seconds: float = 0.5
) -> list[float]:
    """Median time of one forward pass in eval mode, milliseconds, for each batch size.

    Args:
        model: The network, on its device.
        example: One input batch; its shape behind the first dimension is used.
        batches: Batch sizes.
        seconds: Time to spend on each batch size, after two passes to warm up.
    """
    training = model.training
    model.eval()
    weight = next(model.parameters())
    channels_last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    medians = []
    for size in batches:
        x = torch.zeros(size, *example.shape[1:], device=example.device)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        times, begin = [], time.perf_counter()
        while len(times) < 7 or time.perf_counter() - begin < seconds:
            mark = time.perf_counter()
            model(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - mark)
        times = sorted(times[2:])
        medians.append(1e3 * times[len(times) // 2])
    model.train(training)
    return medians

"""Contexts in which a device computes with a precision of ours, whatever stands around."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """No automatic mixed precision but what a model or a loss enters inside, which casts weights anew each time.

    Autocast keeps its copies of weights until the outermost context around it ends, as this one would be; it would go on with
    them where weights have other values since.
    """
    torch.clear_autocast_cache()
    with torch.autocast(device.type, enabled=False, cache_enabled=False):
        yield


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let convolutions and matrix products in fp32 round to TF32 on CUDA devices, or not."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, flag in zip(backends, before, strict=True):
            backend.allow_tf32 = flag

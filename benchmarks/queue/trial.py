"""A short timed trial of training steps: precision, memory format and threads that are fastest on this machine, now."""

from __future__ import annotations

import os
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F

from catode.prune.devices.timing import keep_freed_memory
from catode.train.loop import AMP, autocast
from catode.train.models import build

WARM, TIMED, BATCH = 3, 8, 128


@dataclass(frozen=True)
class Way:
    """A way to compute a training step.

    Attributes:
        amp: Setting `amp`.
        channels_last: Setting `channels_last`.
        threads: Setting `threads`.
        step_seconds: Median seconds of a step of the dense ResNet-20 on 128 random images; None before it is timed.
    """

    amp: str
    channels_last: bool
    threads: int
    step_seconds: float | None = None

    def content(self) -> dict:
        """As a JSON object."""
        return asdict(self)


def ways(threads: int | None, cores: int) -> list[Way]:
    """What is tried: both precisions, both memory formats, and, unless given, one thread and all cores."""
    counts = [threads] if threads else sorted({1, cores})
    return [Way(amp, last, n) for n in counts for amp in ("off", "bf16") for last in (True, False)]


def best(timed: list[Way], jobs: int | None, cores: int, amp: str | None = None) -> Way:
    """The way with most steps a second, all jobs together.

    Args:
        timed: Ways with their seconds of a step, each measured alone.
        jobs: Runs at a time; None for as many as the cores hold.
        cores: Cores of the machine.
        amp: The precision that is already settled by finished runs; None for any.
    """
    possible = [way for way in timed if amp in (None, way.amp)]
    return max(possible, key=lambda way: (jobs or max(1, cores // way.threads)) / way.step_seconds)


def measure(threads: int | None, quick: bool = False) -> list[Way]:
    """Time every way of `ways`, in turn."""
    keep_freed_memory()
    found = []
    for way in ways(threads, os.cpu_count() or 1):
        with _threads(way.threads):
            seconds = _step(way, *((0, 1, 4) if quick else (WARM, TIMED, BATCH)))
        found.append(replace(way, step_seconds=seconds))
        print(
            f"trial: {way.amp}, {_layout(way)}, {way.threads} threads: {1000 * seconds:.0f} ms a step", file=sys.stderr
        )
    return found


def _layout(way: Way) -> str:
    return "channels last" if way.channels_last else "channels first"


def _step(way: Way, warm: int, timed: int, batch: int) -> float:
    memory = torch.channels_last if way.channels_last else torch.contiguous_format
    rng = torch.Generator().manual_seed(0)
    model = build("resnet20", in_channels=3, classes=10).to(memory_format=memory).train()
    images = torch.randn(batch, 3, 32, 32, generator=rng).to(memory_format=memory)
    labels = torch.randint(10, (batch,), generator=rng)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    marks = []
    for _ in range(warm + timed):
        before = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with autocast("cpu", AMP[way.amp]):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        marks.append(time.perf_counter() - before)
    return statistics.median(marks[warm:])


@contextmanager
def _threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Ratios of gated to plain training steps, and their memory.

Plain and gated steps take turns in blocks of two cycles of the pruner's measuring, so that a block holds every kind of step as
often as training does. A block is timed by CUDA events (by the clock on a CPU), with one synchronisation at its end, as the
trainer's steps follow each other without any; ratios are taken within a round. The gated step includes ``Pruner.step`` with all
its probes, gradient products and readings, as set by the trainer's preset.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import gate_cost
from benchmarks.gpu.units import Finding, Place, unit
from catode.prune.pruner import Pruner
from catode.train import models

SHAPES = {"resnet20": (128, 32, 10), "resnet56": (128, 32, 10), "resnet50": (64, 224, 1000)}
"""Images in a step, their side and classes."""
SMOKE = {"resnet20": (4, 8, 10), "resnet56": (4, 8, 10), "resnet50": (2, 32, 10)}
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
READ_EVERY = 10  # as the trainer on an accelerator
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 7.0, 3, 25


@dataclass
class Lane:
    """A network in training on random images.

    Args:
        model: The network.
        device: Where it trains.
        shape: Images in a step, their side, classes.
        dtype: Type of automatic mixed precision; None for none. With fp16 the loss is scaled.
    """

    model: nn.Module
    device: str
    shape: tuple[int, int, int]
    dtype: torch.dtype | None = None
    pruner: Pruner | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.model.to(self.device, memory_format=torch.channels_last).train()
        fp16 = self.dtype == torch.float16
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True if fp16 else None
        )
        kind = torch.device(self.device).type
        self.scaler = torch.amp.GradScaler(kind, enabled=fp16)
        if fp16:  # as the trainer does
            self.optimizer.register_step_pre_hook(lambda own, *_: setattr(self, "skipped", own.found_inf.clone()))
            for parameter in self.model.parameters():
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        number, side, classes = self.shape
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(number, 3, side, side, generator=generator)
        self.x = x.to(self.device).contiguous(memory_format=torch.channels_last)
        self.y = torch.randint(classes, (number,), generator=generator).to(self.device)
        self.autocast = partial(torch.autocast, kind, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def step(self) -> None:
        """One training step, with the pruner's if there is one."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = F.cross_entropy(self.model(self.x), self.y)
        self.scaler.scale(loss).backward()
        scale, skipped = 1.0, False
        if self.scaler.is_enabled():
            scale = self.scaler.scale(torch.ones((), device=self.device))
            self.scaler.unscale_(self.optimizer)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            skipped = self.skipped
        else:
            self.optimizer.step()
        if self.pruner is not None:
            self.pruner.step(grad_scale=scale, skipped=skipped)

    def seconds(self, steps: int) -> float:
        """Time of some steps, in a row."""
        if not self.device.startswith("cuda"):
            mark = time.perf_counter()
            for _ in range(steps):
                self.step()
            return time.perf_counter() - mark
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(steps):
            self.step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak(self, steps: int) -> int:
        """Most memory in use during some steps, bytes; 0 where it is not counted."""
        if not self.device.startswith("cuda"):
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            self.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def _resident(place: Place) -> int:
    return torch.cuda.memory_allocated() if place.cuda else 0


def measure(place: Place, arch: str, precision: str) -> Finding:
    """Ratio of gated to plain steps of one network in one precision."""
    shape = (SMOKE if place.smoke else SHAPES)[arch]
    options = {"hidden_scale": 0.25} if place.smoke else {}

    def lane() -> Lane:
        torch.manual_seed(0)
        return Lane(
            models.build(arch, in_channels=3, classes=shape[2], **options), place.device, shape, DTYPES[precision]
        )

    start = _resident(place)
    plain = lane()
    for _ in range(1 if place.smoke else 3):
        plain.step()
    alone = plain.peak(3) - start
    plain.optimizer.zero_grad(set_to_none=True)
    own = _resident(place)
    other = lane()
    more = {"read_every": READ_EVERY, "self_check": False}
    if arch == "resnet50":
        more["probe_size"] = None if not place.smoke else 2
    other.pruner = gate_cost.pruner_for(other, settled=True, **more)
    schedule = other.pruner.schedule
    block = int(np.lcm(schedule.burst_every, schedule.read_every)) if not place.smoke else schedule.burst_every
    for _ in range(
        1 if place.smoke else block
    ):  # the first probe finds out the kind of the loss; algorithms are chosen
        other.step()
    gated = other.peak(block) - own
    times: dict[str, list[float]] = {"plain": [], "gated": []}
    least, most = (1, 1) if place.smoke else (LEAST_ROUNDS, MOST_ROUNDS)
    begin = time.perf_counter()
    while len(times["plain"]) < least or (len(times["plain"]) < most and time.perf_counter() - begin < SECONDS):
        times["plain"].append(plain.seconds(block))
        times["gated"].append(other.seconds(block))
    ratios = np.divide(times["gated"], times["plain"])
    numbers: dict[str, Any] = {"n": len(ratios), "steps in a block": block, "images in a step": shape[0]}
    numbers["tf32"] = bool(torch.backends.cudnn.allow_tf32) and place.cuda
    for name, values in times.items():
        numbers[f"{name}, ms a step"] = [round(1e3 * v / block, 4) for v in np.quantile(values, (0.25, 0.5, 0.75))]
    numbers["ratio"] = [round(float(v), 4) for v in np.quantile(ratios, (0.25, 0.5, 0.75))]
    numbers["kinds of steps"] = _kinds(other)
    if place.cuda:
        numbers |= {"plain, peak bytes": alone, "gated, peak bytes": gated}
    return Finding(None, numbers)


def _kinds(lane: Lane) -> dict[str, int]:
    """How often a cycle has each kind of gated step."""
    schedule, found = lane.pruner.schedule, []
    for place in range(schedule.burst_every):
        found.append(
            "probe" if place % schedule.measure_every == 0 else "products" if place in schedule.burst else "gates"
        )
    return {kind: found.count(kind) for kind in dict.fromkeys(found)}


for _arch in SHAPES:
    for _precision in DTYPES:
        unit("ratios", f"{_arch} {_precision}", 75.0, needs_cuda=_precision == "fp16")(
            partial(measure, arch=_arch, precision=_precision)
        )

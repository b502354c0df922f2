"""Units of work that are run one after the other in a process that may be stopped, killed or lost."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where a unit runs, and how large.

    Attributes:
        device: Device of PyTorch.
        smoke: Whether sizes are so small that the unit only shows that it runs.
    """

    device: str
    smoke: bool

    @property
    def cuda(self) -> bool:
        """Whether the device is one of CUDA."""
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Finding:
    """What a unit found.

    Attributes:
        passed: Whether it is as it must be; None for a measurement.
        numbers: What was measured, by name.
    """

    passed: bool | None
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Unit:
    """One unit.

    Attributes:
        part: Part of the benchmark.
        name: Its name there.
        run: Does it.
        seconds: Time after which it is stopped; it is not begun with less left.
        needs_cuda: Whether it has no meaning elsewhere.
    """

    part: str
    name: str
    run: Callable[[Place], Finding]
    seconds: float
    needs_cuda: bool = False


UNITS: dict[str, dict[str, Unit]] = {}
"""Units by part and name; `load` has all."""
MODULES = ("checks", "runs", "compiling", "ratios")


def load() -> dict[str, dict[str, Unit]]:
    """All units by part and name, in order of worth."""
    for module in MODULES:
        importlib.import_module(f"benchmarks.gpu.{module}")
    return UNITS


def unit(part: str, name: str, seconds: float, needs_cuda: bool = False) -> Callable[[Callable], Callable]:
    """Register a function as a unit."""

    def register(run: Callable[[Place], Finding]) -> Callable[[Place], Finding]:
        UNITS.setdefault(part, {})[name] = Unit(part, name, run, seconds, needs_cuda)
        return run

    return register

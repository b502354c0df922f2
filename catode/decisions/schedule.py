"""Schedule of a run: probes, bursts of gradients, readings and checks, and the rotation of paired differences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from catode.decisions.evidence import LEAST_EVIDENCE
from catode.theory.tolerance.measured import MEMORIES

NOISE = 1.6e-3  # nats, of one estimate of a unit's benefit, seen early in a ResNet-20 on batches of 128
CHECKS = 10  # in a deciding phase that is not too short
LEAD = 4  # memories of measuring before the thetas may move
LEAST_BURST = 8  # steps from one burst of gradients to the next
ANSWER_EVERY = 2  # bursts from one probe of the gradient's answer to the next


def needed_memory(noise: ArrayLike, price: ArrayLike, risk: float, correlation: ArrayLike = 0.0) -> NDArray[np.float64]:
    """Estimates that a pool must hold to tell a benefit of 0 from the price.

    Source: a pool of time constant T has 2 T (1 - phi) / (1 + phi) independent ones, which must be (z noise / price)^2.

    Args:
        noise: Standard deviation of one estimate, nats.
        price: Price, nats, of that shape.
        risk: Accepted probability of a mistake.
        correlation: Correlation phi of successive estimates, in [0, 1).

    Returns:
        The time constant, in estimates.
    """
    correlation = np.asarray(correlation)
    draws = (-float(ndtri(risk)) * np.asarray(noise) / np.asarray(price)) ** 2
    return np.asarray(draws / 2.0 * (1.0 + correlation) / (1.0 - correlation))


def needed_phase(memory: float, check_every: int = 1) -> int:
    """Steps that a deciding phase should have at least: ten memories of the pools and ten checks.

    Args:
        memory: Steps over which measurements are pooled.
        check_every: Steps between checks.
    """
    return math.ceil(max(MEMORIES * memory, CHECKS * check_every))


@dataclass(frozen=True)
class Schedule:
    """The steps of a pruner.

    Args:
        steps: Steps after which the deciding phase ends.
        watch_until: Steps after which a shadow run ends; `steps` for others.
        warmup: Steps before any theta moves, fewer than `steps`.
        measure_every: Steps between probes.
        check_every: Steps between checks.
        read_every: Steps between readings of what the device measured.
    """

    steps: int
    watch_until: int
    warmup: int
    measure_every: int
    check_every: int
    read_every: int

    @property
    def burst_every(self) -> int:
        """Steps from one burst of gradients to the next, a multiple of `measure_every`."""
        return self.measure_every * max(-(-LEAST_BURST // self.measure_every), 2)

    @property
    def burst(self) -> list[int]:
        """Places in that cycle whose gradients are multiplied: three in a row, of which the last has a probe."""
        last = self.measure_every * -(-2 // self.measure_every)
        return [last - 2, last - 1, last]

    def answers(self, done: int) -> bool:
        """Whether the burst in the cycle of the step after `done` ends with a probe of the gradient's answer."""
        return done // self.burst_every % ANSWER_EVERY == 0

    def begin(self, memory: int, layers: int, layers_per_probe: int) -> int:
        """First step with gates if thetas start at 1: early enough to measure before they may move.

        Args:
            memory: Steps over which measurements are pooled.
            layers: Number of layers.
            layers_per_probe: Layers whose paired difference one probe takes.
        """
        round_of_layers = 2 * self.measure_every * -(-layers // layers_per_probe)
        return max(self.warmup - math.ceil(LEAD * max(memory, round_of_layers * LEAST_EVIDENCE / 2)), 0)

    def progress(self, done: int) -> float:
        """Share of the deciding phase that is over after `done` steps."""
        return (done - self.warmup) / (self.steps - self.warmup)

    def ends(self, done: int) -> bool:
        """Whether the deciding phase or the watching ends with this step."""
        return done in (self.steps, self.watch_until)

    def reads(self, done: int) -> bool:
        """Whether what was measured is read after this step."""
        return self.ends(done) or done % self.read_every == 0

    def checks(self, done: int) -> bool:
        """Whether there is a check after this step: at the first reading after a multiple of `check_every`."""
        passed = done // self.check_every > (done - self.read_every) // self.check_every
        return self.ends(done) or (self.reads(done) and passed and done > self.warmup)

    def checked_before(self, done: int) -> int:
        """The step at which the check before the one after `done` was due."""
        due = (done - self.read_every) // self.check_every * self.check_every
        return -(-due // self.read_every) * self.read_every

    def until_read(self, done: int) -> int:
        """Steps up to the next reading, at least one."""
        return min(self.read_every - done % self.read_every, max(self.watch_until - done, 1))


@dataclass(eq=False)
class Turns:
    """Rotation of the paired differences: how many were taken so far of each kind."""

    layers: int = 0
    units: int = 0

    def next(self, candidates: NDArray[np.int64], taken: int, number: int) -> list[int]:
        """The next structures in the rotation.

        Args:
            candidates: Structures of one kind that can be probed.
            taken: How many of that kind were taken so far.
            number: How many to take.
        """
        return [int(candidates[(taken + i) % len(candidates)]) for i in range(min(number, len(candidates)))]

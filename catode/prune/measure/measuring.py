"""Probes on a part of each measured batch, and the estimates of L1 - L0 at each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from catode.decisions.evidence import Evidence
from catode.decisions.schedule import Turns
from catode.prune.devices.distributed import Group
from catode.prune.measure.capture import Capture
from catode.prune.measure.curvature import Curvature
from catode.prune.measure.growth import Response
from catode.prune.measure.loss_check import check
from catode.prune.measure.losses import NOT_RECOGNISED, Objective
from catode.prune.measure.probes import Probe, curvature_corrected, straight_through

LEAST_PROBE = 12  # examples, where the batch has as many


class NotFinite(RuntimeError):
    """A step was taken whose loss or gradient is not finite.

    Attributes:
        step: Its number, from 1.
    """

    def __init__(self, step: int):
        super().__init__(
            f"the loss must be finite at every step that the optimizer takes; got a gradient of the gates that is not, at step "
            f"{step}. Leave such a batch out, or call step(skipped=True) where the optimizer skips it."
        )
        self.step = step


def check_finite(derivative: NDArray, step: int) -> None:
    """Make sure that a step which the optimizer took has a finite gradient.

    Args:
        derivative: dL/dxi at the draw, shape (n,).
        step: Number of the step.

    Raises:
        NotFinite: if not.
    """
    if not np.isfinite(derivative).all():
        raise NotFinite(step)


def usual_probe(batch: int) -> int:
    """Default number of examples in a probe: a tenth of the batch, at least `LEAST_PROBE` if it has as many."""
    return min(batch, max(LEAST_PROBE, batch // 10))


@dataclass(frozen=True)
class Probed:
    """A probe whose numbers are still on the device.

    Attributes:
        structures: Those whose paired differences it took; None if it took the curvature, or nothing.
        numbers: Whether all logits were finite, whether the loss fits, and the values.
    """

    structures: list[int] | None
    numbers: tuple[torch.Tensor, ...]


class Measuring:
    """How the benefits of a gated model are measured.

    Args:
        capture: Hooks of the model.
        objective: The loss of the training steps.
        is_layer: Which structures are layers, shape (n,).
        estimators: Estimators of the layers' and of the units' benefits, of `catode.prune.measure.probes.ESTIMATORS`.
        probe_size: Examples in a probe; None for `usual_probe` of the batch.
        per_probe: Structures whose paired difference one probe takes.
        measure_every: Steps between probes.
        shared: Whether batch norms take their statistics over all processes.
        label_rng: Generator of the vectors that probes draw.
    """

    def __init__(
        self,
        capture: Capture,
        objective: Objective,
        is_layer: NDArray[np.bool_],
        *,
        estimators: tuple[str, str],
        probe_size: int | None,
        per_probe: int,
        measure_every: int,
        shared: bool,
        label_rng: torch.Generator,
    ):
        self.capture, self.objective, self.is_layer = capture, objective, is_layer
        self.estimators, self.label_rng, self.curved = estimators, label_rng, Curvature(capture.group)
        self.probe_size, self.per_probe, self.measure_every, self.shared = probe_size, per_probe, measure_every, shared

    @property
    def corrected(self) -> NDArray[np.bool_]:
        """Structures whose estimates contain half the pooled curvature, shape (n,)."""
        return np.where(self.is_layer, *(name == "curvature" for name in self.estimators))

    def probe(
        self,
        done: int,
        open_: NDArray[np.bool_],
        turns: Turns,
        batch: Any,
        grad_scale: float | torch.Tensor,
        answer: Callable[[Response], None] | None = None,
    ) -> Probed | None:
        """Run a probe on part of a measured step's examples; its numbers stay on the device.

        Args:
            done: Training steps, this one included.
            open_: Undecided structures, shape (n,).
            turns: Rotation of the paired differences; advanced.
            batch: What was given to the pruner's ``step()``.
            grad_scale: Factor that the loss was multiplied with before ``backward()``.
            answer: Takes the gradients' answer by this probe, which then takes neither curvature nor differences.

        Returns:
            The probe; None for a step that is not measured, or if no gradient came back to the outputs.
        """
        calls = [call for call in self.capture.calls if call.trained]
        if not calls:
            return None
        part, group = self._part(self.objective.examples(calls, batch), done)
        sample = self.objective.sample(calls, batch, part, grad_scale)
        flaws = torch.stack([~sample.finite, ~sample.fits]).long()
        finite, fit = (self.capture.group.sum(flaws) == 0).unbind()
        # curvature and paired probes take turns, so that no step pays for both
        curved = open_[self.is_layer].any() and self.estimators[0] == "curvature"
        curved |= open_[~self.is_layer].any() and self.estimators[1] == "curvature"
        chosen = self._next(open_, turns)
        if not curved and not chosen and answer is None:
            return Probed(None, (finite, fit))
        self.capture.paused = True
        try:
            probe = Probe(
                self.capture.model, self.capture.gates, sample.loss, sample.examples, self.label_rng, group, self.curved
            )
            if answer is not None:
                answer(probe.response)
                return Probed(None, (finite, fit))
            if curved and ((done // self.measure_every) % 2 == 0 or not chosen):
                return Probed(None, (finite, fit, probe.curvature(self.estimators[0] == "curvature")))
            turns.layers += self.per_probe
            turns.units += self.per_probe
            return Probed(chosen, (finite, fit, probe.paired(chosen)))
        finally:
            self.capture.paused = False

    def check_loss(self, batch: Any, grad_scale: float | torch.Tensor) -> None:
        """Make sure that the loss trained on in this step is the objective's; in the next step if this one does not tell.

        Raises:
            ValueError: if it is not, or mixes examples.
            RuntimeError: if the step's backward pass came by parts of the model, or no loss was given and the one trained on
                is not recognised.
        """
        capture = self.capture
        capture.paused = True
        try:
            found = check(self.objective, capture, batch, float(grad_scale), self.estimators)
        except (ValueError, TypeError, RuntimeError) as error:
            found = error
        finally:
            capture.paused = False
        everywhere = capture.group.gather(found)  # all processes stop, or none
        if isinstance(found, Exception):
            raise found
        for other in everywhere:
            if isinstance(other, Exception):
                raise other
        capture.checked = not all(everywhere)

    def take(
        self,
        probed: Probed,
        evidence: Evidence,
        open_: NDArray[np.bool_],
        finite: NDArray,
        fit: NDArray,
        *found: NDArray,
    ) -> dict[int, float]:
        """Pool the curvature of a probe, or return its paired benefits.

        Args:
            probed: The probe.
            evidence: Where the curvature is pooled.
            open_: Undecided structures, shape (n,).
            finite: Whether all outputs were finite, shape ().
            fit: Whether the loss fits, shape ().
            found: The curvature, shape (n,), or the paired benefits of `probed.structures`, nats; nothing if it took neither.

        Returns:
            Finite paired benefits by structure, nats.

        Raises:
            RuntimeError: if no loss was given, and the one trained on is not recognised.
        """
        if not finite:
            return {}
        if not fit:
            raise RuntimeError(NOT_RECOGNISED)
        if found and probed.structures is None and np.isnan(found[0]).all():
            self.curved.forget_softmax()
        for values in found:
            if probed.structures is not None:
                return {s: b for s, b in zip(probed.structures, values.tolist(), strict=True) if np.isfinite(b)}
            evidence.curvature.add(values, open_ & np.isfinite(values))
        return {}

    def estimates(
        self,
        evidence: Evidence,
        open_: NDArray[np.bool_],
        draw: NDArray,
        derivative: NDArray,
        paired: dict[int, float],
    ) -> tuple[NDArray, NDArray[np.bool_]]:
        """Estimates of L1 - L0 at a step, nats, and which structures have one, shape (n,) each.

        Args:
            evidence: With the pooled curvature.
            open_: Undecided structures, shape (n,).
            draw: Gate values, shape (n,).
            derivative: dL/dxi there, shape (n,).
            paired: Benefits that a probe found.
        """
        estimate, seen = np.zeros_like(draw), np.zeros_like(open_)
        for kind, name in zip((self.is_layer, ~self.is_layer), self.estimators, strict=True):
            where = kind & open_
            if name == "curvature":
                # a closed layer may leave the ReLU behind it exactly on its kink, where autograd's derivative is not one-sided
                where &= (evidence.curvature.count > 0) & (~self.is_layer | (draw > 0.5))
                values = curvature_corrected(derivative, draw, evidence.curvature.mean)
            elif name == "straight-through":
                values = straight_through(derivative, draw)
            else:
                values = np.zeros_like(draw)
                values[list(paired)] = [-b for b in paired.values()]
                where = where & np.isin(np.arange(len(draw)), list(paired))
            where = where & np.isfinite(values)
            estimate[where], seen = values[where], seen | where
        return estimate, seen

    def _next(self, open_: NDArray[np.bool_], turns: Turns) -> list[int]:
        """The next structures for a paired difference, layers first."""
        chosen = []
        for kind, name, taken in (
            (self.is_layer, self.estimators[0], turns.layers),
            (~self.is_layer, self.estimators[1], turns.units),
        ):
            if name == "paired":
                chosen += turns.next(np.flatnonzero(open_ & kind), taken, self.per_probe)
        return chosen

    def _part(self, batch: int, done: int) -> tuple[slice, Group]:
        """The rows that a probe takes of this process's `batch` examples, and the processes by the order of their rows."""
        group = self.capture.group
        processes = group.size if self.shared else 1
        batch *= processes
        size = min(batch, self.probe_size or usual_probe(batch))
        size += -size % processes
        begin = (done // self.measure_every * size) % max(batch - size + 1, 1)
        if not self.shared:
            return slice(begin, begin + size), group
        return group.rows(begin, size), replace(group, rank=(group.rank - begin) % group.size)

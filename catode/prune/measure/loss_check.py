"""Check that the loss which probes evaluate is the one that is trained on, and that it does not mix examples.

A loss that was given is evaluated on what the model returned in training: that must give the gradients that came back in
training, up to the share of a micro-batch. So neither dropout nor batch norms nor augmentation stand in the way, and the
model is not run.

Source: docs/theory.md section 3, "Any loss".
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from catode.prune.measure import inside_check, nests
from catode.prune.measure.capture import Call, Capture, RandomStates
from catode.prune.measure.curvature import couples_examples, second_derivative
from catode.prune.measure.inside_check import SAME, closeness
from catode.prune.measure.losses import CHANGED, NOT_RECOGNISED, Objective, scalar, size
from catode.prune.measure.probes import outputs_of, replaced_forward, undisturbed

ROUGH = 0.6  # the same where a loss draws random numbers, or micro-batches may weigh differently
FEW = 8  # examples on which the loss of a model that returns its own is looked at


def check(
    objective: Objective,
    capture: Capture,
    batch: Any,
    grad_scale: float,
    estimators: tuple[str, str] = ("paired", "curvature"),
) -> bool:
    """Compare the objective with the loss that was trained on in a step.

    Args:
        objective: The objective.
        capture: The step's calls, with everything kept.
        batch: What was given to the pruner's ``step()``.
        grad_scale: Factor that the loss was multiplied with before ``backward()``.
        estimators: Estimators of the layers' and of the units' benefits.

    Returns:
        Whether this step could tell: not where gradients are infinite (a loss scale that is still too high) or all 0.

    Raises:
        ValueError: if they differ, or the objective is no loss that can be measured by.
        RuntimeError: if the step's backward pass came by parts of the model, or no loss was given and the one trained on
            is not recognised.
    """
    trained = [call for call in capture.calls if call.trained]
    if not trained:
        raise RuntimeError(
            "`model` must be called itself in every step, model(...), for its outputs to be seen; got a backward pass that came "
            "through parts of it. Put what you call in its place into its forward()."
        )
    gradients = [g for call in trained for g in call.gradients if g is not None]
    if not all(bool(g.isfinite().all()) for g in gradients):
        return False
    if not all(bool(z.isfinite().all()) for call in trained for z in call.outputs):
        raise ValueError(
            "`model` must return finite numbers, by which probes tell a step that went wrong; got others, with a finite gradient. "
            "Mask with a number such as -1e4, or in the loss."
        )
    examples, told = objective.examples(trained, batch), True
    with undisturbed(capture.model, capture.gates.draw.device):
        if objective.given is not None:
            told = _check_given(objective, capture, trained, batch, grad_scale, "curvature" in estimators)
        elif all(call.loss is not None for call in trained):
            _check_own(objective, capture, trained, grad_scale)
        elif not bool(objective.sample(trained, None, slice(0, examples), grad_scale).fits):
            raise RuntimeError(NOT_RECOGNISED)
        if told:
            sample = objective.sample(trained, batch, slice(0, min(examples, FEW)), grad_scale)
            inside_check.check(capture, trained, sample, objective.given is not None, estimators)
    return told


def _check_own(objective: Objective, capture: Capture, calls: Sequence[Call], grad_scale: float) -> None:
    """The check for models that return their loss: nothing else may have been trained on, and with no factor."""
    factor = 0.0
    for call in calls:
        for place, gradient in enumerate(call.gradients):
            if place == call.loss:
                factor += 0.0 if gradient is None else float(gradient) / grad_scale
            elif gradient is not None and bool(gradient.any()):
                raise ValueError(
                    "`loss` must be given where more is trained on than the loss that the model returns; got gradients of its "
                    "other outputs. Pass Pruner(..., loss=lambda model, batch: ...) and step(batch)."
                )
    _check_factor(factor, SAME)
    _check_own_examples(objective, capture, calls, None)


def _check_own_examples(objective: Objective, capture: Capture, calls: Sequence[Call], batch: Any) -> None:
    """Make sure that a loss that the model returns does not mix examples, nor can't be differentiated twice."""
    examples = min(objective.examples(calls, batch), FEW)
    if examples > 1:
        sample = objective.sample(calls, batch, slice(0, examples), 1.0)
        with outputs_of(capture.model) as outputs:
            value = sample.loss(capture.model)
        generator = torch.Generator(value.device).manual_seed(0)
        leaves = [leaf for _, leaf in outputs]
        if couples_examples(value, leaves, sample.examples, lambda z: torch.empty_like(z).normal_(generator=generator)):
            raise _couples(objective)


def _check_given(
    objective: Objective, capture: Capture, trained: Sequence[Call], batch: Any, grad_scale: float, twice: bool
) -> bool:
    """The check for a loss that was given."""
    if any(call.changed_inputs for call in trained):
        raise ValueError(CHANGED)
    examples = objective.examples(trained, batch)
    replay = _find(objective, capture, trained, batch, examples, grad_scale)
    first, close = replay.evaluate(), replay.close
    if not any(bool(g.any()) for part in first.gradients for g in part):
        if all(part is None for part in first.parts):
            raise ValueError(
                f"`loss` must depend on what the model returns; {objective.name} does not. Compute it from the outputs, without "
                "detach()."
            )
        return False
    again = replay.evaluate(advance=True)
    if not _same_inputs(first.inputs, [(call.args, call.kwargs) for call in replay.answers], close) and _same_inputs(
        first.inputs, again.inputs, close
    ):
        raise ValueError(
            "`batch` must be what the model was trained on in this step, or its last micro-batch; the loss gives the model another "
            "input than the training loop did. Pass the batch as it went into the model, mixed or augmented."
        )
    random_loss = not _near(first.flat, again.flat, close)
    factor = replay.factor(first, close)
    if factor is None and not random_loss:
        raise ValueError(
            f"`loss` must be the loss that is trained on; got {objective.name}, whose gradient in the model's outputs is another. "
            "Give the whole loss, every term and setting of it, and the batch that it was computed from."
        )
    sure = factor is not None and len(trained) == len(replay.answers)
    if factor is None:
        factor = replay.repeated * float(replay.flat.norm() / first.flat.norm())
    _check_factor(factor / grad_scale, close if sure else ROUGH)
    if any(call.loss is not None for call in replay.answers):
        _check_own_examples(objective, capture, trained, batch)
        return True
    coupled = replay.couples(first, close) if examples > 1 else False
    if coupled:
        raise _couples(objective)
    replay.evaluate(twice=twice)
    return coupled is not None


@dataclass
class _Evaluation:
    """A loss evaluated on outputs of the training step.

    Attributes:
        inputs: What the model was called with, args and kwargs of each call.
        parts: Gradient in every output of every call, in order; None where it does not depend on it.
        gradients: The same by call, with zeros.
    """

    inputs: list[tuple[tuple, dict]] = field(default_factory=list)
    leaves: list[list[torch.Tensor]] = field(default_factory=list)
    parts: list[torch.Tensor | None] = field(default_factory=list)
    gradients: list[list[torch.Tensor]] = field(default_factory=list)

    @property
    def flat(self) -> torch.Tensor:
        """All gradients in one vector."""
        return _flat([g for part in self.gradients for g in part])


@dataclass
class _Replay:
    """A loss that reads, in place of the model's outputs, those of the training step.

    Attributes:
        objective: The loss.
        model: The gated model, which is not run but for calls without gradients.
        batch: The batch.
        parts: For every call that it makes, the calls of the step whose outputs are read, joined.
        repeated: How many times as many calls the step had, which are taken to be like these.
        examples: Examples in the batch.
    """

    objective: Objective
    model: nn.Module
    batch: Any
    parts: list[list[Call]]
    repeated: int
    examples: int

    def __post_init__(self) -> None:
        self.answers = [_joined(calls) for calls in self.parts]

    @property
    def close(self) -> float:
        """Relative deviation of gradients that are the same."""
        return closeness(self.answers)

    @property
    def flat(self) -> torch.Tensor:
        """The gradients that came back in training, in one vector."""
        return _flat([g for call in self.answers for g in _gradients(call)])

    def evaluate(
        self, answers: Sequence[Call] | None = None, advance: bool = False, twice: bool = False
    ) -> _Evaluation:
        """The loss and its gradients.

        Args:
            answers: Other outputs.
            advance: Whether the loss draws other random numbers than before.
            twice: Whether to make sure that it can be differentiated twice.

        Raises:
            ValueError: if the loss is none, or fails.
        """
        answers = self.answers if answers is None else answers
        found, plain = _Evaluation(), self.model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return plain(*args, **kwargs)
            call = answers[min(len(found.inputs), len(answers) - 1)]
            found.inputs.append((args, kwargs))
            found.leaves.append([])

            def leaf(z: torch.Tensor) -> torch.Tensor:
                if not z.requires_grad:
                    return z
                found.leaves[-1].append(z.detach().clone().requires_grad_())
                return found.leaves[-1][-1].clone()

            return nests.mapped(call.output, leaf)

        device, dtype = answers[-1].outputs[0].device, answers[-1].autocast
        precision = torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
        with _random_numbers(device, advance), replaced_forward(self.model, forward), precision:
            value = _called(self.objective, self.model, self.batch)
        leaves = [z for part in found.leaves for z in part]
        if not leaves or not value.requires_grad:
            raise ValueError(
                f"`loss` must depend on what the model returns; {self.objective.name} does not. Call the model that it is given, "
                "and compute it from the outputs, without detach()."
            )
        if not bool(value.isfinite()):
            raise ValueError(
                f"`loss` must be finite; {self.objective.name} gives {float(value.detach())} on the step's batch. Mend it."
            )
        found.parts = list(torch.autograd.grad(value, leaves, allow_unused=True, create_graph=twice))
        if twice:
            reached = [(g, z) for g, z in zip(found.parts, leaves, strict=True) if g is not None]
            second_derivative(*zip(*reached, strict=True), [z.detach() for _, z in reached])
        parts = iter([torch.zeros_like(z) if g is None else g for g, z in zip(found.parts, leaves, strict=True)])
        found.gradients = [[next(parts) for _ in part] for part in found.leaves]
        return found

    def factor(self, evaluation: _Evaluation, close: float) -> float | None:
        """How many times the loss was trained on; None for another loss.

        Args:
            evaluation: The loss.
            close: Relative deviation of gradients that are the same.
        """
        factor, sizes = 0.0, [_examples(call) for call in self.parts[0]]
        for number, share in enumerate(sizes):  # a micro-batch may have a factor of its own
            pairs = []
            for calls, gradients in zip(self.parts, evaluation.gradients, strict=True):
                for place, found in enumerate(_gradients(calls[number])):
                    before = sum(len(call.outputs[place]) for call in calls[:number]) if found.dim() else 0
                    part = slice(before, before + len(found)) if found.dim() else ...
                    pairs.append((found, gradients[place][part]))
            found, expected = (_flat(side) for side in zip(*pairs, strict=True))
            ratio = float((found * expected).sum() / expected.square().sum().clamp_min(1e-38))
            if not _near(found, ratio * expected, close):
                return None
            factor += ratio * share / sum(sizes)
        return factor * self.repeated

    def explains(self, grad_scale: float) -> bool:
        """Whether the loss gives the gradients that came back in training."""
        factor = self.factor(self.evaluate(), self.close)
        return factor is not None and abs(factor / grad_scale - 1.0) <= self.close

    def couples(self, evaluation: _Evaluation, close: float) -> bool | None:
        """Whether an example's gradient changes when other examples have the outputs of their neighbours; None if all are equal."""
        outputs = [z for call in self.answers for z in call.outputs if self._dimension(z) is not None]
        if not outputs:  # whose rows are not those of examples
            return False
        each = max([len(z) // self.examples for z in outputs if self._dimension(z) == 0], default=1)
        # an example's rows may follow each other, or be those of the first, second, ... view
        layouts = {(each, 1), (1, 1) if each == 1 else (1, self.examples)}
        found = [self._coupled(evaluation, close, *layout) for layout in layouts]
        return None if None in found else all(found)

    def _dimension(self, z: torch.Tensor) -> int | None:
        """The dimension that counts the examples; None for none."""
        if z.dim() and len(z) and len(z) % self.examples == 0:
            return 0
        return next((d for d, length in enumerate(z.shape) if length == self.examples), None)

    def _coupled(self, evaluation: _Evaluation, close: float, run: int, period: int) -> bool | None:
        """The same where rows i have the example ``i // run``, modulo `period` if that is not 1."""

        def rows(z: torch.Tensor, dimension: int) -> tuple[torch.Tensor, torch.Tensor]:
            """Rows of the even examples, and for every row, itself or that of the example before an odd one."""
            every, length = torch.arange(z.shape[dimension], device=z.device), 1 if dimension else run
            numbers = every // length
            odd = (numbers % period if period > 1 else numbers) % 2 == 1
            return every[~odd], torch.where(odd, every - length, every)

        def exchanged(z: torch.Tensor) -> torch.Tensor:
            dimension = self._dimension(z) if z.requires_grad else None
            return (
                z if dimension is None else z.detach().index_select(dimension, rows(z, dimension)[1]).requires_grad_()
            )

        changed = [replace(call, output=nests.mapped(call.output, exchanged)) for call in self.answers]
        outputs = [
            zip(nests.tensors(call.output), nests.tensors(other.output), strict=True)
            for call, other in zip(self.answers, changed, strict=True)
        ]
        if all(torch.equal(z, other) for part in outputs for z, other in part):
            return None
        after = self.evaluate(changed)
        pairs = [
            tuple(g.index_select(dimension, rows(g, dimension)[0]) for g in (before, now))
            for one, other in zip(evaluation.gradients, after.gradients, strict=True)
            for before, now in zip(one, other, strict=True)
            if (dimension := self._dimension(before)) is not None
        ]
        return not _near(*(_flat(side) for side in zip(*pairs, strict=True)), close)


def _find(
    objective: Objective, capture: Capture, trained: Sequence[Call], batch: Any, examples: int, grad_scale: float
) -> _Replay:
    """Which of the step's calls the batch stands for: its last ones, or all, joined, if the batch is as large as all.

    A loss may call the model without learning from what it returns, and so may the loop beside the loss.

    Raises:
        ValueError: if the loss cannot be evaluated on any of them.
    """
    sequences = [list(trained)] if len(trained) == len(capture.calls) else [list(capture.calls), list(trained)]
    found, problems = [], []
    for calls in sequences:
        replay = _last_calls(objective, capture.model, calls, batch, examples, problems)
        if replay is not None:
            found.append(replay)
    if not found:
        raise problems[0]
    return next((replay for replay in found[:-1] if replay.explains(grad_scale)), found[-1])


def _last_calls(
    objective: Objective, model: nn.Module, calls: Sequence[Call], batch: Any, examples: int, problems: list[ValueError]
) -> _Replay | None:
    """The last calls of a sequence, as many as the loss makes; None if it makes none of those numbers, with the reasons."""
    whole = len(calls) > 1 and _examples(calls[-1]) < examples
    for number in (n for n in range(1, len(calls) + 1) if len(calls) % n == 0):
        parts = [calls[place::number] for place in range(number)] if whole else [[c] for c in calls[-number:]]
        if not all(nests.joinable([call.output for call in part]) for part in parts):
            continue
        replay = _Replay(objective, model, batch, parts, 1 if whole else len(calls) // number, examples)
        try:
            asked = len(replay.evaluate().inputs)
        except ValueError as error:
            problems.append(error)
            continue
        if asked == number:
            return replay
        problems.append(
            ValueError(
                f"`loss` must be the loss that is trained on; {objective.name} calls the model {asked} times, the step called "
                f"it {len(calls)} times. Give the whole loss."
            )
        )
    return None


def _called(objective: Objective, model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss, with its errors in one line."""
    try:
        value = objective.given(model, batch)
    except (RuntimeError, ValueError, LookupError, AttributeError, TypeError) as error:
        line = (str(error).strip().splitlines() or [""])[0][:160]
        raise ValueError(
            f"`loss` must fit the batch that step() is given and what the model returned; {objective.name} failed with "
            f"{type(error).__name__}: {line}. Pass the step's batch, or its last micro-batch."
        ) from error
    return scalar(value)


@contextmanager
def _random_numbers(device: torch.device, advance: bool) -> Iterator[None]:
    """The same random numbers every time, or others."""
    before = RandomStates.now(device)
    if advance:
        random.random(), np.random.random(), torch.rand(1), torch.rand(1, device=device)
    try:
        yield
    finally:
        before.set()


def _joined(calls: Sequence[Call]) -> Call:
    """Several calls as one."""
    if len(calls) == 1:
        return calls[0]
    output = nests.joined([call.output for call in calls])
    return Call(
        None,
        *_joined_inputs(calls),
        autocast=calls[-1].autocast,
        output=nests.mapped(output, lambda z: z.detach().requires_grad_(z.requires_grad)),
        outputs=nests.joined([call.outputs for call in calls]),
        gradients=nests.joined([_gradients(call) for call in calls]),
    )


def _joined_inputs(calls: Sequence[Call]) -> tuple[tuple, dict]:
    inputs = [(call.args, call.kwargs) for call in calls]
    return nests.joined(inputs) if nests.joinable(inputs) else ((), {})


def _gradients(call: Call) -> list[torch.Tensor]:
    """Gradients that came back to a call's outputs, with zeros."""
    return [torch.zeros_like(z) if g is None else g for z, g in zip(call.outputs, call.gradients, strict=True)]


def _examples(call: Call) -> int:
    """Examples of a call, or rows of what it returned."""
    try:
        return size(call)
    except (ValueError, TypeError):
        return next((len(z) for z in call.outputs if z.dim()), 1)


def _same_inputs(ours: Sequence[tuple[tuple, dict]], theirs: Sequence[tuple[tuple, dict]], close: float) -> bool:
    """Whether models were called with the same tensors, as far as that is known."""
    for one, other in zip(ours, theirs, strict=False):
        try:
            pairs = list(zip(nests.tensors(one), nests.tensors(other), strict=True))
        except (TypeError, ValueError):
            continue
        for a, b in pairs:
            if a.shape != b.shape or not _near(a, b, close):
                return False
    return True


def _near(a: torch.Tensor, b: torch.Tensor, share: float) -> bool:
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm()) <= share * float(a.norm())


def _flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors])


def _check_factor(factor: float, share: float) -> None:
    """Make sure that a factor is 1 up to a share."""
    if not 1 / (1 + share) <= factor <= 1 + share:
        raise ValueError(
            f"`loss` must be the loss that is trained on; what was trained on is {factor:.3g} times it. Divide micro-batches' "
            "losses by their number, pass a loss scale to step(grad_scale=...), and any other factor in loss=."
        )


def _couples(objective: Objective) -> ValueError:
    return ValueError(
        "`loss` must be a mean of losses of single examples, which a part of the batch can estimate; got "
        f"{objective.name}, which compares examples with each other. Contrastive and triplet losses can't be measured."
    )

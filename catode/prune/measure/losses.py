"""The loss that a step was trained on, so that probes can evaluate it on some of the step's examples.

Source: docs/theory.md section 3, "Any loss".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from catode.prune.measure import nests
from catode.prune.measure.capture import Call, own_loss

Loss = Callable[[nn.Module, Any], torch.Tensor]

# relative and absolute tolerance of targets; in 16 bits the relative one alone, the other is the type's resolution
ONE_HOT, ONE_HOT_HALF = (1e-3, 1e-5), 2e-2
CHANGED = (
    "`batch` must stay as the model saw it, and what it returned, until step(); got one that was changed in place. Let the model "
    "and the loop compute new tensors, as x = x - mean and z = z.masked_fill(...)."
)
NOT_RECOGNISED = (
    "`loss` must be given where the training loss is no mean softmax cross-entropy with one label for each example; got another "
    "gradient of the outputs. Pass Pruner(..., loss=lambda model, batch: ...) and step(batch), and a loss scale, if any, to "
    "step(grad_scale=...)."
)


@dataclass(frozen=True)
class Sample:
    """Some examples of a step.

    Attributes:
        loss: Mean loss of the examples, shape (); takes the gated model.
        examples: Their number.
        finite: Whether all outputs of the step were finite, shape ().
        fits: Whether the loss is the one that the step was trained on, as far as its gradient tells, shape ().
    """

    loss: Callable[[nn.Module], torch.Tensor]
    examples: int
    finite: torch.Tensor
    fits: torch.Tensor


class Objective:
    """The loss of the training steps: the one given, the model's own, or a mean cross-entropy that is recognised.

    Args:
        loss: ``loss(model, batch)``, the mean loss of a batch; None for one that needs no batch.

    Attributes:
        most: Most calls that a step had: the last micro-batches of an epoch may be fewer, and divided by as many.
    """

    def __init__(self, loss: Loss | None = None):
        self.given, self.most = loss, 1

    def examples(self, calls: Sequence[Call], batch: Any) -> int:
        """Examples of a step that can be probed.

        Args:
            calls: The model's calls of the step.
            batch: What was given to the pruner's ``step()``.

        Raises:
            ValueError: if the loss needs a batch and there is none, or it is not made of examples.
        """
        if self.given is None:
            return sum(size(call) for call in calls)
        self.check_given(batch)
        return nests.examples(batch)

    def check_given(self, batch: Any) -> None:
        """Make sure that there is a batch for a loss that needs one.

        Raises:
            ValueError: if there is none.
        """
        if self.given is not None and batch is None:
            raise ValueError(
                "`step()` must be given the batch where the pruner was given a loss; got none. Use step(batch)."
            )

    def sample(self, calls: Sequence[Call], batch: Any, part: slice, grad_scale: float | torch.Tensor) -> Sample:
        """Some examples of a step, with their loss.

        Args:
            calls: The model's calls of the step, their gradients included.
            batch: What was given to the pruner's ``step()``.
            part: The examples, among those that `examples` counts.
            grad_scale: Factor that the loss was multiplied with before ``backward()``.

        Raises:
            ValueError: if the model's inputs have been changed since, or its outputs where the loss is recognised by them.
        """
        finite = torch.stack([tensor.isfinite().all() for call in calls for tensor in call.outputs]).all()
        yes = torch.ones_like(finite)
        if self.given is not None:
            chosen = nests.rows(batch, part)
            return Sample(lambda model: self.evaluate(model, chosen), nests.examples(chosen), finite, yes)
        own = all(call.loss is not None for call in calls)
        if any(call.changed_inputs or (call.changed_outputs and not own) for call in calls):
            raise ValueError(CHANGED)
        pieces = [(call, rows) for call, rows in zip(calls, _shares(calls, part), strict=True) if rows is not None]
        inputs = [nests.rows((call.args, call.kwargs), rows) for call, rows in pieces]
        if not nests.joinable(inputs):  # such as texts of different lengths
            pieces, inputs = pieces[:1], inputs[:1]
        inputs = nests.joined(inputs)
        if any(call.autocast for call in calls):
            inputs = nests.mapped(inputs, _in_32_bits)
        args, kwargs = inputs
        examples = sum(rows.stop - rows.start for _, rows in pieces)
        # as the step ran, but not in float16, in which derivatives without a loss scale may come to 0
        low = all(call.autocast is torch.bfloat16 for call in calls)
        precision = partial(torch.autocast, calls[0].outputs[0].device.type, torch.bfloat16, low, cache_enabled=False)

        def output(model: nn.Module) -> Any:
            with precision():
                return model(*args, **kwargs)

        if own:
            return Sample(lambda model: own_loss(output(model)), examples, finite, yes)
        self.most = max(self.most, len(calls))
        found = (_targets(call, rows, calls, self.most, grad_scale) for call, rows in pieces)
        targets, fits = zip(*found, strict=True)
        labels = torch.cat(targets)

        def cross_entropy(model: nn.Module) -> torch.Tensor:
            return nn.functional.cross_entropy(output(model).float(), labels)

        return Sample(cross_entropy, examples, finite, torch.stack(fits).all())

    def evaluate(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The loss given, of a batch.

        Raises:
            ValueError: if it is no scalar tensor.
        """
        return scalar(self.given(model, batch))

    @property
    def name(self) -> str:
        """Name of the loss in messages."""
        given = self.given
        while isinstance(given, partial):
            given = given.func
        return "the model's own" if given is None else getattr(given, "__name__", type(given).__name__)


def scalar(value: Any) -> torch.Tensor:
    """What a loss returned, of shape ().

    Raises:
        ValueError: if it is no scalar tensor.
    """
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"`loss` must return a scalar tensor, the mean loss of the batch; got {found}. Average it.")
    return value.reshape(())


def recovered_labels(
    logits: torch.Tensor, gradient: torch.Tensor, scale: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels behind a mean softmax cross-entropy: the target distribution is softmax(z) - N dL/dz.

    Args:
        logits: Logits z, shape (m, classes).
        gradient: dL/dz as the backward pass left it, of that shape.
        scale: N over the factor that the loss was multiplied with.

    Returns:
        The labels, shape (m,), and whether every distribution is one label, as it is not with another loss, shape ().
    """
    chances = logits.float().softmax(1)
    targets = chances - gradient.float() * scale
    labels = targets.argmax(1)
    one_hot = nn.functional.one_hot(labels, logits.shape[1])
    relative, absolute = ONE_HOT if logits.element_size() > 2 else (ONE_HOT_HALF, torch.finfo(logits.dtype).eps)
    miss, error = (targets - one_hot).abs().amax(1), (chances - one_hot).abs().amax(1)
    return labels, (miss <= relative * error + absolute).all()


def _targets(
    call: Call, rows: slice, calls: Sequence[Call], most: int, grad_scale: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of some examples of a call, and whether its loss is a mean cross-entropy, over its own or over all examples.

    With fewer calls than other steps had, also whether it is one divided by their number.
    """
    logits, gradient = call.outputs[0][rows], call.gradients[0]
    if gradient is None or logits.dim() != 2 or len(call.outputs) != 1:
        return logits.new_zeros(len(logits), dtype=torch.long), torch.zeros((), dtype=torch.bool, device=logits.device)
    labels, fits = recovered_labels(logits, gradient[rows], len(calls) * size(call) / grad_scale)
    scales = [sum(map(size, calls))] * (len(calls) > 1) + [most * size(call)] * (len(calls) < most)
    for scale in scales:
        others, again = recovered_labels(logits, gradient[rows], scale / grad_scale)
        labels, fits = torch.where(fits, labels, others), fits | again
    return labels, fits


def _in_32_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Inputs of a model under autocast may have fewer bits than its weights, for which probes have no use."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def size(call: Call) -> int:
    """Examples of a call."""
    return nests.examples((call.args, call.kwargs), "the model's input")


def _shares(calls: Sequence[Call], part: slice) -> list[slice | None]:
    """The rows of each call that belong to a part of all examples, in order; None for none."""
    found, first = [], 0
    for call in calls:
        own = size(call)
        begin, end = max(part.start - first, 0), min(part.stop - first, own)
        found.append(slice(begin, end) if begin < end else None)
        first += own
    return found

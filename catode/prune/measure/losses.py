"""The loss that a step was trained on, so that probes can evaluate it on some of the step's examples.

Source: docs/theory.md section 5, "Any loss".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from catode.prune.measure import nests
from catode.prune.measure.capture import Call, Capture, own_loss
from catode.prune.measure.probes import outputs_of, undisturbed

Loss = Callable[[nn.Module, Any], torch.Tensor]

ONE_HOT = {torch.float32: (1e-3, 1e-5), torch.float64: (1e-3, 1e-5)}  # relative and absolute tolerance of targets
ONE_HOT_HALF = (2e-2, 1e-3)
SAME, HALF, ROUGH = 0.02, 0.15, 0.6  # relative deviations up to which two gradients are the same


@dataclass(frozen=True)
class Sample:
    """Some examples of a step.

    Attributes:
        loss: Mean loss of the examples, shape (); takes the gated model.
        finite: Whether all outputs of the step were finite, shape ().
        fits: Whether the loss is the one that the step was trained on, as far as its gradient tells, shape ().
    """

    loss: Callable[[nn.Module], torch.Tensor]
    finite: torch.Tensor
    fits: torch.Tensor


class Objective:
    """The loss of the training steps: the one given, the model's own, or a mean cross-entropy that is recognised.

    Args:
        loss: ``loss(model, batch)``, the mean loss of a batch; None for one that needs no batch.
    """

    def __init__(self, loss: Loss | None = None):
        self.given = loss

    def examples(self, calls: Sequence[Call], batch: Any) -> int:
        """Examples of a step that can be probed.

        Args:
            calls: The model's calls of the step.
            batch: What was given to the pruner's ``step()``.

        Raises:
            ValueError: if the loss needs a batch and there is none, or it is not made of examples.
        """
        if self.given is None:
            return sum(_size(call) for call in calls)
        if batch is None:
            raise ValueError("`step()` must be given the batch where the pruner was given a loss; got none. Use step(batch).")
        return nests.examples(batch)

    def sample(self, calls: Sequence[Call], batch: Any, part: slice, grad_scale: float | torch.Tensor) -> Sample:
        """Some examples of a step, with their loss.

        Args:
            calls: The model's calls of the step, their gradients included.
            batch: What was given to the pruner's ``step()``.
            part: The examples, among those that `examples` counts.
            grad_scale: Factor that the loss was multiplied with before ``backward()``.
        """
        finite = torch.stack([tensor.isfinite().all() for call in calls for tensor in call.outputs]).all()
        yes = torch.ones_like(finite)
        if self.given is not None:
            chosen = nests.rows(batch, part)
            return Sample(lambda model: self.evaluate(model, chosen), finite, yes)
        pieces = [(call, rows) for call, rows in zip(calls, _shares(calls, part), strict=True) if rows is not None]
        args, kwargs = nests.joined([nests.rows((call.args, call.kwargs), rows) for call, rows in pieces])
        if all(call.loss is not None for call in calls):
            return Sample(lambda model: own_loss(model(*args, **kwargs)), finite, yes)
        targets, fits = zip(*(_targets(call, rows, calls, grad_scale) for call, rows in pieces), strict=True)
        labels = torch.cat(targets)

        def cross_entropy(model: nn.Module) -> torch.Tensor:
            return nn.functional.cross_entropy(model(*args, **kwargs).float(), labels)

        return Sample(cross_entropy, finite, torch.stack(fits).all())

    def evaluate(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The loss given, of a batch.

        Raises:
            ValueError: if it is no finite scalar tensor that depends on the model.
        """
        value = self.given(model, batch)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"`loss` must return a scalar, the mean loss of the batch; got {found}. Average it.")
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
    relative, absolute = ONE_HOT.get(logits.dtype, ONE_HOT_HALF)
    miss, error = (targets - one_hot).abs().amax(1), (chances - one_hot).abs().amax(1)
    return labels, (miss <= relative * error + absolute).all()


def _targets(
    call: Call, rows: slice, calls: Sequence[Call], grad_scale: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of some examples of a call, and whether its loss is a mean cross-entropy, over its own or over all examples."""
    logits, gradient = call.outputs[0][rows], call.gradients[0]
    if gradient is None or logits.dim() != 2 or len(call.outputs) != 1:
        return logits.new_zeros(len(logits), dtype=torch.long), torch.zeros((), dtype=torch.bool, device=logits.device)
    labels, fits = recovered_labels(logits, gradient[rows], len(calls) * _size(call) / grad_scale)
    if len(calls) > 1:
        fits |= recovered_labels(logits, gradient[rows], sum(map(_size, calls)) / grad_scale)[1]
    return labels, fits


def _size(call: Call) -> int:
    """Examples of a call."""
    return nests.examples((call.args, call.kwargs), "the model's input")


def _shares(calls: Sequence[Call], part: slice) -> list[slice | None]:
    """The rows of each call that belong to a part of all examples, in order; None for none."""
    found, first = [], 0
    for call in calls:
        size = _size(call)
        begin, end = max(part.start - first, 0), min(part.stop - first, size)
        found.append(slice(begin, end) if begin < end else None)
        first += size
    return found


def mismatch(objective: Objective, capture: Capture, batch: Any, grad_scale: float) -> str:
    """How the loss that was trained on differs from the objective's, as far as its gradient tells; empty if it does not.

    A loss that was given is evaluated again on the batch, with the gates and random numbers of the last calls; its
    gradient in the model's outputs must be the one that came back in training, up to the factor of a micro-batch.

    Args:
        objective: The objective.
        capture: The step's calls, with the states of the random number generators noted.
        batch: What was given to the pruner's ``step()``.
        grad_scale: Factor that the loss was multiplied with before ``backward()``.
    """
    calls = capture.trained
    if not calls or not all(gradient.isfinite().all() for _, gradient in _pairs(calls)):
        return ""
    if objective.given is None:
        own = [call.gradients[call.loss] for call in calls if call.loss is not None]
        return _times(sum(float(g) for g in own if g is not None) / grad_scale, SAME) if own else ""
    per_call = max(len(calls[-1].outputs), 1)
    outputs, expected = _again(objective, capture, batch, 1)
    number = max(len(outputs) // per_call, 1)
    if 1 < number <= len(calls):
        outputs, expected = _again(objective, capture, batch, number)
    pairs = _pairs(calls[-number:])
    micro_batches = len(calls) / number
    if number == 1 and len(calls) > 1 and [z.shape for z, _ in pairs] != [z.shape for z in outputs]:
        parts = list(zip(*map(_pairs, map(lambda call: [call], calls)), strict=True))
        pairs = [(torch.cat([z for z, _ in part]), torch.cat([g for _, g in part])) for part in parts]
        micro_batches = 1.0
    if [z.shape for z, _ in pairs] != [z.shape for z in outputs]:
        return "`batch` must be the batch of the model's last forward pass; got one that gives outputs of other shapes"
    found = torch.cat([g.float().reshape(-1) for _, g in pairs])
    expected = torch.cat([g.float().reshape(-1) for g in expected])
    half = any(z.dtype not in ONE_HOT or z.dtype != again.dtype for (z, _), again in zip(pairs, outputs, strict=True))
    close = HALF if half else SAME
    ratio = float((found * expected).sum() / expected.square().sum().clamp_min(1e-30))
    if all(_near(z, again, close) for (z, _), again in zip(pairs, outputs, strict=True)):
        if not _near(found, ratio * expected, close):
            return "`loss` must be the loss that is trained on; its gradient in the model's outputs is another one"
    else:  # random numbers of the loss itself, such as an augmentation's
        ratio, close = float(found.norm() / expected.norm().clamp_min(1e-30)), ROUGH
    return _times(ratio * micro_batches / grad_scale, close if micro_batches == 1 else ROUGH)


def _again(
    objective: Objective, capture: Capture, batch: Any, number: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The model's outputs when the loss is evaluated again as in the last `number` calls, and its gradients in them."""
    model, calls, device = capture.model, capture.trained[-number:], capture.gates.draw.device
    dtype = calls[0].autocast
    precision = torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
    with undisturbed(model, device), capture.replaying(calls), outputs_of(model) as outputs, precision:
        value = objective.evaluate(model, batch)
    if not value.requires_grad:
        raise ValueError("`loss` must depend on what the model returns; got a loss without a gradient. Don't detach it.")
    found = torch.autograd.grad(value, outputs, allow_unused=True)
    return outputs, [torch.zeros_like(z) if g is None else g for z, g in zip(outputs, found, strict=True)]


def _pairs(calls: Sequence[Call]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Outputs of calls and the gradients that came back."""
    return [
        (z, torch.zeros_like(z) if g is None else g)
        for call in calls
        for z, g in zip(call.outputs, call.gradients, strict=True)
    ]


def _near(a: torch.Tensor, b: torch.Tensor, share: float) -> bool:
    return float((a.float() - b.float()).norm()) <= share * float(a.float().norm())


def _times(factor: float, share: float) -> str:
    """Message about a factor that should be 1 up to a share."""
    if 1 / (1 + share) <= factor <= 1 + share:
        return ""
    return (
        f"`loss` must be the loss that is trained on; what was trained on is {factor:.3g} times it. Divide micro-batches' losses by "
        "their number, pass a loss scale to step(grad_scale=...), and any other factor in loss="
    )

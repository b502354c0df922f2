"""Curvature of any loss in a network's outputs, as vectors to pull back to the gates.

With H the second derivative of the loss in the outputs z and J = dz/dxi, the Gauss-Newton curvature of an example is
J'HJ. Vectors a and b with E[a b'] = H give it as E[(J'a)(J'b)]: no root of H is needed, nor a positive one.

Source: docs/theory.md section 5, "Any loss".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Noise = Callable[[torch.Tensor], torch.Tensor]

SOFTMAX, SOFTMAX_HALF = 1e-3, 5e-2  # relative deviation up to which a second derivative is a softmax cross-entropy's
SATURATED = 1e-5  # share of a vector that H must leave for its weight to be known


class Curvature:
    """Random vectors a and b with E[a b'] = H, for all examples of a loss at once.

    For a softmax cross-entropy, weighted or not, per example or per position, ``a = b = sqrt(s) (softmax - label)`` with a
    label sampled from the softmax and s the weight of the example or position in the loss. Else a is normal and b = H a.
    Which of the two is found out when it is first called.

    Attributes:
        classes: Dimension of the classes; None for another loss, or before the first call.
    """

    def __init__(self) -> None:
        self.classes: int | None = None
        self._known = False

    def pullbacks(
        self, loss: torch.Tensor, outputs: Sequence[torch.Tensor], normal: Noise, clocks: Noise
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None, list[torch.Tensor], torch.Tensor]:
        """Draw the vectors.

        Args:
            loss: The loss, shape (); its graph is kept.
            outputs: The network's outputs z that it depends on, of a graph.
            normal: Normal random numbers of a tensor's shape.
            clocks: Exponential random numbers of a tensor's shape.

        Returns:
            a; b, None where it equals a; the outputs that they belong to; whether all is finite and of the kind that the
            first call found, shape ().

        Raises:
            ValueError: if the loss does not depend on the outputs.
        """
        outputs, gradients = _last(loss, outputs)
        drawn = [normal(z).to(z.dtype) for z in outputs]
        curved = second_derivative(gradients, outputs, drawn)
        finite = torch.stack([z.isfinite().all() for z in (*outputs, *curved)]).all()
        if self._known and self.classes is None:
            return drawn, curved, outputs, finite
        z = outputs[0].detach().float()
        dims = [self.classes] if self._known else sorted({1, z.dim() - 1}) if len(outputs) == 1 and z.dim() > 1 else []
        for dim in dims:
            weight, fits = _softmax_weight(z, drawn[0].float(), curved[0].float(), dim, outputs[0].dtype)
            if self._known or fits:
                self.classes, self._known = dim, True
                chances = z.softmax(dim)
                label = (chances / clocks(chances)).argmax(dim, keepdim=True)
                pull = weight.sqrt() * (chances - torch.zeros_like(chances).scatter_(dim, label, 1.0))
                return [pull.to(outputs[0].dtype)], None, outputs, finite & fits
        self._known = bool(finite)
        return drawn, curved, outputs, finite


def second_derivative(
    gradients: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """H times vectors, of the outputs' shapes.

    Args:
        gradients: dL/dz, of a graph.
        outputs: z.
        vectors: The vectors, of the outputs' shapes.
    """
    product = sum((gradient * vector).sum() for gradient, vector in zip(gradients, vectors, strict=True))
    if not product.requires_grad:  # a loss linear in the outputs
        return [torch.zeros_like(z) for z in outputs]
    found = torch.autograd.grad(product, outputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(z) if part is None else part.detach() for part, z in zip(found, outputs, strict=True)]


def couples_examples(loss: torch.Tensor, outputs: Sequence[torch.Tensor], normal: Noise) -> bool:
    """Whether the second derivative of a loss mixes different examples, as that of a contrastive loss does.

    Args:
        loss: The loss of at least two examples, shape (); its graph is kept.
        outputs: The network's outputs z, of a graph, whose first dimension counts the examples.
        normal: Normal random numbers of a tensor's shape.
    """
    outputs, gradients = _last(loss, outputs)
    vectors = [normal(z).to(z.dtype) for z in outputs]
    for vector in vectors:
        vector[1::2] = 0.0
    curved = second_derivative(gradients, outputs, vectors)
    own, other = (sum(float(h[first::2].float().square().sum()) for h in curved) for first in (0, 1))
    return other > 1e-6 * own


def _last(loss: torch.Tensor, outputs: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The outputs that the loss depends on, without those behind which others come, and dL/d of each, of a graph."""
    outputs = [z for z in outputs if z.requires_grad and z is not loss]
    found = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True) if loss.requires_grad else []
    pairs = [(z, g) for z, g in zip(outputs, found, strict=False) if g is not None]
    if not pairs:
        raise ValueError(
            "`loss` must depend on what the model returns; got a loss that does not, so that no curvature can be taken. "
            "Compute it from the model's outputs, without detach()."
        )
    if len(pairs) > 1:
        pairs = [
            (z, g)
            for z, g in pairs
            if not any(
                torch.autograd.grad(other.sum(), z, retain_graph=True, allow_unused=True)[0] is not None
                for other, _ in pairs
                if other is not z
            )
        ]
    return [z for z, _ in pairs], [g for _, g in pairs]


def _softmax_weight(
    z: torch.Tensor, vector: torch.Tensor, curved: torch.Tensor, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight of every position, with 1 entry along `dim`, and whether H is that of a softmax cross-entropy along it."""
    chances = z.softmax(dim)
    expected = chances * (vector - (chances * vector).sum(dim, keepdim=True))
    power = expected.square().sum(dim, keepdim=True)
    known = power > SATURATED**2 * vector.square().sum(dim, keepdim=True)
    weight = torch.where(known, (curved * expected).sum(dim, keepdim=True) / torch.where(known, power, 1.0), 0.0)
    allowed = SOFTMAX if dtype in (torch.float32, torch.float64) else SOFTMAX_HALF
    miss = torch.where(known, curved - weight * expected, 0.0).square().sum()
    return weight.clamp_min(0.0), (miss <= allowed**2 * curved.square().sum()) & (weight >= 0.0).all() & known.any()

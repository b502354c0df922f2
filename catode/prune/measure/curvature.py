"""Curvature of any loss in a network's outputs, as vectors to pull back to the gates.

With H the second derivative of the loss in the outputs z and J = dz/dxi, the Gauss-Newton curvature of an example is
J'HJ. Vectors a and b with E[a b'] = H give it as E[(J'a)(J'b)]: no root of H is needed, nor a positive one.

Source: docs/theory.md section 3, "Any loss".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from catode.prune.devices.distributed import Group

Noise = Callable[[torch.Tensor], torch.Tensor]

SOFTMAX, SOFTMAX_HALF = 1e-3, 5e-2  # relative deviation up to which a second derivative is a softmax cross-entropy's
SATURATED = 1e-5  # share of a vector that H must leave for its weight to be known
LEVEL = 0.1  # share of an example's mean scale that is added to the scale of every entry of its vectors


@dataclass(frozen=True)
class Pullbacks:
    """Vectors a and b with E[a b'] = H.

    Attributes:
        places: Places of the outputs that they belong to, among those given.
        left: a, of the outputs' shapes.
        right: b; None where it equals a.
        finite: Whether all is, shape ().
        fits: Whether the loss is of the kind that the first call found, shape ().
    """

    places: list[int]
    left: list[torch.Tensor]
    right: list[torch.Tensor] | None
    finite: torch.Tensor
    fits: torch.Tensor


class Curvature:
    """Random vectors a and b with E[a b'] = H, for all examples of a loss at once.

    With v of random signs, which bring less noise than normal numbers: for a softmax cross-entropy, weighted or not, per
    example or per position, p the softmax and s the weight of the example or position in the loss,
    ``a = b = sqrt(s) (r - p sum(r))`` with ``r = sqrt(p) v``, whose covariance is H. Else ``a = sqrt(d) v`` and
    ``b = H v / sqrt(d)``, d > 0 of the size of H's entries, so that outputs that hardly matter add no noise. Which of the two
    is found out when it is first called.

    Args:
        group: Processes that must find the same.

    Attributes:
        classes: Dimension of the classes; None for another loss, or before the first call.
    """

    def __init__(self, group: Group | None = None) -> None:
        self.group = group or Group()
        self.classes: int | None = None
        self._known = False
        self._places: tuple[int, list[int]] | None = None

    def forget_softmax(self) -> None:
        """Take any loss from now on: it turned out to be no softmax cross-entropy."""
        self.classes, self._known = None, True

    def pullbacks(self, loss: torch.Tensor, outputs: Sequence[torch.Tensor], normal: Noise) -> Pullbacks:
        """Draw the vectors.

        Args:
            loss: The loss, shape (); its graph is kept.
            outputs: The network's outputs z, of a graph; those that the loss does not depend on are left out, and those behind
                which others of them come.
            normal: Normal random numbers of a tensor's shape.

        Raises:
            ValueError: if the loss does not depend on the outputs, or cannot be differentiated twice.
        """
        if self._places is None or self._places[0] != len(outputs):
            self._places = len(outputs), last(loss, outputs)
        places = self._places[1]
        outputs = [outputs[place] for place in places]
        gradients = torch.autograd.grad(loss, outputs, create_graph=True)
        drawn = [normal(z) for z in outputs]
        curved = second_derivative(gradients, outputs, drawn)
        finite = torch.stack([z.isfinite().all() for z in (loss, *outputs, *curved)]).all()
        z = outputs[0].detach().float()
        dims = [self.classes]
        if not self._known:
            dims = sorted({1, z.dim() - 1}) if len(outputs) == 1 and z.dim() > 1 else []
        for dim in dims if self.classes is not None or not self._known else ():
            weight, fits = _softmax_weight(z, drawn[0].float(), curved[0].float(), dim, outputs[0].dtype)
            if self._known or self._all(fits & finite):
                self.classes, self._known = dim, True
                chances = z.softmax(dim)
                root = chances.sqrt() * normal(z).sign()
                pull = weight.sqrt() * (root - chances * root.sum(dim, keepdim=True))
                return Pullbacks(places, [pull.to(outputs[0].dtype)], None, finite, fits)
        self._known = self._known or self._all(finite)
        scales = [_scale(part) for part in curved]
        drawn = [normal(z).sign() for z in outputs]
        left = [scale * part for scale, part in zip(scales, drawn, strict=True)]
        right = second_derivative(gradients, outputs, [part / scale for scale, part in zip(scales, drawn, strict=True)])
        return Pullbacks(
            places, [a.to(z.dtype) for a, z in zip(left, outputs, strict=True)], right, finite, torch.ones_like(finite)
        )

    def _all(self, flag: torch.Tensor) -> bool:
        """Whether a flag is set in all processes; the host waits."""
        return not bool(self.group.sum((~flag).long()))


def second_derivative(
    gradients: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """H times vectors, of the outputs' shapes.

    Args:
        gradients: dL/dz, of a graph.
        outputs: z.
        vectors: The vectors, of the outputs' shapes.

    Raises:
        ValueError: if the loss cannot be differentiated twice.
    """
    product = sum(
        (gradient.float() * vector.float()).sum() for gradient, vector in zip(gradients, vectors, strict=True)
    )
    if not product.requires_grad:  # a loss linear in the outputs
        return [torch.zeros_like(z) for z in outputs]
    try:
        found = torch.autograd.grad(product, outputs, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise ValueError(
            f"`loss` must be twice differentiable for the curvature estimator; got {_line(error)!r}. Choose "
            'estimator="paired" and layer_estimator="paired", which need longer runs, or another loss.'
        ) from error
    return [torch.zeros_like(z) if part is None else part.detach() for part, z in zip(found, outputs, strict=True)]


def couples_examples(loss: torch.Tensor, outputs: Sequence[torch.Tensor], examples: int, normal: Noise) -> bool:
    """Whether the second derivative of a loss mixes different examples, as that of a contrastive loss does.

    Args:
        loss: The loss of at least two examples, shape (); its graph is kept.
        outputs: The network's outputs z, of a graph, in whose first dimension every example has one row or as many as the others.
        examples: Number of examples.
        normal: Normal random numbers of a tensor's shape.
    """
    outputs = [outputs[place] for place in last(loss, outputs)]
    gradients = torch.autograd.grad(loss, outputs, create_graph=True)

    def mixes(number: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        even = [(number(z) % 2 == 0).view(-1, *[1] * (z.dim() - 1)) for z in outputs]
        vectors = [normal(z) * mask for z, mask in zip(outputs, even, strict=True)]
        curved = [part.float() for part in second_derivative(gradients, outputs, vectors)]
        own = sum(float((h * mask).square().sum()) for h, mask in zip(curved, even, strict=True))
        return sum(float((h * ~mask).square().sum()) for h, mask in zip(curved, even, strict=True)) > 1e-6 * own

    # an example's rows may follow each other, or be those of the first, second, ... view
    return mixes(lambda z: _rows(z) // max(len(z) // examples, 1)) and mixes(lambda z: _rows(z) % examples)


def last(loss: torch.Tensor, outputs: Sequence[torch.Tensor]) -> list[int]:
    """Places of the outputs that the loss depends on, without those behind which others of them come.

    Raises:
        ValueError: if there are none.
    """
    places = [place for place, z in enumerate(outputs) if z.requires_grad]
    if places and loss.requires_grad:
        ends = [outputs[place] for place in places]
        found = torch.autograd.grad(loss, ends, retain_graph=True, allow_unused=True)
        places = [place for place, gradient in zip(places, found, strict=True) if gradient is not None]
    if not places or not loss.requires_grad:
        raise ValueError(
            "`loss` must depend on what the model returns; got a loss that does not, so that no curvature can be taken. "
            "Compute it from the model's outputs, without detach(), and let a model that returns its loss return those, too."
        )

    def leads_on(place: int) -> bool:
        ends = [outputs[other] for other in places if other != place and outputs[other].grad_fn is not None]
        sums = [z.sum() for z in ends]
        return (
            bool(ends)
            and torch.autograd.grad(sums, outputs[place], retain_graph=True, allow_unused=True)[0] is not None
        )

    return [place for place in places if not leads_on(place)] if len(places) > 1 else places


def _rows(z: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(z), device=z.device)


def _scale(curved: torch.Tensor) -> torch.Tensor:
    """sqrt(d) of every entry, from H times a vector; positive."""
    size = curved.float().abs()
    mean = size.mean(list(range(1, size.dim())), keepdim=True) if size.dim() > 1 else size.mean()
    return (size + LEVEL * mean + 1e-6 * size.mean() + 1e-20).sqrt()


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__


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

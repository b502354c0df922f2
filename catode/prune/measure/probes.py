"""Estimators of G = L1 - L0 = -benefit, the loss side of dC/dtheta (docs/mathematics.md section 3).

All work on the same kind of evidence. `straight_through` and `curvature` turn the derivative dL/dxi at a draw, which the
training step's own backward pass delivers, into an estimate for every structure at once. `Probe` makes the extra
evidence on a few examples of the batch: the Gauss-Newton curvature in xi for all structures at once, and *paired*
differences, the loss with a structure off minus the loss with it on, same examples, same other gates.

============== ============================================== =========== ==================================
estimator      mean                                           noise       use
============== ============================================== =========== ==================================
straight-      theta g(1) + (1-theta) g(0); blind at xi = 1   low         comparison; right at theta = 1/2
curvature      exact for losses quadratic in xi               low         units (default)
paired         exact for any loss, on the probe's examples    one or few  layers (default)
                                                              per probe
============== ============================================== =========== ==================================
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from catode.prune.devices.distributed import Group
from catode.prune.gated.gates import Gates

ESTIMATORS = ("curvature", "paired", "straight-through")


def straight_through(derivative, draw, curvature=None):
    """dL/dxi at the draw, taken for L1 - L0.

    Args:
        derivative: dL/dxi at the draw, shape (n,).
        draw: Gate values, shape (n,).
        curvature: Not used.

    Returns:
        Estimate of L1 - L0, shape (n,), nats.
    """
    return derivative


def curvature_corrected(derivative, draw, curvature):
    """Trapezoidal rule from one end: exact for losses quadratic in xi.

    Args:
        derivative: dL/dxi at the draw, shape (n,).
        draw: Gate values in [0, 1], shape (n,).
        curvature: Expected d2L/dxi2, Gauss-Newton, shape (n,).

    Returns:
        Estimate of L1 - L0, shape (n,), nats.
    """
    return derivative + (0.5 - draw) * curvature


def tracking_norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]


@contextmanager
def batch_statistics_only(model: nn.Module, norms: Sequence[nn.Module] | None = None):
    """Freeze the running statistics of train-mode batch norms inside this context.

    Args:
        model: The network.
        norms: Its `tracking_norms`, where they are known.
    """
    norms = tracking_norms(model) if norms is None else norms
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class Probe:
    """Extra evidence about the gates from a few examples, at the current weights and draw.

    Batch norms use the statistics of these examples alone: a probe of very few examples is noisy and biased where the
    images are small (benchmarks/results/estimators.md has figures).

    Args:
        model: The gated model, in train mode.
        gates: Its gates.
        inputs: Examples, shape (m, ...).
        targets: Target distribution of each example, shape (m, classes).
        generator: Source of the sampled labels.
        group: Processes that probe together, each with m examples of its own; results are means over all.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: Gates,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        generator: torch.Generator,
        group: Group | None = None,
    ):
        self.group = group or Group()
        self.model, self.gates = model, gates
        self.inputs, self.targets = inputs, targets
        self.draw = gates.draw.detach().clone()
        self.generator = generator
        self._norms = tracking_norms(model)

    def curvature(self, layers: bool = True) -> torch.Tensor:
        """Gauss-Newton curvature of the loss in every gate, shape (n,); 0 for layers without `layers`, which is cheaper.

        The mean over examples of the squared derivative at a label *sampled from the model*, whose expectation is the
        variance over the model's softmax of dz/dxi. NaN if a logit is not finite.
        """
        with self._gates(self.draw), self.gates.tapped(layers) as taps:
            logits = self.model(self.inputs).float()
        # labels of all processes' examples are drawn everywhere, so that the generators stay in step
        chances = logits.new_ones(len(logits) * self.group.size, logits.shape[1])
        chances[self.group.rank :: self.group.size] = logits.detach().softmax(1)
        labels = self.group.share(_sampled(chances, self.generator))
        per_example = self.draw.new_zeros(len(logits), len(self.draw))
        if taps:
            loss = F.cross_entropy(logits, labels, reduction="sum")
            for tap, gradient in zip(taps, torch.autograd.grad(loss, [tap.after for tap in taps]), strict=True):
                per_example.index_add_(1, tap.structures, tap.derivative(gradient).to(per_example.dtype))
        found = per_example.square().mean(0).masked_fill(~logits.isfinite().all(), torch.nan)
        return self.group.mean(found)

    @torch.no_grad()
    def paired(self, structures: Sequence[int]) -> torch.Tensor:
        """Loss without minus loss with each of the given structures, shape (len(structures),), nats."""
        blocks = [self.model.get_submodule(block.name) for block in self.gates.blocks]
        with _recorded(blocks) as outputs:
            base = self._loss(self.draw)
        differences = []
        for number in structures:
            other = self.draw.clone()
            other[number] = 1.0 - other[number]
            # what comes before a layer is the same with and without it
            before = blocks[:number] if number < len(blocks) else []
            with _replayed(before, outputs):
                change = self._loss(other) - base
            differences.append(torch.where(self.draw[number] > 0.5, change, -change))
        return self.group.mean(torch.stack(differences)) if differences else self.draw.new_zeros(0)

    @contextmanager
    def _gates(self, draw: torch.Tensor):
        """The model with other gate values, its running statistics frozen."""
        before = self.gates.draw, self.gates.rows
        self.gates.draw, self.gates.rows = draw, None
        try:
            with batch_statistics_only(self.model, self._norms):
                yield
        finally:
            self.gates.draw, self.gates.rows = before

    def _loss(self, draw: torch.Tensor) -> torch.Tensor:
        with self._gates(draw):
            logits = self.model(self.inputs).float()
        return -(self.targets * logits.log_softmax(1)).sum(1).mean()


def _sampled(probabilities: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One class of each row, shape (m,): as torch.multinomial draws it, whose checks would make the host wait."""
    clocks = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / clocks).argmax(1)


@contextmanager
def _recorded(modules: Sequence[nn.Module]):
    """Outputs of modules in forward passes inside this context; None for a module that runs more than once."""
    outputs: dict[nn.Module, torch.Tensor | None] = {}

    def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        outputs[module] = None if module in outputs else output

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _replayed(modules: Sequence[nn.Module], outputs: dict[nn.Module, torch.Tensor | None]):
    """Make modules return recorded outputs instead of computing them inside this context."""
    known = [module for module in modules if outputs.get(module) is not None]
    for module in known:
        module.forward = lambda *args, output=outputs[module]: output
    try:
        yield
    finally:
        for module in known:
            del module.forward

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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from catode.prune.describe.protocol import before
from catode.prune.devices.distributed import Group
from catode.prune.gated.gates import Gates, Tap
from catode.prune.measure import nests
from catode.prune.measure.capture import RandomStates, differentiable, own_loss
from catode.prune.measure.curvature import Curvature

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
    images are small (benchmarks/results/estimators.md has figures). All evaluations have the same random numbers, and
    leave running statistics, other buffers and random number generators as they were.

    Args:
        model: The gated model, in train mode.
        gates: Its gates.
        loss: Mean loss of the examples, shape (); takes the model.
        examples: Number of examples.
        generator: Source of the random vectors in the outputs.
        group: Processes that probe together, each with as many examples of its own; results are means over all.
        curved: What is known of the loss's second derivative; kept from probe to probe.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: Gates,
        loss: Callable[[nn.Module], torch.Tensor],
        examples: int,
        generator: torch.Generator,
        group: Group | None = None,
        curved: Curvature | None = None,
    ):
        self.group, self.curved = group or Group(), curved or Curvature(group)
        self.model, self.gates, self.loss, self.examples = model, gates, loss, examples
        self.draw = gates.draw.detach().clone()
        self.generator = generator
        self._norms = tracking_norms(model)

    def curvature(self, layers: bool = True) -> torch.Tensor:
        """Gauss-Newton curvature of the mean loss in every gate, shape (n,); 0 for layers without `layers`, which is cheaper.

        The sum over examples of the products of two derivatives, see `catode.prune.measure.curvature`. Infinite if an output
        is not finite, NaN if the loss is not of the kind that the first probe found. Where an activation has not one row for
        each example, all rows are added up first: the mean is the same, as the vectors of different examples are independent.

        Raises:
            ValueError: if the loss does not depend on the outputs, or cannot be differentiated twice.
        """
        with self._undisturbed(self.draw), self.gates.tapped(layers) as taps, outputs_of(self.model) as outputs:
            value, found = self.loss(self.model), torch.zeros_like(self.draw)
            taps = list(taps)  # checkpointed modules run again in the backward passes
            if taps:
                drawn = self.curved.pullbacks(value, [leaf for _, leaf in outputs], self._normal)
                ends = [outputs[place][0] for place in drawn.places]
                left = self._pulled(taps, ends, drawn.left, retain=drawn.right is not None)
                right = left if drawn.right is None else self._pulled(taps, ends, drawn.right)
                found = (left * right).sum(0).masked_fill(~drawn.fits, torch.nan).masked_fill(~drawn.finite, torch.inf)
        return self.group.mean(found)

    def response(
        self,
        parameters: Sequence[nn.Parameter],
        moves: Mapping[nn.Parameter, torch.Tensor],
        stood: Mapping[nn.Parameter, torch.Tensor],
    ) -> list[torch.Tensor]:
        """By how much the gradient of the loss changes when weights are moved.

        Args:
            parameters: Those whose gradient is returned.
            moves: What is added to parameters, of their shapes.
            stood: Where they are moved from; parameters that are left out, from where they are.

        Returns:
            Gradient at the moved weights minus gradient before, of the parameters' shapes; of these examples alone.
        """
        with placed(stood):
            before = self._gradient(parameters)
            with placed({p: p.data + move.to(p.dtype) for p, move in moves.items()}):
                after = self._gradient(parameters)
        return [new - old for new, old in zip(after, before, strict=True)]

    def _gradient(self, parameters: Sequence[nn.Parameter]) -> tuple[torch.Tensor, ...]:
        with self._undisturbed(self.draw):
            return torch.autograd.grad(self.loss(self.model), parameters, allow_unused=True, materialize_grads=True)

    @torch.no_grad()
    def paired(self, structures: Sequence[int]) -> torch.Tensor:
        """Loss without minus loss with each of the given structures, shape (len(structures),), nats."""
        blocks = self.gates.blocks
        with _recorded(before(self.model, blocks, len(blocks)), self.draw.device) as outputs:
            base = self._evaluated(self.draw)
        differences = []
        for number in structures:
            other = self.draw.clone()
            other[number] = 1.0 - other[number]
            # what comes before a layer is the same with and without it
            earlier = before(self.model, blocks, number) if number < len(blocks) else []
            with _replayed(earlier, outputs):
                change = self._evaluated(other) - base
            differences.append(torch.where(self.draw[number] > 0.5, change, -change))
        return self.group.mean(torch.stack(differences)) if differences else self.draw.new_zeros(0)

    @contextmanager
    def _undisturbed(self, draw: torch.Tensor) -> Iterator[None]:
        """The model with other gate values and always the same random numbers; what it changes is put back."""
        before = self.gates.draw, self.gates.rows
        self.gates.draw, self.gates.rows = draw, None
        try:
            with undisturbed(self.model, draw.device, self._norms):
                yield
        finally:
            self.gates.draw, self.gates.rows = before

    def _evaluated(self, draw: torch.Tensor) -> torch.Tensor:
        with self._undisturbed(draw):
            return self.loss(self.model).float()

    def _pulled(
        self,
        taps: Sequence[Tap],
        outputs: Sequence[torch.Tensor],
        vectors: Sequence[torch.Tensor],
        retain: bool = False,
    ) -> torch.Tensor:
        """J' times vectors of the outputs, of every example, or of all in the first row, shape (examples, n)."""
        found = self.draw.new_zeros(self.examples, len(self.draw))
        nodes = [tap.after for tap in taps]
        gradients = torch.autograd.grad(outputs, nodes, vectors, retain_graph=retain, allow_unused=True)
        plain = all(len(tap.after) == self.examples for tap in taps)  # else products of rows would not belong together
        for tap, gradient in zip(taps, gradients, strict=True):
            if gradient is not None:
                derivative = tap.derivative(gradient).to(found.dtype)
                (found if plain else found[:1]).index_add_(
                    1, tap.structures, derivative if plain else derivative.sum(0, True)
                )
        return found

    def _normal(self, like: torch.Tensor) -> torch.Tensor:
        """Normal numbers of a tensor's shape; drawn for all processes' examples, so that the generators stay in step."""
        whole = torch.empty(len(like) * self.group.size, *like.shape[1:], device=like.device)
        return self.group.share(whole.normal_(generator=self.generator))


@contextmanager
def exchanged(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Exchange the data of tensors inside this context; autograd's versions of them stay."""

    def exchange() -> None:
        for one, other in pairs:
            one.data, other.data = other.data, one.data
        torch.clear_autocast_cache()  # a decorator `torch.autocast` has its own setting of the cache

    exchange()
    try:
        yield
    finally:
        exchange()


def placed(weights: Mapping[nn.Parameter, torch.Tensor]) -> AbstractContextManager[None]:
    """Parameters with other values inside this context, and their own behind it; autograd's versions of them stay."""
    return exchanged([(parameter, data.detach()) for parameter, data in weights.items()])


@contextmanager
def outputs_of(model: nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The differentiable outputs of the model's forward passes inside this context, in order.

    Yields:
        Each one, and what the loss reads in its place: a leaf of its own graph, so that the loss's derivatives are those in its
        arguments alone; the tensor itself where the model returns its loss.
    """
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def part(z: torch.Tensor) -> torch.Tensor:
        if not (z.is_floating_point() and z.requires_grad):
            return z
        found.append((z, z.detach().requires_grad_()))
        return found[-1][1].clone()  # which the loss may change in place

    def split(module: nn.Module, args: tuple, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        own = own_loss(output)
        if own is None:
            return nests.mapped(output, part)
        found.extend((z, z) for z in differentiable(output) if z is not own)
        return None

    hook = model.register_forward_hook(split)
    try:
        yield found
    finally:
        hook.remove()


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else inside this context; its hooks run as ever."""
    before = vars(module).get("forward")  # patched by somebody else
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def undisturbed(model: nn.Module, device: torch.device, norms: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Leave running statistics, other buffers and random number generators as they are; see `Probe`."""
    norms, random = tracking_norms(model) if norms is None else norms, RandomStates.now(device)
    try:
        with batch_statistics_only(model, norms), buffers_kept(model, norms):
            yield
    finally:
        random.set()


@contextmanager
def buffers_kept(model: nn.Module, norms: Sequence[nn.Module]) -> Iterator[None]:
    """Put buffers that forward passes change back at the end of this context, such as queues.

    Args:
        model: The network.
        norms: Its `tracking_norms`, whose buffers are frozen in another way.
    """
    frozen = {id(buffer) for norm in norms for buffer in norm.buffers(recurse=False)}
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and id(buffer) not in frozen
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in before:
            with torch.no_grad():
                buffer.copy_(value)
            module._buffers[name] = buffer


@dataclass(frozen=True)
class _Ran:
    """What a module returned, and the random generators' states behind it.

    Attributes:
        output: What it returned.
        versions: Counts of changes in place of the tensors in it, at that moment.
        random: The states.
    """

    output: Any
    versions: tuple[int, ...]
    random: RandomStates

    @classmethod
    def now(cls, output: Any, device: torch.device) -> _Ran | None:
        """What a module just returned; None for what may hold tensors that cannot be found."""
        try:
            return cls(output, _versions(output), RandomStates.now(device))
        except (TypeError, RuntimeError):  # RuntimeError: inference tensors count no changes
            return None

    @property
    def unchanged(self) -> bool:
        """Whether nothing changed the output in place, as an activation or an addition behind the module may have."""
        return self.versions == _versions(self.output)

    def again(self, *_: Any, **__: Any) -> Any:
        """Returns the output, and leaves the generators as the module did."""
        self.random.set()
        return self.output


def _versions(output: Any) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in nests.tensors(output))


@contextmanager
def _recorded(modules: Sequence[nn.Module], device: torch.device):
    """What modules return in forward passes inside this context; None for a module that runs more than once."""
    outputs: dict[nn.Module, _Ran | None] = {}

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        outputs[module] = None if module in outputs else _Ran.now(output, device)

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _replayed(modules: Sequence[nn.Module], outputs: dict[nn.Module, _Ran | None]):
    """Make modules return what they did, if nothing changed it since, instead of computing it inside this context."""
    with ExitStack() as stack:
        for module in modules:
            ran = outputs.get(module)
            if ran is not None and ran.unchanged:
                stack.enter_context(replaced_forward(module, ran.again))
        yield

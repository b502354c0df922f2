"""Bernoulli gates at negligible cost: one draw a step, a multiplication of small tensors.

A layer gate scales the affine of its block's last module; a unit gate scales the input slices of the module that
*consumes* the unit. (Scaling the norm before the ReLU instead would erase dL/dxi wherever xi = 0, since relu'(0) = 0.)
Both are `torch.nn.utils.parametrize` parametrizations of an otherwise plain network, and every gate reads its value from
one flat vector, so that after ``loss.backward()`` the vector's ``.grad`` holds dL/dxi of every structure at its draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from catode.prune.devices.distributed import Group
from catode.prune.devices.transfer import upload
from catode.structures.inventory import Inventory


@dataclass(frozen=True)
class Tap:
    """Where a gate of every example acts: an activation before and after it.

    Attributes:
        structures: Numbers of the structures gated here, shape (channels,), or one for all channels of a layer.
        mean: Mean of `before` over the batch where a following norm removes what a gate does to it, else None.
        channels: Dimension of the channels.
        before: Activation before the gates, detached, shape (batch, ...).
        after: The same times the draw: a node of the graph.
    """

    structures: torch.Tensor
    mean: torch.Tensor | None
    channels: int
    before: torch.Tensor
    after: torch.Tensor

    @torch.no_grad()
    def derivative(self, gradient: torch.Tensor) -> torch.Tensor:
        """dL/dxi of each example.

        Args:
            gradient: dL/d `after`, of its shape.

        Returns:
            Shape (batch, len(structures)).
        """
        x = self.before if self.mean is None else self.before - self.mean
        own = [0, self.channels] if len(self.structures) > 1 else [0]
        over = [d for d in range(x.dim()) if d not in own]
        product = x * gradient
        return (product.sum(over) if over else product).reshape(len(x), -1)


class Gates:
    """Values of all gates and their installation in a model.

    Structures keep the numbers of the original network, also when units have been cut.

    Args:
        model: The model.
        inventory: What can be removed from it, and its numbering.
        group: Processes over whose batches the model's norms take their statistics; None for this one alone.

    Attributes:
        draw: Current gate values, shape (n,), float32, a leaf that collects dL/dxi in ``draw.grad``. Always the same
            tensor, as captured graphs need it.
        keep_prob: theta, shape (n,), float32; used instead of the draw in eval mode. Always the same tensor.
        rows: None, or one row of gate values for each example of the next batch, shape (batch, n); then activations are
            scaled instead of weights. Where a batch norm follows the consumer, a closed gate leaves the unit's mean.
    """

    def __init__(self, model: nn.Module, inventory: Inventory, group: Group | None = None):
        self.model, self.inventory, self.group = model, inventory, group or Group()
        self.blocks, device = inventory.blocks, next(model.parameters()).device
        self.draw = torch.ones(inventory.size, device=device, requires_grad=True)
        self.keep_prob = torch.ones(inventory.size, device=device)
        self.rows: torch.Tensor | None = None
        self._taps: list[Tap] | None = None
        self._tap_layers = False
        self._installed: list[tuple[nn.Module, str]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @torch.no_grad()
    def set(self, keep_prob: torch.Tensor | None, draw: torch.Tensor) -> None:
        """Set theta (None: leave it) and the gate values of the next forward pass, both of shape (n,)."""
        if keep_prob is not None:
            self.keep_prob.copy_(keep_prob, non_blocking=True)
        self.draw.copy_(draw, non_blocking=True)
        self.draw.grad = None

    def values(self, training: bool) -> torch.Tensor:
        """Gate values that the forward pass uses, shape (n,)."""
        return self.draw if training else self.keep_prob

    def install(self, layers: Sequence[bool], sites: Sequence[torch.Tensor | None]) -> None:
        """Put gates into the model.

        Args:
            layers: For each block, whether its layer is gated.
            sites: For each site of each block in order, the numbers of the units that are now present in it, or None
                where no unit of the site is gated.
        """
        for place in self.inventory.places:
            if sites[place.number] is None:
                continue
            units = upload(sites[place.number], self.draw.device)
            for name in place.site.consumers:
                module = self.model.get_submodule(name)
                self._parametrize(module, "weight", _UnitGate(self, units))
                self._hooks.append(module.register_forward_pre_hook(self._scale_input(units, place.site.normalised)))
        for number, block in enumerate(self.blocks):
            if layers[number]:
                module = self.model.get_submodule(block.output)
                for name in ("weight", "bias"):
                    if getattr(module, name, None) is not None:
                        self._parametrize(module, name, _LayerGate(self, number))
                self._hooks.append(module.register_forward_hook(self._scale_output(number)))

    @contextmanager
    def tapped(self, layers: bool = True) -> Iterator[list[Tap]]:
        """Scale activations by the draw in forward passes inside this context; yields the taps.

        Args:
            layers: Whether for layers too; without it their weights are scaled as usual.
        """
        self._taps, self._tap_layers = [], layers
        try:
            yield self._taps
        finally:
            self._taps, self._tap_layers = None, False

    def remove(self) -> None:
        """Remove all gates; the model is plain again and holds the same parameter objects."""
        for module, name in self._installed:
            if parametrize.is_parametrized(module, name):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        for hook in self._hooks:
            hook.remove()
        self._installed, self._hooks = [], []

    def plain_state(self) -> dict[str, torch.Tensor]:
        """State dict of the network without its gates."""
        return {plain_name(name): tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    @torch.no_grad()
    def folded_state(self) -> dict[str, torch.Tensor]:
        """State dict of the plain network that eval mode computes: theta folded into the weights."""
        state = self.plain_state()
        names = {module: name for name, module in self.model.named_modules()}
        for module, name in set(self._installed):
            training = module.training
            module.eval()
            state[f"{names[module]}.{name}"] = getattr(module, name).detach().clone()
            module.train(training)
        return state

    def _parametrize(self, module: nn.Module, name: str, gate: nn.Module) -> None:
        gate.train(module.training)
        parametrize.register_parametrization(module, name, gate, unsafe=True)
        module.parametrizations.train(module.training)
        self._installed.append((module, name))

    def _scale_input(self, units: torch.Tensor, normalised: bool):
        def hook(module: nn.Module, args: tuple):
            if self.rows is None and self._taps is None:
                return None
            x = args[0]
            channels = x.dim() - 1 if isinstance(module, nn.Linear) else 1
            gate = (self.draw if self.rows is None else self.rows)[..., units]
            gate = gate.view(-1, *(len(units) if d == channels else 1 for d in range(1, x.dim())))
            # A gate of the whole batch shifts the units' means, which the following norm removes; a gate of one
            # example closes towards the mean instead.
            centred = normalised and module.training
            mean = self.group.mean(x.detach().mean(_all_but(x, channels), keepdim=True)) if centred else None
            if self._taps is not None:
                self._taps.append(Tap(units, mean, channels, x.detach(), _node(x * gate)))
                return (self._taps[-1].after, *args[1:])
            if centred:
                return (torch.lerp(mean, x, gate.to(x.dtype)), *args[1:])
            return (x * gate, *args[1:])

        return hook

    def _scale_output(self, number: int):
        here = upload(torch.tensor([number]), self.draw.device)

        def hook(module: nn.Module, args: tuple, output: torch.Tensor):
            if self._taps is not None and self._tap_layers:
                self._taps.append(Tap(here, None, 1, output.detach(), _node(output * self.draw[number])))
                return self._taps[-1].after
            if self.rows is None:
                return None
            return output * self.rows[:, number].view(-1, *[1] * (output.dim() - 1))

        return hook


def _node(x: torch.Tensor) -> torch.Tensor:
    """A tensor that requires a gradient, also behind frozen weights."""
    return x if x.requires_grad else x.requires_grad_()


def _all_but(x: torch.Tensor, dimension: int) -> list[int]:
    return [d for d in range(x.dim()) if d != dimension]


def plain_name(name: str) -> str:
    """Name that a parameter of the gated model has in the plain one."""
    return name.replace("parametrizations.", "").removesuffix(".original")


class _UnitGate(nn.Module):
    """Scales the input slices of a weight by the gates of the units that it reads."""

    def __init__(self, gates: Gates, units: torch.Tensor):
        super().__init__()
        self.gates, self.units = gates, units

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.gates.rows is not None or self.gates._taps is not None:
            return weight
        return weight * self.gates.values(self.training)[self.units].view(1, -1, *[1] * (weight.dim() - 2))


class _LayerGate(nn.Module):
    """Scales an affine by the gate of its block."""

    def __init__(self, gates: Gates, number: int):
        super().__init__()
        self.gates, self.number = gates, number

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        on_activations = self.gates.rows is not None or self.gates._tap_layers
        return weight if on_activations else weight * self.gates.values(self.training)[self.number]

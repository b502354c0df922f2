"""Bernoulli gates at negligible cost: one draw a step, a multiplication of small tensors.

A layer gate scales the affine of its branch's last module, or what that returns; a unit gate scales the input slices of the
modules that *consume* the unit. (Scaling the norm before the ReLU instead would erase dL/dxi wherever xi = 0, since relu'(0) = 0.)
A gated module's weight is scaled while its forward pass runs and is the plain parameter at all other times, so that
names, order and identity of the parameters never change. Every gate reads its value from one flat vector, so that after
``loss.backward()`` the vector's ``.grad`` holds dL/dxi of every structure at its draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from catode.prune.describe.protocol import slices
from catode.prune.devices.distributed import Group
from catode.prune.devices.transfer import upload
from catode.structures.description import CONSUMER, Slice
from catode.structures.inventory import Inventory
from catode.structures.layout import Layout

BatchNorm = nn.modules.batchnorm._BatchNorm
# scaled parameters of a module and the plain ones, by name, and the latter's numbers of changes
Scaled = tuple[dict[str, torch.Tensor], dict[str, nn.Parameter], list[int]]
NO_GRADIENTS = (
    "`model` must run the modules that read units with gradients; got one that runs some inside torch.no_grad(), as "
    "checkpoints do with use_reentrant=True. Use use_reentrant=False, or leave the units out."
)
AGAIN = (
    "`per_example` must be False where checkpoints compute parts of several forward passes of one step again; got gates of "
    "examples, which would be those of the last pass. Use per_example=False."
)


def in_backward() -> bool:
    """Whether a backward pass is running, as where checkpointed modules run again."""
    return torch._C._current_graph_task_id() != -1


def saved_elsewhere() -> bool:
    """Whether what is saved for the backward pass is handled by others, as in checkpointed modules, which run again."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def version(tensor: torch.Tensor) -> int:
    """Number of changes in place that a tensor has seen; 0 where that is not counted."""
    return 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class Tap:
    """Where a gate of every example acts: an activation before and after it.

    Attributes:
        structures: Numbers of the structures gated here, shape (channels,), or one for all channels of a layer.
        mean: Mean of `before` over the batch where a following norm removes what a gate does to it, else None.
        channels: Dimension of the channels.
        before: Activation before the gates, detached, shape (batch, ...).
        after: The same times the draw: a node of the graph.
        entries: Channels that are gated, shape (len(structures),); None for all.
    """

    structures: torch.Tensor
    mean: torch.Tensor | None
    channels: int
    before: torch.Tensor
    after: torch.Tensor
    entries: torch.Tensor | None = None

    @torch.no_grad()
    def derivative(self, gradient: torch.Tensor) -> torch.Tensor:
        """dL/dxi of each example.

        Args:
            gradient: dL/d `after`, of its shape.

        Returns:
            Shape (batch, len(structures)).
        """
        x = self.before if self.mean is None else self.before - self.mean
        own = [0, self.channels] if len(self.structures) > 1 or self.entries is not None else [0]
        over = [d for d in range(x.dim()) if d not in own]
        product = x * gradient
        found = (product.sum(over) if over else product).reshape(len(x), -1)
        return found if self.entries is None else found.index_select(1, self.entries)


class Copied:
    """Owner of hooks that a copy of a gated model takes along."""


class Gates(Copied):
    """Values of all gates and their installation in a model.

    Structures keep the numbers of the original network, also when units have been cut. A call of the model in train mode
    scales the parameters of all gated modules at once, which takes less time; where a part of the model is called by
    itself, is checkpointed, or runs with gradients off inside the model, they are scaled by module.

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
        several: Whether the batch is not the step's first one with rows of its own.
        traced: Whether compiled code holds gates.
        scaled: Parameters of the call of the model that is running, scaled in advance, by gate; with whether there are gradients.
    """

    def __init__(self, model: nn.Module, inventory: Inventory, group: Group | None = None):
        self.model, self.inventory, self.group = model, inventory, group or Group()
        self.blocks, device = inventory.blocks, next(model.parameters()).device
        self.draw = torch.ones(inventory.size, device=device, requires_grad=True)
        self.keep_prob = torch.ones(inventory.size, device=device)
        self.rows: torch.Tensor | None = None
        self.traced = False
        self._taps: list[Tap] | None = None
        self._tap_layers = self._differentiated = self.several = False
        self._installed: dict[nn.Module, _ModuleGate] = {}
        self.scaled: tuple[bool, dict[_ModuleGate, Scaled]] = False, {}
        self._pieces: tuple[torch.Tensor, list[int]] | None = None
        self._whole = True
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of a gated model holds: theta alone, in train mode too, so that it depends on no pruner."""
        theta = self.keep_prob.detach().clone()
        alone = dict(
            model=None, inventory=None, group=Group(), blocks=(), rows=None, traced=False, several=False, _taps=None
        )
        alone |= dict(_tap_layers=False, _differentiated=False, scaled=(False, {}), _pieces=None)
        return {**alone, "draw": theta, "keep_prob": theta, "_installed": {}, "_hooks": []}

    @classmethod
    def at_theta(cls, model: nn.Module, gates: Gates) -> Gates:
        """Gates of a copy of the model, always at the theta of the model's own `gates`, also in train mode."""
        own = cls(model, gates.inventory)
        own.draw = own.keep_prob = gates.keep_prob
        return own

    @torch.no_grad()
    def set(self, keep_prob: torch.Tensor | None, draw: torch.Tensor) -> None:
        """Set theta (None: leave it) and the gate values of the next forward pass, both of shape (n,)."""
        if keep_prob is not None:
            self.keep_prob.copy_(keep_prob, non_blocking=True)
        self.draw.copy_(draw, non_blocking=True)
        self.draw.grad = None

    @property
    def training(self) -> bool:
        """Whether the model is in train mode as a whole, also where parts are not, such as frozen batch norms."""
        return self.model is not None and self.model.training

    @property
    def values(self) -> torch.Tensor:
        """Gate values that the forward pass uses, shape (n,)."""
        return self.draw if self.training else self.keep_prob

    def install(
        self, layers: Sequence[bool], sites: Sequence[torch.Tensor | None], layout: Layout | None = None
    ) -> None:
        """Put gates into the model.

        Args:
            layers: For each block, whether its layer is gated.
            sites: For each site of each block in order, the numbers of the units that are now present in it, or None
                where no unit of the site is gated.
            layout: Where the units are; None for a network that is whole.
        """
        ranges: dict[nn.Module, list[tuple[Slice, torch.Tensor, Layout]]] = {}
        for place in self.inventory.places:
            units, site = sites[place.number], place.site
            if units is None:
                continue
            layout = layout or Layout(other.site for other in self.inventory.places)
            for part in slices(self.model, site):  # without those of branches that went
                if part.role == CONSUMER:
                    module = self.model.get_submodule(part.tensor.rpartition(".")[0])
                    ranges.setdefault(module, []).append((part, units, layout))
                    if site.normalised:
                        block = self.model.get_submodule(place.block.place)
                        self._gate(module).norms = [norm for norm in block.modules() if isinstance(norm, BatchNorm)]
        for module, parts in ranges.items():
            self._gate(module).read(module, parts, self.draw)
        for number, block in enumerate(self.blocks):
            if layers[number] and block.removable:
                here = upload(torch.tensor([number]), self.draw.device)
                output = self.model.get_submodule(block.output)
                gate = self._gate(self.model.get_submodule(block.reader) if block.reader else output)
                gate.layer, gate.holder = (number, here), output if block.reader else None
        for module, gate in self._installed.items():
            self._hooks.append(module.register_forward_pre_hook(gate.before))
            self._hooks.append(module.register_forward_hook(gate.after, always_call=True))
        if self._installed:
            every = self._installed.values()
            layered = [gate.layer[1] for gate in every if gate.layer is not None]
            reading = [gate.units for gate in every if gate.units is not None]
            self._pieces = torch.cat(layered + reading), [len(layered), *map(len, reading)]
            self._whole = all(gate.entries is None for gate in every)
            self._hooks.append(self.model.register_forward_pre_hook(self._begin))
            self._hooks.append(self.model.register_forward_hook(self._end, always_call=True))

    def _begin(self, module: nn.Module, args: tuple) -> None:
        """Scale the parameters of all gated modules; by module in eval mode, which need not hold all of them at once."""
        if torch.compiler.is_compiling() or not self.training or self._pieces is None:
            return
        if self.rows is not None or self._taps is not None or saved_elsewhere():
            return
        order, sizes = self._pieces
        draw = (
            self.draw if self._whole else torch.cat([self.draw, self.draw.new_ones(1)])
        )  # 1 for entries without a gate
        layered, *reading = draw[order].split(sizes)
        layers, units, found = iter(layered.unbind()), iter(reading), {}
        for inner, gate in self._installed.items():
            own = None if gate.units is None else next(units), None if gate.layer is None else next(layers)
            held = gate.held(inner)
            scaled = gate.scaled(held, *own)
            plain = {name: held._parameters[name] for name in scaled}
            found[gate] = scaled, plain, [version(parameter) for parameter in plain.values()]
        self.scaled = torch.is_grad_enabled(), found

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forget what was scaled, also after an error."""
        if not torch.compiler.is_compiling():
            self.scaled = False, {}

    @contextmanager
    def tapped(self, layers: bool = True) -> Iterator[list[Tap]]:
        """Scale activations by the draw in forward passes inside this context; yields the taps.

        Args:
            layers: Whether for layers too; without it their weights are scaled as usual.
        """
        self._taps, self._tap_layers = [], layers
        hook = self.model.register_forward_pre_hook(self._called)
        try:
            yield self._taps
        finally:
            hook.remove()
            self._taps, self._tap_layers = None, False

    def _called(self, module: nn.Module, args: tuple) -> None:
        self._differentiated = torch.is_grad_enabled()

    @property
    def tapping(self) -> bool:
        """Whether activations are scaled, and tapped: not in a call of the model without gradients, such as for pseudo-labels.

        Raises:
            ValueError: if gradients are switched off inside the model.
        """
        if self._taps is None or torch.is_grad_enabled():
            return self._taps is not None
        if self._differentiated:
            raise ValueError(NO_GRADIENTS)
        return False

    def remove(self) -> None:
        """Remove all gates; the model holds the same parameters as before."""
        for hook in self._hooks:
            hook.remove()
        self._installed, self._hooks, self._pieces = {}, [], None

    @torch.no_grad()
    def folded_state(self) -> dict[str, torch.Tensor]:
        """State dict of the network that eval mode computes: theta folded into the weights, but for the layers `unfolded`."""
        state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        names = {module: name for name, module in self.model.named_modules()}
        for module, gate in self._installed.items():
            for name, weight in gate.scaled(gate.held(module), *gate.own(self.keep_prob)).items():
                state[f"{names[gate.held(module)]}.{name}"] = weight
        return state

    @property
    def unfolded(self) -> list[int]:
        """Layers whose gates scale what a module without parameters returns, such as an activation."""
        gates = self._installed.items()
        return [gate.layer[0] for module, gate in gates if gate.layer is not None and not affine(gate.held(module))]

    def _gate(self, module: nn.Module) -> _ModuleGate:
        """The gate of a module, a new one if it has none."""
        return self._installed.setdefault(module, _ModuleGate(self))


class _ModuleGate(Copied):
    """The gates of one module: of the units that it reads, of the layer that it ends, or both.

    Attributes:
        gates: All gates.
        units: Number of the unit that each entry of its weight along `dim` reads, and n for one without a gate; or None.
        dim: Dimension of its weight that reads units.
        entries: Entries with a gate; None for all.
        norms: The block's batch norms, if its output goes straight into one.
        layer: Number of the layer that it ends, and the same as a tensor of the device; or None.
        holder: The module whose parameters it reads without calling it; None where they are its own.
    """

    def __init__(self, gates: Gates):
        self.gates = gates
        self.units: torch.Tensor | None = None
        self.dim = 1
        self.entries: torch.Tensor | None = None
        self.norms: list[nn.Module] = []
        self.layer: tuple[int, torch.Tensor] | None = None
        self.holder: nn.Module | None = None
        self._plain: dict[str, nn.Parameter] = {}

    def read(self, module: nn.Module, parts: Sequence[tuple[Slice, torch.Tensor, Layout]], draw: torch.Tensor) -> None:
        """Gate what a module reads.

        Args:
            module: The module.
            parts: Slices of its weight, the numbers of the units present there, and where they are.
            draw: Gate values, whose device counts.
        """
        self.dim, nothing = parts[0][0].dim, len(draw)
        units = torch.full((module._parameters["weight"].shape[self.dim],), nothing)
        for part, numbers, layout in parts:
            entries = torch.from_numpy(layout.entries(part, np.arange(len(numbers))))
            units[entries] = numbers.repeat_interleave(part.each)
        gated = units < nothing
        self.entries = None if gated.all() else upload(gated.nonzero().flatten(), draw.device)
        self.units = upload(units, draw.device)

    def held(self, module: nn.Module) -> nn.Module:
        """The module that holds the parameters which the gates scale."""
        return self.holder or module

    def _of_units(self, values: torch.Tensor) -> torch.Tensor:
        """Gate of every entry along `dim`, from values of shape (..., n)."""
        if self.entries is not None:  # 1 for entries without a gate
            values = torch.cat([values, values.new_ones(*values.shape[:-1], 1)], -1)
        return values[..., self.units]

    def own(self, values: torch.Tensor, units: bool = True, layer: bool = True) -> tuple[torch.Tensor | None, ...]:
        """Gates of the units and of the layer, among all gate values; None where there are none, or they are not wanted."""
        return (
            self._of_units(values) if units and self.units is not None else None,
            values[self.layer[0]] if layer and self.layer is not None else None,
        )

    def scaled(
        self, module: nn.Module, units: torch.Tensor | None, layer: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Scaled parameters of a module by name.

        Args:
            module: The module, or what is `held`.
            units: Gates of the units that scale its weight, shape (units,); None for none.
            layer: Gate of the layer that scales its affine, shape (); None for none.
        """
        found = {}
        if units is not None:
            weight = module._parameters["weight"]
            shape = [-1 if d == self.dim else 1 for d in range(weight.dim())]
            found["weight"] = weight * units.to(weight.dtype).view(shape)
        if layer is not None:
            for name in affine(module):
                found[name] = found.get(name, module._parameters[name]) * layer
        return found

    def _in_advance(self, module: nn.Module) -> Scaled | None:
        """What the call of the model has scaled in advance, if it holds here: with or without gradients alike, and unchanged."""
        differentiated, found = self.gates.scaled
        if self not in found or differentiated is not torch.is_grad_enabled() or saved_elsewhere():
            return None
        _, plain, versions = found[self]
        for (name, parameter), before in zip(plain.items(), versions, strict=True):
            if self.held(module)._parameters.get(name) is not parameter or version(parameter) != before:
                return None
        return found[self]

    def before(self, module: nn.Module, args: tuple) -> tuple | None:
        """Put the scaled parameters into the module, or scale what it reads."""
        gates = self.gates
        if torch.compiler.is_compiling():
            gates.traced = True
        elif gates.rows is None and gates._taps is None and (found := self._in_advance(module)) is not None:
            scaled, self._plain, _ = found
            self.held(module)._parameters.update(scaled)
            return None
        by_example, tapped = gates.rows is not None, gates.tapping
        if by_example and gates.several and not torch.compiler.is_compiling() and in_backward():
            raise RuntimeError(AGAIN)
        units, layer = not (by_example or tapped), not (by_example or (tapped and gates._tap_layers))
        held = self.held(module)
        scaled = self.scaled(held, *self.own(gates.values, units, layer))
        self._plain = {name: held._parameters[name] for name in scaled}
        held._parameters.update(scaled)
        if self.units is None or not (by_example or tapped):
            return None
        x = args[0]
        channels = 1 if isinstance(module, nn.modules.conv._ConvNd) else x.dim() - 1
        gate = self._of_units(gates.rows if by_example else gates.draw)
        gate = gate.view(-1, *(len(self.units) if d == channels else 1 for d in range(1, x.dim()))).to(x.dtype)
        # A gate of the whole batch shifts the units' means, which the following norm removes; a gate of one example closes
        # towards the mean instead.
        # not if a norm is frozen
        centred = bool(self.norms) and gates.training and all(norm.training for norm in self.norms)
        mean = gates.group.mean(x.detach().mean(_all_but(x, channels), keepdim=True)) if centred else None
        if tapped:
            structures = self.units if self.entries is None else self.units[self.entries]
            gates._taps.append(Tap(structures, mean, channels, x.detach(), _node(x * gate), self.entries))
            return (gates._taps[-1].after, *args[1:])
        return (torch.lerp(mean, x, gate) if centred else x * gate, *args[1:])

    def after(self, module: nn.Module, args: tuple, output: torch.Tensor | None) -> torch.Tensor | None:
        """Put the plain parameters back, also after an error; scale what the module returns."""
        self.held(module)._parameters.update(self._plain)
        self._plain = {}
        if self.layer is None or output is None:
            return None
        gates, (number, here) = self.gates, self.layer
        x = output[0] if isinstance(output, tuple) else output
        if gates._tap_layers and gates.tapping:
            gates._taps.append(Tap(here, None, 1, x.detach(), _node(x * gates.draw[number])))
            scaled = gates._taps[-1].after
        elif gates.rows is not None:
            scaled = x * gates.rows[:, number].view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        elif not affine(self.held(module)):
            scaled = x * gates.values[number].to(x.dtype)
        else:
            return None
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled


def affine(module: nn.Module) -> list[str]:
    """Names of a module's own parameters that scale with what it returns: weight and bias, or those of a LayerScale."""
    own = [name for name, parameter in module._parameters.items() if parameter is not None]
    return own if len(own) == 1 and not module._modules else [name for name in ("weight", "bias") if name in own]


def _node(x: torch.Tensor) -> torch.Tensor:
    """A tensor that requires a gradient, also behind frozen weights."""
    return x if x.requires_grad else x.requires_grad_()


def _all_but(x: torch.Tensor, dimension: int) -> list[int]:
    return [d for d in range(x.dim()) if d != dimension]


def drop_copied_hooks(model: nn.Module) -> None:
    """Remove from a copy of a gated model the hooks that were copied with it."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Copied)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)

"""Capture of a training step: the model's calls with their inputs and outputs, and dL/dxi at the draw of its gates."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from catode.prune.devices.distributed import Group
from catode.prune.devices.transfer import upload
from catode.prune.gated.draws import GateDraws
from catode.prune.gated.gates import Copied, Gates
from catode.prune.measure import nests


@dataclass(eq=False)
class Call:
    """One forward pass of the gated model in train mode.

    Attributes:
        rows: Gate values of its examples, shape (batch, n); None for one draw of all.
        args: Positional arguments, detached.
        kwargs: Keyword arguments, detached.
        autocast: Type of automatic mixed precision; None for off.
        output: What it returned; None in steps that are not checked.
        loss: Place in `outputs` of a loss of its own; None for none.
        outputs: The tensors in what it returned that a loss may depend on, its own loss included, detached.
        gradients: dL/d of each of them as an argument of the loss, whatever it depends on itself; None where none came back.
    """

    rows: torch.Tensor | None
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    output: Any = None
    loss: int | None = None
    outputs: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor | None] = field(default_factory=list)

    @property
    def trained(self) -> bool:
        """Whether a gradient came back to its outputs."""
        return any(gradient is not None for gradient in self.gradients)


class Capture(Copied):
    """Hooks at the root of a gated model.

    Args:
        model: The gated model.
        gates: Its gates.
        draws: Draws of the gates.
        per_example: Whether gates are drawn for each example.
        group: Processes that train together.
        inputs: Whether the probes need the model's inputs.

    Attributes:
        calls: The calls of the current step, in order; with their contents in a step that is measured.
        measured: Whether the current step is.
        checked: Whether everything is kept for `catode.prune.measure.losses.check`.
        paused: Whether forward passes are ignored, as those of a probe are.
    """

    def __init__(
        self, model: nn.Module, gates: Gates, draws: GateDraws, per_example: bool, group: Group, inputs: bool = True
    ):
        self.model, self.gates, self.draws, self.per_example, self.group = model, gates, draws, per_example, group
        self.inputs, self.checked = inputs, True
        self.calls: list[Call] = []
        self.measured = self.paused = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._parts: list[torch.Tensor] = []  # dL/dxi of the calls before the last one
        self._gradient: torch.Tensor | None = None  # of one parameter, when a gradient last came to it
        self._version: int | None = None  # of that parameter then
        self._moved = False

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of a gated model holds: nothing, and does nothing."""
        return {"paused": True}

    def attach(self) -> None:
        """Register the hooks."""
        self._hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after),
        ]
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._hooks += [last.register_post_accumulate_grad_hook(self._arrived) for last in learning[-1:]]

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def begin(self, measured: bool) -> None:
        """Begin a step."""
        self.calls, self.measured = [], measured or self.checked
        self._parts, self._gradient, self._version, self._moved = [], None, None, False

    def derivative(self, grad_scale: float | torch.Tensor) -> tuple[NDArray, torch.Tensor]:
        """Draw of the current step, and, still on the device, dL/dxi there, each of shape (n,).

        Args:
            grad_scale: Factor that the loss was multiplied with before ``backward()``.

        Raises:
            RuntimeError: if no backward pass through the gated model came before.
        """
        rows = [call.rows for call in self.calls if call.rows is not None]
        gradients = [row.grad for row in rows] if rows else [*self._parts, self.gates.draw.grad]
        gradients = [gradient for gradient in gradients if gradient is not None]
        if not gradients:
            mode = "train" if self.model.training else "eval"
            raise RuntimeError(
                f"`step()` must follow a backward pass through the gated model in train mode; got none since the last one, and a "
                f"model in {mode} mode. Call model.train() before the forward pass, and loss.backward() before step()."
            )
        if self._moved:
            raise RuntimeError(
                "`step()` must follow backward passes at the same weights; got weights that changed between two of them, as SAM "
                "does. Call step() after each optimizer step."
            )
        self.gates.rows = None
        derivative = sum(gradient.sum(0) if rows else gradient for gradient in gradients)
        return self.draws.values(bool(rows)), self.group.mean(derivative / grad_scale)

    @torch.compiler.disable  # or each kind of step would be compiled by itself
    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.paused:
            return
        if not module.training or not torch.is_grad_enabled():
            self.gates.rows = None
            return
        call = Call(None)
        self.calls.append(call)
        if self.gates.draw.grad is not None:
            self._parts.append(self.gates.draw.grad)
            self.gates.draw.grad = None
        if self.per_example:
            batch = nests.examples((args, kwargs), "the model's input")
            rows = self.group.share(self.draws.draw_examples(batch * self.group.size, more=len(self.calls) > 1))
            self.gates.rows = call.rows = upload(rows, self.gates.draw.device).requires_grad_()
        if self.measured and (self.inputs or self.checked):
            try:
                call.args, call.kwargs = nests.mapped((args, kwargs), torch.Tensor.detach)
            except TypeError:  # a loss that is given may call the model with anything
                if self.inputs:
                    raise
        if self.checked:
            kind = self.gates.draw.device.type
            call.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self.paused or not self.measured or not module.training or not torch.is_grad_enabled():
            return None
        call = self.calls[-1]
        several = len(differentiable(output)) > 1
        if several:  # one may depend on another: their gradients as arguments of the loss come back to aliases
            output = nests.mapped(output, lambda z: z.view_as(z) if z.requires_grad else z)
        own = own_loss(output)
        for place, tensor in enumerate(differentiable(output)):
            call.loss = place if tensor is own else call.loss
            call.outputs.append(tensor.detach())
            call.gradients.append(None)
            tensor.register_hook(lambda gradient, place=place: _accumulate(call.gradients, place, gradient))
        if self.checked:
            call.output = output
        return output if several else None

    def _arrived(self, parameter: nn.Parameter) -> None:
        """Forget the calls before the last one if the user has cleared their gradients, as of a batch that was left out."""
        if not self.calls:  # of passes in eval mode, or before the gates
            return
        if self._gradient is not None and parameter.grad is not self._gradient:
            self.calls, self._parts = self.calls[-1:], []
        self._moved |= self._version is not None and parameter._version != self._version
        self._gradient, self._version = parameter.grad, parameter._version


def _accumulate(gradients: list[torch.Tensor | None], place: int, gradient: torch.Tensor) -> None:
    before = gradients[place]
    gradients[place] = gradient if before is None else before + gradient


def differentiable(output: Any) -> list[torch.Tensor]:
    """The tensors in what a model returned that have a gradient, in order."""
    return [tensor for tensor in nests.tensors(output) if tensor.requires_grad]


def own_loss(output: Any) -> torch.Tensor | None:
    """The scalar `loss` in what a model returned; None if there is none."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None


@dataclass(frozen=True)
class RandomStates:
    """States of the random number generators of Python, NumPy and PyTorch, of the CPU and of a device."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    device: tuple[torch.device, torch.Tensor] | None

    @classmethod
    def now(cls, device: torch.device) -> RandomStates:
        """The present states."""
        there = (device, torch.cuda.get_rng_state(device)) if device.type == "cuda" else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), there)

    def set(self) -> None:
        """Bring the generators back to these states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device[1], self.device[0])

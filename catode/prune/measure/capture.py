"""Capture of a training step: the model's calls with their inputs and outputs, and dL/dxi at the draw of its gates."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from catode.prune.describe.protocol import branch
from catode.prune.devices.distributed import Group
from catode.prune.devices.transfer import upload
from catode.prune.gated.draws import GateDraws
from catode.prune.gated.gates import AGAIN, Copied, Gates, in_backward, version
from catode.prune.measure import nests


@dataclass(frozen=True)
class Moment:
    """What a model's forward pass depends on beside its inputs.

    Attributes:
        tensors: Copies of its parameters and buffers by name.
        random: States of the random number generators.
    """

    tensors: dict[str, torch.Tensor]
    random: RandomStates


@dataclass(eq=False)
class Call:
    """One forward pass of the gated model in train mode.

    Attributes:
        rows: Gate values of its examples, shape (batch, n); None for one draw of all.
        args: Positional arguments, detached.
        kwargs: Keyword arguments, detached.
        autocast: Type of automatic mixed precision; None for off.
        moment: Its moment; None in steps that are not checked, or if its inputs could not be kept.
        output: What it returned; None in steps that are not checked.
        loss: Place in `outputs` of a loss of its own; None for none.
        outputs: The tensors in what it returned that a loss may depend on, its own loss included, detached.
        gradients: dL/d of each of them as an argument of the loss, whatever it depends on itself; None where none came back.
        versions: Numbers of the changes in place that its inputs had seen before it, by their order, and its outputs after it.
    """

    rows: torch.Tensor | None
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    moment: Moment | None = None
    output: Any = None
    loss: int | None = None
    outputs: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor | None] = field(default_factory=list)
    versions: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))

    @property
    def trained(self) -> bool:
        """Whether a gradient came back to its outputs."""
        return any(gradient is not None for gradient in self.gradients)

    @property
    def changed_inputs(self) -> list[torch.Tensor]:
        """Inputs that have been changed in place since the call began."""
        inputs = nests.tensors((self.args, self.kwargs))
        return [x for x, before in zip(inputs, self.versions[0], strict=True) if version(x) != before]

    @property
    def changed_outputs(self) -> list[torch.Tensor]:
        """Outputs that have been changed in place since the call ended."""
        return [z for z, before in zip(self.outputs, self.versions[1], strict=True) if version(z) != before]


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
        total: dL/dxi of the step, of this process, up to the loss's scale; once `derivative` has been called.
    """

    def __init__(
        self, model: nn.Module, gates: Gates, draws: GateDraws, per_example: bool, group: Group, inputs: bool = True
    ):
        self.model, self.gates, self.draws, self.per_example, self.group = model, gates, draws, per_example, group
        self.inputs, self.checked, self.paused = inputs, True, False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        # of one parameter, with its version, when it last came
        self._gradient: tuple[torch.Tensor | None, int] = (None, 0)
        self.begin(False)

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
        removable = {p for block in self.gates.blocks for p in branch(self.model, block).values()}
        for last in ([p for p in learning if p not in removable] or learning)[-1:]:
            self._hooks.append(last.register_hook(partial(self._arriving, last)))
            self._hooks.append(last.register_post_accumulate_grad_hook(self._arrived))

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def begin(self, measured: bool) -> None:
        """Begin a step."""
        self.calls: list[Call] = []
        self.measured = measured or self.checked
        self._parts: list[torch.Tensor] = []  # dL/dxi of the calls before the last one
        self._reached = self._seen = 0  # calls before the last one with dL/dxi, and before the last gradient
        self._left, self._gradient = self._gradient, (None, 0)
        self._weights: int | None = None  # version of that parameter when a gradient last came
        self._moved = self._summed = False

    def derivative(self, grad_scale: float | torch.Tensor) -> tuple[NDArray, torch.Tensor]:
        """Draw of the current step, and, still on the device, dL/dxi there, each of shape (n,).

        Args:
            grad_scale: Factor that the loss was multiplied with before ``backward()``.

        Raises:
            RuntimeError: if no backward pass through the gated model came before, or the model is not in train mode.
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
        if not self.model.training:
            raise RuntimeError(
                "`model` must be in train mode at step(), as it was in the forward pass; got eval mode. Call model.train() before."
            )
        if self._summed:
            raise RuntimeError(
                "`step()` must be called once for each step of the optimizer, whose gradients are cleared in between; got one that "
                "was added to those before the last call. Call it where the optimizer steps."
            )
        if self._moved:
            raise RuntimeError(
                "`step()` must follow backward passes at the same weights; got weights that changed between two of them, as SAM "
                "does. Call step() after each optimizer step."
            )
        self.gates.rows = None
        derivative = self.total = sum(gradient.sum(0) if rows else gradient for gradient in gradients)
        return self.draws.values(bool(rows)), self.group.mean(derivative / grad_scale)

    @torch.compiler.disable  # or each kind of step would be compiled by itself
    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.paused:
            return
        if not module.training or not torch.is_grad_enabled():
            self.gates.rows = None
            return
        if not in_backward():  # where a checkpointed model runs again
            self._settle()
        elif self.per_example:
            raise RuntimeError(AGAIN)
        call = Call(None)
        self.calls.append(call)
        if self.per_example:
            self.gates.several = len(self.calls) > 1
            batch = nests.examples((args, kwargs), "the model's input")
            rows = self.group.share(self.draws.draw_examples(batch * self.group.size, more=len(self.calls) > 1))
            self.gates.rows = call.rows = upload(rows, self.gates.draw.device).requires_grad_()
        if self.measured and (self.inputs or self.checked):
            try:
                call.args, call.kwargs = nests.mapped((args, kwargs), torch.Tensor.detach)
            except TypeError:  # a loss that is given may call the model with anything
                if self.inputs:
                    raise
            else:
                call.moment = self._moment() if self.checked else None
            call.versions[0].extend(map(version, nests.tensors((call.args, call.kwargs))))
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
            call.outputs.append(tensor.detach().clone() if self.checked else tensor.detach())
            call.versions[1].append(version(call.outputs[-1]))
            call.gradients.append(None)
            tensor.register_hook(lambda gradient, place=place: _accumulate(call.gradients, place, gradient))
        if self.checked:
            call.output = nests.mapped(output, lambda z: z.detach().clone().requires_grad_(z.requires_grad))
        return output if several else None

    def _moment(self) -> Moment:
        """This moment; the weights of a step are copied once."""
        parameters = dict(self.model.named_parameters())
        before = next((call.moment.tensors for call in self.calls if call.moment), None)
        tensors = {name: p.detach().clone() if before is None else before[name] for name, p in parameters.items()}
        tensors |= {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return Moment(tensors, RandomStates.now(self.gates.draw.device))

    def _settle(self) -> None:
        """Put dL/dxi of the calls so far aside; those whose gradient went to their inputs alone have not been trained on."""
        draw = self.gates.draw
        for call in self.calls[self._reached :]:
            if (draw if call.rows is None else call.rows).grad is None:
                call.gradients = [None] * len(call.gradients)
            else:
                self._reached = len(self.calls)
        if draw.grad is not None:
            self._parts.append(draw.grad)
            draw.grad = None

    def _arriving(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Forget the calls before the last gradient if the user has cleared it, as that of a batch that was left out."""
        if self.paused:
            return
        before, version = self._gradient
        if before is None:
            left, version = self._left
            self._summed = left is not None and left is parameter.grad and left._version == version and bool(self.calls)
            return
        now = parameter.grad  # also 0 if it was cleared in place
        if now is not before or (now._version != version and not bool(now.any())):
            self.calls, self._parts = self.calls[min(self._seen, len(self.calls) - 1) :], []
            self._reached = self._seen = 0
            self._summed = False

    def _arrived(self, parameter: nn.Parameter) -> None:
        """Note a gradient that has come."""
        if not self.calls:  # of passes in eval mode, or before the gates
            return
        self._moved |= self._weights is not None and parameter._version != self._weights
        self._gradient, self._weights = (parameter.grad, parameter.grad._version), parameter._version
        self._seen = len(self.calls)


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
        there = None
        if device.type == "cuda":
            there = device, torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            there = device, torch.mps.get_rng_state()
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), there)

    def set(self) -> None:
        """Bring the generators back to these states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.device is not None and self.device[0].type == "mps":
            torch.mps.set_rng_state(self.device[1])
        elif self.device is not None:
            torch.cuda.set_rng_state(self.device[1], self.device[0])

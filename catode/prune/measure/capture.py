"""Capture of a training step: the model's calls with their inputs and outputs, and dL/dxi at the draw of its gates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

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
        args: Positional arguments, detached.
        kwargs: Keyword arguments, detached.
        rows: Gate values of its examples, shape (batch, n); None for one draw of all.
        loss: Place in `outputs` of a loss of its own; None for none.
        outputs: The tensors in what it returned that a loss may depend on, its own loss included, detached.
        gradients: dL/d of each of them; None where no gradient came back.
        random: States of the random number generators before it, where they were noted.
        autocast: Type of automatic mixed precision; None for off.
    """

    args: tuple
    kwargs: dict[str, Any]
    rows: torch.Tensor | None
    loss: int | None = None
    outputs: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor | None] = field(default_factory=list)
    random: list[torch.Tensor] | None = None
    autocast: torch.dtype | None = None


class Capture(Copied):
    """Hooks at the root of a gated model.

    Args:
        model: The gated model.
        gates: Its gates.
        draws: Draws of the gates.
        per_example: Whether gates are drawn for each example.
        group: Processes that train together.

    Attributes:
        calls: The calls of the current step, in order; with their contents in a step that is measured.
        measured: Whether the current step is.
        note_random: Whether the states of the random number generators are noted before a call.
        paused: Whether forward passes are ignored, as those of a probe are.
    """

    def __init__(self, model: nn.Module, gates: Gates, draws: GateDraws, per_example: bool, group: Group):
        self.model, self.gates, self.draws, self.per_example, self.group = model, gates, draws, per_example, group
        self.calls: list[Call] = []
        self.measured = self.note_random = self.paused = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._replayed: Iterator[Call] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of a gated model holds: nothing, and does nothing."""
        return {"paused": True, "_replayed": None}

    def attach(self) -> None:
        """Register the hooks."""
        self._hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after),
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def begin(self, measured: bool) -> None:
        """Begin a step."""
        self.calls, self.measured = [], measured

    @property
    def trained(self) -> list[Call]:
        """The calls of a measured step to whose outputs a gradient came back."""
        return [call for call in self.calls if any(gradient is not None for gradient in call.gradients)]

    def derivative(self, grad_scale: float | torch.Tensor) -> tuple[NDArray, torch.Tensor]:
        """Draw of the current step, and, still on the device, dL/dxi there, each of shape (n,).

        Args:
            grad_scale: Factor that the loss was multiplied with before ``backward()``.

        Raises:
            RuntimeError: if no backward pass through the gated model came before.
        """
        rows = [call.rows for call in self.calls if call.rows is not None]
        gradients = [row.grad for row in rows if row.grad is not None] if rows else [self.gates.draw.grad]
        if not gradients or gradients[0] is None:
            raise RuntimeError(
                "`step()` must follow a backward pass through the gated model in train mode; there was none since the last one. "
                "Call model.train(), and loss.backward() before step()."
            )
        self.gates.rows = None
        derivative = sum(gradient.sum(0) for gradient in gradients) if rows else gradients[0]
        return self.draws.values(bool(rows)), self.group.mean(derivative / grad_scale)

    @contextmanager
    def replaying(self, calls: Iterable[Call]) -> Iterator[None]:
        """Let the model's next calls in this context have the gate values and random numbers that these calls had."""
        before, self.paused = self.paused, True
        self._replayed = iter(calls)
        try:
            yield
        finally:
            self.paused, self._replayed, self.gates.rows = before, None, None

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        call = next(self._replayed, None) if self._replayed is not None else None
        if call is not None:
            self.gates.rows = call.rows
            set_random_states(call.random, self.gates.draw.device)
        if self.paused:
            return
        if not module.training or not torch.is_grad_enabled():
            self.gates.rows = None
            return
        call = Call((), {}, None)
        self.calls.append(call)
        if self.per_example:
            batch = nests.examples((args, kwargs), "the model's input")
            rows = self.group.share(self.draws.draw_examples(batch * self.group.size, more=len(self.calls) > 1))
            self.gates.rows = call.rows = upload(rows, self.gates.draw.device).requires_grad_()
        if self.measured:
            call.args, call.kwargs = nests.mapped((args, kwargs), torch.Tensor.detach)
        if self.note_random:
            kind = self.gates.draw.device.type
            call.random = random_states(self.gates.draw.device)
            call.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.paused or not self.measured or not module.training or not torch.is_grad_enabled():
            return
        call = self.calls[-1]
        own = own_loss(output)
        for place, tensor in enumerate(differentiable(output)):
            call.loss = place if tensor is own else call.loss
            call.outputs.append(tensor.detach())
            call.gradients.append(None)
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient, place=place: _accumulate(call.gradients, place, gradient))


def _accumulate(gradients: list[torch.Tensor | None], place: int, gradient: torch.Tensor) -> None:
    before = gradients[place]
    gradients[place] = gradient if before is None else before + gradient


def differentiable(output: Any) -> list[torch.Tensor]:
    """The tensors of floating-point numbers in what a model returned, in order."""
    if hasattr(output, "__dataclass_fields__") and not hasattr(output, "items"):
        output = vars(output)
    return [tensor for tensor in nests.tensors(output) if tensor.is_floating_point()]


def own_loss(output: Any) -> torch.Tensor | None:
    """The scalar `loss` in what a model returned; None if there is none."""
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    return loss if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None


def random_states(device: torch.device) -> list[torch.Tensor]:
    """States of PyTorch's random number generators of the CPU and of a device."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_states(states: list[torch.Tensor], device: torch.device) -> None:
    """Set what `random_states` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)

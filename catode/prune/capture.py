"""Capture of a training step: inputs, logits and their gradient, and dL/dxi at the draw of its gates."""

from __future__ import annotations

import torch
from numpy.typing import NDArray
from torch import nn

from catode.prune.devices.distributed import Group
from catode.prune.devices.transfer import upload
from catode.prune.draws import GateDraws
from catode.prune.gates import Gates


class Capture:
    """Hooks at the root of a gated model.

    Args:
        model: The gated model.
        gates: Its gates.
        draws: Draws of the gates.
        per_example: Whether gates are drawn for each example.
        group: Processes that train together.

    Attributes:
        batch: Inputs, logits and their gradient of the current step by name; None in a step that is not measured.
        paused: Whether forward passes are ignored, as those of a probe are.
    """

    def __init__(self, model: nn.Module, gates: Gates, draws: GateDraws, per_example: bool, group: Group):
        self.model, self.gates, self.draws, self.per_example, self.group = model, gates, draws, per_example, group
        self.batch: dict[str, torch.Tensor] | None = None
        self.paused = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self) -> None:
        """Register the hooks."""
        self._hooks = [
            self.model.register_forward_pre_hook(self._before),
            self.model.register_forward_hook(self._after),
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def derivative(self, grad_scale: float | torch.Tensor) -> tuple[NDArray, torch.Tensor]:
        """Draw of the current step, and, still on the device, dL/dxi there, each of shape (n,).

        Args:
            grad_scale: Factor that the loss was multiplied with before ``backward()``.

        Raises:
            RuntimeError: if no backward pass through the gated model came before.
        """
        rows = self.gates.rows
        source = rows if rows is not None else self.gates.draw
        if source.grad is None:
            raise RuntimeError(
                "`step()` must follow a backward pass through the gated model in train mode; there was none"
            )
        self.gates.rows = None
        derivative = source.grad / grad_scale
        if rows is not None:
            derivative = derivative.sum(0)
        return self.draws.values(rows is not None), self.group.mean(derivative)

    def _before(self, module: nn.Module, args: tuple) -> None:
        if self.paused:
            return
        if not module.training or not torch.is_grad_enabled():
            self.gates.rows = None
            return
        self.gates.draw.grad = None  # of a batch that the user left out after its backward pass
        if self.per_example:
            rows = self.group.share(self.draws.draw_examples(len(args[0]) * self.group.size))
            self.gates.rows = upload(rows, self.gates.draw.device).requires_grad_()

    def _after(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if self.paused or self.batch is None or not module.training or not torch.is_grad_enabled():
            return
        if not isinstance(output, torch.Tensor) or output.dim() != 2:
            raise TypeError("`model` must return logits of shape (batch, classes); got something else")
        captured = self.batch
        captured["inputs"], captured["logits"] = args[0].detach(), output.detach()
        output.register_hook(lambda gradient: captured.__setitem__("gradient", gradient))

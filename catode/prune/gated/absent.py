"""What stands in the place of the modules of a branch that went, where the module around them cannot be traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from catode.prune.describe.protocol import owner
from catode.structures.description import Block


class Absent(nn.Module):
    """Returns a single 0, which the module around it adds to its shortcut.

    It keeps the numbers, flags and strings that the module had as attributes, and None for its parameters: others may ask for them,
    as torch's TransformerEncoderLayer does.

    Args:
        outputs: Number of things that the module returned, the first of which is now 0 and the others None; 0 for a tensor.
        instead: The module.
    """

    def __init__(self, outputs: int = 0, instead: nn.Module | None = None):
        super().__init__()
        self.outputs = outputs
        for name, value in vars(instead).items() if instead is not None else ():
            if isinstance(value, (bool, int, float, str)) and not hasattr(self, name):
                setattr(self, name, value)
        for name in instead._parameters if instead is not None else ():
            if not hasattr(self, name):
                self.register_parameter(name, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [part for part in (*args, *kwargs.values()) if isinstance(part, torch.Tensor)]
        like = next((part for part in given if part.is_floating_point()), None)
        zero = torch.zeros(()) if like is None else like.new_zeros(())
        return (zero, *[None] * (self.outputs - 1)) if self.outputs else zero

    def extra_repr(self) -> str:
        return f"outputs={self.outputs}" if self.outputs else ""


def remove(model: nn.Module, block: Block) -> None:
    """Take the modules and parameters of a block's branch out of a network, in place; all others keep class and name."""
    for path, outputs in block.absent:
        before = model.get_submodule(path)
        after = Absent(outputs, before)
        after.training = before.training
        model.set_submodule(path, after)
        around = model.get_submodule(path.rpartition(".")[0])
        if isinstance(around, nn.TransformerEncoderLayer):
            around.activation_relu_or_gelu = 0  # its fused kernel of eval mode takes the parameters of all its parts
    for path in set(block.branch) - {path for path, _ in block.absent}:
        module, name = owner(model, path)
        del module._parameters[name]
        setattr(module, name, 0.0)


def outputs_of(model: nn.Module, paths: Sequence[str], run: Callable[[], Any]) -> tuple[tuple[str, int], ...]:
    """What `Block.absent` must be for the modules at some paths.

    Args:
        model: The network.
        paths: Paths of modules.
        run: Calls the network.

    Raises:
        ValueError: if one returns neither a tensor nor a tuple that begins with one.
    """
    found, hooks = dict.fromkeys(paths, 0), []

    def note(path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            several = isinstance(output, tuple) and not hasattr(output, "_fields") and len(output) > 0
            if not isinstance(output[0] if several else output, torch.Tensor):
                raise ValueError(
                    f"a branch must return tensors to be taken out; `{path}` returns a {type(output).__name__}. Leave it in."
                )
            found[path] = len(output) if several else 0

        return hook

    try:
        for path in paths:
            hooks.append(model.get_submodule(path).register_forward_hook(note(path)))
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(found.items())

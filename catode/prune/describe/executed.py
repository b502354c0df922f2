"""What a forward pass executes: products of activations with weights and with each other, and normalised elements."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from catode.prune.measure import nests

aten = torch.ops.aten
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _recurrent_flops(input: torch.Size, *weights: Any, **_: Any) -> int:
    """Every step of every sequence goes through every matrix once; shapes are of (steps, sequences, channels) or packed."""
    listed = [part for weight in weights for part in (weight if isinstance(weight, list) else [weight])]
    shapes = [getattr(part, "shape", part) for part in listed]
    return 2 * prod(input[:-1]) * sum(prod(shape) for shape in shapes if len(shape) == 2)


def _vector_flops(matrix: torch.Size, vector: torch.Size, *_: Any, **__: Any) -> int:
    """Every element of a matrix times one of a vector."""
    return 2 * prod(matrix)


def _distance_flops(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    """Distances of all pairs of rows: a product of the two matrices, or as many subtractions and powers."""
    return 2 * prod(left) * right[-2]


def _sum_of_products_flops(_: torch.Size, left: torch.Size, right: torch.Size, **__: Any) -> int:
    return 2 * prod(left) * right[-1]


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.mv: _vector_flops,
    aten._euclidean_dist: _distance_flops,
    aten._cdist_forward: _distance_flops,
    aten.addmv: lambda _, matrix, vector, **__: _vector_flops(matrix, vector),
    aten.addbmm: _sum_of_products_flops,
    aten.mkldnn_rnn_layer: lambda input, *others, **_: _recurrent_flops(input, *others[:2]),
    aten._cudnn_rnn: lambda input, weights, *_, **__: _recurrent_flops(input, weights),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_attention_math_for_mps: _attention_flops,
}
"""Operations of every product, two for a multiply-accumulate, from shapes of arguments: torch's, those with a vector, distances,
the CPU's attention, and recurrent layers that run as one operation."""
OWN = frozenset(FLOPS) - frozenset(flop_registry)
UNCOUNTED = re.compile(
    r"_fft_\w+|_?linalg_(?!vector_norm|cross|check_errors|diagonal)\w+|_?cholesky_\w+|triangular_solve|_pdist_forward|"
    r"_trilinear|_(scaled_)?grouped_mm\w*|_int_mm|_sparse_\w*mm|_sparse_sparse_matmul|conv_tbc|_lstm_mps|miopen_rnn"
)
"""PyTorch's operations that multiply tensors and whose products nothing counts here; so does any other library's that takes a
matrix among the parameters."""


@dataclass
class Executed:
    """MACs of a forward pass, of all examples together; modules by path, in the order in which they ran.

    Attributes:
        modules: Modules that ran, each once.
        products: MACs of a parameter or buffer, by the path of the innermost module that ran and its number, as in `numbers`.
        functional: MACs of activations with each other, by the path of the innermost module that ran.
        normalised: Elements that a norm returned.
        uncounted: Operations whose products are not counted, by the path of the innermost module that ran.
    """

    modules: list[str] = field(default_factory=list)
    products: dict[tuple[str, int], int] = field(default_factory=dict)
    functional: dict[str, int] = field(default_factory=dict)
    normalised: dict[str, int] = field(default_factory=dict)
    uncounted: dict[str, str] = field(default_factory=dict)

    @property
    def macs(self) -> int:
        """All of them, an element of a norm for one."""
        return sum(sum(part.values()) for part in (self.products, self.functional, self.normalised))


class _Products(TorchDispatchMode):
    """Notes every product, for the innermost module that runs."""

    def __init__(self, model: nn.Module, found: Executed, running: list[tuple[str, nn.Module]]):
        super().__init__()
        self.found, self.running = found, running
        self.number = numbers(model)
        self.parameters, self.buffers = (
            {_storage(tensor): self.number[id(tensor)] for tensor in tensors}
            for tensors in (model.parameters(), model.buffers())
        )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        flops = FLOPS.get(getattr(function, "_overloadpacket", None))
        if flops is _vector_flops and self._held(args[0]):
            pass  # of weights with each other, as spectral norms take them: once a batch, not for each example
        elif flops is None:
            if self._multiplies(function, args):
                self.found.uncounted.setdefault(self.running[-1][0], str(function))
        else:
            shapes = [part.shape if isinstance(part, torch.Tensor) else part for part in args]
            macs = self._macs(function, flops, shapes, args, kwargs or {}, output)
            path, number = self.running[-1][0], self._weight(args)
            if number is None:
                self.found.functional[path] = self.found.functional.get(path, 0) + macs
            else:
                self.found.products[path, number] = self.found.products.get((path, number), 0) + macs
        return output

    def _held(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a parameter or buffer, or a view of one."""
        return _storage(tensor) in self.parameters or _storage(tensor) in self.buffers

    def _multiplies(self, function, args: tuple) -> bool:
        """Whether an operation that is not in `FLOPS` multiplies tensors."""
        library, _, name = function.name().partition("::")
        name = name.partition(".")[0]
        if library == "aten":
            return UNCOUNTED.fullmatch(name) is not None
        factors = [part for part in args if isinstance(part, torch.Tensor) and part.dim() > 1]
        return any(_storage(part) in self.parameters for part in factors)

    def _macs(self, function, flops, shapes, args, kwargs, output) -> int:
        if function._overloadpacket in OWN:
            return flops(*(shapes[:3] if flops is _attention_flops else shapes)) // 2
        return flops(*args, **kwargs, out_val=output) // 2

    def _weight(self, args: tuple) -> int | None:
        """Number of the parameter among the factors: itself, a view, or computed from one of the module; or of a buffer."""
        factors = [part for part in args if isinstance(part, torch.Tensor)]
        found = [self.parameters.get(_storage(part)) for part in factors if part.dim() > 1]
        if (number := next((number for number in found if number is not None), None)) is not None:
            return number
        own = [p for p in self.running[-1][1]._parameters.values() if p is not None and p.dim() > 1]
        for part in factors[1:]:
            for parameter in own:
                if parameter.numel() == part.numel():
                    return self.number.get(id(parameter))  # None for what a gate has scaled
        kept = [self.buffers.get(_storage(part)) for part in factors if part.dim() > 1]
        return next((number for number in kept if number is not None), None)


def numbers(model: nn.Module) -> dict[int, int]:
    """Numbers of a network's parameters and then of its buffers, by identity."""
    found: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        found.setdefault(id(tensor), len(found))
    return found


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    """What a tensor and its views share."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def executed(model: nn.Module, run: Callable[[], Any]) -> Executed:
    """What the modules of a network execute.

    Args:
        model: The network, without gates.
        run: Calls it, or one of its modules.
    """
    found, running, hooks = Executed(), [("", model)], []

    def enter(name: str, module: nn.Module) -> Callable:
        def hook(*_: Any) -> None:
            running.append((name, module))

        return hook

    def leave(name: str, module: nn.Module) -> Callable:
        def hook(_: nn.Module, args: tuple, output: Any) -> None:
            running.pop()
            if name not in seen:
                seen.add(name)
                found.modules.append(name)
            if isinstance(module, NORMS) and isinstance(output, torch.Tensor):
                found.normalised[name] = found.normalised.get(name, 0) + output.numel()

        return hook

    seen: set[str] = set()
    try:
        for name, module in model.named_modules():
            if name:
                hooks.append(module.register_forward_pre_hook(enter(name, module)))
                hooks.append(module.register_forward_hook(leave(name, module)))
        with plain_attention(), _Products(model, found, running):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def executed_by(model: nn.Module, example: Any) -> Executed:
    """What a network without gates executes in eval mode, called with an example."""
    with inference(model):
        return executed(model, lambda: called(model, example))


def parts_executed(model: nn.Module, example: Any) -> dict[str, int]:
    """MACs of the products of every module by path, of all examples together, in the order in which they ran."""
    found = executed_by(model, example)
    parts = dict.fromkeys(found.modules, 0)
    for path, macs in [*((path, macs) for (path, _), macs in found.products.items()), *found.functional.items()]:
        parts[path] = parts.get(path, 0) + macs
    return parts


def check_counted(
    model: nn.Module, copied: nn.Module, example_for: Callable[[nn.Module], Any], expected: float
) -> None:
    """Make sure that the products of a network that are counted are so in every precision; warn of those that are not.

    Args:
        model: The network, without gates.
        copied: A copy of it in another precision.
        example_for: The example input for either.
        expected: MACs that the network was counted to, of one example.

    Raises:
        ValueError: if the copy executes others, with the module whose operation is not counted.

    Warns:
        Uncounted: of the first operation that has no count.
    """
    example = example_for(copied)
    found = executed_by(copied, example)
    warn_of_uncounted(model, found)
    if abs(found.macs / batch_size(example) - expected) <= 0.5 + 1e-9 * expected:
        return
    here, there = parts_executed(model, example_for(model)), parts_executed(copied, example)
    path = next(p for p in (*here, *there) if here.get(p) != there.get(p))
    raise ValueError(
        f"`model` must run operations whose MACs are counted; {named(model, path)} executes {there.get(path, 0):,} in "
        f"{next(copied.parameters()).dtype} and {here.get(path, 0):,} as it is, by an operation that is not counted. Use the same "
        "one in every precision, or pass self_check=False to price it as it is."
    )


def named(model: nn.Module, path: str) -> str:
    """A module by its path, with its type, as text."""
    return f"`{path or type(model).__name__}` ({type(model.get_submodule(path)).__name__})"


class Uncounted(UserWarning):
    """An operation multiplies tensors, and nothing counts its products: it has no MACs and no price."""


def uncounted(model: nn.Module, found: Executed) -> str:
    """What the MACs of a network leave out, as text: the first operation that is not counted; empty for none."""
    for path, operation in found.uncounted.items():
        return f"the MACs leave out what {named(model, path)} executes by {operation}, which is not counted and has no price."
    return ""


def warn_of_uncounted(model: nn.Module, found: Executed) -> None:
    """Warn of what is not counted, if anything is."""
    if said := uncounted(model, found):
        warnings.warn(said, Uncounted, stacklevel=4)


@contextmanager
def plain_attention():
    """Attention as its separate operations, without the fused inference kernel."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def inference(model: nn.Module):
    """Eval mode without gradients; every module's training flag is restored."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag


def called(model: nn.Module, example: Any) -> Any:
    """What a model returns when it is called with an example: a tensor, a tuple of arguments, or a mapping of keyword arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def batch_size(example: Any) -> int:
    """Number of examples in an example input: the first dimension of its first tensor that has one."""
    sizes = [len(tensor) for tensor in nests.tensors(example) if tensor.dim()]
    return sizes[0] if sizes else 1

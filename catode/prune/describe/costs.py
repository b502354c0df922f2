"""MACs and parameters of a network: counted, and as a polynomial in its keep probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from catode.structures.complexity import Complexity, Term
from catode.structures.description import Block
from catode.structures.inventory import Inventory


@dataclass(frozen=True)
class Counts:
    """MACs and parameters of a network, per example.

    Convention: a multiply-accumulate is 1 MAC (= 1 FLOP). Convolutions and linear layers count one MAC per weight use,
    norm layers one per normalised element (scale and shift); additions, biases, activations, pooling, tables that are looked
    up and products of activations with each other (those of attention) count none.
    """

    macs: int
    params: int


_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


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


def _positions(model: nn.Module, example: Any) -> dict[str, int]:
    """Number of output positions per example of every counted module, summed over its calls."""
    found: dict[str, int] = {}
    hooks: list[torch.utils.hooks.RemovableHandle] = []

    def record(name: str, channels: int):
        def hook(module, args, output):
            found[name] = found.get(name, 0) + output.numel() // (output.shape[0] * channels)

        return hook

    try:
        for name, module in model.named_modules():
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, *_NORMS)):
                hooks.append(module.register_forward_hook(record(name, out_width(module))))
            elif any(True for _ in module.parameters(recurse=False)):
                raise TypeError(
                    f"cannot count `{name}` ({type(module).__name__}): only convolutions, linear and norm layers and "
                    "embeddings may have parameters. Extend catode.prune.describe.costs for other layers."
                )
        with inference(model):
            called(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def out_width(module: nn.Module) -> int:
    """Output channels of a counted layer."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, nn.LayerNorm):
        return int(np.prod(module.normalized_shape))
    return module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features


def _costs(module: nn.Module, positions: int) -> tuple[int, int, int, int]:
    """MACs and parameters per (input, output) pair, and per output unit alone."""
    if isinstance(module, nn.modules.conv._ConvNd):
        taps = int(np.prod(module.kernel_size))
        return positions * taps, taps, 0, int(module.bias is not None)
    if isinstance(module, nn.Linear):
        return positions, 1, 0, int(module.bias is not None)
    if isinstance(module, nn.Embedding):
        return 0, 1, 0, 0
    affine = int(module.weight is not None) + int(module.bias is not None) if hasattr(module, "weight") else 0
    return 0, 0, positions, affine


def in_width(module: nn.Module) -> int:
    """Channels that each output of a convolution or linear layer reads, rows of an embedding's table; 0 for a norm."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels // module.groups
    if isinstance(module, nn.Embedding):
        return module.num_embeddings
    return module.in_features if isinstance(module, nn.Linear) else 0


def count(model: nn.Module, example: Any) -> Counts:
    """MACs and parameters of a plain network, from its modules' own sizes.

    Args:
        model: A network without gates.
        example: One input batch: a tensor, a tuple of arguments, or a mapping of keyword arguments; only shapes matter.
    """
    macs = params = 0
    modules = dict(model.named_modules())
    for name, positions in _positions(model, example).items():
        module = modules[name]
        pair_macs, pair_params, unit_macs, unit_params = _costs(module, positions)
        n_in, n_out = in_width(module), out_width(module)
        macs += n_out * (pair_macs * n_in + unit_macs)
        params += n_out * (pair_params * n_in + unit_params)
    return Counts(macs, params)


def describe(model: nn.Module, blocks: Sequence[Block], example: Any) -> Complexity:
    """Expected MACs and parameters of `model` as a polynomial in its keep probabilities (docs/mathematics.md section 2).

    Args:
        model: The whole, ungated network.
        blocks: Its structures.
        example: One input batch: a tensor, a tuple of arguments, or a mapping of keyword arguments; only shapes matter.

    Raises:
        ValueError: if the description names a module that is not there or gets a width wrong.
    """
    modules = dict(model.named_modules())
    inventory = Inventory(blocks)
    inner, outer = {}, {}
    for place in inventory.places:
        site = place.site
        for table, names, width_of in ((outer, site.producers, out_width), (inner, site.consumers, in_width)):
            for name in names:
                if name not in modules:
                    raise ValueError(f"`structures()` names `{name}`, which the model does not have")
                if width_of(modules[name]) != site.width:
                    raise ValueError(
                        f"site `{site.name}` must have the width of `{name}`; got {site.width} and {width_of(modules[name])}"
                    )
                if isinstance(modules[name], (nn.GroupNorm, nn.LayerNorm)):
                    raise ValueError(
                        f"site `{site.name}` must not pass `{name}`, a {type(modules[name]).__name__}, which mixes the units: "
                        "removing one would change the others. Use a batch norm, or leave the site out."
                    )
                if isinstance(modules[name], nn.Embedding):
                    raise ValueError(
                        f"site `{site.name}` must be made by a convolution, a linear layer or a batch norm; `{name}` is an "
                        "Embedding. Leave the site out."
                    )
                table[name] = place.number
    terms = []
    for name, positions in _positions(model, example).items():
        module = modules[name]
        pair_macs, pair_params, unit_macs, unit_params = _costs(module, positions)
        block = next((i for i, b in enumerate(blocks) if _inside(name, b.name) and not _inside(name, *b.fixed)), None)
        s_in, s_out = inner.get(name), outer.get(name)
        rows = 1 if s_out is not None else out_width(module)
        if pair_macs or pair_params:
            size = rows * (1 if s_in is not None else in_width(module))
            terms.append(Term(name, size * pair_macs, size * pair_params, block, s_in, s_out))
        if unit_macs or unit_params:
            terms.append(Term(name, rows * unit_macs, rows * unit_params, block, None, s_out))
    return Complexity(terms, inventory)


def _inside(name: str, *roots: str) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)

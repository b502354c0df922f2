"""Independent proof of a description: with closed gates a network computes what the physically cut one does.

Gates of units scale the entries of every weight that reads them, gates of branches what the branch's last module returns. All
parameters are random, so that no branch that begins at 0 hides an error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from catode.prune.describe.executed import called, plain_attention
from catode.prune.describe.protocol import slices, tensor_of
from catode.prune.describe.trace.recording import doubled
from catode.prune.describe.trial import difference, evaluating, floats, randomise, training_norms
from catode.prune.gated.cut import drop_block, keep_units
from catode.prune.gated.heads import adopt
from catode.structures.description import CONSUMER, Block
from catode.structures.inventory import Inventory
from catode.structures.layout import Layout

LARGEST = 700_000_000
"""Parameters above which a network is run in single precision, so that its copies fit into memory."""
RANDOM_DEPTH = ("Dropout", "DropPath", "StochasticDepth", "DropBlock")


@dataclass(frozen=True)
class Verdict:
    """Result of a verification.

    Args:
        deviation: Largest difference between gated and cut outputs, relative to the largest output.
        where: The vertex and mode with the largest difference.
        idle: Structures whose gate alone changes nothing.
        tried: Structures whose gate was closed alone.
    """

    deviation: float
    where: str
    idle: tuple[str, ...]
    tried: int


def without_chance(model: nn.Module) -> None:
    """Put a network into train mode, but for what drops parts of it at random."""
    model.train()
    for module in model.modules():
        if any(word in type(module).__name__ for word in RANDOM_DEPTH):
            module.eval()


def vertices(inventory: Inventory, count: int, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Random sets of structures that stay: half of every site; half of the branches; both, then only random ones.

    Args:
        inventory: Numbering of the structures.
        count: How many.
        rng: Source of randomness.
    """
    for number in range(count):
        kept = np.ones(inventory.size, dtype=bool)
        if number != 1:
            for units in inventory.units:
                gone = rng.permutation(units)[: len(units) // 2 if number == 0 else rng.integers(0, len(units))]
                kept[gone] = False
        if number != 0:
            goes = rng.random(inventory.layers) < 0.5
            kept[: inventory.layers] = ~goes | [not block.removable for block in inventory.blocks]
        name = ("half of the units", "half of the branches")[number] if number < 2 else "branches and units"
        yield name, inventory.close(kept)


def cut_copy(model: nn.Module, inventory: Inventory, kept: np.ndarray) -> nn.Module:
    """A copy of a network without some structures.

    Args:
        model: The network.
        inventory: Numbering of the structures.
        kept: Structures that stay, shape (n,).
    """
    found = copy.deepcopy(model)
    layout = Layout(place.site for place in inventory.places)
    for block, stays in zip(inventory.blocks, kept, strict=False):
        if not stays:
            drop_block(found, block)
    for place in inventory.standing(kept):
        keep_units(found, place.site, np.flatnonzero(kept[place.units]), layout=layout)
    return found


@contextmanager
def closed(model: nn.Module, inventory: Inventory, kept: np.ndarray) -> Iterator[None]:
    """Close the gates of structures for a while.

    Args:
        model: The network.
        inventory: Numbering of the structures.
        kept: Structures that stay, shape (n,).
    """
    before: dict[torch.Tensor, torch.Tensor] = {}
    hooks = []
    for block, stays in zip(inventory.blocks, kept, strict=False):
        if not stays:
            hooks.append(model.get_submodule(block.reader or block.output).register_forward_hook(_nothing))
    with torch.no_grad():
        for place in inventory.places:
            gone = np.flatnonzero(~kept[place.units])
            for part in slices(model, place.site) if len(gone) else ():
                if part.role == CONSUMER:
                    tensor = tensor_of(model, part.tensor)
                    if tensor not in before:
                        before[tensor] = tensor.detach().clone()
                    tensor.index_fill_(part.dim, torch.from_numpy(part.entries(gone)), 0.0)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for tensor, values in before.items():
                tensor.copy_(values)


def _nothing(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
    """0 times what a module returns, or the first of the things that it returns."""
    return (output[0] * 0.0, *output[1:]) if isinstance(output, tuple) else output * 0.0


def run(model: nn.Module, example: Any, mode: Callable[[nn.Module], None], seed: int = 0) -> list[torch.Tensor]:
    """Outputs of a network, whose buffers and random numbers are as before."""
    buffers = [
        (module, name, tensor, tensor.clone())
        for module in model.modules()
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]
    mode(model)
    with torch.no_grad(), plain_attention(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = [tensor.clone() for tensor in floats(called(model, example))]
        for module, name, tensor, before in buffers:
            module._buffers[name] = tensor.copy_(before)  # some models replace a buffer by another one
    return found


def verify(
    model: nn.Module, blocks: Sequence[Block], example: Any, count: int = 3, alone: int | None = None, seed: int = 0
) -> Verdict:
    """Compare closed gates with physical cuts at random vertices, in eval and train mode, and close single gates.

    Args:
        model: The network; not changed.
        blocks: Its description.
        example: One input batch.
        count: Number of vertices.
        alone: How many branches and sites to close alone; None: all.
        seed: Seed of parameters, inputs and vertices.

    Raises:
        RuntimeError: if the cut network does not run.
    """
    rng, inventory = np.random.default_rng(seed), Inventory(blocks)
    small = sum(parameter.numel() for parameter in model.parameters()) <= LARGEST
    precision = torch.float64 if small else torch.float32
    model = copy.deepcopy(model).to(precision)
    adopt(model, blocks)
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(precision)

    example = tree_map_only(torch.Tensor, noise, doubled(example))
    worst, where = 0.0, ""
    modes = {"eval mode": evaluating, "train mode": without_chance}
    if _is_random(model, example):
        modes["train mode"] = training_norms
    for name, kept in vertices(inventory, count, rng):
        with closed(model, inventory, kept):
            gated = {mode: _tried(model, example, setting) for mode, setting in modes.items()}
        small_model = cut_copy(model, inventory, kept)
        for mode, setting in modes.items():
            if gated[mode] is None:
                continue
            found = difference(run(small_model, example, setting), gated[mode])
            if found > worst or not where:
                worst, where = found, f"{name}, {mode}"
    whole = run(model, example, evaluating)
    structures = [np.array([n]) for n, block in enumerate(blocks) if block.removable]
    structures += [place.units for place in inventory.places]
    chosen = range(len(structures)) if alone is None else rng.permutation(len(structures))[:alone]
    idle = []
    for number in sorted(chosen):
        kept = np.ones(inventory.size, dtype=bool)
        kept[structures[number]] = False
        with closed(model, inventory, kept):
            if difference(run(model, example, evaluating), whole) < (1e-12 if small else 1e-7):
                first = structures[number][0]
                idle.append(
                    blocks[first].name
                    if first < len(blocks)
                    else next(place.site.name for place in inventory.places if first in place.units)
                )
    return Verdict(worst, where, tuple(idle), len(chosen))


def _is_random(model: nn.Module, example: Any) -> bool:
    """Whether a network draws random numbers in train mode by itself, such as by a dropout that is no module."""
    try:
        return difference(run(model, example, without_chance), run(model, example, without_chance, 1)) > 0
    except Exception:  # it does not run in train mode
        return False


def _tried(model: nn.Module, example: Any, mode: Callable[[nn.Module], None]) -> list[torch.Tensor] | None:
    """Outputs, or None where the whole network itself does not run in a mode."""
    try:
        return run(model, example, mode)
    except Exception:
        if mode is evaluating:
            raise
        return None

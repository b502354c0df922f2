"""MACs and parameters of a network: counted, and as a polynomial in its keep probabilities."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

from catode.prune.describe.executed import (
    NORMS,
    Executed,
    batch_size,
    called,
    executed,
    executed_by,
    inference,
    numbers,
    warn_of_uncounted,
)
from catode.prune.describe.protocol import goes_with, slices, tensor_of, within
from catode.prune.describe.trial import failing_module, first_line
from catode.prune.gated.cut import keep_units
from catode.prune.gated.remainder import without
from catode.structures.complexity import Complexity, Term
from catode.structures.description import CONSUMER, Block, Site, Slice
from catode.structures.inventory import Inventory

__all__ = ["Counts", "called", "count", "describe", "in_width", "inference", "out_width"]

Part = tuple[int | None, int]  # number of a site, or None, and entries of each of its units


@dataclass(frozen=True)
class Counts:
    """MACs and parameters of a network, per example.

    Convention: a multiply-accumulate is 1 MAC (= 1 FLOP). Convolutions, linear layers and every other product of matrices,
    those of attention included, count one MAC per multiplication, as `torch.utils.flop_counter` counts two; norm layers one
    per normalised element (scale and shift). Additions, biases, activations, pooling and tables that are looked up count none.
    """

    macs: int
    params: int


def out_width(module: nn.Module) -> int:
    """Output channels of a layer."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, nn.LayerNorm):
        return int(np.prod(module.normalized_shape))
    return module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features


def in_width(module: nn.Module) -> int:
    """Channels that each output of a convolution or linear layer reads, rows of an embedding's table; 0 for a norm."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.in_channels // module.groups
    if isinstance(module, nn.Embedding):
        return module.num_embeddings
    return module.in_features if isinstance(module, nn.Linear) else 0


def count(model: nn.Module, example: Any) -> Counts:
    """MACs and parameters of a plain network, from what it executes.

    Args:
        model: A network without gates.
        example: One input batch: a tensor, a tuple of arguments, or a mapping of keyword arguments; only shapes matter.

    Warns:
        Uncounted: if it executes operations whose products are not counted.
    """
    found = executed_by(model, example)
    warn_of_uncounted(model, found)
    return Counts(round(found.macs / batch_size(example)), sum(p.numel() for p in model.parameters()))


def describe(model: nn.Module, blocks: Sequence[Block], example: Any) -> Complexity:
    """Expected MACs and parameters of `model` as a polynomial in its keep probabilities (docs/mathematics.md section 2).

    Args:
        model: The whole, ungated network.
        blocks: Its structures.
        example: One input batch: a tensor, a tuple of arguments, or a mapping of keyword arguments; only shapes matter.

    Raises:
        ValueError: if the description names a module that is not there or gets a width wrong, or the network does not run.
    """
    inventory = Inventory(blocks)
    for place in inventory.places:
        _check_widths(model, place.site)
    with inference(model):
        try:
            with failing_module(model) as running:
                found = executed(model, lambda: called(model, example))
        except Exception as error:
            raise ValueError(
                f"`example` must be an input that the network runs on; `{running[0] if running else type(model).__name__}` fails: "
                f"{first_line(error).rstrip('.')}. Give a batch as in training, of its type and on its device."
            ) from error
        terms = list(_Terms(model, inventory, found, batch_size(example), example).all())
    return Complexity(terms, inventory)


def _check_widths(model: nn.Module, site: Site) -> None:
    """Make sure that the plain layers of a site have its width and mix no units."""
    modules = dict(model.named_modules())
    for names, width_of in ((site.producers, out_width), (site.consumers, in_width)):
        for name in names:
            if name not in modules:
                raise ValueError(f"`structures()` names `{name}`, which the model does not have")
            if width_of(modules[name]) != site.width:
                raise ValueError(
                    f"site `{site.name}` must have the width of `{name}`; got {site.width} and {width_of(modules[name])}. Give its "
                    f"`parts` where `{name}` has other units beside these, as behind a concatenation."
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


class _Terms:
    """The terms of a network's polynomial.

    Args:
        model: The whole network.
        inventory: Numbering of its structures.
        found: What it executes.
        examples: Number of examples that it executed that for.
        example: The example input.
    """

    def __init__(self, model: nn.Module, inventory: Inventory, found: Executed, examples: int, example: Any):
        self.model, self.inventory, self.found, self.examples, self.example = model, inventory, found, examples, example
        self.modules = dict(model.named_modules())
        self.numbers = numbers(model)
        self.names: dict[int, list[str]] = {}
        for every in (model.named_parameters, model.named_buffers):
            for name, tensor in every(remove_duplicate=False):
                self.names.setdefault(self.numbers[id(tensor)], []).append(name)
        self.axes: dict[tuple[int, int], dict[tuple[int, int], tuple[int, Slice]]] = {}
        for place in inventory.places:
            for part in slices(model, place.site):
                ranges = self.axes.setdefault((id(tensor_of(model, part.tensor)), part.dim), {})
                ranges.setdefault((part.offset, part.each), (place.number, part))
        self.products: dict[int, list[tuple[str, int]]] = {}
        for (path, number), macs in found.products.items():
            self.products.setdefault(number, []).append((path, macs))

    def all(self) -> Iterator[Term]:
        """Those of every module in the order in which they ran, then of those that did not, then of functional products."""
        done: set[int] = set()
        for path in dict.fromkeys([*self.found.modules, *self.modules]):
            module = self.modules[path]
            if isinstance(module, NORMS):
                yield from self._norm(path, module, done)
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and self.numbers[id(tensor)] not in done:
                    done.add(self.numbers[id(tensor)])
                    yield from self._tensor(f"{path}.{name}" if path else name, tensor)
        for path, macs in self.found.functional.items():
            yield from self._functional(path, macs)

    def _block(self, *paths: str) -> int | None:
        """Number of the block that all of some modules or parameters go with."""
        found = set()
        for path in paths:
            found.add(next((n for n, block in enumerate(self.inventory.blocks) if goes_with(block, path)), None))
        return found.pop() if len(found) == 1 else None

    def _parts(self, tensor: Any, dim: int) -> list[Part]:
        """Entries along one dimension: of the units of each site, and those that always stay."""
        ranges = self.axes.get((id(tensor), dim), {}).values()
        fixed = tensor.shape[dim] - sum(part.each * self.inventory.places[n].site.width for n, part in ranges)
        parts: list[Part] = [(number, part.each) for number, part in ranges]
        return [*parts, (None, fixed)] if fixed or not parts else parts

    def _tensor(self, name: str, parameter: torch.Tensor) -> Iterator[Term]:
        """Terms of a parameter: its entries, and what every entry is multiplied with; of a buffer the latter alone."""
        path, number = name.rpartition(".")[0], self.numbers[id(parameter)]
        names, uses = self.names[number], self.products.get(number, [])
        several = len({self._block(other) for other in names}) > 1
        used = [(self._block(place) if several else self._block(*names), macs) for place, macs in uses]
        # params with the first use, if all go together
        if not used or several:
            used = [(self._block(*names), 0), *used]
        params = float(isinstance(parameter, nn.Parameter))
        for block, macs in used:
            each = macs / self.examples / parameter.numel() if parameter.numel() else 0.0
            for inner, outer, entries in self._pairs(name, parameter):
                if entries * each or entries * params:
                    yield Term(path, entries * each, entries * params, block, inner, outer)
            params = 0.0

    def _pairs(self, name: str, parameter: nn.Parameter) -> Iterator[tuple[int | None, int | None, int]]:
        """Sites on the input and output side of the entries of a tensor, and the entries of each pair of their units."""
        cut = [dim for dim in range(parameter.dim()) if (id(parameter), dim) in self.axes]
        rest = prod(parameter.shape[dim] for dim in range(parameter.dim()) if dim not in cut)
        if len(cut) > 2:
            raise ValueError(
                f"`{name}` must have units along at most two dimensions; got {len(cut)}. Leave a site out."
            )
        reads = [dim for dim in cut if self._read(parameter, dim)]
        inner = reads[0] if reads else (cut[1] if len(cut) == 2 else None)
        outer = next((dim for dim in cut if dim != inner), None)
        for i, size in [(None, 1)] if inner is None else self._parts(parameter, inner):
            for o, other in [(None, 1)] if outer is None else self._parts(parameter, outer):
                yield i, o, rest * size * other

    def _read(self, parameter: nn.Parameter, dim: int) -> bool:
        return any(part.role == CONSUMER for _, part in self.axes[id(parameter), dim].values())

    def _norm(self, path: str, module: nn.Module, done: set[int]) -> Iterator[Term]:
        """Terms of a norm: its elements, scales and shifts."""
        width = out_width(module)
        tensors = [*module._parameters.values(), *module._buffers.values()]
        sized = [tensor for tensor in tensors if tensor is not None and tensor.shape == (width,)]
        known = next((tensor for tensor in sized if (id(tensor), 0) in self.axes), None)
        parts = self._by_attribute(path, width) if known is None else self._parts(known, 0)
        own = [p for p in module._parameters.values() if p is not None and p.numel() == width]
        own = [p for p in own if self.numbers[id(p)] not in done]
        if any(len(self.names[self.numbers[id(p)]]) > 1 for p in own):
            own = []  # a shared one counts by itself
        done.update(self.numbers[id(p)] for p in own)
        elements = self.found.normalised.get(path, 0) / self.examples / width
        for site, size in parts:
            if size * elements or size * len(own):
                yield Term(path, size * elements, size * len(own), self._block(path), None, site)

    def _by_attribute(self, path: str, width: int) -> list[Part]:
        """Channels of a norm without tensors that sites cut, from the attributes that a cut rewrites."""
        parts: list[Part] = [
            (place.number, part.each)
            for place in self.inventory.places
            for part in place.site.attributes
            if part.module == path and part.name == "num_features"
        ]
        fixed = width - sum(each * self.inventory.places[n].site.width for n, each in parts)
        return [*parts, (None, fixed)] if fixed or not parts else parts

    def _functional(self, path: str, macs: int) -> Iterator[Term]:
        """Terms of products of activations in a module: linear in the units of each site inside it, as cut copies of it show."""
        block, rest = self._block(path), float(macs)
        inside = [place for place in self.inventory.places if any(within(p.tensor, path) for p in place.site.parts)]
        ending = [n for n, b in enumerate(self.inventory.blocks) if b.addend and b.place == path and block is None]
        if not inside and not ending:
            yield Term(path, rest / self.examples, 0.0, block)
            return
        changes = [partial(_cut, path=path, site=place.site) for place in inside]
        changes += [partial(_shortened, addend=self.inventory.blocks[number].addend) for number in ending]
        left = self._left(path, macs, changes)
        for number, place in enumerate(inside):
            if left[number] is None:  # its units reach what the module is called with
                left[number] = self._left_in_whole(path, place.site)
        gone = [0.0 if there is None else macs - there for there in left]
        of_branch = dict(zip(ending, gone[len(inside) :], strict=True))
        for place, less in zip(inside, gone, strict=False):
            slope = less / max(place.site.width - 1, 1)
            rest -= slope * place.site.width
            if place.layer in of_branch:
                of_branch[place.layer] -= slope * place.site.width
            if slope:
                yield Term(
                    path, slope / self.examples, 0.0, place.layer if place.block.removable else block, place.number
                )
        for number, more in of_branch.items():
            rest -= more
            if more:
                yield Term(path, more / self.examples, 0.0, number)
        if rest:
            yield Term(path, rest / self.examples, 0.0, block)

    def _left(self, path: str, macs: int, changes: Sequence[Callable[[nn.Module], nn.Module]]) -> list[float | None]:
        """MACs of the functional products of a module left after each of some changes of a copy of it; None if that fails."""
        found: list[float | None] = []

        def measure(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if found:  # the module runs several times
                return
            whole = sum(executed(module, lambda: module(*args, **kwargs)).functional.values())
            for change in changes:
                try:
                    small = change(module)
                    left = sum(executed(small, lambda small=small: small(*args, **kwargs)).functional.values())
                except Exception:
                    found.append(None)
                else:
                    found.append(left * macs / whole if whole else macs)

        module, busy = self.modules[path], []

        def once(_: nn.Module, args: tuple, kwargs: dict) -> None:
            if not busy:
                busy.append(True)
                measure(module, args, kwargs)
                busy.clear()

        hook = module.register_forward_pre_hook(once, with_kwargs=True)
        try:
            called(self.model, self.example)
        finally:
            hook.remove()
        return found

    def _left_in_whole(self, path: str, site: Site) -> float | None:
        """The same after the cut of a site to one unit in the whole network; None if that does not run."""
        small = _copied(self.model)
        try:
            keep_units(small, site, [0])
            return float(executed(small, lambda: called(small, self.example)).functional.get(path, 0))
        except Exception:  # the self-check says what is wrong
            return None


def _copied(module: nn.Module) -> nn.Module:
    """A copy without hooks."""
    small = copy.deepcopy(module)
    for hooks in (small._forward_pre_hooks, small._forward_hooks):
        hooks.clear()
    return small


def _shortened(module: nn.Module, addend: str) -> nn.Module:
    """A copy of a module without one of its branches."""
    return without(_copied(module), addend)


def _cut(module: nn.Module, path: str, site: Site) -> nn.Module:
    """A copy of a module with one unit of a site, as far as the site is inside it."""

    def inner(name: str) -> str:
        return name.removeprefix(f"{path}.") if name != path else ""

    parts = tuple(dataclasses.replace(p, tensor=inner(p.tensor)) for p in site.parts if within(p.tensor, path))
    attributes = tuple(
        dataclasses.replace(a, module=inner(a.module)) for a in site.attributes if within(a.module, path)
    )
    small = _copied(module)
    keep_units(small, dataclasses.replace(site, parts=parts, attributes=attributes), [0])
    return small

"""Batches of any form: nests of tensors whose first dimension counts the examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def mapped(nest: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The nest with every tensor changed; everything else as it is.

    Raises:
        TypeError: for an object that may hold tensors, but is no mapping and no sequence.
    """
    if isinstance(nest, torch.Tensor):
        return change(nest)
    if isinstance(nest, PLAIN):
        return nest
    if isinstance(nest, Mapping):
        found = copy.copy(nest)  # keeps the type, such as a tokenizer's batch
        for key, value in nest.items():
            found[key] = mapped(value, change)
        return found
    if isinstance(nest, Sequence):
        parts = [mapped(part, change) for part in nest]
        return type(nest)(*parts) if hasattr(nest, "_fields") else type(nest)(parts)
    raise TypeError(
        f"`batch` must be a tensor, or mappings and sequences of tensors; got a {type(nest).__name__} in it. Convert it."
    )


def tensors(nest: Any) -> list[torch.Tensor]:
    """The tensors of a nest, in order."""
    found: list[torch.Tensor] = []
    mapped(nest, found.append)
    return found


def examples(nest: Any, name: str = "batch") -> int:
    """Number of examples in a nest.

    Args:
        nest: The nest.
        name: Its name in messages.

    Raises:
        ValueError: if its tensors have no common first dimension, or there are none.
        TypeError: as `mapped`.
    """
    sizes = {len(tensor) for tensor in tensors(nest) if tensor.dim()}
    if len(sizes) != 1:
        raise ValueError(
            f"`{name}` must hold tensors whose first dimension counts the examples; got first dimensions {sorted(sizes)}. Pass "
            "loss=, and to step() a batch whose tensors begin with the examples; give the loss what they share in another way."
        )
    return sizes.pop()


def rows(nest: Any, part: slice) -> Any:
    """Some examples of a nest."""
    return mapped(nest, lambda tensor: tensor[part] if tensor.dim() else tensor)


def joined(nests: Sequence[Any]) -> Any:
    """The examples of several nests of one form, as one nest.

    Raises:
        RuntimeError: if their tensors differ in more than the number of examples.
    """
    if len(nests) == 1:
        return nests[0]
    columns: Iterator[tuple[torch.Tensor, ...]] = zip(*map(tensors, nests), strict=True)
    parts = iter([torch.cat(column) if column[0].dim() else column[0] for column in columns])
    return mapped(nests[0], lambda _: next(parts))

"""Batches of any form: nests of tensors whose first dimension counts the examples."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

TEXT = (str, bytes)
PLAIN = (bool, int, float, complex, *TEXT, type(None), torch.dtype, torch.device)


def mapped(nest: Any, change: Callable[[torch.Tensor], Any], texts: Callable[[Any], Any] = lambda texts: texts) -> Any:
    """The nest with every tensor changed; everything else as it is, of the types that it has.

    Args:
        nest: Tensors in mappings, sequences, named tuples, dataclasses, of any depth.
        change: What becomes of a tensor.
        texts: What becomes of a list or tuple of text.

    Raises:
        TypeError: for an object that may hold tensors, but is none of these.
    """
    if isinstance(nest, torch.Tensor):
        return change(nest)
    if isinstance(nest, PLAIN):
        return nest
    if isinstance(nest, Mapping):
        values = {key: mapped(value, change, texts) for key, value in nest.items()}
        return _filled(nest, values)
    if isinstance(nest, Sequence):
        if nest and all(isinstance(part, TEXT) for part in nest):
            return texts(nest)
        parts = [mapped(part, change, texts) for part in nest]
        return type(nest)(*parts) if hasattr(nest, "_fields") else type(nest)(parts)
    if (dataclasses.is_dataclass(nest) and not isinstance(nest, type)) or isinstance(nest, SimpleNamespace):
        found = copy.copy(nest)
        for name, value in vars(nest).items():
            object.__setattr__(found, name, mapped(value, change, texts))
        return found
    raise TypeError(
        f"`batch` and the model's input and output must be tensors in mappings, sequences or dataclasses; got a "
        f"{type(nest).__name__} in it. Convert it."
    )


def _filled(nest: Mapping, values: dict) -> Mapping:
    """A mapping of another's type, such as a tokenizer's batch, with other values."""
    if type(nest) is dict:
        return values
    try:
        found = copy.copy(nest)
        for key, value in values.items():
            found[key] = value
    except TypeError:  # one that cannot be changed
        return values
    return found


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
    """Some examples of a nest; a list of as many texts is one of examples, too."""
    sizes = {len(tensor) for tensor in tensors(nest) if tensor.dim()}
    return mapped(
        nest,
        lambda tensor: tensor[part] if tensor.dim() else tensor,
        lambda texts: texts[part] if len(texts) in sizes else texts,
    )


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


def joinable(nests: Sequence[Any]) -> bool:
    """Whether nests of one form differ in the number of examples alone."""
    shapes = {tuple((tensor.dim(), tensor.shape[1:]) for tensor in tensors(nest)) for nest in nests}
    return len(shapes) == 1

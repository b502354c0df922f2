"""What a checkpoint must contain to be resumed: types, ranges, and that its parts agree with each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Check = Callable[[Any], bool]


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _time(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_count, value))


def _tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and torch.is_tensor(v) for k, v in value.items())


def _tensors_of_each(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) and _tensors(own) for name, own in value.items())


def _sums(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"right", "losses", "waited", "seconds"}
        and torch.is_tensor(right := value["right"])
        and (right.dtype, right.dim()) == (torch.int64, 0)
        and right >= 0
        and torch.is_tensor(losses := value["losses"])
        and losses.dim() == 1
        and losses.dtype.is_floating_point
        and bool(losses.isfinite().all())
        and _time(value["waited"])
        and _time(value["seconds"])
    )


def _random(value: Any) -> bool:
    return _tensors(value) and "cpu" in value and all(state.dtype == torch.uint8 for state in value.values())


FIELDS: dict[str, tuple[str, Check]] = {
    "epochs_done": ("a count", _count),
    "step": ("a count", _count),
    "time": ("a time", _time),
    "seconds": ("a time", _time),
    "cpu_seconds": ("a time", _time),
    "history": ("shares", lambda v: isinstance(v, list) and all(_time(share) and share <= 1 for share in v)),
    "over": ("true or false", lambda v: type(v) is bool),
    "executed": ("a count or nothing", lambda v: v is None or _count(v)),
    "config": ("settings by name", lambda v: isinstance(v, dict) and all(isinstance(name, str) for name in v)),
    "processes": ("a positive count", lambda v: _count(v) and v > 0),
    "steps_per_epoch": ("a positive count", lambda v: _count(v) and v > 0),
    "classes": ("names", lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v)),
    "answer": ("numbers", lambda v: isinstance(v, list) and all(type(number) is float for number in v)),
    "images": ("a fingerprint", lambda v: type(v) in (int, str)),
    "sums": ("the sums of an epoch", _sums),
    "lengths": ("two counts", _pair),
    "checksums": ("two counts", _pair),
    "optimizer": ("tensors by name and parameter", _tensors_of_each),
    "scaler": ("values by name", lambda v: isinstance(v, dict)),
    "pruner": ("a pruner's state or nothing", lambda v: v is None or isinstance(v, dict)),
    "model": ("tensors by name or nothing", lambda v: v is None or _tensors(v)),
    "average": ("tensors by name or nothing", lambda v: v is None or _tensors(v)),
    "rng": ("states of generators", _random),
}
"""Every field of a checkpoint: what it must hold, and whether a value is that."""


def check(state: dict, *, gated: bool, averaged: bool, validated: bool) -> None:
    """Make sure that a checkpoint's fields are what they should be and agree with each other.

    Args:
        state: What the file held.
        gated: Whether its run prunes.
        averaged: Whether its run averages its weights.
        validated: Whether its run has validation images.

    Raises:
        ValueError: if not; the reason in a few words.
    """
    missing = [name for name in FIELDS if name not in state]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    for name, (what, is_right) in FIELDS.items():
        if not is_right(state[name]):
            raise ValueError(f"its {name} must be {what}")
    epochs, steps, trained = state["epochs_done"], state["steps_per_epoch"], state["step"]
    inside = trained - epochs * steps
    if len(state["sums"]["losses"]) != inside or not 0 <= inside < steps:
        raise ValueError(
            f"its step {trained} does not follow from {epochs} epochs of {steps} steps and the sums of one begun"
        )
    if len(state["history"]) != (recorded := epochs if validated else 0):
        raise ValueError(f"its history has {len(state['history'])} epochs instead of {recorded}")
    if (state["pruner"] is not None) != gated or (state["model"] is None) != gated:
        raise ValueError(f"it must hold {'a pruner' if gated else 'a model'}, and nothing else of the two")
    if (state["average"] is not None) != averaged:
        raise ValueError(f"it must hold {'averaged weights' if averaged else 'no averaged weights'}")

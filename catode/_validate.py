"""Argument checks with one message form.

Every failure is a `ValueError` that reads "`risk` must lie in (0, 0.5); got risk=1.5" followed, where the caller
passes `hint`, by a sentence that says how to fix it: "... got risk=1.5. Choose e.g. 0.05.". Array arguments
report the first invalid entry: "got price[3]=-1.0". Each function returns the converted value, so that a caller can check
and convert in one line. Scalars become Python numbers; only `array=True` accepts arrays, and then always returns a
numpy array of floats.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

__all__ = [
    "check_bool",
    "check_broadcast",
    "check_choice",
    "check_int",
    "check_interval",
    "check_nonnegative",
    "check_positive",
    "check_real",
    "check_shape",
    "check_state",
    "expanded",
    "fail",
]


def expanded(name: str, path: str | os.PathLike, *, hint: str | None = None) -> str:
    """A path as text, a leading ~ or ~user replaced by the home folder, as a shell does, which skips ``--flag=~/path``.

    Args:
        name: Name of the argument, as the caller spells it.
        path: The path.
        hint: A full sentence that says how to fix it.

    Raises:
        ValueError: if the home folder is not known.
    """
    try:
        return str(Path(path).expanduser()) if str(path).startswith("~") else os.fspath(path)
    except RuntimeError:
        fail(name, "be a path whose home folder is known", os.fspath(path), hint=hint or "Write the path out.")


def fail(
    name: str, requirement: str, value: Any, *, index: tuple[int, ...] | None = None, hint: str | None = None
) -> NoReturn:
    """Raise a ValueError in the package's message form.

    Args:
        name: Name of the argument, as the caller spells it.
        requirement: What must hold, continuing "`name` must ...".
        value: The invalid value (the invalid entry where `index` is given).
        index: Position of the invalid entry in an array argument.
        hint: A full sentence that says how to fix it.

    Raises:
        ValueError: always.
    """
    place = name if not index else f"{name}[{', '.join(str(i) for i in index)}]"
    if isinstance(value, np.generic):
        value = value.item()
    text = repr(value)
    if len(text) > 80:
        text = text[:77] + "..."
    message = f"`{name}` must {requirement}; got {place}={text}"
    raise ValueError(f"{message}. {hint}" if hint else message)


def _convert(name: str, value: Any, *, array: bool, hint: str | None) -> float | np.ndarray:
    """Return `value` as a float, or as an array of floats where `array`; refuse booleans, text and complex numbers."""
    if not array:
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value[()]
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
            fail(name, "be a real number", value, hint=hint)
        try:
            return float(value)
        except OverflowError:
            fail(name, "be representable as a float", value, hint=hint)
    try:
        raw = np.asarray(value)
    except ValueError:  # ragged nesting
        fail(name, "be a real number or a rectangular array of them", value, hint=hint)
    if raw.dtype.kind not in "iuf":
        fail(name, "be a real number or an array of them", value, hint=hint)
    return raw.astype(np.float64)


def _require(name: str, value: float | np.ndarray, good: Any, requirement: str, hint: str | None) -> None:
    """Fail at the first entry of `value` where the condition `good` (same shape) does not hold."""
    if not isinstance(value, np.ndarray):
        if not good:
            fail(name, requirement, value, hint=hint)
    elif not np.all(good):
        index = tuple(int(i) for i in np.argwhere(~np.asarray(good))[0])
        fail(name, requirement, value[index], index=index, hint=hint)


def _finite(value: float | np.ndarray) -> Any:
    return np.isfinite(value) if isinstance(value, np.ndarray) else math.isfinite(value)


def check_real(name: str, value: Any, *, array: bool = False, hint: str | None = None) -> Any:
    """Return `value` as a finite float (array of floats where `array`).

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.
        array: Also accept arrays; the result is then always an array, of shape () for a scalar.
        hint: A sentence that says how to fix it.

    Returns:
        The converted value.

    Raises:
        ValueError: if `value` is not a real number (or an array of them), is a boolean, or is not finite.
    """
    value = _convert(name, value, array=array, hint=hint)
    _require(name, value, _finite(value), "be finite", hint)
    return value


def check_positive(name: str, value: Any, *, array: bool = False, hint: str | None = None) -> Any:
    """Return `value` as a finite float greater than zero; arguments and errors as in `check_real`."""
    value = _convert(name, value, array=array, hint=hint)
    _require(name, value, _finite(value) & (value > 0), "be positive and finite", hint)
    return value


def check_nonnegative(name: str, value: Any, *, array: bool = False, hint: str | None = None) -> Any:
    """Return `value` as a finite float, zero or greater; arguments and errors as in `check_real`."""
    value = _convert(name, value, array=array, hint=hint)
    _require(name, value, _finite(value) & (value >= 0), "be non-negative and finite", hint)
    return value


def check_interval(
    name: str,
    value: Any,
    low: float,
    high: float,
    low_open: bool = False,
    high_open: bool = False,
    *,
    array: bool = False,
    hint: str | None = None,
) -> Any:
    """Return `value` as a finite float inside an interval.

    Args:
        name: Name of the argument, for the message.
        value: What the caller passed.
        low: Lower end; `-inf` for none.
        high: Upper end; `inf` for none.
        low_open: Exclude the lower end.
        high_open: Exclude the upper end.
        array: Also accept arrays, each entry checked; the result is then always an array.
        hint: A sentence that says how to fix it.

    Returns:
        The converted value.

    Raises:
        ValueError: if `value` is not a finite real number or lies outside the interval.
    """
    value = _convert(name, value, array=array, hint=hint)
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    opening = "(" if low_open or math.isinf(low) else "["
    closing = ")" if high_open or math.isinf(high) else "]"
    _require(name, value, _finite(value) & above & below, f"lie in {opening}{low:g}, {high:g}{closing}", hint)
    return value


def check_int(
    name: str, value: Any, *, low: int | None = None, high: int | None = None, hint: str | None = None
) -> int:
    """Return `value` as an int between `low` and `high`, both ends included.

    A float is refused even where it is whole: a step count of 1e3 is more often a mistake than intended.

    Raises:
        ValueError: if `value` is not an integer (booleans are not) or lies outside the limits.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        fail(name, "be an integer", value, hint=hint)
    value = int(value)
    if low is not None and high is not None and not low <= value <= high:
        fail(name, f"be an integer in [{low}, {high}]", value, hint=hint)
    if low is not None and value < low:
        fail(name, f"be an integer of at least {low}", value, hint=hint)
    if high is not None and value > high:
        fail(name, f"be an integer of at most {high}", value, hint=hint)
    return value


def check_bool(name: str, value: Any, *, hint: str | None = None) -> bool:
    """Return `value` as a bool.

    Raises:
        ValueError: if `value` is not a boolean (0, 1 and text are not).
    """
    if not isinstance(value, (bool, np.bool_)):
        fail(name, "be True or False", value, hint=hint)
    return bool(value)


def check_choice(name: str, value: Any, choices: Iterable[Any], *, hint: str | None = None) -> Any:
    """Return the member of `choices` that equals `value`.

    Raises:
        ValueError: if `value` is not in `choices` (a boolean never equals a number here).
    """
    choices = tuple(choices)
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    fail(name, f"be one of {', '.join(repr(choice) for choice in choices)}", value, hint=hint)


def check_state(name: str, value: Any, *, hint: str | None = None) -> np.ndarray:
    """Return `value` as finite states of a planar system, a float array of shape (..., 2).

    Raises:
        ValueError: if an entry is not a finite real number or the last axis does not have length 2.
    """
    value = check_real(name, value, array=True, hint=hint)
    if value.ndim == 0 or value.shape[-1] != 2:
        check_shape(name, value, "(..., 2)", False, hint=hint)
    return value


def check_shape(name: str, value: np.ndarray, expected: str, good: bool, *, hint: str | None = None) -> None:
    """Raise an error that names the shape, unless `good`.

    Raises:
        ValueError: if not `good`.
    """
    if not good:
        message = f"`{name}` must have shape {expected}; got {name} of shape {value.shape}"
        raise ValueError(f"{message}. {hint}" if hint else message)


def check_broadcast(values: dict[str, np.ndarray], *, hint: str | None = None) -> tuple[int, ...]:
    """Return the common shape of several named arrays.

    Raises:
        ValueError: if the shapes do not broadcast together; the message lists them.
    """
    try:
        return np.broadcast_shapes(*(value.shape for value in values.values()))
    except ValueError:
        names = ", ".join(f"`{name}`" for name in values)
        shapes = ", ".join(f"{name} of shape {value.shape}" for name, value in values.items() if value.shape)
        message = f"{names} must broadcast together; got {shapes}"
        raise ValueError(f"{message}. {hint}" if hint else message) from None

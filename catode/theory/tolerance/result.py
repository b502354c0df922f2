"""What a derivation returns, `Tolerance`, with its JSON; and `fixed`, a tolerance that was chosen by hand."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from catode._validate import check_choice, check_int, check_interval, fail
from catode.theory.tolerance.reasons import explain

__all__ = ["Tolerance", "fixed", "frozen"]


@dataclasses.dataclass(frozen=True, eq=False)
class Tolerance:
    """Keep probability at or below which each structure may be removed, with what it was derived from.

    Args:
        values: Tolerance on the keep probability, at most 1, shape () or any; where it is not positive nothing can be
            removed safely, and `reason` says why and what would help. Read-only.
        separatrix: Keep probability theta_sep on the boundary of the domain of attraction (the tolerance without
            noise), same shape; `nan` where the origin is "fixed". Read-only.
        inputs: What `derive` or `fixed` was given, broadcast views of the same shape by name.
        origin: "derived" or "fixed".
    """

    values: np.ndarray
    separatrix: np.ndarray
    inputs: dict[str, np.ndarray]
    origin: str

    def __post_init__(self) -> None:
        check_choice("origin", self.origin, ("derived", "fixed"))

    def __len__(self) -> int:
        return len(self.values)

    def __float__(self) -> float:
        return float(self.values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tolerance):
            return NotImplemented
        if self.origin != other.origin or self.inputs.keys() != other.inputs.keys():
            return False
        pairs = [(self.values, other.values), (self.separatrix, other.separatrix)]
        pairs += [(value, other.inputs[name]) for name, value in self.inputs.items()]
        return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)

    def reason(self, index: Any = None) -> str:
        """Why a tolerance is what it is, and what would help where it is not positive; worked out when asked for.

        Args:
            index: Position of the structure; needed only where there are several.

        Returns:
            One sentence. Without an index, for several structures: how many of them have a positive tolerance.

        Raises:
            IndexError: if there is no such structure.
        """
        if index is None and self.values.ndim:
            return f"{int(np.sum(self.values > 0.0))} of {self.values.size} structures have a positive tolerance."
        index = () if index is None else index
        if self.origin == "fixed":
            return f"The tolerance is fixed at {self.values[index]:.6g} by choice; no failure probability is claimed."
        given = {name: float(value[index]) for name, value in self.inputs.items()}
        return explain(float(self.values[index]), float(self.separatrix[index]), **given)

    @property
    def reasons(self) -> tuple[str, ...]:
        """The sentence for every structure, in the order of the flattened values."""
        return tuple(self.reason(index) for index in np.ndindex(self.values.shape))

    def to_json(self) -> str:
        """Return the tolerance as JSON text; floats keep every digit, and those that are not finite become strings."""
        record = {
            "origin": self.origin,
            "values": _encode(self.values.tolist()),
            "separatrix": _encode(self.separatrix.tolist()),
            "inputs": {name: _encode(value.tolist()) for name, value in self.inputs.items()},
        }
        return json.dumps(record, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Tolerance:
        """Return the tolerance that `to_json` wrote.

        Args:
            text: JSON text.

        Returns:
            An equal tolerance.

        Raises:
            ValueError: if `text` is not JSON of that form.
        """
        try:
            record = json.loads(text)
        except RecursionError:
            fail("text", "not be nested too deeply to be a tolerance", text, hint="Write it with `Tolerance.to_json`.")
        keys = {"origin", "values", "separatrix", "inputs"}
        if not isinstance(record, dict) or record.keys() != keys or not isinstance(record["inputs"], dict):
            fail("text", f"hold the keys {sorted(keys)}", text, hint="Write it with `Tolerance.to_json`.")
        inputs = {name: _decode(value) for name, value in record["inputs"].items()}
        return cls(_decode(record["values"]), _decode(record["separatrix"]), inputs, record["origin"])


def fixed(value: float, n: int | None = None) -> Tolerance:
    """Tolerance chosen by hand, the same for every structure; it carries no failure probability.

    Args:
        value: Keep probability at or below which to remove, in [0, 1].
        n: Number of structures, or None for a single one of shape ().

    Returns:
        The tolerance, with origin "fixed".

    Raises:
        ValueError: if `value` lies outside [0, 1] or `n` is not a positive integer.
    """
    value = check_interval("value", value, 0.0, 1.0)
    shape = () if n is None else (check_int("n", n, low=1),)
    values = frozen(np.full(shape, value))
    return Tolerance(values, frozen(np.full(shape, np.nan)), {"value": values}, "fixed")


def frozen(values: np.ndarray) -> np.ndarray:
    """A read-only copy, as floats."""
    values = np.array(values, dtype=np.float64)
    values.setflags(write=False)
    return values


def _encode(value: Any) -> Any:
    """Replace floats that JSON cannot hold by strings, in nested lists."""
    if isinstance(value, list):
        return [_encode(entry) for entry in value]
    return value if np.isfinite(value) else str(value)


def _decode(value: Any) -> np.ndarray:
    """Read back what `_encode` wrote; the strings "inf", "-inf" and "nan" convert like numbers."""

    def convert(entry: Any) -> Any:
        if isinstance(entry, list):
            return [convert(part) for part in entry]
        if isinstance(entry, str) and entry in ("inf", "-inf", "nan"):
            return float(entry)
        return entry

    return frozen(_numbers(convert(value)))


def _numbers(value: Any) -> np.ndarray:
    """Return numbers, finite or not, as an array of floats."""
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" or isinstance(value, bool):
        fail("text", "hold numbers", value, hint="Write it with `Tolerance.to_json`.")
    return array.astype(np.float64)

"""Reading the files of a run's folder: JSON, and tables that may be compressed (``.csv.gz``), as those of records are.

Every function checks what it reads and names the file in its complaint.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["number", "packed", "read_json", "read_rows", "read_table", "structure_key"]

PLACE = ("kind", "block", "site", "index")
_KINDS = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}


def structure_key(row: Mapping[str, str]) -> tuple[str, str, str, str]:
    """What tells a structure from all others of its run, of a row of structures.csv or shadow.csv: `PLACE`."""
    return row["kind"], row["block"], row["site"], row["index"]


def read_json(
    path: Path, required: Mapping[str, type] | None = None, optional: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """One JSON object.

    Args:
        path: The file.
        required: Keys that must be there, each with the type of its value: str, int, float (finite) or bool.
        optional: Keys that may be missing or null, likewise.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged, or a required key is missing or of another type.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path) from None
    except ValueError as error:
        raise ValueError(f"{path} must hold valid JSON; {error}. Restore the file from the run.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(value).__name__}. Restore the file from the run.")
    known = required or {}
    for key, kind in {**known, **(optional or {})}.items():
        if key not in known and value.get(key) is None:
            continue
        if key not in value:
            raise ValueError(f"{path} must have the key {key!r}; got none. Restore the file from the run.")
        if not _is(value[key], kind):
            raise ValueError(f"{path} must have {_KINDS[kind]} at {key!r}; got {key}={value[key]!r}.")
    return value


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def packed(path: Path) -> Path:
    """The compressed form of a table if that is there, else the table itself."""
    other = path.with_name(path.name + ".gz")
    return other if other.exists() else path


def read_table(path: Path, required: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """A table, compressed or not.

    Args:
        path: The file, without ``.gz``.
        required: Columns that must be there.

    Returns:
        The header, which for a file without even that is `required`, and the rows.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged or cut short, lacks a column, or has rows of another length than the header.
    """
    path = packed(path)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.reader(stream) if row]
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path.with_suffix("") if path.suffix == ".gz" else path) from None
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be a whole file; got one that is damaged: {error}. Restore it.") from None
    if not rows:  # an ungated run may leave the file without even a header
        return list(required), []
    header = rows[0]
    if absent := [name for name in required if name not in header]:
        raise ValueError(f"{path} must have the column {absent[0]!r}; its header is {','.join(header)}.")
    for row_number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise ValueError(f"{path} must have {len(header)} values in every row; row {row_number} has {len(row)}.")
    return header, rows[1:]


def read_rows(path: Path, required: Sequence[str] = ()) -> list[dict[str, str]]:
    """The same as one mapping a row; see `read_table`."""
    header, rows = read_table(path, required)
    return [dict(zip(header, row, strict=True)) for row in rows]


def number(path: Path, name: str, text: str) -> float:
    """A number of a table; NaN where nothing was measured.

    Args:
        path: The table, for the message.
        name: The column, for the message.
        text: What stands there.

    Raises:
        ValueError: if it is no number.
    """
    if text == "" or text == "None":
        return math.nan
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{path} must hold numbers in column {name!r}; got {text!r}.") from None


def _missing(path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"`folder` must hold {path.name}, as every finished run's folder does; got {path.parent} without it."
    )

"""Reads the files of a run's folder: JSON, and CSV tables, which may be compressed (``.csv.gz``) as in records.

Every function checks what it reads, its checksum too where the folder has a checksums.json; its error messages name the
file. `read_config`, `read_structures`, `read_decisions` and `read_result` translate the names of earlier versions to those
of this one (see CHANGELOG.md).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catode import _checksums
from catode.structures.fates import (
    COMMITTED,
    FATES,
    KEPT_AS_LAST,
    KEPT_AT_TARGET,
    KEPT_FOR_WIDTH,
    KEPT_OUT_OF_TIME,
    NOT_BY_RULE,
    REMOVED_OUT_OF_TIME,
    REMOVED_WITH_BLOCK,
)

__all__ = [
    "PLACE",
    "number",
    "packed",
    "read_config",
    "read_decisions",
    "read_json",
    "read_result",
    "read_rows",
    "read_structures",
    "read_table",
    "structure_key",
]

PLACE = ("kind", "block", "site", "index")
_DEEPEST = 50  # those of runs are nested at most 5 deep; readers go through them by recursion
_KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def structure_key(row: Mapping[str, str]) -> tuple[str, str, str, str]:
    """Key of a structure, unique in its run, from a row of structures.csv or shadow.csv: the values of `PLACE`."""
    return row["kind"], row["block"], row["site"], row["index"]


def read_json(
    path: Path, required: Mapping[str, type] | None = None, optional: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """One JSON object.

    Args:
        path: The file.
        required: Required keys, each with the type of its value: str, int, float (finite) or bool.
        optional: Keys that may be missing or null, with their types.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged, or a required key is missing or of another type.
    """
    try:
        with path.open("rb") as file:
            _checksums.check(path, file)
            content = file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold valid JSON; {error}. Restore the file from the run.") from None
    if _depth(value) > _DEEPEST:
        raise ValueError(f"{path} must be nested at most {_DEEPEST} deep; got more. Restore the file from the run.")
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(value).__name__}. Restore the file from the run.")
    _check_keys(path, value, required or {}, optional or {})
    return value


def _check_keys(path: Path, value: dict[str, Any], known: Mapping[str, type], optional: Mapping[str, type]) -> None:
    """Check the keys of a JSON object, as `read_json` describes."""
    for key, kind in {**known, **optional}.items():
        if key not in known and value.get(key) is None:
            continue
        if key not in value:
            raise ValueError(f"{path} must have the key {key!r}; got none. Restore the file from the run.")
        if not _is(value[key], kind):
            raise ValueError(f"{path} must have {_KINDS[kind]} at {key!r}; got {key}={value[key]!r}.")


def _depth(value: Any) -> int:
    """How deep lists and objects are nested; counted no further than one beyond `_DEEPEST`."""
    depth, inside = 0, [value]
    while depth <= _DEEPEST and (inside := [v for v in inside if isinstance(v, list | dict)]):
        depth += 1
        inside = [v for part in inside for v in (part.values() if isinstance(part, dict) else part)]
    return depth


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        try:
            return isinstance(value, int | float) and math.isfinite(value)
        except OverflowError:  # an integer of hundreds of digits
            return False
    return isinstance(value, kind)


def packed(path: Path) -> Path:
    """Path of the compressed table if it exists, else of the plain one."""
    other = path.with_name(path.name + ".gz")
    return other if other.exists() else path


def read_table(path: Path, required: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """A table, compressed or not.

    Args:
        path: The file, without ``.gz``.
        required: Required columns.

    Returns:
        Header and rows; `required` and no rows for an empty file.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged or truncated, lacks a column, or has rows of another length than the header.
    """
    plain, path = path, packed(path)
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as stream:
            _checksums.check(plain, stream)
            rows = [row for row in csv.reader(io.TextIOWrapper(stream, encoding="utf-8", newline="")) if row]
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path.with_suffix("") if path.suffix == ".gz" else path) from None
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be a whole file; got one that is damaged: {error}. Restore it.") from None
    except OSError as error:
        raise _unreadable(path, error) from None
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
    """The rows of a table as dicts by column; arguments and errors as in `read_table`."""
    header, rows = read_table(path, required)
    return [dict(zip(header, row, strict=True)) for row in rows]


def number(path: Path, name: str, text: str) -> float:
    """Parse a number of a table; NaN where nothing was measured.

    Args:
        path: The table, for the message.
        name: The column, for the message.
        text: The cell.

    Raises:
        ValueError: if it is not a number.
    """
    if text == "" or text == "None":
        return math.nan
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{path} must hold numbers in column {name!r}; got {text!r}.") from None


def read_config(
    folder: Path, required: Mapping[str, type] | None = None, optional: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """config.json of a run, with `memory`, `check_every` and `validation_share` always set.

    Earlier versions left the first two null where they followed from the run's length; they are then computed from
    metrics.csv. `rate_ratio` and `probe_size`, which no reader needs, stay null. Before 0.2 no image was held out for
    validation: the share is 0.

    Args:
        folder: The run's folder.
        required: As in `read_json`.
        optional: As in `read_json`.
    """
    from catode.theory.tolerance.measured import check_steps, pool_memory

    config = read_json(folder / "config.json", required, optional)
    config.setdefault("validation_share", 0.0)
    if config.get("memory", 0) is None:
        read_json(folder / "config.json", {"decide_until": float, "epochs": float})
        config["memory"] = pool_memory(round(config["decide_until"] * _steps(folder, config)))
    if config.get("check_every", 0) is None and "memory" in config:
        config["check_every"] = check_steps(config["memory"])
    return config


def _steps(folder: Path, config: Mapping[str, Any]) -> float:
    """Steps of a whole run, from its first epoch."""
    path = folder / "metrics.csv"
    rows = read_rows(path, ("epoch", "step"))
    if not rows:
        return 0.0
    last = rows[-1]
    return number(path, "step", last["step"]) / max(number(path, "epoch", last["epoch"]), 1.0) * config["epochs"]


def read_structures(folder: Path, required: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """structures.csv of a run: header and rows, with one of `catode.structures.fates.FATES` in the column ``fate``.

    Args:
        folder: The run's folder.
        required: Required columns beside ``fate`` and `PLACE`.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged, lacks a column, or holds an unknown fate.
    """
    path = folder / "structures.csv"
    header, rows = read_table(path)
    if not header:
        header = [*PLACE, *required, "fate"]
    if "state" in header and "fate" not in header:  # before 0.2
        header = ["fate" if name == "state" else name for name in header]
        earlier = True
    else:
        earlier = False
    if absent := [name for name in (*PLACE, *required, "fate") if name not in header]:
        raise ValueError(f"{packed(path)} must have the column {absent[0]!r}; its header is {','.join(header)}.")
    at = header.index("fate")
    if earlier:
        named = _earlier_fates(folder, [dict(zip(header, row, strict=True)) for row in rows])
        rows = [[*row[:at], fate, *row[at + 1 :]] for row, fate in zip(rows, named, strict=True)]
    if unknown := [row[at] for row in rows if row[at] not in FATES]:
        raise ValueError(f"{packed(path)} must hold one of {', '.join(FATES)} in column 'fate'; got {unknown[0]!r}.")
    return header, rows


def read_decisions(folder: Path, required: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a shadow run's shadow.csv."""
    rows = read_rows(folder / "shadow.csv", required)
    for row in rows:
        if row.get("outcome") == "promoted":  # before 0.2
            row["outcome"] = REMOVED_WITH_BLOCK
    return rows


def read_result(
    folder: Path, required: Mapping[str, type] | None = None, optional: Mapping[str, type] | None = None
) -> dict[str, Any]:
    """result.json of a run; arguments as in `read_json`. Before 0.2 its accuracies, all on test images, did not say so."""
    result = read_json(folder / "result.json")
    for name in ("accuracy", "accuracy_history"):
        if name in result and f"test_{name}" not in result:
            result[f"test_{name}"] = result.pop(name)
    _check_keys(folder / "result.json", result, required or {}, optional or {})
    _check_numbers(folder / "result.json", result)
    decisions = result.get("decisions")
    if isinstance(decisions, dict) and {"forced", "promoted"} & set(decisions):  # before 0.2
        last = {}
        header, rows = read_structures(folder)
        for row in rows:
            named = dict(zip(header, row, strict=True))
            last[structure_key(named)] = named["fate"]
        known = {fate: list(last.values()).count(fate) for fate in FATES}
        kept = {name: count for name, count in decisions.items() if name in FATES}
        kept |= {fate: known[fate] for fate in NOT_BY_RULE if known[fate]}
        if "promoted" in decisions:
            kept[REMOVED_WITH_BLOCK] = decisions["promoted"]
        result["decisions"] = dict(sorted(kept.items()))
    return result


def _check_numbers(path: Path, result: Mapping[str, Any]) -> None:
    """Check that a result holds numbers, but for `decisions` and `warnings`, and lists of numbers in its histories.

    Raises:
        ValueError: if it does not.
    """
    for name, value in result.items():
        listed = isinstance(value, list) and name.endswith("history")
        for part in value if listed else [value]:
            if not (name in ("decisions", "warnings") or part is None or _is(part, float)):
                raise ValueError(
                    f"{path} must have numbers at {name!r}; got {part!r:.60}. Restore the file from the run."
                )


def _earlier_fates(folder: Path, rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The fates in the rows of a structures.csv from before 0.2, which called five of them ``forced``."""
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    file = folder / "structure.json"
    blocks = read_json(file).get("blocks") if file.exists() else {}
    if not isinstance(blocks, dict) or not all(_describes(block) for block in blocks.values()):
        raise ValueError(f"{file} must list what was kept of each block; it does not. Restore the file from the run.")
    targeted = any(config.get(name) is not None for name in ("target_macs", "target_params"))
    grouped = config.get("round_to", 1) != 1

    def kept(row: Mapping[str, str]) -> bool | None:
        block = blocks.get(row["block"])
        if block is None or row["kind"] == "layer" or not block["kept"]:
            return block and block["kept"]
        return row["index"] in map(str, block["sites"].get(row["site"], ()))

    def low(row: Mapping[str, str]) -> bool:
        return not number(folder / "structures.csv", "keep_prob", row["keep_prob"]) >= 0.5

    # kept with theta below 1/2: a unit that waited for its group, or everything undecided, as the last of the network
    forced = [row for row in rows if row["fate"] == "forced"]
    last = {row.get("step") for row in forced if kept(row) and low(row) and (row["kind"] == "layer" or not grouped)}

    def fate(row: Mapping[str, str]) -> str:
        if row["fate"] == "promoted":
            return REMOVED_WITH_BLOCK
        if row["fate"] != "forced":
            return row["fate"]
        there = kept(row)
        if (
            targeted
        ):  # only the first versions called a kept structure with theta near 1 `forced`; later it was committed
            near_one = number(folder / "structures.csv", "keep_prob", row["keep_prob"]) >= 0.9
            if there:
                return COMMITTED if near_one else KEPT_AT_TARGET
            return KEPT_AT_TARGET if there is None and not near_one else REMOVED_OUT_OF_TIME
        if there and row.get("step") in last:
            return KEPT_AS_LAST
        if not low(row) if there is None else there:
            return KEPT_FOR_WIDTH if low(row) else KEPT_OUT_OF_TIME
        return REMOVED_OUT_OF_TIME

    return [fate(row) for row in rows]


def _describes(block: Any) -> bool:
    """Whether an entry of structure.json says what was kept of a block."""
    return (
        isinstance(block, dict)
        and isinstance(block.get("kept"), bool)
        and isinstance(block.get("sites"), dict)
        and all(isinstance(units, list) for units in block["sites"].values())
    )


def _unreadable(path: Path, error: OSError) -> ValueError:
    reason = error.strerror or type(error).__name__
    return ValueError(f"{path} must be a file that can be read; got: {reason}. Restore it from the run.")


def _missing(path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"`folder` must hold {path.name}, as every finished run's folder does; got {path.parent} without it."
    )

"""Checksums of the files of a run's folder, checksums.json: what was damaged or changed since is not read in silence.

CRC-32 finds accidents, not intent. A folder without checksums.json, as of versions before 0.2, is read unchecked.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import BinaryIO

FILE = "checksums.json"
_CHUNK = 1 << 20  # bytes read at a time


def of(stream: BinaryIO) -> str:
    """CRC-32 of the rest of a stream, eight hexadecimal digits."""
    value = 0
    while content := stream.read(_CHUNK):
        value = zlib.crc32(content, value)
    return f"{value:08x}"


def listed(folder: Path) -> dict[str, str]:
    """The checksums of a folder by file name; empty without checksums.json.

    Raises:
        ValueError: if that file is damaged.
    """
    path = folder / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        found, reason = None, getattr(error, "strerror", None) or str(error)
    else:
        reason = "something else"
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(
            f"{path} must hold a checksum for each file; got: {reason}. Restore it from the run, or delete it to read the "
            "others unchecked."
        )
    return found


def check(path: Path, stream: BinaryIO) -> None:
    """Compare a file with its checksum, if its folder has one for it.

    Args:
        path: The file's path, without ``.gz``.
        stream: Its content, uncompressed; is read from its start and left there.

    Raises:
        ValueError: if it is another.
    """
    expected = listed(path.parent).get(path.name)
    if expected is None:
        return
    found = of(stream)
    stream.seek(0)
    if found != expected:
        raise ValueError(
            f"{path} must be as the run wrote it; got the checksum {found} instead of {expected} in {FILE}. Restore it from "
            f"the run; if it was changed on purpose, delete {FILE}."
        )


def text(sums: dict[str, str]) -> str:
    """Content of checksums.json."""
    return json.dumps(sums, indent=1, sort_keys=True) + "\n"

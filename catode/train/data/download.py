"""Download of a file: resumes a partial download and verifies the md5."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from catode.train.data.images import DataError

CHUNK = 1 << 18
PATIENCE = 30
"""Socket timeout in seconds."""


def fetch(url: str, path: Path, md5: str) -> None:
    """Download a file, or do nothing if it exists with the right checksum.

    The partial download is ``path.part``; it is renamed when it is complete and its checksum is right. An interrupted
    connection is resumed, as long as each attempt receives something.

    Args:
        url: Address of the file.
        path: Where to save it; its folder exists.
        md5: Checksum of its content, hexadecimal.

    Raises:
        DataError: if it cannot be downloaded (a partial download is kept), or has another checksum.
    """
    if path.exists() and checksum(path) == md5:
        return
    part = path.with_name(path.name + ".part")
    while True:
        before = _size(part)
        try:
            if _receive(url, part):
                break
            reason = "the connection was closed"
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__
        if _size(part) <= before:
            raise DataError(
                f"`download` must be able to fetch {url}; got: {reason}. Try again with a network (a partial download is "
                f"resumed), or put the official archive into {str(path.parent)!r} by hand."
            )
    found = checksum(part)
    if found != md5:
        part.unlink()
        raise DataError(
            f"`download` must get a file of md5 {md5} from {url}; got md5 {found}. It was deleted; try again, or put the "
            f"official archive into {str(path.parent)!r} by hand."
        )
    os.replace(part, path)


def _receive(url: str, part: Path) -> bool:
    """Append the missing part of a file; returns whether it is complete."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return True  # nothing is missing
        raise
    with response:
        resumed = response.status == http.client.PARTIAL_CONTENT
        start = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        with (
            part.open("ab" if resumed else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, file=sys.stderr) as bar,
        ):
            while chunk := response.read1(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    return total is None or _size(part) == total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def checksum(path: Path) -> str:
    """The md5 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a lock file, waiting for other processes that hold it, such as other ranks of a distributed run.

    The system releases the lock when the process ends, even if killed. Without `fcntl` there is no lock.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

"""Lock file of a run's folder: one process at a time uses it."""

from __future__ import annotations

import errno
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from catode.train.settings.setting import ConfigError

try:
    import fcntl
except ImportError:  # not on Windows, where a run's folder is not locked
    fcntl = None

FILE = "lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # errors of file systems without locks


def hold(folder: Path, name: str = "out") -> TextIO:
    """Lock a run's folder.

    The system releases the lock when this process ends, even if it is killed. Forked processes do not hold it.

    Args:
        folder: The folder.
        name: The setting that names the folder, for messages.

    Returns:
        The lock file; closing it releases the lock.

    Raises:
        ConfigError: if another process holds the lock, or the folder cannot be written.
    """
    try:
        file = (folder / FILE).open("a+")
    except OSError as error:
        raise ConfigError(
            f"`{name}` must be a folder that can be written; got {name}={str(folder)!r}, its {FILE}: {error.strerror}. Choose "
            "another, or change its permissions."
        ) from None
    if fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "a process that has just started"
            file.close()
            raise ConfigError(
                f"`{name}` must be a folder that no other process uses; got {name}={str(folder)!r}, locked by {holder}. "
                "Wait until it ends, or choose another."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"note: {folder} is on a file system without locks; do not start a second run there.",
                file=sys.stderr,
            )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


@contextmanager
def released(file: TextIO) -> Iterator[None]:
    """Release a lock at the end of this context; an error of closing its file costs nothing, since nothing is in it."""
    try:
        yield
    finally:
        with suppress(OSError):
            file.close()


def drop(folder: Path) -> None:
    """Delete the lock file of a finished run; nothing depends on it any more, so that a failure costs a warning alone."""
    try:
        (folder / FILE).unlink()
    except OSError as error:
        print(f"warning: the run is finished, but {folder / FILE} stays: {error.strerror}", file=sys.stderr)

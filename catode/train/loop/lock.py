"""One process at a time in a run's folder."""

from __future__ import annotations

import errno
import os
import platform
import sys
from pathlib import Path
from typing import TextIO

from catode.train.settings.setting import ConfigError

try:
    import fcntl
except ImportError:  # Windows has no such locks: there nothing keeps two processes apart
    fcntl = None

FILE = "lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what file systems without locks answer


def hold(folder: Path, name: str = "out") -> TextIO:
    """Keep other processes out of a run's folder.

    The system takes the lock back when this process ends, however it ends: a killed one never blocks its run. Processes
    that this one forks do not hold it.

    Args:
        folder: The folder.
        name: The setting that names it.

    Returns:
        A file; closing it gives the folder free.

    Raises:
        ConfigError: if another process holds the folder, or nothing can be written there.
    """
    try:
        file = (folder / FILE).open("a+")
    except OSError as error:
        raise ConfigError(
            f"`{name}` must be a folder that can be written; got {name}={str(folder)!r}: {error.strerror}. Choose another, or "
            "change its permissions."
        ) from None
    if fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "one that has just begun"
            file.close()
            raise ConfigError(
                f"`{name}` must be a folder in which no other process is at work; got {name}={str(folder)!r}, held by {holder}. "
                "Wait for its end, or choose another."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"note: {folder} is on a file system without locks; nothing keeps a second run out of it.",
                file=sys.stderr,
            )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def drop(folder: Path) -> None:
    """Delete the lock's file of a run that is finished."""
    (folder / FILE).unlink()

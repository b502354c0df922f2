"""The end of a program that is interrupted, or whose output nobody reads to the end, as with ``| head``."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence

CLOSED = 141
"""Exit status then: 128 and the number of SIGPIPE, as of any program that the signal ends."""

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors, without a file's name, of an output that is a file on a full disk."""


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run a program's `main`, and end it without a traceback where it is interrupted or its output was closed.

    Args:
        main: Takes the arguments and returns the exit status.
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        The exit status.
    """
    _replace_closed()
    try:
        try:
            return main(argv)
        finally:
            sys.stdout.flush()  # here, not when Python ends and can only complain
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _discard()
        return CLOSED
    except OSError as error:
        if error.filename is not None or error.errno not in UNWRITABLE:
            raise
        _discard()
        print(f"error: the output cannot be written: {error.strerror}. Write it elsewhere.", file=sys.stderr)
        return 1


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short: Python's, NumPy's, or PyTorch's on any device, which is a RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in said for words in ("allocate memory", "out of memory", "not enough memory")
    )


def _replace_closed() -> None:
    """Write to nowhere where the process was started without standard output or error, as by ``>&-``."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  open until the process ends


def _discard() -> None:
    """Send what is still to be written, and what follows, to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

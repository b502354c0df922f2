"""The end of a program that is interrupted, or whose output nobody reads to the end, as with ``| head``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

CLOSED = 141
"""Exit status then: 128 and the number of SIGPIPE, as of any program that the signal ends."""


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run a program's `main`, and end it without a traceback where it is interrupted or its output was closed.

    Args:
        main: Takes the arguments and returns the exit status.
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        The exit status.
    """
    try:
        try:
            return main(argv)
        finally:
            sys.stdout.flush()  # here, not when Python ends and can only complain
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED

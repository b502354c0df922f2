"""Signals that stop a run: it stops between two steps, after writing a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
MASKS = hasattr(signal, "pthread_sigmask")  # not on Windows


def outlive(worker: int) -> None:
    """Ignore the first signal of each kind in a worker process; Ctrl-C reaches it and the run at the same time.

    Args:
        worker: Number of the worker, not used.
    """
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    if MASKS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def held_back() -> Iterator[None]:
    """Block signals while worker processes are forked; each unblocks them in `outlive`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if MASKS else ()
    try:
        yield
    finally:
        if MASKS:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Stopped(KeyboardInterrupt):
    """A signal stopped the run.

    Attributes:
        number: Number of the signal.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


@contextmanager
def terminated() -> Iterator[None]:
    """Let SIGTERM raise `Stopped`, as Ctrl-C raises KeyboardInterrupt. In the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number, "stopped")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


class Stop:
    """Whether a signal to stop was received.

    Attributes:
        number: Number of the signal; None before one.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __bool__(self) -> bool:
        return self.number is not None

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Record the first signal; a second one, of either kind, raises `Stopped`. Works in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self:
            raise Stopped(number, "stopped at once")
        self.number = number

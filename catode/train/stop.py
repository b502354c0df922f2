"""Signals that ask a run to stop: it does so between two steps, when everything is kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
MASKS = hasattr(signal, "pthread_sigmask")  # not on Windows


def outlive(worker: int) -> None:
    """Leave the first signal of each kind to the run that this process works for; Ctrl-C reaches all of them at once.

    Args:
        worker: Number of the worker, of no use here.
    """
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    if MASKS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def held_back() -> Iterator[None]:
    """Let signals wait while processes are forked, which take them only once they `outlive` the first."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if MASKS else ()
    try:
        yield
    finally:
        if MASKS:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Stopped(KeyboardInterrupt):
    """The run was asked to stop.

    Attributes:
        number: The signal.
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
    """Whether somebody asked to stop.

    Attributes:
        number: The signal that asked; None while nobody did.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __bool__(self) -> bool:
        return self.number is not None

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Take note of the first signal; a second one, of either kind, does not wait. In the main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self:
            raise Stopped(number, "stopped at once")
        self.number = number

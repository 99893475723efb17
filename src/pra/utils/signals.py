"""Blocks that handle SIGTERM, SIGHUP (the terminal was closed) and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

Handler = Callable[[int, FrameType | None], Any] | signal.Handlers

HANGUP: signal.Signals = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows does not have it
ENDS = (signal.SIGTERM, HANGUP)
"""Signals that end a process from outside: of a scheduler, and of a terminal that is closed."""
STOPS = (*ENDS, signal.SIGINT)


@contextmanager
def handled(numbers: tuple[signal.Signals, ...], handler: Handler) -> Iterator[None]:
    """Send signals to ``handler`` in the block. Outside the main thread Python cannot do that, and nothing changes.

    A SIGHUP that is ignored stays so: nohup asks for that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {HANGUP} if signal.getsignal(HANGUP) is signal.SIG_IGN else set()
    previous = {number: signal.signal(number, handler) for number in {*numbers} - kept}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold :data:`STOPS` back in the block, and deliver them at its end."""
    received: list[int] = []
    try:
        with handled(STOPS, lambda signum, _: received.append(signum)):
            yield
    finally:
        for signum in received:
            signal.raise_signal(signum)


class _Woken(BaseException):
    """A signal has come. Not an Exception, so that no ``except Exception`` catches it."""


class Caught:
    """Signals in a block of :func:`caught_signals`: ``received`` are those that have come."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._leaves = False

    def until_signal(self, do: Callable[[], T]) -> T | None:
        """Return ``do()``, or None as soon as a signal comes, which interrupts ``do`` with an exception."""
        try:
            try:
                self._leaves = True
                return None if self.received else do()
            finally:
                self._leaves = False
        except _Woken:
            self._leaves = False
            return None

    def receive(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received.append(signum)
        if self._leaves:
            raise _Woken


@contextmanager
def caught_signals() -> Iterator[Caught]:
    """Collect :data:`STOPS`, so that work in progress can finish. A second Ctrl-C stops at once."""
    caught = Caught()
    with handled(STOPS, caught.receive):
        yield caught


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """End the block by an exception at :data:`ENDS`, so that it cleans up; another handler stays."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    with handled(ENDS, lambda signum, _: sys.exit(128 + signum)):
        yield


class Interrupted(Exception):  # noqa: N818  (not an error)
    """One of :data:`STOPS`, after the step was finished and saved; ``what`` says where."""

    def __init__(self, signum: int, what: str) -> None:
        super().__init__(f"{what}; the same command resumes from there")
        self.signum = signum

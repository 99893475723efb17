"""Blocks that handle SIGTERM, SIGHUP (the terminal was closed) and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

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
def caught_signals() -> Iterator[list[int]]:
    """Collect :data:`STOPS` in a list, so that the step can be finished. A second Ctrl-C stops at once."""
    received: list[int] = []

    def receive(signum: int, frame: FrameType | None) -> None:
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signum)

    with handled(STOPS, receive):
        yield received


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
        super().__init__(f"{what}; the same command goes on from there")
        self.signum = signum

"""SIGTERM and Ctrl-C while a step is being computed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C as a list that fills: finish the step first. A second Ctrl-C stops at once."""
    received: list[int] = []

    def receive(signum: int, frame: FrameType | None) -> None:
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signum)

    try:
        previous = {s: signal.signal(s, receive) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread (a notebook's worker, say): signals are not ours to handle
        previous = {}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

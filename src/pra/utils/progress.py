"""Progress bars on a terminal; lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

SECONDS = 30.0
"""Least time between two lines of a log."""


class Lines:
    """A file for tqdm's redrawn bars that passes on a line in :data:`SECONDS`, and the last line of each bar."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.encoding = getattr(file, "encoding", "utf-8")
        self.waiting = ""
        self.due = 0.0

    def write(self, text: str) -> None:
        """Take one redrawn bar, or the line feed that ends a bar."""
        bar = text.strip("\r\n ")
        if bar:
            self.waiting = bar
        if self.waiting and ("\n" in text or time.monotonic() >= self.due):
            self.file.write(f"{self.waiting}\n")
            self.waiting, self.due = "", time.monotonic() + SECONDS

    def flush(self) -> None:
        """Pass the lines on."""
        self.file.flush()


class Progress(tqdm):  # type: ignore[misc]
    """tqdm, on stderr: a bar on a terminal, elsewhere a line at most every 30 seconds and one at the end."""

    def __init__(self, *args: Any, **options: Any) -> None:
        if not sys.stderr.isatty():
            options = {"file": Lines(sys.stderr), "ncols": 0, "mininterval": 1.0, "position": 0} | options
        super().__init__(*args, **{"dynamic_ncols": "ncols" not in options} | options)

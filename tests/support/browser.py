"""The web demo in a real browser: for its tests and its screenshots."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """A Chromium of the system's; the one that Playwright would download is not needed."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def served(*runs: Path, temporary: Path | None = None) -> Iterator[str]:
    """``pra demo RUN [RUN2]`` in a process of its own: the page's address. ``temporary`` is for its temporary files."""
    port = free_port()
    command = [sys.executable, "-m", "pra", "demo", *map(str, runs), "--port", str(port), "--device", "cpu"]
    # Without its compiled step the sampler is slow enough to be watched, and stopped.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PRA_NATIVE": "0"} | (
        {"TMPDIR": str(temporary)} if temporary else {}
    )
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background a shell has it ignored
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            address = re.search(r"open (http://\S+)", line)
            if address:
                yield address[1]
                break
        else:
            raise AssertionError(f"the demo did not start: {''.join(said)}")
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser. The sandbox needs rights that a container does not give."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()

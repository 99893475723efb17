"""Time the way from nothing to the first pictures: an environment, the installation, and `pra sample` twice.

    python benchmarks/first_image.py              # packages come from pip's cache, where it has them
    python benchmarks/first_image.py --no-cache   # and download all of them

In a temporary folder, each in a process of its own: `python -m venv`; `pip install` of this checkout as a wheel, with
the versions of constraints.txt; the first `pra sample`, which finds no cache of an earlier one and compiles the
sampler's step where there is a C++ compiler; the second. Prints seconds; the last line is the same as JSON.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import tyro

from pra.errors import PraError
from pra.utils.provenance import environment

CHECKOUT = Path(__file__).parents[1]
AGAIN = "pra sample, again"
PROJECT = ("pyproject.toml", "README.md", "LICENSE", "src")

Command = tuple[str, Sequence[str | Path]]
"""A name, and the words."""


def main(no_cache: bool = False) -> None:
    """Measures and prints.

    Args:
        no_cache: Have pip download everything, and neither read nor fill its cache.
    """
    with tempfile.TemporaryDirectory(prefix="pra-first-") as name:
        folder = Path(name)
        seconds = timed(commands(copied(folder / "checkout"), folder, no_cache), folder)
    for step, took in seconds.items():
        print(f"{step:24} {took:6.1f} s")
    first = sum(seconds.values()) - seconds[AGAIN]
    print(f"{'to the first pictures':24} {first:6.1f} s")
    print(json.dumps({"seconds": seconds, "first": first, "no_cache": no_cache, "where": environment()}))


def copied(folder: Path) -> Path:
    """Copy what a wheel is built of: building leaves folders behind."""
    folder.mkdir()
    for name in PROJECT:
        if (CHECKOUT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(CHECKOUT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(CHECKOUT / name, folder)
    return folder


def commands(project: Path, folder: Path, no_cache: bool) -> list[Command]:
    """The commands that a newcomer types, in order."""
    venv, constraints = folder / "venv", CHECKOUT / "constraints.txt"
    options = ["--no-cache-dir"] if no_cache else []
    sample = ["env", f"XDG_CACHE_HOME={folder / 'cache'}", venv / "bin" / "pra", "sample"]  # pip keeps its own cache
    return [
        ("python -m venv", [sys.executable, "-m", "venv", venv]),
        ("pip install", [venv / "bin" / "python", "-m", "pip", "install", *options, "-c", constraints, project]),
        ("pra sample", sample),
        (AGAIN, sample),
    ]


def timed(steps: Sequence[Command], folder: Path) -> dict[str, float]:
    """Runs commands one after another, each in a new folder below; seconds by the clock.

    Raises:
        PraError: a command fails; the message has its last output.
    """
    seconds = {}
    for number, (name, words) in enumerate(steps):
        place = folder / f"step-{number}"
        place.mkdir()
        begin = time.perf_counter()
        done = subprocess.run(words, cwd=place, capture_output=True, text=True, check=False)
        seconds[name] = time.perf_counter() - begin
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]
            raise PraError(f"{name} ended with {done.returncode}: {said}")
    return seconds


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except PraError as error:
        print(f"first_image: error: {error}", file=sys.stderr)
        sys.exit(2)

"""A command in the test's own process, as its script calls it, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from pra import cli


class Answer(NamedTuple):
    """What a command printed, progress bars left out, and its exit code."""

    code: int
    out: str
    errors: list[str]


Pra = Callable[..., Answer]


def caller(capsys: pytest.CaptureFixture[str]) -> Pra:
    """``call("show", "tiny")``."""

    def call(*words: object) -> Answer:
        capsys.readouterr()
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stop:  # tyro's own
            code = stop.code if isinstance(stop.code, int) else 1
        out, error = capsys.readouterr()
        lines = [line.strip() for line in error.replace("\r", "\n").splitlines()]
        return Answer(code, out, [line for line in lines if line and not line.startswith(("train:", "sample:"))])

    return call

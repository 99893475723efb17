"""A command in the test's own process, called as its script calls it, and its answer."""

import contextlib
import functools
import io
import re
from typing import NamedTuple

from pra import cli
from pra.commands.program import parse_command


class Answer(NamedTuple):
    """The answer of a command: its output without progress bars, and its exit code."""

    code: int
    out: str
    errors: list[str]

    def is_refusal(self, *parts):
        """Whether the exit code is 2 and stderr is one line that holds all ``parts``."""
        assert (self.code, len(self.errors)) == (2, 1), self
        assert self.errors[0].startswith("pra: error: ")
        assert [part for part in parts if str(part) not in self.errors[0]] == [], self.errors[0]
        return True


def caller(capsys):
    """``call("show", "tiny")``."""

    def call(*words):
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        out, error = capsys.readouterr()
        lines = [line.strip() for line in error.replace("\r", "\n").splitlines()]
        return Answer(code, out, [line for line in lines if line and not line.startswith(("train:", "sample:"))])

    return call


@functools.cache
def options_of(command):
    """The options that the help of a command shows."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        parse_command("pra", command, ["--help"])
    return frozenset(re.findall(r"^. (--[a-z-]+)", said.getvalue(), re.MULTILINE))

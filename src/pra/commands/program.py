"""Run a command line: parse it with tyro, and turn bad input and interruptions into one line on stderr."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from tyro.conf import FlagCreatePairsOff

from pra.errors import PraError, one_line
from pra.utils.progress import Progress
from pra.utils.signals import Interrupted

VERBOSE = {"-v", "--verbose"}

ROW = re.compile(r"^[│ ] (.*?) *│?$", re.M)
"""A row of tyro's box for errors, whose border is blank where stdout is not UTF-8."""
HELP_OF_AN_OPTION = " " * 8
"""Indentation in that box."""


def run_program(
    program: str, parse: Callable[[list[str]], Callable[[], object]], argv: Sequence[str] | None = None
) -> int:
    """Run a command line, by default this process's, and return its exit code.

    The code is 0, 2 for bad input, and 128 + signal when interrupted or when nobody reads the output any more.
    ``parse`` checks the arguments without ``-v``, and returns the work.
    """
    warnings.showwarning = _warn  # type: ignore[assignment]
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that the terminal's encoding does not have
        sys.stdout.reconfigure(errors="backslashreplace")
    if os.environ.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"  # tyro asks this variable alone
    args = _without_verbose(list(sys.argv[1:] if argv is None else argv))
    try:
        code = _run(program, parse, args)
        print(end="", flush=True)  # sys.stdout.flush() fails without a stdout (>&-)
    except OSError as error:
        if (reason := _closed_output()) is None:
            raise
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        return _refuse(f"stdout cannot be written ({reason}). Redirect it")
    return code


def _run(program: str, parse: Callable[[list[str]], Callable[[], object]], args: list[str]) -> int:
    try:
        work = parse(args)
    except SystemExit:  # --help
        return 0
    except PraError as error:
        # Every rank parses the same command line, so only rank 0 reports errors.
        return _refuse(error) if is_rank_0() else 2
    try:
        work()
    except PraError as error:
        return _refuse(error)
    except PermissionError as error:
        return _refuse(f"{error.filename} cannot be accessed ({error.strerror})")
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return _refuse(f"{one_line(error.filename, 60)}: the name is too long. Use a shorter one")
    except Interrupted as stop:
        if is_rank_0():
            print(f"pra: {one_line(stop)}: {program} {shlex.join(args)}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("pra: interrupted", file=sys.stderr)
        return 130
    return 0


def parse_command(program: str, command: Callable[..., None], words: Sequence[str]) -> Callable[[], object]:
    """Parse words into a call of ``command``: its keywords are the options, and its docstring is the help.

    Raises:
        PraError: words that the command does not take, as tyro explains them.
        SystemExit: the help was asked for and is printed.
    """

    @functools.wraps(command)
    def later(*arguments: Any, **options: Any) -> Callable[[], object]:
        return functools.partial(command, *arguments, **options)

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(later, prog=program, args=words, config=(FlagCreatePairsOff,), console_outputs=is_rank_0())
    except SystemExit as end:
        if not end.code:
            raise
    problem = f"{program}: {_in_one_line(said.getvalue())}".replace(f": missing from {program}:", " needs")
    raise PraError(f"{problem}; see `{program} --help`")


def _in_one_line(box: str) -> str:
    """Return tyro's error without its border, the help of options and the hint at --help."""
    parts = [""]
    for row in ROW.findall(box):
        if row.startswith(("Argument helptext:", "For full helptext")):
            break
        if not row.strip("─-"):
            parts.append("")
        elif not row.startswith(HELP_OF_AN_OPTION):
            parts[-1] += " " + row.strip()
    text = "; ".join(part[1:2].lower() + part[2:] for part in parts if part)
    text = text.replace("invalid literal for int() with base 10:", "expected a whole number, not")
    return text.replace("could not convert string to float:", "expected a number, not").rstrip(".")


def is_rank_0() -> bool:
    """Return whether this process is rank 0 under torchrun, or was started without torchrun."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def _without_verbose(args: list[str]) -> list[str]:
    """Return the words without ``-v`` and ``--verbose``, which turn the package's loggers on."""
    logger = logging.getLogger("pra")
    if not VERBOSE & set(args):
        logger.setLevel(logging.WARNING)
        return args
    logging.basicConfig(format="pra: %(message)s", stream=sys.stderr, force=True)
    logger.setLevel(logging.INFO)
    return [word for word in args if word not in VERBOSE]


def _closed_output() -> str | None:
    """Return why stdout takes no more, as after ``pra show | head -1`` or on a full disk; if so, discard the rest.

    Python would write its buffer again at its exit, and report the failure.
    """
    try:
        print(flush=True)
    except OSError as error:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return error.strerror
    return None


def _refuse(reason: object) -> int:
    print(f"pra: error: {one_line(reason)}", file=sys.stderr)
    return 2


def _warn(message: Warning | str, *_: Any) -> None:
    Progress.write(f"pra: warning: {one_line(message)}", file=sys.stderr)

"""The one exception for mistakes a person can correct."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal

Code = Literal[
    "invalid",  # a value of the wrong type, format or range
    "unknown",  # a name that is not among the known ones
    "conflict",  # two settings, options or runs that exclude each other
    "mismatch",  # two things that must agree and differ: shapes, classes, configurations
    "missing",  # a file, folder or option that is needed
    "exists",  # an output that would be overwritten
    "unreadable",  # a file that is damaged or of another format
    "unwritable",  # a disk or folder that refuses
    "unsupported",  # a feature that this model, device or file does not have
    "too-large",  # more than memory or a limit allows
    "not-installed",  # an optional package
    "unreachable",  # a server or network
    "busy",  # another process works there
    "lost",  # another process of this command has ended
    "diverged",  # numbers that are not finite
]


MOST_NAMED = 50
"""Known names that an error lists."""


class PraError(ValueError):
    """Bad input, explained in one line: the value, the place and the fix.

    The command line prints the message and exits with code 2, without a traceback. Broken invariants
    inside the library are ``AssertionError``\\ s instead, and show their traceback.

    Attributes:
        code: the kind of mistake, one of :data:`Code`.
        fields: what the message is about, by name, such as ``path`` or ``value``.
    """

    def __init__(self, message: object = "", code: Code = "invalid", **fields: object) -> None:
        super().__init__(message)
        self.code = code
        self.fields = fields


class NotFiniteError(PraError):
    """Images that are not finite: the settings are to blame, not the command."""


def reason_of(error: object) -> str:
    """Shorten another library's error to part of a line of at most 300 characters; by default to its class."""
    error = (isinstance(error, OSError) and error.strerror) or error
    return " ".join(str(error).split())[:300].rstrip(". ") or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'digits'? Known: digits, fashion"``, to be appended to an error about ``name``."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    more = f", ... ({len(options):,} in all)" if len(options) > MOST_NAMED else ""
    return f"{hint} Known: {', '.join(options[:MOST_NAMED])}{more}"


def one_line(text: object, longest: int = 2_000) -> str:
    """Return a text for a terminal: in one line, escaped and shortened. A stranger's names may hold anything."""
    line = escaped(" ".join(str(text)[: 2 * longest].split()))
    return line if len(line) <= longest else f"{line[:longest]} ..."


def counted(count: int, noun: str) -> str:
    """Return ``"1 image"`` or ``"2 images"``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def escaped(text: object) -> str:
    """Return a text with unprintable characters and line breaks escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))

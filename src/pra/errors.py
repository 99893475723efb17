"""The one exception for mistakes a person can correct."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PraError(ValueError):
    """Bad input, explained in one line that names the value, the place and the way out.

    The command line prints the message and exits with code 2, without a traceback. Broken invariants
    inside the library are ``AssertionError``\\ s instead, and do show where they happened.
    """


class NotFiniteError(PraError):
    """Images that hold infinite numbers or none at all: of these settings, not of the command."""


def reason_of(error: object) -> str:
    """What another library's error says, as part of a line: 300 characters at most; its name where it says nothing."""
    return " ".join(str(error).split())[:300].rstrip(". ") or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'digits'? Known: digits, fashion"``, to be appended to an error about ``name``."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Known: {', '.join(options)}"

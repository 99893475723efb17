"""Checks that bad input is refused in the right way."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pra import PraError


def refused(do: Callable[[], object], *parts: str, code: str | None = None, **fields: object) -> PraError:
    """Check that ``do`` raises a PraError of ``code`` with these ``fields``, and return it.

    The message must be one line that holds every field's value, and all ``parts``.
    """
    with pytest.raises(PraError) as raised:
        do()
    error, message = raised.value, str(raised.value)
    assert "\n" not in message
    assert code in (None, error.code), message
    for name, value in fields.items():
        assert str(error.fields.get(name)) == str(value), message
        assert str(value) in message
    for part in parts:
        assert part in message
    return error

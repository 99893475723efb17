"""Checks that bad input is refused correctly."""

import pytest

from pra import PraError


def refused(do, *parts, code=None, **fields):
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

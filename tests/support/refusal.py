"""How every bad input must be refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pra import PraError


def refused(do: Callable[[], object], *parts: str) -> None:
    """``do`` raises a PraError whose message is one line that holds all ``parts``."""
    with pytest.raises(PraError) as raised:
        do()
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message

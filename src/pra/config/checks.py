"""What settings check of themselves."""

from __future__ import annotations

import math
from typing import Any

from pra.errors import PraError


def positive(config: Any, *names: str) -> None:
    """Whether each of these is positive and finite.

    Raises:
        PraError: one is not.
    """
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise PraError(f"{name} must be positive and finite, got {getattr(config, name)}")


def between(config: Any, name: str, low: float, high: float) -> None:
    """Whether a value lies between two others, or is one of them.

    Raises:
        PraError: it does not.
    """
    if not low <= getattr(config, name) <= high:
        raise PraError(f"{name} must lie in [{low:g}, {high:g}], got {getattr(config, name)}")

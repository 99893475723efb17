"""What settings check of themselves."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import typing
from typing import Any, TypeVar

from pra.errors import PraError, nearest

E = TypeVar("E", bound=enum.Enum)


def coerce(config: Any) -> None:
    """Puts into a new settings object, frozen as it is, members of enums for their values and tuples for lists.

    Left as they come they would mean something else without a word: no string is the member of its name, and no list
    equals a tuple.

    Raises:
        PraError: no member has that value; the nearest is given.
    """
    for name, kind in _enums(config.__class__).items():
        object.__setattr__(config, name, member(kind, getattr(config, name), name))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list):
            object.__setattr__(config, field.name, tuple(value))


def member(kind: type[E], value: Any, where: str) -> E:
    """A member of an enum, as itself or by its value.

    Raises:
        PraError: none has that value; the nearest is given.
    """
    if isinstance(value, kind):
        return value
    members = {str(known.value): known for known in kind}
    if not isinstance(value, str) or value not in members:
        raise PraError(f"{where}: {value!r} is unknown{nearest(str(value), members)}")
    return members[value]


@functools.cache
def _enums(config: type) -> dict[str, type[enum.Enum]]:
    """The fields of a class of settings that are enums."""
    kinds = typing.get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config)]
    return {name: kinds[name] for name in names if isinstance(kinds[name], enum.EnumType)}


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

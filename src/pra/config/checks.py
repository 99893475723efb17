"""What settings check of themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import math
import numbers
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from pra.errors import PraError, nearest

E = TypeVar("E", bound=enum.Enum)

NUMBERS: dict[type, type] = {int: numbers.Integral, float: numbers.Real}
"""What does for one: numpy's numbers too, and an integer for a float."""


def coerce(config: Any) -> None:
    """Puts into a new settings object, frozen as it is, what :func:`fit` makes of its values.

    Left as they come they would mean something else without a word (no string is the member of its name, and no list
    equals a tuple), or fail where nobody looks for them.

    Raises:
        PraError: a value is of another type than its field, or no member has it.
    """
    for name, kind in field_types(config.__class__).items():
        object.__setattr__(config, name, fit(kind, getattr(config, name), name))


@functools.cache
def field_types(config: type) -> dict[str, Any]:
    """The fields of a class of settings, and what they are annotated with."""
    every = typing.get_type_hints(config)
    return {field.name: every[field.name] for field in dataclasses.fields(config)}


def alternatives(kind: Any) -> list[Any]:
    """The types of a union, without None; of another type itself."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return [one for one in typing.get_args(kind) if one is not type(None)] if union else [kind]


def fit(kind: Any, value: Any, where: str) -> Any:
    """A value as one of the type that a setting is annotated with: ``int``, ``tuple[float, ...] | None``, an enum, ...

    Integers do for floats, lists for tuples, one string for a list of strings, values for members of enums, and numpy's
    numbers for Python's. A string is no number, and a number no boolean.

    Raises:
        PraError: it is none, and no member has it; ``where`` names the setting.
    """
    kinds = alternatives(kind)
    if value is None and type(None) in typing.get_args(kind):
        return None
    if any(dataclasses.is_dataclass(one) for one in kinds):
        if not isinstance(value, tuple(kinds)):
            raise _unfit(" or ".join(one.__name__ for one in kinds), value, where)
        return value
    if len(kinds) > 1:
        return _either(kinds, value, where)
    (one,) = kinds
    if typing.get_origin(one) is tuple:
        return _tuple(typing.get_args(one), value, where)
    return member(one, value, where) if issubclass(one, enum.Enum) else _leaf(one, value, where)


def _either(kinds: list[Any], value: Any, where: str) -> Any:
    """The value as one of the first of several plain types that it fits."""
    for kind in kinds:
        with contextlib.suppress(PraError):
            return fit(kind, value, where)
    raise _unfit(" or ".join(kind.__name__ for kind in kinds), value, where)


def _tuple(items: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    several = items[-1] is Ellipsis
    if isinstance(value, str) and items == (str, ...):
        value = [value]
    if isinstance(value, list | tuple):
        items = items[:1] * len(value) if several else items
    if not isinstance(value, list | tuple) or len(value) != len(items):
        raise _unfit("a list" if several else f"{len(items)} values", value, where)
    return tuple(fit(item, one, where) for item, one in zip(items, value, strict=True))


def _leaf(kind: type, value: Any, where: str) -> Any:
    # To Python a boolean is an integer.
    if isinstance(value, bool) == (kind is bool) and isinstance(value, NUMBERS.get(kind, kind)):
        with contextlib.suppress(OverflowError):  # an integer beyond any float
            return kind(value)
    raise _unfit(kind.__name__, value, where)


def _unfit(expected: str, value: Any, where: str) -> PraError:
    given = " ".join(repr(value).split())
    return PraError(f"{where}: expected {expected}, got {given if len(given) <= 80 else f'{given[:80]}...'}")


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


def nearest_multiple(value: int, unit: int) -> int:
    """For ways out of an error: the multiple of ``unit``, at least one of it, that is nearest to ``value``."""
    return max(1, (2 * value + unit - 1) // (2 * unit)) * unit


def nearest_of(known: Iterable[int], value: int) -> int | None:
    """For ways out of an error: the nearest to ``value``, None where there is none to choose from."""
    return min(known, key=lambda one: (abs(one - value), one), default=None)


def divisors(number: int) -> set[int]:
    """Of a positive number."""
    low = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return {*low, *(number // one for one in low)}

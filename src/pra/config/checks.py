"""Checks that settings make of themselves: the type and the range of every field."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pra.errors import Code, PraError, nearest

E = TypeVar("E", bound=enum.Enum)

NUMBERS: dict[type, type] = {int: numbers.Integral, float: numbers.Real}
"""Accepted types: NumPy scalars count as numbers, and integers as floats."""


MOST_VALUES = 100_000
"""Values of a list: a damaged file may hold any number."""


class Settings:
    """Base of all settings: a new object converts and checks its fields by their annotations (:func:`fit`)."""

    def __post_init__(self) -> None:
        config: Any = type(self)
        for name, kind in field_types(config).items():
            object.__setattr__(self, name, fit(kind, getattr(self, name), name))


def positive(value: float, where: str) -> None:
    """Check that a value is positive and finite."""
    if not 0 < value < math.inf:
        raise _outside("be positive and finite", value, where)


def within(low: float, high: float = math.inf, below: bool = False) -> Callable[[float, str], None]:
    """Return a check that a value lies in ``[low, high]``; with ``below``, in ``[low, high)``."""

    def check(value: float, where: str) -> None:
        if not low <= value <= high or (below and value == high):
            raise _outside(f"lie in [{low:g}, {high:g}{')' if below else ']'}", value, where)

    return check


def wrong(name: str, value: object, problem: str, code: Code = "conflict") -> PraError:
    """Return the error of a setting. ``problem`` continues its name and value, such as "is below 3. Use 3"."""
    return PraError(f"{name} {value} {problem}", code=code, name=name, value=value)


def _outside(expected: str, value: float, where: str) -> PraError:
    return PraError(f"{where} must {expected}, got {value}", name=where.rpartition(".")[2], value=value)


PositiveInt = Annotated[int, positive]
PositiveFloat = Annotated[float, positive]
NaturalInt = Annotated[int, within(0)]
NaturalFloat = Annotated[float, within(0)]
Share = Annotated[float, within(0, 1)]
Decay = Annotated[float, within(0, 1, below=True)]


@functools.cache
def field_types(config: Any) -> dict[str, Any]:
    """Return the annotations of a settings class by field."""
    every = typing.get_type_hints(config, include_extras=True)
    return {field.name: every[field.name] for field in dataclasses.fields(config)}


def alternatives(kind: Any) -> list[Any]:
    """Return the types of a union, without None; of another type itself."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return [one for one in typing.get_args(kind) if one is not type(None)] if union else [kind]


def fit(kind: Any, value: Any, where: str) -> Any:
    """Convert a value to the annotation of a setting: ``int``, ``tuple[float, ...] | None``, an enum, ...

    Accepts integers for floats, lists for tuples, one string for a list of strings, the values of enum members, and
    NumPy scalars. Strings are not numbers, and numbers are not booleans. Functions in ``Annotated`` check the range.

    Raises:
        PraError: the value has another type, is out of range, or is not a member. ``where`` names the setting.
    """
    if typing.get_origin(kind) is Annotated:
        kind, *checks = typing.get_args(kind)
        value = fit(kind, value, where)
        for check in checks:
            check(value, where)
        return value
    if value is None and type(None) in typing.get_args(kind):
        return None
    kinds = alternatives(kind)
    if len(kinds) > 1:
        for one in kinds:
            with contextlib.suppress(PraError):
                return fit(one, value, where)
        raise _unfit(" or ".join(one.__name__ for one in kinds), value, where)
    (one,) = kinds
    if one is not kind:
        return fit(one, value, where)
    if typing.get_origin(one) is tuple:
        return _tuple(typing.get_args(one), value, where)
    return member(one, value, where) if issubclass(one, enum.Enum) else _leaf(one, value, where)


def _tuple(items: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    several = items[-1] is Ellipsis
    if isinstance(value, str) and items == (str, ...):
        value = [value]
    if isinstance(value, list | tuple):
        items = items[:1] * len(value) if several else items
    if not isinstance(value, list | tuple) or len(value) != len(items):
        raise _unfit("a list" if several else f"{len(items)} values", value, where)
    if len(value) > MOST_VALUES:
        raise _unfit(f"at most {MOST_VALUES:,} values", value, where)
    return tuple(fit(item, one, where) for item, one in zip(items, value, strict=True))


def _leaf(kind: type, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(value, kind):
        return value
    # To Python a boolean is an integer.
    if isinstance(value, bool) == (kind is bool) and isinstance(value, NUMBERS.get(kind, kind)):
        with contextlib.suppress(OverflowError):  # an integer beyond any float
            return kind(value)
    raise _unfit(kind.__name__, value, where)


def _unfit(expected: str, value: Any, where: str) -> PraError:
    given = " ".join(repr(value).split())
    given = given if len(given) <= 80 else f"{given[:80]}..."
    return PraError(f"{where}: expected {expected}, got {given}", name=where, value=given)


def member(kind: type[E], value: Any, where: str) -> E:
    """Return a member of an enum, given as itself or by its value. Refuse other values, and name the nearest."""
    if isinstance(value, kind):
        return value
    members = {str(known.value): known for known in kind}
    if not isinstance(value, str) or value not in members:
        message = f"{where}: {value!r} is unknown{nearest(str(value), members)}"
        raise PraError(message, code="unknown", name=where, value=value)
    return members[value]


def nearest_multiple(value: int, unit: int) -> int:
    """Return the positive multiple of ``unit`` that is nearest to ``value``."""
    return max(1, (2 * value + unit - 1) // (2 * unit)) * unit

"""Named functions that users add to the package's own, by a call or by a Python entry point."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Collection
from typing import Generic, TypeVar

from pra.errors import PraError, reason_of

T = TypeVar("T")


class Registry(Generic[T]):
    """Users' functions by name: registered in this process, or entry points of installed packages.

    ``what`` is the kind for messages, such as "data source"; ``group`` that of the entry points, such as "pra.sources";
    ``built_in`` are the package's own names, which cannot be replaced.
    """

    def __init__(self, what: str, group: str, built_in: Collection[str]) -> None:
        self.what, self.group, self.built_in = what, group, built_in
        self.registered: dict[str, T] = {}

    def add(self, name: str, function: T) -> None:
        """Register or replace a function. Refuse a built-in or malformed name, and an object that is not callable."""
        subject = f"{self.what} {name!r}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise PraError(f"{subject}: the name is malformed. Use letters, digits, _, . and -", name=name)
        if name in self.built_in:
            raise PraError(f"{subject} is built in. Choose another name", code="conflict", name=name)
        if not callable(function):
            raise PraError(f"{subject}: {function!r} is not callable. Register a function", name=name)
        self.registered[name] = function

    def names(self) -> list[str]:
        """Return every known name, sorted; no entry point is loaded."""
        return sorted({*self.built_in, *self.registered, *_entry_points(self.group)})

    def added(self, name: str) -> T | None:
        """Return a user's function, if there is one of that name. Refuse an entry point that cannot be loaded."""
        if name not in {*self.built_in, *self.registered} and name in _entry_points(self.group):
            point = _entry_points(self.group)[name]
            try:
                self.add(name, point.load())
            except Exception as error:  # whatever the other package raises at its import
                problem = f"entry point {point.value!r} cannot be loaded ({reason_of(error)})"
                raise PraError(f"{self.what} {name!r}: {problem}. Repair or remove that package") from error
        return self.registered.get(name)


@functools.cache
def _entry_points(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=group)}

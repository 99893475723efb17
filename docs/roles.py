"""Docstrings name code as ``:func:`name` ``; on the site such a name is a link, where the reference has that name.

A Griffe extension, for mkdocstrings.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|data|attr|mod):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Called by Griffe."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """A package is loaded."""
        rewrite(pkg)


def rewrite(thing: griffe.Object) -> None:
    """The docstrings of a module, class or function, and of all in it."""
    if thing.docstring:
        thing.docstring.value = ROLE.sub(lambda match: link(thing, match[1]), thing.docstring.value)
    for member in thing.members.values():
        if not member.is_alias:
            rewrite(member)  # type: ignore[arg-type]


def link(thing: griffe.Object, name: str) -> str:
    """Return what ``name`` means where ``thing`` is; a name without a page stays a name."""
    try:
        path = thing.resolve(name)
    except griffe.NameResolutionError:
        path = name
    # A package's name for what one of its modules has: the page is that module's.
    with contextlib.suppress(KeyError, griffe.AliasResolutionError):
        path = thing.modules_collection[path].canonical_path
    return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'

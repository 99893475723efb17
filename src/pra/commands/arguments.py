"""What a command was given, looked at before tyro does: it answers a slip with a page, where a line is enough."""

from __future__ import annotations

import dataclasses
import inspect
import string
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pra.errors import PraError, nearest

HELP = ("-h", "--help")
NUMBERS = {int: "a whole number", float: "a number"}


def join_command(commands: Mapping[str, Callable[..., None]], args: Sequence[str]) -> list[str]:
    """``["data", "pack", ...]`` to ``["data pack", ...]``, where that is a command: its name is then one word.

    Raises:
        PraError: the first word begins the names of commands, and the second ends none of them.
    """
    seconds = [name.partition(" ")[2] for name in commands if args and name.startswith(f"{args[0]} ")]
    if not seconds:
        return list(args)
    if args[1:2] and args[1] in seconds:
        return [f"{args[0]} {args[1]}", *args[2:]]
    if args[1:2] and args[1] in HELP:
        return list(args[1:])
    if args[1:2]:
        raise PraError(f"no command '{args[0]} {args[1]}'{nearest(args[1], seconds)}")
    raise PraError(f"which `pra {args[0]}`? Known: {', '.join(seconds)}; see `pra {args[0]} {seconds[0]} --help`")


def check_arguments(commands: Mapping[str, Callable[..., None]], args: Sequence[str]) -> None:
    """Looks at names, at numbers and at what is missing or too much.

    Args:
        commands: functions by name; positional parameters are arguments, keywords are options.
        args: the command line, without the program's name.

    Raises:
        PraError: whatever is wrong first.
    """
    if not args:
        raise PraError(f"which command? Known: {', '.join(commands)}; see `pra --help`")
    name, words = args[0], args[1:]
    if name.startswith("-"):
        return
    if name not in commands:
        raise PraError(f"no command {name!r}{nearest(name, commands)}")
    check_words(f"pra {name}", commands[name], words)


def check_words(program: str, command: Callable[..., None], words: Sequence[str]) -> None:
    """Check the words of one command, as :func:`check_arguments` does.

    Args:
        program: what people type before the words, such as ``pra train``.
        command: the function.
        words: its arguments and options.

    Raises:
        PraError: the first wrong, missing or superfluous word.
    """
    options = options_of(command)
    for word in filter(_is_option, words):
        name = _name(word)
        if name not in (*options, *HELP):
            raise PraError(f"{program} has no option {name!r}{nearest(name, options)}")
    if not set(HELP) & set(words):
        values, free = _sorted_out(words, options, program)
        _check_values(values, options, program)
        _check_free(free, command, program)
        missing = [name for name, option in options.items() if option.required and name not in dict(values)]
        if missing:
            raise PraError(f"{program} needs {missing[0]}; see `{program} --help`")


@dataclasses.dataclass(frozen=True)
class Option:
    """A keyword of a command: its type without ``None``, and whether it must be given."""

    kind: Any
    required: bool


def options_of(command: Callable[..., None]) -> dict[str, Option]:
    """``--run-dir`` and the like: a command's keywords, and the fields of those that are dataclasses."""
    options: dict[str, Option] = {}
    hints = typing.get_type_hints(command)
    for parameter in inspect.signature(command).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        kind = hints[parameter.name]
        if dataclasses.is_dataclass(kind):
            for name, hint in typing.get_type_hints(kind).items():
                options[_spelled(name)] = Option(_bare(hint), False)
        else:
            options[_spelled(parameter.name)] = Option(_bare(kind), parameter.default is parameter.empty)
    return options


def _spelled(name: str) -> str:
    """A name that Python keeps for itself ends in an underscore: ``from_`` is ``--from``."""
    return "--set" if name == "settings" else "--" + name.rstrip("_").replace("_", "-")


def _bare(hint: Any) -> Any:
    """``int`` of ``int | None``."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0] if type(None) in typing.get_args(hint) else hint


def _is_option(word: str) -> bool:
    """Negative numbers are none."""
    return word.startswith("-") and word[1:2] in ("-", *string.ascii_letters)


def _name(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")


def _sorted_out(
    words: Sequence[str], options: Mapping[str, Option], program: str
) -> tuple[list[tuple[str, str]], list[str]]:
    """Options with their values, flags with an empty one, and the words that belong to none."""
    values, free = [], []
    rest = iter(words)
    for word in rest:
        if not _is_option(word):
            free.append(word)
        elif options[_name(word)].kind is bool or "=" in word:
            values.append((_name(word), word.partition("=")[2]))
        else:
            value = next(rest, None)
            if value is None or _is_option(value):
                raise PraError(f"{program} {_name(word)} needs a value; see `{program} --help`")
            values.append((_name(word), value))
    return values, free


def _check_values(values: Sequence[tuple[str, str]], options: Mapping[str, Option], program: str) -> None:
    for name, value in values:
        kind = options[name].kind
        if kind in NUMBERS:
            try:
                kind(value)
            except ValueError:
                raise PraError(
                    f"{program} {name} needs {NUMBERS[kind]}, not {value!r}; see `{program} --help`"
                ) from None


def _check_free(words: Sequence[str], command: Callable[..., None], program: str) -> None:
    """Words against positional parameters; a tuple takes all that are left."""
    types, hints = typing.get_type_hints(command), typing.get_type_hints(command, include_extras=True)
    places = [p for p in inspect.signature(command).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    many = any(typing.get_origin(types[place.name]) is tuple for place in places)
    called = [_metavar(hints[place.name], place.name) for place in places]
    needed = [place for place in places if place.default is place.empty]
    if len(words) < len(needed) - many:
        raise PraError(f"{program} needs {called[len(words)]}; see `{program} --help`")
    if len(words) > len(places) and not many:
        raise PraError(f"{program} takes {' '.join(called)} and no {words[len(places)]!r}; see `{program} --help`")


def _metavar(hint: Any, name: str) -> str:
    """What the help calls an argument: tyro keeps that beside the type."""
    metavars = [getattr(note, "metavar", None) for note in typing.get_args(hint)[1:]]
    return next((metavar for metavar in metavars if metavar), name.upper())

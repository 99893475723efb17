"""Configurations as JSON values, and changes to them."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar, Union

from pra.config.checks import member
from pra.config.model import AnyModelConfig, JiTConfig
from pra.config.rollout import Rollout
from pra.errors import PraError, nearest

T = TypeVar("T")

TAGGED = (*typing.get_args(Rollout), JiTConfig)
"""Classes that JSON names as "type". Of several possible ones a single one may do without: it is what no type means."""


def to_dict(config: Any) -> Any:
    """Plain JSON values. A dataclass that is one of several possible (a rollout, JiT) carries its class as "type"."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        tag = {"type": type(config).__name__} if isinstance(config, TAGGED) else {}
        return tag | fields
    if isinstance(config, enum.Enum):
        return config.value
    if isinstance(config, tuple):
        return [to_dict(item) for item in config]
    return config


def from_dict(cls: type[T], values: Any, where: str = "config") -> T:
    """Inverse of :func:`to_dict`; absent keys take their defaults.

    Raises:
        PraError: an unknown key (the nearest name is given), a missing one, or a value of the wrong type.
    """
    return typing.cast(T, _read(cls, values, where))


def model_from_dict(values: Any, where: str) -> AnyModelConfig:
    """:func:`from_dict` for a model of either kind.

    Raises:
        PraError: as :func:`from_dict`.
    """
    return typing.cast(AnyModelConfig, _read(AnyModelConfig, values, where))


def override(config: T, path: str, text: str) -> T:
    """``override(run, "train.optimizer.lr", "1e-3")``: a copy with one field replaced.

    ``text`` is read as JSON, and as a plain string where it is none.

    Raises:
        PraError: no such field (the nearest name is given), or a value of the wrong type or range.
    """
    values = to_dict(config)
    here, *parents = values, *path.split(".")[:-1]
    for name in parents:
        if not isinstance(here, dict) or name not in here:
            raise PraError(f"no setting {path!r}: {name!r} is unknown{nearest(name, _keys(here))}")
        here = here[name]
    last = path.split(".")[-1]
    if not isinstance(here, dict) or last not in here:
        raise PraError(f"no setting {path!r}: {last!r} is unknown{nearest(last, _keys(here))}")
    try:
        here[last] = json.loads(text)
    except json.JSONDecodeError:
        here[last] = text
    return from_dict(type(config), values, "setting")


def apply_settings(config: T, settings: Iterable[str]) -> T:
    """``apply_settings(run, ["train.optimizer.lr=1e-3"])``: :func:`override` by lines, as ``--set`` takes them.

    Raises:
        PraError: as :func:`override`, or a line without ``=``.
    """
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals:
            raise PraError(f"--set {setting!r} needs the form KEY=VALUE, such as sampling.guidance=2")
        config = override(config, path, value)
    return config


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """``["train.batch_size: 64 in the run, 128 asked for"]``: where two ``to_dict`` values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        prefix = f"{path}." if path else ""
        return [line for k in keys for line in differences(old.get(k), new.get(k), prefix + k)]
    return [] if old == new else [f"{path}: {json.dumps(old)} in the run, {json.dumps(new)} asked for"]


def _read(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return _read_union(typing.get_args(kind), value, where)
    if origin is tuple:
        items = typing.get_args(kind)
        if items[-1] is Ellipsis and isinstance(value, list | tuple):
            items = items[:1] * len(value)
        if not isinstance(value, list | tuple) or len(value) != len(items):
            raise PraError(f"{where}: expected {len(items)} values, got {value!r}")
        return tuple(_read(item, v, where) for item, v in zip(items, value, strict=True))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return member(kind, value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise PraError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def _read_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    named = {kind.__name__: kind for kind in kinds if kind is not type(None)}
    if len(named) == 1:
        return _read(next(iter(named.values())), value, where)
    if isinstance(value, str):  # a bare name: the defaults of that class
        value = {"type": value}
    untagged = [kind for kind in named.values() if kind not in TAGGED]
    if len(untagged) == 1 and not (isinstance(value, dict) and "type" in value):
        return _read(untagged[0], value, where)
    if not isinstance(value, dict) or value.get("type") not in named:
        got = value.get("type") if isinstance(value, dict) else value
        raise PraError(f"{where}: {got!r} is unknown{nearest(str(got), named)}")
    fields = {k: v for k, v in value.items() if k != "type"}
    return _read(named[value["type"]], fields, where)


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise PraError(f"{where}: expected the fields of {kind.__name__}, got {value!r}")
    every = typing.get_type_hints(kind)
    hints = {f.name: every[f.name] for f in dataclasses.fields(kind)}
    for key in value:
        if key not in hints:
            raise PraError(f"{where}.{key} is unknown{nearest(key, hints)}")
    fields = {key: _read(hints[key], v, f"{where}.{key}") for key, v in value.items()}
    needed = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in needed if name not in fields]
    if missing:
        raise PraError(f"{where}: {', '.join(missing)} missing")
    try:
        return kind(**fields)
    except PraError as error:
        raise PraError(f"{where}: {error}") from None


def _keys(values: Any) -> list[str]:
    return list(values) if isinstance(values, dict) else []

"""Configurations as JSON values, and changes to them."""

from __future__ import annotations

import dataclasses
import enum
import json
import typing
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pra.config.checks import alternatives, field_types, fit
from pra.config.model import AnyModelConfig, JiTConfig
from pra.config.training import MatrixOptimizer, Rollout
from pra.errors import PraError, nearest

T = TypeVar("T")

TAGGED = (*alternatives(Rollout), JiTConfig, *alternatives(MatrixOptimizer))
"""Classes that JSON names as "type". JSON without a type means the class that is not listed here."""


def to_dict(config: Any) -> Any:
    """Convert to plain JSON values. Where several classes are possible (a rollout, JiT), "type" names the class."""
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
        PraError: an unknown key (the nearest name is given), a missing one, or a value of the wrong type or range.
    """
    return typing.cast(T, _read(cls, values, where, _object))


def model_from_dict(values: Any, where: str) -> AnyModelConfig:
    """:func:`from_dict` for a model of either kind."""
    return from_dict(typing.cast(type[AnyModelConfig], AnyModelConfig), values, where)


def override(config: T, path: str, text: str) -> T:
    """``override(run, "train.optimizer.lr", "1e-3")``: :func:`apply_settings` of one line."""
    return apply_settings(config, [f"{path}={text}"])


def apply_settings(config: T, settings: Iterable[str]) -> T:
    """``apply_settings(run, ["train.optimizer.lr=1e-3"])``: return a copy, changed by lines as ``--set`` takes them.

    Settings that must fit together are checked when all lines are read.

    Raises:
        PraError: no such field (the nearest name is given), a value of the wrong type or range, a line without ``=``.
    """
    kind, values = type(config), to_dict(config)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            problem = "needs the form KEY=VALUE, such as sampling.guidance=2"
            raise PraError(f"--set {setting!r} {problem}", option="--set", value=setting)
        _write(values, path, text)
        values = _read(kind, values, "setting", _values)  # a later line may change a default of this one
    return from_dict(kind, values, "setting")


def _write(values: Any, path: str, text: str) -> None:
    *parents, last = path.split(".")
    here = values
    for name in (*parents, last):
        known = list(here) if isinstance(here, dict) else []
        if name not in known:
            problem = f"no setting {path!r}: {name!r} is unknown{nearest(name, known)}"
            raise PraError(problem, code="unknown", path=path, name=name)
        parent, here = here, here[name]
    parent[last] = parse_value(text)


def parse_value(text: str) -> Any:
    """Read the value of ``--set KEY=VALUE``: JSON, or else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def differences(old: Any, new: Any, path: str = "", where: str = "in the run") -> list[str]:
    """``["train.batch_size: 64 in the run, 128 asked for"]``: where two ``to_dict`` values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        prefix = f"{path}." if path else ""
        return [line for k in keys for line in differences(old.get(k), new.get(k), prefix + k, where)]
    return [] if old == new else [f"{path}: {json.dumps(old)} {where}, {json.dumps(new)} asked for"]


def _read(kind: Any, value: Any, where: str, make: Callable[[Any, dict[str, Any], str], Any]) -> Any:
    """Read JSON values of a type, with every default; ``make`` builds the result of a class and its fields."""
    if value is None and type(None) in typing.get_args(kind):
        return None
    named = [one for one in alternatives(kind) if isinstance(one, type) and dataclasses.is_dataclass(one)]
    classes = {one.__name__: one for one in named}
    if not classes:
        return fit(kind, value, where)
    if isinstance(value, str) and any(one in TAGGED for one in classes.values()):
        value = {"type": value}  # a bare name: the defaults of that class
    chosen = _chosen(classes, value, where)
    if not isinstance(value, dict):
        raise PraError(f"{where}: expected the fields of {chosen.__name__}, got {value!r}", name=where, value=value)
    kinds = field_types(chosen)
    values = {f.name: to_dict(f.default) for f in dataclasses.fields(chosen) if f.default is not dataclasses.MISSING}
    values |= {key: given for key, given in value.items() if key != "type"}
    for key in values:
        if key not in kinds:
            problem = f"{where}.{key} is unknown{nearest(key, kinds)}"
            raise PraError(problem, code="unknown", path=f"{where}.{key}", name=key)
    if missing := ", ".join(name for name in kinds if name not in values):
        raise PraError(f"{where}: {missing} missing", code="missing", path=where, name=missing)
    return make(chosen, {name: _read(kinds[name], values[name], f"{where}.{name}", make) for name in kinds}, where)


def _object(chosen: Any, fields: dict[str, Any], where: str) -> Any:
    try:
        return chosen(**fields)
    except PraError as error:
        raise PraError(f"{where}: {error}", error.code, **error.fields) from None


def _values(chosen: Any, fields: dict[str, Any], where: str) -> dict[str, Any]:
    tag = {"type": chosen.__name__} if chosen in TAGGED else {}
    return tag | {name: to_dict(value) for name, value in fields.items()}


def _chosen(classes: dict[str, Any], value: Any, where: str) -> Any:
    """Return the class of JSON values: the one that they name, or the one that needs no name."""
    usual = [one for one in classes.values() if one not in TAGGED] or list(classes.values())
    if len(usual) == 1 and not (isinstance(value, dict) and "type" in value):
        return usual[0]
    name = value.get("type") if isinstance(value, dict) else value
    if str(name) not in classes:
        problem = f"{where}: {name!r} is unknown{nearest(str(name), classes)}"
        raise PraError(problem, code="unknown", path=where, name=name)
    return classes[str(name)]

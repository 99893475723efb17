"""The settings that a sweep tries: every combination of a few values."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pra.config import SamplingConfig, to_dict
from pra.config.values import parse_value
from pra.errors import PraError
from pra.models.weights import EMA
from pra.sampling.requests import changed_sampling

GUIDANCE = ("guidance=1,1.5,2,3,4",)
"""What is tried where nothing is said: it decides most (docs/evidence.md)."""

AVERAGE = "average"
"""The name under which the weights of a run are varied."""

LISTS = ("guidance_interval", "times")
"""Settings of which one value is a list."""
LONGEST = 200
"""Letters of a point's name: file systems take 255, with an ending and the suffix of a file being written."""


@dataclass(frozen=True)
class Point:
    """One combination: its changes by the names of :class:`pra.config.SamplingConfig`, and all settings of it."""

    changes: dict[str, Any]
    sampling: SamplingConfig

    @property
    def name(self) -> str:
        """Return ``"guidance=1.5,solver=heun"``, the name of its files too."""
        return ",".join(f"{name}={value_text(value)}" for name, value in self.changes.items())

    @property
    def average(self) -> str:
        """Return the name of the weights."""
        return str(self.changes.get(AVERAGE, EMA))

    @property
    def options(self) -> list[str]:
        """Return the changes as options of `pra sample`."""
        known = {f"--{name.replace('_', '-')}": value for name, value in self.changes.items() if value is not None}
        return [word for option, value in known.items() for word in (option, value_text(value))]

    @property
    def settings(self) -> list[str]:
        """Return the changes as options of `pra export`."""
        words = []
        for name, value in self.changes.items():
            text = json.dumps(value) if isinstance(value, list) else value_text(value)
            words += [f"--{AVERAGE}", text] if name == AVERAGE else ["--set", f"sampling.{name}={text}"]
        return words

    def beside(self, own: SamplingConfig) -> Point:
        """Return the same settings, with all that differs from a model's own among the changes."""
        before = to_dict(own)
        other = {name: value for name, value in to_dict(self.sampling).items() if value != before[name]}
        return Point(self.changes | other, self.sampling)


def points(base: SamplingConfig, over: Sequence[str]) -> list[Point]:
    """Combine the values in lines such as ``guidance=1,1.5,2``, the last line's values running fastest.

    ``average=ema,raw`` varies the weights. A list as a value is in brackets: ``guidance_interval=[0,0.8],[0,1]``.

    Refuse a line without values, a setting named twice or unknown, or a value that does not go with it.
    """
    axes: dict[str, list[str]] = {}
    for line in over:
        name, equals, text = line.removeprefix("sampling.").partition("=")
        values = [value.strip() for value in re.split(r",(?![^\[]*\])", text)]
        if not equals or "" in values:
            raise PraError(f"--over {line!r} is not KEY=VALUE,VALUE. Write guidance=1,1.5,2, say", value=line)
        if name in axes:
            raise PraError(f"--over names {name} twice. Give all its values in one --over", "conflict", name=name)
        axes[name] = values
    found: dict[str, Point] = {}
    for combination in itertools.product(*axes.values()):
        texts = dict(zip(axes, combination, strict=True))
        try:
            sampling = changed_sampling(base, {k: parse_value(text) for k, text in texts.items() if k != AVERAGE})
        except PraError as error:
            asked = " ".join(f"{name}={text}" for name, text in texts.items())
            hint = "" if axes.keys().isdisjoint(LISTS) else "; a list is one value in brackets, as in times=[0,0.4,1]"
            raise PraError(f"--over {asked}: {error}{hint}", error.code, value=asked) from None
        settled = to_dict(sampling) | {AVERAGE: texts.get(AVERAGE)}
        point = Point({name: settled[name] for name in axes}, sampling)
        if len(point.name) > LONGEST:
            problem = f"--over: the file name {point.name[:40]}... has {len(point.name)} letters of at most {LONGEST}"
            raise PraError(f"{problem}. Vary fewer settings, or give common ones with --set", "too-large")
        found.setdefault(point.name, point)  # 1 and 1.0 are one
    return list(found.values())


def value_text(value: Any) -> str:
    """Return a value as it is written, with all digits: ``1.5``, ``heun``, ``0,0.8``, ``null``."""
    if isinstance(value, list | tuple):
        return ",".join(map(value_text, value))
    if isinstance(value, str):
        return value
    return json.dumps(value).removesuffix(".0")

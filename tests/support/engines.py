"""Engines for the tests: without the compiled arithmetic, with caches in buckets."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from pra.models.cache import StaticCache
from pra.sampling import runner
from pra.sampling.native import SWITCH


def by_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own modules run, on a CPU too."""
    monkeypatch.setenv(SWITCH, "0")


def in_buckets(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    """Attention looks at so many tokens at a time, or at the whole cache, as under CUDA graphs and the compiler."""
    by_modules(monkeypatch)
    way_for = runner.way_for

    def bucketed(*arguments: Any) -> runner.Way:
        return replace(way_for(*arguments), cache=partial(StaticCache, bucket=size))

    monkeypatch.setattr(runner, "way_for", bucketed)

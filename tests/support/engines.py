"""Engines for the tests: without the compiled arithmetic, with caches in buckets."""

from dataclasses import replace
from functools import partial

from pra.models.cache import StaticCache
from pra.sampling import runner
from pra.sampling.native import SWITCH


def by_modules(monkeypatch):
    """The model's own modules run, on a CPU too."""
    monkeypatch.setenv(SWITCH, "0")


def in_buckets(monkeypatch, size):
    """Attention reads the cache in blocks of tokens, or as a whole, as under CUDA graphs and the compiler."""
    by_modules(monkeypatch)
    way_for = runner.way_for

    def bucketed(*arguments):
        return replace(way_for(*arguments), cache=partial(StaticCache, bucket=size))

    monkeypatch.setattr(runner, "way_for", bucketed)

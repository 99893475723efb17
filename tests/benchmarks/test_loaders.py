"""``benchmarks/loaders.py``: what it writes. No rate is held to anything."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import loaders
import pytest


def test_every_source_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaders.main(images=8, images_per_second=(500.0, 4000.0), repeats=1, out=tmp_path / "rates.json")
    figures = json.loads((tmp_path / "rates.json").read_text())
    expected = ["folder", "imagenet-tar", "wds", "wds, packed with --size 256"]
    if importlib.util.find_spec("datasets"):
        expected += ["hf", "hf, streaming"]
    assert list(figures["sources"]) == expected
    assert 90 < figures["kilobytes"] < 130  # as ImageNet's
    assert figures["hardware"]["threads"] == 1
    lines = {line[:28].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    for name, found in figures["sources"].items():
        rate = found["medians"]["recipe"]
        assert found["images_per_core_second"]["recipe"] == [rate]
        assert found["cores_for_images_per_second"] == {"500": math.ceil(500 / rate), "4000": math.ceil(4000 / rate)}
        assert lines[name][-2:] == [str(count) for count in found["cores_for_images_per_second"].values()]

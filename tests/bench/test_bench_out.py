"""Where `pra bench` writes: refused before anything is measured, as by every other command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pra import cli
from pra.bench import plan
from pra.commands import bench_sample as command
from pra.commands import bench_train as training_command
from pra.utils.device import cores

COMMANDS: dict[str, tuple[str, ...]] = {
    "sample": ("bench", "sample", "tiny", "--counts", "--batch", "1"),
    "train": ("bench", "train", "tiny", "--plan", "--gpus", "1"),
}


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be counted nor planned."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it has begun")

    monkeypatch.setattr(command, "count", refuse)
    monkeypatch.setattr(training_command, "_planned", refuse)


@pytest.mark.parametrize("name", COMMANDS)
def test_out_overwrites_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, unmeasured: None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "kept.json").write_text("mine")
    (tmp_path / "folder").mkdir()
    for place in ("kept.json", "folder", "kept.json/figures.json"):
        assert cli.main([*COMMANDS[name], "--out", f"~/{place}"]) == 2
        error = capsys.readouterr().err.strip()
        assert str(tmp_path / place) in error
        assert "\n" not in error
    assert (tmp_path / "kept.json").read_text() == "mine"


@pytest.mark.parametrize("name", COMMANDS)
def test_out_in_a_home_is_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(plan, "saved_bytes", lambda *_: 1)
    assert cli.main([*COMMANDS[name], "--out", "~/figures.json"]) == 0
    assert "environment" in json.loads((tmp_path / "figures.json").read_text())


def test_cores_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 9}, raising=False)
    assert cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == 128
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1

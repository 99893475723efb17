"""``examples/curves.py``: a figure of any runs, and nothing where one of them is none."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pages
import pytest
from PIL import Image
from refusal import refused

pytest.importorskip("matplotlib", reason="matplotlib is in the extra 'train'")


@pytest.fixture
def script() -> ModuleType:
    return pages.script(pages.ROOT / "examples" / "curves.py")


@pytest.fixture
def run(script: ModuleType, tmp_path: Path) -> Path:
    """As much of one as is drawn."""
    (tmp_path / "run").mkdir()
    rows = [{"step": step, **dict.fromkeys(script.SHOWN, 1 / step)} for step in (1, 2, 3)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "run"


def test_runs_are_drawn_over_each_other(script: ModuleType, run: Path, tmp_path: Path) -> None:
    out, runs = script.parse([str(tmp_path / "a.png"), str(run), f"rate=1={run}"])
    assert list(runs) == ["run", "rate=1"]
    script.main(out, runs)
    script.main(out, {"alone": run})  # in place of the first
    with Image.open(out) as picture:
        assert picture.size == (1320, 330)


def test_a_loss_that_explodes_does_not_hide_the_others(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def metrics(folder: Path) -> list[dict[str, float]]:
        highest = 2.0 if folder.name == "good" else 1e9
        return [{"step": step, **dict.fromkeys(script.SHOWN, highest / step)} for step in (1, 2, 3)]

    figures = []
    monkeypatch.setattr(script, "read_metrics", metrics)
    monkeypatch.setattr(script, "write_atomically", lambda out, write: None)
    drawn = script.curves
    monkeypatch.setattr(script, "curves", lambda *arguments: figures.append(drawn(*arguments)) or figures[0])
    script.main(tmp_path / "a.png", {"good": Path("good"), "bad": Path("bad")})
    assert [axes.get_ylim()[1] for axes in figures[0].axes] == [6.0] * 3
    assert all(len(axes.lines) == 2 for axes in figures[0].axes)


def test_runs_that_will_not_do(script: ModuleType, run: Path, tmp_path: Path) -> None:
    refused(lambda: script.main(tmp_path / "a.png", {"a": run, "b": tmp_path}), f"{tmp_path} has no metrics.jsonl")
    assert list(tmp_path.iterdir()) == [run]
    refused(lambda: script.parse(["a.png"]), "at least one run: FILE.png NAME=RUN")

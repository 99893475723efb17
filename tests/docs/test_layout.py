"""The layout of the package, from its imports."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.pages import ROOT, script

pytest.importorskip("matplotlib", reason="draws the layout: pip install 'pra-pixels[train]'")
layout = script(ROOT / "docs" / "layout.py")


def test_layout_names_every_room() -> None:
    inside = {path.stem for path in layout.PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert inside - {"__init__", "__main__"} == set(layout.ROOMS)


def test_imports_never_go_upwards() -> None:
    found = layout.imports()
    assert found["sampling"] >= {"models", "method"}  # they are read
    assert layout.upwards(found) == []
    assert layout.upwards({"models": {"config", "training"}}) == [("models", "training")]


def test_layout_draws_a_picture(tmp_path: Path) -> None:
    layout.draw(tmp_path / "layout.png")
    assert (tmp_path / "layout.png").stat().st_size > 10_000

"""The scripts in ``examples``, as far as the README does not run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from support.files import contents
from support.pages import ROOT, script
from support.refusal import refused

SCRIPT = ROOT / "examples" / "held_out.py"


@pytest.fixture(scope="module")
def held_out() -> ModuleType:
    return script(SCRIPT)


def test_held_out_images(held_out: ModuleType, trained: Path, tmp_path: Path) -> None:
    held_out.main("digits@test", trained, tmp_path / "out", [1, 0, 1])
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name.split("-")[0] for name in names] == ["00000", "00001"]
    with Image.open(tmp_path / "out" / names[0]) as picture:
        assert (picture.size, picture.mode) == ((8, 8), "L")


def test_held_out_bad_numbers_write_nothing(held_out: ModuleType, trained: Path, tmp_path: Path) -> None:
    for index in (100_000, -1):
        refused(lambda index=index: held_out.main("digits@test", trained, tmp_path, [0, index]), f"no image {index} in")
    assert list(tmp_path.iterdir()) == []
    held_out.main("digits@test", trained, tmp_path, [1])
    (written,) = tmp_path.iterdir()
    written.write_text("mine")
    refused(lambda: held_out.main("digits@test", trained, tmp_path, [0, 1]), f"{written} exists already")
    assert contents(tmp_path) == {written.name: b"mine"}


def test_held_out_without_numbers(held_out: ModuleType) -> None:
    for words in ([], ["digits", "run", "out"], ["digits", "run", "out", "x"], ["digits", "run", "out", "-1"]):
        refused(lambda: held_out.parse(words), "the numbers of images")  # noqa: B023
    done = subprocess.run([sys.executable, SCRIPT, "digits"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("held_out: error: give a SOURCE")
    assert len(done.stderr.splitlines()) == 1

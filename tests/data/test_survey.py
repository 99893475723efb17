"""``pra data check``: every picture of a source, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.data import tar_of

from pra import cli
from pra.data import open_source
from pra.data.survey import check, lines_of


@pytest.fixture
def damaged(photos: str) -> Path:
    """The folder of the pictures, of which cat/1.png and dog/4.jpg are corrupt."""
    folder = Path(photos.removeprefix("folder:"))
    (folder / "cat/1.png").write_bytes(b"")
    whole = (folder / "dog/4.jpg").read_bytes()
    (folder / "dog/4.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_check_reports_every_image(damaged: Path, workers: int) -> None:
    report = check(open_source(f"folder:{damaged}"), 34, workers)
    assert report["images"] == 7
    found = [(image["index"], image["where"]) for image in report["corrupt"]]
    assert found == [(1, f"{damaged}/cat/1.png"), (4, f"{damaged}/dog/4.jpg")]
    assert "not an image" in report["corrupt"][0]["problem"]
    assert report["classes"] == [{"name": n, "images": i} for n, i in (("cat", 3), ("dog", 3), ("emu", 1))]
    assert report["modes"] == {"RGB": 3, "P": 1, "RGBA": 1}
    assert {"width": 60, "height": 40, "images": 1} in report["sizes"]
    assert report["smallest"] == {"where": f"{damaged}/dog/3.bmp", "width": 25, "height": 20}
    assert report["largest"] == {"where": f"{damaged}/emu/6.png", "width": 80, "height": 64}
    assert [image["width"] for image in report["smaller_than_size"]] == [33, 25]


def test_check_many_lines_are_cut(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for number in range(60):
        files |= {f"{number}.png": b"", f"{number}.cls": str(min(number, 29)).encode()}
    (tmp_path / "s.tar").write_bytes(tar_of(files))
    lines = lines_of(check(open_source(f"wds:{tmp_path}/s.tar"), None, workers=0))
    assert lines[0] == "corrupt: 60"
    assert lines[21] == "  ... and 40 more (--out FILE.json has all)"
    assert lines[22].startswith("classes: 30, 1 (0) to 31 (29) images")


def test_check_command_corrupt_images_fail(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    code = cli.main(("data", "check", f"folder:{damaged}", "--out", str(report), "--workers", "0"))
    out, err = capsys.readouterr()
    assert code == 2
    assert f"  {damaged}/cat/1.png: not an image" in out
    assert err.splitlines()[-1].startswith(f"pra: error: 2 of 7 images from folder:{damaged} are corrupt")
    assert len(json.loads(report.read_text())["corrupt"]) == 2

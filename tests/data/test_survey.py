"""``pra data check``: every picture of a source, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.data import picture, tar_of

from pra import cli
from pra.data import open_source
from pra.data.survey import check, lines_of


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five pictures of three classes, of which cat/1.png and dog/4.jpg are corrupt."""
    shapes = {"cat/0.jpg": (40, 60), "cat/1.png": (30, 20), "dog/3.bmp": (20, 25), "dog/4.jpg": (50, 40)}
    for name, shape in {**shapes, "emu/6.png": (64, 80)}.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(*shape, mode="P" if name.startswith("emu") else "RGB").save(path)
    (tmp_path / "photos/cat/1.png").write_bytes(b"")
    whole = (tmp_path / "photos/dog/4.jpg").read_bytes()
    (tmp_path / "photos/dog/4.jpg").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "photos"


@pytest.mark.parametrize("workers", [0, 2])
def test_check_reports_every_image(photos: Path, workers: int) -> None:
    report = check(open_source(f"folder:{photos}"), 34, workers)
    assert report["images"] == 5
    found = [(image["index"], image["where"]) for image in report["corrupt"]]
    assert found == [(1, f"{photos}/cat/1.png"), (3, f"{photos}/dog/4.jpg")]
    assert "not an image" in report["corrupt"][0]["problem"]
    assert report["classes"] == [{"name": n, "images": i} for n, i in (("cat", 2), ("dog", 2), ("emu", 1))]
    assert report["modes"] == {"RGB": 2, "P": 1}
    assert {"width": 60, "height": 40, "images": 1} in report["sizes"]
    assert report["smallest"] == {"where": f"{photos}/dog/3.bmp", "width": 25, "height": 20}
    assert report["largest"] == {"where": f"{photos}/emu/6.png", "width": 80, "height": 64}
    assert [image["width"] for image in report["smaller_than_size"]] == [25]


def test_check_many_lines_are_cut(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for number in range(60):
        files |= {f"{number}.png": b"", f"{number}.cls": str(min(number, 29)).encode()}
    (tmp_path / "s.tar").write_bytes(tar_of(files))
    lines = lines_of(check(open_source(f"wds:{tmp_path}/s.tar"), None, workers=0))
    assert lines[0] == "corrupt: 60"
    assert lines[21] == "  ... and 40 more (--out FILE.json has all)"
    assert lines[22].startswith("classes: 30, 1 (0) to 31 (29) images")


def test_check_command_corrupt_images_fail(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    code = cli.main(("data", "check", f"folder:{photos}", "--out", str(report), "--workers", "0"))
    out, err = capsys.readouterr()
    assert code == 2
    assert f"  {photos}/cat/1.png: not an image" in out
    assert err.splitlines()[-1].startswith(f"pra: error: 2 of 5 images from folder:{photos} are corrupt")
    assert len(json.loads(report.read_text())["corrupt"]) == 2

"""``pra data check``: every picture of a source, and the report."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from support.data import flat, jpeg, noisy, tar_of
from support.refusal import refused

from pra import cli
from pra.config import DataConfig, OnCorrupt
from pra.data import TrainingSet, open_source, survey
from pra.data.survey import Range, check, lines_of, look


@pytest.fixture
def damaged(photos):
    """The folder of the pictures, of which cat/1.png and dog/4.jpg are corrupt."""
    folder = Path(photos.removeprefix("folder:"))
    (folder / "cat/1.png").write_bytes(b"")
    whole = (folder / "dog/4.jpg").read_bytes()
    (folder / "dog/4.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


def test_check_reports_every_image(damaged):
    report = check(open_source(f"folder:{damaged}"), 34, workers=1)
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


def test_check_names_the_first_of_equal_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "PIECE", 2)
    for number, size in enumerate(((9, 9), (8, 8), (8, 8), (12, 10), (10, 12))):
        noisy(tmp_path / f"{number}.png", size)
    report = check(open_source(f"folder:{tmp_path}"), None, workers=0)
    assert report["smallest"]["where"] == f"{tmp_path}/1.png"
    assert report["largest"]["where"] == f"{tmp_path}/3.png"


def test_look_leaves_out_classes_without_images(tmp_path):
    tars = {f"{number}.{kind}": data for number in (0, 1) for kind, data in (("jpg", jpeg()), ("cls", b"2"))}
    (tmp_path / "s.tar").write_bytes(tar_of(tars))
    assert look(f"wds:{tmp_path}").classes == {"2": 2}
    lines = lines_of(check(open_source(f"wds:{tmp_path}"), None, workers=0))
    assert lines[1:4] == ["classes: 1, 2 (2) to 2 (2) images", "  2: 2", "classes without images: 2, such as 0"]
    (tmp_path / "classes.json").write_text('["a", "b", "a"]')
    refused(lambda: look(f"wds:{tmp_path}"), "both called 'a'", code="conflict", value="a")


def test_check_many_lines_are_cut(tmp_path):
    files = {}
    for number in range(60):
        files |= {f"{number}.png": b"", f"{number}.cls": str(min(number, 29)).encode()}
    (tmp_path / "s.tar").write_bytes(tar_of(files))
    lines = lines_of(check(open_source(f"wds:{tmp_path}/s.tar"), None, workers=0))
    assert lines[0] == "corrupt: 60"
    assert lines[21] == "  ... and 40 more (--out FILE.json has all)"
    assert lines[22].startswith("classes: 30, 1 (0) to 31 (29) images")


def test_check_counts_pictures_too_narrow_for_the_size(tmp_path):
    for number, width in enumerate((900, 9)):
        noisy(tmp_path / f"{number}.png", (width, 8))
    source = open_source(f"folder:{tmp_path}")
    [narrow] = check(source, 8, workers=0)["corrupt"]
    assert "900x8" in narrow["problem"]
    assert check(source, None, workers=0)["corrupt"] == []


def test_lines_of_strange_names_are_escaped(tmp_path):
    noisy(tmp_path / "a\n\x1b[1m" / "\udce9.png", (9, 9))
    noisy(tmp_path / "b" / "\udce9.png", (9, 9)).write_bytes(b"")
    source = open_source(f"folder:{tmp_path}")
    for lines in (lines_of(check(source, 10, workers=0)), look(source).lines()):
        assert all(line.isprintable() for line in lines)
        assert any("\\udce9.png" in line for line in lines)


def test_check_command_corrupt_images_fail(damaged, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert cli.main(("data", "check", f"folder:{damaged}", "--out", str(report), "--workers", "0")) == 2
    out, err = capsys.readouterr()
    assert f"  {damaged}/cat/1.png: not an image" in out
    assert err.splitlines()[-1].startswith(f"pra: error: 2 of 7 images from folder:{damaged} are corrupt")
    assert len(json.loads(report.read_text())["corrupt"]) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_check_command_prints_names_in_any_locale(encoding, tmp_path, monkeypatch):
    folder = tmp_path / "caf\udce9 日"
    noisy(folder / "tête" / "\udce9.png", (9, 9))
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr("sys.stdout", out)
    assert cli.main(("data", "check", f"folder:{folder}", "--workers", "0")) == 0
    assert b"\\udce9.png" in out.buffer.getvalue()


def test_look_describes_a_folder(tmp_path):
    noisy(tmp_path / "cats" / "a.png", (40, 30))
    noisy(tmp_path / "cats" / "b.png", (10, 60))
    noisy(tmp_path / "dogs" / "c.png", (50, 50))
    flat(tmp_path / "dogs" / "grey.png", 100, "L")
    flat(tmp_path / "dogs" / "tinted.png", (100, 104, 98))
    flat(tmp_path / "dogs" / "clear.png", (255, 0, 0, 0), "RGBA")
    (tmp_path / "dogs" / "broken.jpg").write_bytes(b"nonsense")
    found = look(f"folder:{tmp_path}")
    assert (found.images, found.classes, found.opened) == (7, {"cats": 2, "dogs": 5}, 6)
    assert (found.width, found.height) == (Range(8, 10, 50), Range(8, 30, 60))
    assert found.short_side == Range(8, 10, 50)
    assert (found.grey, found.transparent, found.square) == (3, 1, 4)  # what cannot be seen has no colour
    assert found.corrupt == (f"{tmp_path}/dogs/broken.jpg",)
    assert (found.channels, found.unconditional) == (3, False)
    text = "\n".join(found.lines())
    for words in ("7 pictures in 2 classes of 2 to 5", "width 8 to 50, median 10", "3 in colour, 3 grey", "broken.jpg"):
        assert words in text
    noisy(tmp_path / "alone" / "a.png", (12, 9), "L")
    found = look(f"folder:{tmp_path}/alone")
    assert (found.images, found.unconditional, found.channels) == (1, True, 1)
    assert found.lines() == ["1 pictures without classes", "width 12; height 9; grey"]


def test_look_opens_some_of_every_class(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "LOOKED_AT", 16)
    for number in range(60):
        flat(tmp_path / ("a" if number < 30 else "b") / f"{number}.png", (255, 0, 0), size=(8 + number // 30, 8))
    found = look(f"folder:{tmp_path}")
    assert (found.images, found.opened, found.width.low, found.width.high) == (60, 16, 8, 9)
    assert "60 pictures in 2 classes of 30 to 30; 16 of them opened" in found.lines()
    monkeypatch.setattr(survey, "PATIENCE", 0.0)
    assert look(f"folder:{tmp_path}").opened == 1


def test_look_and_training_count_float_pixels_as_corrupt(tmp_path):
    flat(tmp_path / "good.png", 100, "L")
    flat(tmp_path / "float.tif", 0.5, "F")
    source = open_source(f"folder:{tmp_path}")
    found = look(source)
    assert (found.opened, found.corrupt) == (1, (f"{tmp_path}/float.tif",))
    settings = DataConfig(source=source.name, on_corrupt=OnCorrupt.SKIP)
    samples = TrainingSet(source, (8, 8), 1, settings, seed=0)
    assert sorted(samples[g].skipped for g in range(2)) == [0, 1]
    assert all(samples[g].image.eq(100).all() for g in range(2))
    strict = TrainingSet(source, (8, 8), 1, dataclasses.replace(settings, on_corrupt=OnCorrupt.ERROR), seed=0)
    refused(lambda: [strict[g] for g in range(2)], "16 bits", "on_corrupt=skip", where=f"{tmp_path}/float.tif")


def test_look_without_images_is_refused(tmp_path):
    refused(lambda: look(f"folder:{tmp_path}"), f"{tmp_path} holds no images")
    (tmp_path / "a.png").write_bytes(b"nonsense")
    refused(lambda: look(f"folder:{tmp_path}"), "none of the 1 images", "can be read", "a.png")

"""``examples/emoji_captions.py``, on three tiny packages."""

import csv
import io
import json
import runpy
import sys
import tarfile
import types
import zlib

import pytest
from PIL import Image
from support.files import contents
from support.pages import ROOT, script
from support.refusal import refused

from pra.config import OnCorrupt
from pra.data import open_source
from pra.data.source import check_captions

SCRIPT = ROOT / "examples" / "emoji_captions.py"
emoji_captions = script(SCRIPT)

THUMB = "1F44D"
EMOJI = [
    *((f"{0x1F400 + number:X}", "animals-nature", f"animal {number}", "animal, zoo", "") for number in range(40)),
    (THUMB, "people-body", "thumbs up", "good, yes", ""),
    (f"{THUMB}-1F3FB", "people-body", "thumbs up: light skin tone", "", THUMB),
    (f"{THUMB}-1F3FF", "people-body", "thumbs up: dark skin tone", "", THUMB),
    ("2764-FE0F", "smileys-emotion", "red heart", "heart, love", ""),
    ("1F1F3-1F1F4", "flags", "flag: Norway", "NO", ""),
    ("1F1E7-1F1FB", "flags", "flag: Bouvet Island", "BV", ""),
    ("E000", "extras-openmoji", "a brand", "", ""),
]


def png(text):
    file = io.BytesIO()
    number = zlib.crc32(text.encode())
    Image.new("RGBA", (64, 64), (number & 255, number >> 8 & 255, number >> 16 & 255, 255)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two tarballs and a folder, as npm has them."""
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["hexcode", "group", "annotation", "tags", "skintone_base_hexcode", "openmoji_tags"])
    rows.writerows([*emoji, "picture"] for emoji in EMOJI)
    files = {"openmoji": {"data/openmoji.csv": table.getvalue().encode()}}
    files["openmoji"] |= {f"color/svg/{code}.svg": f"<svg>{code}</svg>".encode() for code, *_ in EMOJI}
    for style in ("google", "twitter"):
        codes = [code.replace("1F1E7-1F1FB", "1F1F3-1F1F4") for code, *_ in EMOJI]  # one flag looks like the other
        pictures = {f"img/{style}/64/{e[0].lower()}.png": png(style + c) for e, c in zip(EMOJI, codes, strict=True)}
        files[f"emoji-datasource-{style}"] = pictures | {f"img/{style}/sheets/64.png": b"not read"}
    places = []
    for name, content in files.items():
        content |= {"package.json": json.dumps({"name": name}).encode()}
        place = tmp_path / (f"{name}.tgz" if name != "openmoji" else name)
        places.append(place)
        if name == "openmoji":
            for file, data in content.items():
                (place / file).parent.mkdir(parents=True, exist_ok=True)
                (place / file).write_bytes(data)
            continue
        with tarfile.open(place, "w:gz") as tar:
            for file, data in content.items():
                member = tarfile.TarInfo(f"package/{file}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    drawer = types.SimpleNamespace(svg_to_bytes=lambda svg_string, **_: png(svg_string))
    monkeypatch.setitem(sys.modules, "resvg_py", drawer)
    return places


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_emoji_captions_splits_are_disjoint(packages, tmp_path):
    out = tmp_path / "out"
    emoji_captions.main(out, packages)
    splits = {split: rows_of(out / split) for split in ("train", "heldout-emoji", "heldout-pairs")}
    assert sum(map(len, splits.values())) == 3 * (len(EMOJI) - 1)  # no brand
    trained = {row["emoji"] for row in splits["train"]}
    assert not trained & {row["emoji"] for row in splits["heldout-emoji"]}
    assert {row["emoji"] for row in splits["heldout-pairs"]} <= trained
    thumbs = [{(row["style"], row["emoji"]) for row in rows if THUMB in row["emoji"]} for rows in splits.values()]
    assert sorted(map(len, thumbs)) in ([0, 0, 9], [0, 3, 6])
    for split, rows in splits.items():
        for style in ("Google", "Twitter"):  # two flags are the same picture
            assert len({"1F1F3-1F1F4", "1F1E7-1F1FB"} & {r["emoji"] for r in rows if r["style"] == style}) in (0, 2)
        source = open_source(f"folder:{out / split}")
        check_captions(source, OnCorrupt.ERROR)
        assert len(source) == len(rows)
        assert {source.image(index).size for index in range(len(source))} == {(64, 64)}
    assert "CC-BY-SA-4.0" in (out / "LICENSES").read_text()
    emoji_captions.main(tmp_path / "again", packages[::-1])
    assert contents(tmp_path / "again") == contents(out)


def test_emoji_captions_name_style_and_keywords(packages, tmp_path):
    emoji_captions.main(tmp_path / "out", packages)
    texts = {text for split in ("train", "heldout-emoji", "heldout-pairs") for row in rows_of(tmp_path / "out" / split)
             for text in row["text"]}  # fmt: skip
    assert {
        "red heart, Twitter style",
        "Google style, flag of Norway",
        "thumbs up, dark skin tone, OpenMoji style",
    } <= texts
    [heart] = {tuple(sorted(text.split(", "))) for text in texts if "love" in text and "Twitter" in text}
    assert heart == ("Twitter style", "love", "picture", "red heart")
    assert any("good" in text for text in texts if "dark" in text)


def test_emoji_captions_bad_input_is_refused(packages, tmp_path, monkeypatch, capsys):
    refused(lambda: emoji_captions.main(tmp_path, packages), "choose another folder", code="exists")
    out = tmp_path / "out"
    for name, content, code in (("a.tgz", b"", "unreadable"), ("b.tgz", packages[1].read_bytes()[:99], "unreadable")):
        (tmp_path / name).write_bytes(content)
        refused(lambda name=name: emoji_captions.main(out, [tmp_path / name]), name, ".tgz or its folder", code=code)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/package.json").write_text('{"name": "emoji-datasource-apple"}')
    refused(lambda: emoji_captions.main(out, [tmp_path / "other"]), "holds emoji-datasource-apple", code="unknown")
    parts = "2 sets are missing", "`npm pack emoji-datasource-twitter@16.0.0 openmoji@17.0.0`"
    google = next(place for place in packages if "google" in place.name)
    refused(lambda: emoji_captions.main(out, [google]), *parts, code="missing")
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    refused(lambda: emoji_captions.main(out, packages), "pip install resvg-py", code="not-installed")
    assert not out.exists()
    monkeypatch.setattr("sys.argv", [str(SCRIPT)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().err.startswith("emoji_captions: error: no folder is given.")

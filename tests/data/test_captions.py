"""Captions of every source that has them, in packed data and parts, and their errors."""

import json
import pickle
import warnings

import pytest
from support.data import config, jpeg, picture, tar_of, write_parquet
from support.refusal import refused

from pra import cli
from pra.config import OnCorrupt
from pra.data import TrainingSet, held_out, open_source
from pra.data.captions import MOST_TEXT, CorruptCaption, corrupt_caption
from pra.data.pack import Packing, pack
from pra.data.source import Captioned, Relabelled, check_captions
from pra.data.survey import check, lines_of

pytestmark = pytest.mark.filterwarnings("ignore:.*left out")


def fill(folder, files):
    """Write a picture under each name that ends in .png, and the texts of the others."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            picture(seed=len(name)).save(folder / name)
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_source(f"folder:{folder}")


def lines(*rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def all_captions(source):
    return [source.captions(index) for index in range(len(source))]


PICTURES = {"cat/1.png": "", "cat/deep/2.png": "", "dog/3.png": ""}
EXPECTED = [("a cat",), ("two\ncats", "due gatti 🐈"), ("un chien, très brun",)]
LAYOUTS = {
    "one metadata.jsonl": {
        "metadata.jsonl": lines(
            {"file_name": "cat/1.png", "text": " a cat ", "more": 1},
            {"file_name": "./cat/deep/2.png", "text": ["two\ncats", "due gatti 🐈"]},
            {"file_name": "gone.png", "text": "not there"},
            {"file_name": "dog/3.png", "text": "un chien, très brun"},
        )
        + "\n\n"
    },
    "metadata in sub-folders": {
        "cat/metadata.csv": '\ufefftext,file_name\r\n"a cat",1.png\r\n',
        "cat/deep/metadata.jsonl": lines({"file_name": "2.png", "text": list(EXPECTED[1])}),
        "dog/metadata.csv": 'file_name,text,x\n3.png,"un chien, très brun",""\n',
    },
    "texts beside pictures, and metadata": {
        "cat/1.txt": "\ufeffa cat",
        "cat/deep/metadata.jsonl": lines({"file_name": "2.png", "text": list(EXPECTED[1])}),
        "dog/3.txt": "\n  un chien, très brun\r\n",
        "README.txt": "not a caption",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folder_captions_are_read_from_any_layout(tmp_path, layout):
    source = fill(tmp_path, PICTURES | LAYOUTS[layout])
    assert isinstance(source, Captioned)
    assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [0, 0, 1])
    assert all_captions(source) == EXPECTED
    assert all_captions(pickle.loads(pickle.dumps(source))) == EXPECTED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_captions(source, OnCorrupt.ERROR)


def test_folder_text_lines_are_several_captions(tmp_path):
    source = fill(tmp_path, {"1.png": "", "1.txt": "a cat\r\n\r\na small cat\rgatto\u2028piccolo\n"})
    assert source.captions(0) == ("a cat", "a small cat", "gatto\u2028piccolo")


def test_folder_without_captions_is_not_captioned(tmp_path):
    others = {"metadata.jsonl": lines({"file_name": "cat/1.png", "boxes": []}), "cat/notes.txt": "", "dog/3.TXT": "a"}
    with pytest.warns(UserWarning, match=r"2 \*.txt \(such as dog/3.TXT\), 1 \*.jsonl \(such as metadata.jsonl\)"):
        source = fill(tmp_path, PICTURES | others)
    assert not isinstance(source, Captioned)
    refused(lambda: check_captions(source, OnCorrupt.SKIP), "metadata.jsonl", code="missing", name=source.name)


GOOD = {"file_name": "cat/1.png", "text": "a cat"}, {"file_name": "dog/3.png", "text": "a dog"}
LONG = "a" * (MOST_TEXT + 1)
BROKEN = [
    ("metadata.jsonl", lines(*GOOD), "it has no caption", "cat/deep/2.png"),
    ("metadata.jsonl", lines(*GOOD, {"file_name": "cat/deep/2.png"}), "(metadata.jsonl, line 3) is empty", None),
    ("metadata.jsonl", lines(*GOOD, {"file_name": "cat/deep/2.png", "text": ["a", " "]}), "line 3) is empty", None),
    ("metadata.jsonl", lines(*GOOD, {"file_name": "cat/deep/2.png", "text": 3}), "line 3) is neither a text", None),
    ("metadata.jsonl", lines(*GOOD, {"file_name": "cat/deep/2.png", "text": "a\0b"}), "line 3) holds a NUL", None),
    ("metadata.jsonl", lines(*GOOD, {"file_name": "cat/deep/2.png", "text": LONG}), "have 65,537 bytes", None),
    ("metadata.jsonl", lines(*GOOD).encode() + b'\n{"file_name": "cat/deep/2.png", "text": "\xe9"}', "in UTF-8", None),
    ("metadata.jsonl", lines(*GOOD) + '\n{"file_name": "cat/deep/2.png", "text": "\\ud800"}', "in UTF-8", None),
    ("metadata.jsonl", lines(GOOD[0], *GOOD), "in metadata.jsonl, line 1 and metadata.jsonl, line 2", "cat/1.png"),
    ("metadata.jsonl", lines(*GOOD) + '\n{"file_name', "is not JSON", "metadata.jsonl, line 3"),
    ("metadata.jsonl", lines(*GOOD, 3), "has no file_name", "metadata.jsonl, line 3"),
    ("metadata.jsonl", lines({"text": "a"}, *GOOD), "has no file_name", "metadata.jsonl, line 1"),
    (
        "metadata.jsonl",
        lines(*GOOD, {"file_name": "cat/../../x.png", "text": "a"}),
        "outside",
        "metadata.jsonl, line 3",
    ),
    ("metadata.jsonl", lines(*GOOD, {"file_name": "/etc/x.png", "text": ""}), "outside", "metadata.jsonl, line 3"),
    ("metadata.csv", f"file_name,text\ncat/deep/2.png,{LONG}\ncat/1.png,a cat", "line 2) have 65,537 bytes", None),
    ("metadata.csv", 'file_name,text\ncat/1.png,a cat\ncat/deep/2.png,"two', "is not CSV", "metadata.csv, line 3"),
    ("metadata.csv", "file_name,text\ncat/1.png,a cat\ncat/deep/2.png\n", "(metadata.csv, line 3) is empty", None),
]


@pytest.mark.parametrize("case", range(len(BROKEN)))
def test_folder_broken_metadata_names_file_and_line(tmp_path, case):
    name, text, part, where = BROKEN[case]
    source = fill(tmp_path, PICTURES | {name: text})
    where = f"{tmp_path}/{where or 'cat/deep/2.png'}"
    refused(lambda: check_captions(source, OnCorrupt.ERROR), part, "data.on_caption=skip", where=where)
    with pytest.warns(UserWarning, match="are left out, such as"):
        check_captions(source, OnCorrupt.SKIP)
    if ", line" not in where:
        index = [source.where(i) for i in range(3)].index(where)
        for _ in range(2):
            refused(lambda: source.captions(index), part, "data.on_caption=skip", where=where)
    if not where.endswith("1.png"):
        assert source.captions(0) == ("a cat",)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "(1.txt) is empty"), (b" \n\n", "(1.txt) is empty"), (b"a\n\nb\xe9", "(1.txt, line 3) is not in UTF-8"),
        ("a cat".encode("utf-16"), "(1.txt, line 1) is not in UTF-8"), (b"a\0", "(1.txt, line 1) holds a NUL"),
        (b"a" * 2**20, "(1.txt) cannot be read: 1,048,576 bytes, at most 65,536"),
    ],
)  # fmt: skip
def test_folder_broken_text_is_found_when_it_is_read(tmp_path, data, part):
    source = fill(tmp_path, {"1.png": "", "1.txt": data, "2.png": "", "2.txt": "fine"})
    check_captions(source, OnCorrupt.ERROR)
    refused(lambda: source.captions(0), part, "data.on_caption=skip", where=f"{tmp_path}/1.png")
    assert source.captions(1) == ("fine",)
    (tmp_path / "2.txt").unlink()
    refused(lambda: source.captions(1), "cannot be read", where=f"{tmp_path}/2.png")


def test_caption_policy_is_not_that_of_corrupt_images(photos):
    source = open_source(photos)
    whole = source.image

    def image(index):
        if index == 3:
            raise corrupt_caption(source.where(index), "it has no caption")
        return whole(index)

    source.image = image
    skip = OnCorrupt.SKIP
    strict = TrainingSet(source, (8, 8), 3, config(on_corrupt=skip), seed=0)
    with pytest.raises(CorruptCaption):
        [strict[g] for g in range(7)]
    data = TrainingSet(source, (8, 8), 3, config(on_caption=skip), seed=0)
    assert sum(data[g].skipped for g in range(7)) == 1


def sample(key, kind, content):
    """The members of a sample of a shard."""
    return {f"{key}.jpg": jpeg(), f"{key}.{kind}": content if isinstance(content, bytes) else content.encode()}


def test_shard_captions_are_texts_or_json(tmp_path):
    shards = [
        sample("a/0", "txt", "a cat\na small cat\n"),
        sample("1", "json", '{"caption": "img2dataset", "url": "x"}'),
        {"2.json": b'{"text": "lost"}'} | sample("2", "txt", "txt goes first"),
        sample("3", "json", '{"text": ["b", "c"]}'),
    ]
    (tmp_path / "0.tar").write_bytes(tar_of(shards[0] | shards[1]))
    (tmp_path / "1.tar").write_bytes(tar_of(shards[2] | shards[3]))
    for _ in range(2):  # the second time from the index
        source = open_source(f"wds:{tmp_path}")
        assert isinstance(source, Captioned)
        assert all_captions(source) == [("a cat", "a small cat"), ("img2dataset",), ("txt goes first",), ("b", "c")]
        check_captions(source, OnCorrupt.ERROR)
    assert all_captions(pickle.loads(pickle.dumps(source)))[3] == ("b", "c")


def test_shard_json_of_other_things_is_no_caption(tmp_path):
    (tmp_path / "0.tar").write_bytes(tar_of(sample("0", "json", '{"boxes": []}') | sample("1", "json", "[1]")))
    assert not isinstance(open_source(f"wds:{tmp_path}"), Captioned)


def test_shard_broken_captions_are_named(tmp_path):
    long = json.dumps({"text": LONG})
    members = sample("a/0", "txt", b"\xe9") | sample("1", "json", '{"text"') | sample("2", "json", long)
    members |= (
        {"3.jpg": jpeg()} | sample("4", "json", '{"x": 1}') | sample("5", "txt", LONG) | sample("6", "txt", "fine")
    )
    (tmp_path / "0.tar").write_bytes(tar_of(members))
    source = open_source(f"wds:{tmp_path}")
    parts = (
        "(a/0.txt, line 1) is not in UTF-8", "1.json is not JSON", "(2.json) have 65,537 bytes", "it has no caption",
        "it has no caption (4.json lacks text and caption)", "its caption has 65,537 bytes",
    )  # fmt: skip
    for index, part in enumerate(parts):
        refused(lambda index=index: source.captions(index), part, where=source.where(index))
    assert source.captions(6) == ("fine",)
    refused(lambda: check_captions(source, OnCorrupt.ERROR), "it has no caption", where=source.where(3))


@pytest.mark.parametrize("stream", ["", "&streaming=true&window=4"])
def test_hf_caption_is_a_column(hub, tmp_path, stream):
    several = hub.List(hub.Value("string")) if hasattr(hub, "List") else hub.Sequence(hub.Value("string"))
    columns = {
        "number": (hub.Value("int64"), lambda i: i % 2),
        "text": (hub.Value("string"), lambda i: None if i == 2 else f"number {i}"),
        "texts": (several, lambda i: [f"{i}", "b"]),
    }
    write_parquet(tmp_path / "train.parquet", range(5), **columns)
    name = f"hf:{tmp_path}?label=number{stream}"
    assert not isinstance(open_source(name), Captioned)
    source = open_source(f"{name}&caption=text")
    check_captions(source, OnCorrupt.ERROR)
    assert [source.captions(index) for index in (0, 1, 4, 3)] == [(f"number {i}",) for i in (0, 1, 4, 3)]
    refused(lambda: source.captions(2), "(column 'text') is empty", where=source.where(2))
    assert open_source(f"{name}&caption=texts").captions(3) == ("3", "b")
    refused(lambda: open_source(f"{name}&caption=number").captions(0), "neither a text nor")
    refused(lambda: open_source(f"{name}&caption=txt"), "did you mean 'text", code="unknown", column="txt")
    assert (source.image(3).size, source.labels.tolist()) == (picture().size, [0, 1, 0, 1, 0])


def test_packed_images_keep_their_captions(tmp_path):
    source = fill(tmp_path / "in", PICTURES | {"cat/5.png": ""} | LAYOUTS["one metadata.jsonl"])
    pack(source, tmp_path / "out", Packing(shard_images=2), workers=1)
    packed = open_source(f"wds:{tmp_path}/out")
    assert packed.classes == ("cat", "dog")
    assert [packed.captions(index) for index in (0, 2, 3)] == EXPECTED
    refused(lambda: packed.captions(1), "it has no caption", code="missing")
    (tmp_path / "in/dog/metadata.csv").write_text("file_name,text\n3.png,again\n")
    twice = open_source(source.name)
    refused(lambda: pack(twice, tmp_path / "more", Packing(), workers=0), "two captions", "--skip-corrupt")


def test_parts_of_a_source_keep_their_captions(tmp_path):
    files = {f"{name}/{n}.{end}": f"{name} {n}" for name in ("a", "b") for n in range(4) for end in ("png", "txt")}
    source = fill(tmp_path, files)
    learnt, held = held_out.split(source, config(source=source.name, validation=0.25), seed=0)
    assert isinstance(learnt, Captioned)
    assert isinstance(held, Captioned)
    assert sorted(all_captions(learnt) + all_captions(held)) == [(f"{n} {i}",) for n in "ab" for i in range(4)]
    for part in (held, pickle.loads(pickle.dumps(Relabelled(held, ("b", "a"), 1 - source.labels[[0, -1]])))):
        assert all(
            f"{tmp_path}/{text.replace(' ', '/')}.png" == part.where(i) for i, (text,) in enumerate(all_captions(part))
        )
    plain = fill(tmp_path / "plain", {"1.png": "", "2.png": ""})
    assert not any(isinstance(part, Captioned) for part in held_out.split(plain, config(source="", validation=0.5), 0))


def test_check_reports_lengths_of_captions(tmp_path, capsys):
    texts = {"cat/1.txt": "a cat\na très small cat", "dog/3.txt": "b" * 100, "dog/4.png": "", "dog/4.txt": ""}
    source = fill(tmp_path, PICTURES | texts)
    found = check(source, None, workers=1)["captions"]
    assert (found["captions"], found["per_image"], found["characters"]) == (3, (1, 2, 2), (5, 16, 100))
    assert (found["bytes"], found["longer"], found["max_length"]) == ((5, 17, 100), 1, 96)
    assert (found["longest"]["where"], found["longest"]["bytes"]) == (f"{tmp_path}/dog/3.png", 100)
    assert [image["where"] for image in found["lacking"]] == [f"{tmp_path}/cat/deep/2.png", f"{tmp_path}/dog/4.png"]
    report = check(source, None, workers=0, max_length=10)
    assert report["captions"]["longer"] == 2
    assert "  longer than 10 bytes, and cut there by a model of that length: 2 (66.7%)" in lines_of(report)
    assert cli.main(["data", "check", source.name, "--max-length", "10"]) == 2
    out, err = capsys.readouterr()
    assert "  such as 'a cat'" in out
    assert "2 of 4 images" in err
    assert "data.on_caption=skip" in err
    (tmp_path / "dog/4.txt").write_text("a dog")
    (tmp_path / "cat/deep/2.txt").write_text("cats")
    assert cli.main(["data", "check", source.name]) == 0
    assert check(open_source("digits"), None, workers=0)["captions"] is None

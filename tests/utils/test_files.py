"""Files and folders that appear whole or not at all, and never overwrite."""

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.files import contents
from support.refusal import refused

from pra.config.checks import NaturalInt
from pra.utils.files import (
    begin_partial,
    check_output,
    explained,
    file_part,
    new_folder,
    output_format,
    partial_folder,
    read_arrays,
    read_json,
    read_regular,
    save_images,
    write_atomically,
)
from pra.utils.provenance import file_sha256

IMAGES = torch.arange(3 * 3 * 8 * 6).remainder(251).to(torch.uint8).view(3, 3, 8, 6)


def save(path):
    save_images(IMAGES, [2, 0, 1], ["a", "b", "c"], 1, path)


def test_output_format_is_the_ending():
    known = {"a.png": ".png", "a.PNG": ".png", "a.npz": ".npz", "a": "", "guidance-1.5": "", "a.b/c": ""}
    assert {name: output_format(Path(name)) for name in known} == known
    for name in ("a.jpg", "a.npy", "a.pt"):
        refused(lambda name=name: output_format(Path(name)), "FILE.npz", code="unknown", path=name)


def test_read_regular_refuses_what_has_no_end(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    assert read_regular(tmp_path / "link", 5) == b"12345"
    for name, most, reason in (("zero", 5, "not a regular"), ("pipe", 5, "not a regular"), ("a", 4, "5 bytes")):
        with pytest.raises(OSError, match=reason):
            read_regular(tmp_path / name, most)


def test_output_that_exists_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path / "a.png", tmp_path / "folder", tmp_path / "link.png"):
        for do in (check_output, save):
            refused(lambda do=do, path=path: do(path), "--out", code="exists", path=path)
    inside, new = tmp_path / "a.png" / "b.png", tmp_path / "new" / "a.png"
    refused(lambda: check_output(inside), "is a file", code="unwritable", path=inside)
    long = tmp_path / f"{'é' * 125}.png"
    refused(lambda: check_output(long), "choose a shorter name", code="unwritable", path=long)
    check_output(new)

    def closed(*_, **__):  # root may write everywhere
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pra.utils.files.tempfile.NamedTemporaryFile", closed)
    refused(lambda: check_output(new), "Permission denied", code="unwritable", path=new)
    assert contents(tmp_path) == {"a.png": b"mine"}


def test_new_folder_keeps_unfinished_work_of_others(tmp_path):
    partial = tmp_path / ".out.partial"
    begin_partial(partial, {"images": 50_000}, "sampling")
    refused(lambda: save(tmp_path / "out"), "unfinished work", code="conflict", path=partial)
    assert list(contents(tmp_path)) == [".out.partial/plan.json"]


def test_full_disk_is_found_before_any_work(tmp_path, full_disk):
    with full_disk(0):
        refused(lambda: check_output(tmp_path / "new" / "a"), "ulimit -f", code="unwritable")
    assert not any(tmp_path.iterdir())


def test_advice_never_is_to_remove_a_device(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.npz").symlink_to("/dev/null")
    for path in (tmp_path / "pipe", tmp_path / "link.npz", Path("/dev/null")):
        error = refused(lambda path=path: check_output(path), "choose another --out", code="exists", path=path)
        assert "remove it" not in str(error)


def test_part_of_a_file_name_is_short_and_plain():
    names = {"cat": "cat", "a b/..\n": "a-b----", "caf\udce9": "caf-", "猫": "猫", "-x": "-x", "*?": "--"}
    assert {name: file_part(name) for name in names} == names
    assert file_part("é" * 200) == "é" * 50


def test_saved_images_are_the_pixels(tmp_path):
    save(tmp_path / "new" / "x.npz")
    with np.load(tmp_path / "new" / "x.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1"]
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], IMAGES.permute(0, 2, 3, 1))
        assert arrays["arr_1"].tolist() == [2, 0, 1]
    save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "c.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "b.png")), IMAGES[1].permute(1, 2, 0))


@pytest.mark.parametrize("name", ["x.png", "x.npz", "x"])
def test_full_disk_leaves_no_images(tmp_path, full_disk, name):
    with full_disk(60):
        refused(lambda: save(tmp_path / name), "File too large", code="unwritable", path=tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EDQUOT, "free some space"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "choose another place, or make this one writable"),
        (errno.EIO, "check the disk"),
    ],
)
def test_disk_error_gets_its_advice(tmp_path, code, advice):
    def fail(_):
        raise OSError(code, os.strerror(code))

    def fill():
        with new_folder(tmp_path / "x"):
            fail(None)

    for do in (lambda: write_atomically(tmp_path / "x", fail), fill):
        refused(do, os.strerror(code), advice, code="unwritable", path=tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_write_interrupted_leaves_the_old_file(tmp_path):
    def fail(file):
        raise KeyboardInterrupt

    mask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", lambda file: file.write(b"old"))
    finally:
        os.umask(mask)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", fail)
    assert contents(tmp_path) == {"file": b"old"}
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640  # not a temporary file's


def test_new_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "new") as folder:  # noqa: PT012
        (folder / "a").write_text("a")
        assert not (tmp_path / "new").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".new.partial").mkdir()  # of a killed process
    (tmp_path / ".new.partial" / "old").write_text("old")
    with new_folder(tmp_path / "new") as folder:
        (folder / "a").write_text("a")
    assert contents(tmp_path) == {"new/a": b"a"}


def test_disk_that_cannot_sync_is_refused(tmp_path, monkeypatch):
    """Network file systems report a full disk only at the flush. Some cannot sync folders, which is harmless."""
    original, failing = os.fsync, [stat.S_ISREG]

    def sync(descriptor):
        if failing[0](os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    for path in (tmp_path / "x.npz", tmp_path / "x"):
        refused(lambda path=path: save(path), "No space left on device", code="unwritable", path=path)
    assert list(tmp_path.iterdir()) == []
    failing[0] = stat.S_ISDIR
    save(tmp_path / "x")
    assert len(contents(tmp_path / "x")) == 3


STRANGE = {
    "brackets": (b"[" * 100_000 + b"]" * 100_000, "deeper than 100"),
    "nesting below Python's limit": (b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", "deeper than 100"),
    "unclosed": (b'{"a": ', "is not JSON"),
    "NaN": (b'{"a": NaN}', "NaN is not a finite number"),
    "1e999": (b'{"a": 1e999}', "1e999 is not a finite number"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not text"),
    "list": (b"[1]", "list in place of an object"),
    "large": (b" " * (2**25 + 1), "at most 33,554,432"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_json_that_is_not_ours_is_one_line(tmp_path, kind):
    (tmp_path / "a.json").write_bytes(STRANGE[kind][0])
    refused(
        lambda: read_json(tmp_path / "a.json", finite=True),
        STRANGE[kind][1],
        code="unreadable",
        path=tmp_path / "a.json",
    )


def test_json_fields_have_their_types(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"step": 3, "rate": 1e999}')  # an editor put a byte order mark
    assert read_json(path, step=NaturalInt, more=dict | None)["step"] == 3
    for kinds, problem in (({"step": str}, "step: expected str, got 3"), ({"more": dict}, "more: expected dict")):
        do = lambda kinds=kinds: read_json(path, **kinds)  # noqa: E731
        refused(do, problem, code="unreadable", path=path)
    path.write_text('{"step": -1}')
    refused(lambda: read_json(path, step=NaturalInt), "step must lie in [0, inf]", code="unreadable", path=path)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_special_files_are_refused_at_once(tmp_path, make):
    path = tmp_path / "special"
    make(path)
    refused(lambda: read_json(path), code="unreadable", path=path)
    refused(lambda: file_sha256(path), code="missing", path=path)
    refused(lambda: explained(path, "cannot be read", "give another").__enter__(), code="unreadable", path=path)


def test_arrays_of_a_bomb_are_refused_unread(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(10**6), b=np.zeros(10**6))
    with pytest.raises(ValueError, match=r"8,000,128 bytes, at most 8,000,000"):
        read_arrays(tmp_path / "a.npz", ["a"], most=8_000_000)
    assert read_arrays(tmp_path / "a.npz", ["a"], most=9_000_000)["a"].shape == (10**6,)


def test_unfinished_folder_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / ".out.partial").symlink_to(tmp_path / "mine")
    for do in (lambda: partial_folder(tmp_path / "out"), lambda: new_folder(tmp_path / "out").__enter__()):
        refused(do, "is a link", code="unwritable", path=tmp_path / ".out.partial")
    assert not any((tmp_path / "mine").iterdir())


def test_unfinished_folder_with_a_damaged_plan_is_refused(tmp_path):
    assert begin_partial(tmp_path, {"count": 3}, "sampling") == {"count": 3}
    (tmp_path / "plan.json").write_text("[1]")
    refused(lambda: begin_partial(tmp_path, {"count": 3}, "sampling"), code="unreadable", path=tmp_path / "plan.json")

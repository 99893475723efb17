"""What is written to and read from the disk: models, pictures, arrays; whole or not at all, never a pickle."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from support.files import contents
from support.refusal import refused
from torch import Tensor

import pra
from pra.config import GuidanceSchedule, SamplingConfig
from pra.models import weights
from pra.models.pra import PRA
from pra.utils.files import check_output, new_folder, output_format, save_images, write_atomically
from pra.utils.pixels import GAP, contact_sheet, from_uint8, to_pil, to_uint8

FullDisk = Callable[[int], AbstractContextManager[None]]


def same_weights(a: PRA, b: PRA) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(x == y and torch.equal(u, v) for (x, u), (y, v) in pairs)


# --- models -------------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_to_the_bit(tmp_path: Path) -> None:
    model = PRA(pra.recipe("tiny").model, seed=3)
    model.sampling = SamplingConfig(guidance=2.5, schedule=GuidanceSchedule.LINEAR, steps=5)
    model.classes = tuple("zyxwvutsrq")
    folder = pra.save(model, tmp_path / "new" / "model")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = pra.load(folder)
    assert same_weights(loaded, model)
    assert (loaded.config, loaded.sampling, loaded.classes) == (model.config, model.sampling, model.classes)
    assert not loaded.training


def test_half_precision_weights_come_back_as_what_the_model_computes_in(tmp_path: Path) -> None:
    model = PRA(pra.recipe("tiny").model).to(torch.bfloat16)
    loaded = pra.load(pra.save(model, tmp_path / "model"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert same_weights(loaded.to(torch.bfloat16), model)


def test_a_model_without_a_codec(tmp_path: Path) -> None:
    model = PRA(pra.recipe("tiny:teacher-forced").model)
    assert same_weights(pra.load(pra.save(model, tmp_path / "model")), model)


def test_loading_a_run_a_checkpoint_and_a_saved_model(trained: Path, tmp_path: Path) -> None:
    from_run = pra.load(trained)
    newest = trained / "checkpoints" / "step-00000020"
    assert same_weights(from_run, pra.load(newest))
    assert not same_weights(from_run, pra.load(trained / "checkpoints" / "step-00000010"))
    raw = pra.load(trained, average="raw")
    assert not same_weights(from_run, raw)
    with safe_open(newest / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("auxiliary.weight"), raw.auxiliary.weight)
    assert from_run.sampling == pra.recipe("tiny").sampling
    assert from_run.classes == tuple("0123456789")
    assert same_weights(pra.load(pra.save(from_run, tmp_path / "saved")), from_run)


def test_a_saved_model_has_no_average_to_choose(trained: Path, tmp_path: Path) -> None:
    folder = pra.save(pra.load(trained), tmp_path / "saved")
    assert same_weights(pra.load(folder), pra.load(folder, average="raw"))


def test_saving_never_overwrites(run: Path) -> None:
    before = contents(run)
    refused(lambda: pra.save(pra.load(run), run), "exists already", str(run))
    assert contents(run) == before


def test_a_model_on_a_full_disk(tmp_path: Path, full_disk: FullDisk) -> None:
    model = PRA(pra.recipe("tiny").model)
    for size in (100, 4096, 100_000):  # within the configuration, in the first and in a later block of the weights
        with full_disk(size):
            refused(lambda: pra.save(model, tmp_path / "model"), "cannot be written", "File too large")
        assert list(tmp_path.iterdir()) == []


def test_what_is_no_model(run: Path, tmp_path: Path) -> None:
    refused(lambda: pra.load(tmp_path / "nothing"), "nothing", "does not exist")
    refused(lambda: pra.load(run / "config.json"), "it is a file")
    refused(lambda: pra.load(run / "samples"), "neither a run nor a model")
    shutil.rmtree(run / "checkpoints")
    refused(lambda: pra.load(run), "has no checkpoint yet", "pra train")


@pytest.mark.parametrize("left", [0, 4, 8, 100, -1])
def test_truncated_weights(trained: Path, tmp_path: Path, left: int) -> None:
    folder = pra.save(pra.load(trained), tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    refused(lambda: pra.load(folder), str(path), "cannot be read")


def test_weights_of_another_model(tmp_path: Path) -> None:
    config = pra.recipe("tiny").model
    one = pra.save(PRA(config), tmp_path / "one")
    other = pra.save(PRA(pra.recipe("tiny:states").model, seed=1), tmp_path / "other")
    shutil.copy(other / "model.safetensors", one)
    assert same_weights(pra.load(one), pra.load(other))  # of the same shapes: fine
    shutil.copy(pra.save(PRA(pra.recipe("digits").model), tmp_path / "digits") / "model.safetensors", one)
    refused(lambda: pra.load(one), "model.safetensors is not of the model", "condition.embedding", "restore the file")


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("format", 3, "is of format 3, this version of pra reads 2; install a newer pra"),
        ("format", None, "is of format None"),
        ("model", None, "expected the fields of ModelConfig"),
        ("model", {"channels": 1}, "missing"),
        ("sampling", {"guidanse": 1.0}, "did you mean 'guidance'"),
        ("sampling", {"solver": "eular"}, "did you mean 'euler'"),
        ("classes", ["0", "1"], "does not name the 10 classes"),
        ("classes", 3, "does not name the 10 classes"),
    ],
)
def test_a_damaged_config(trained: Path, tmp_path: Path, key: str, value: object, part: str) -> None:
    folder = pra.save(pra.load(trained), tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {key: value}))
    refused(lambda: pra.load(folder), part)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_config_that_is_no_json_object(trained: Path, tmp_path: Path, text: bytes) -> None:
    folder = pra.save(pra.load(trained), tmp_path / "model")
    (folder / "config.json").write_bytes(text)
    refused(lambda: pra.load(folder), str(folder / "config.json"))


def test_a_run_holds_no_pickle(trained: Path) -> None:
    kinds = {re.sub(r"events\.out\.tfevents.*", "tfevents", path.name).split(".")[-1] for path in trained.rglob("*.*")}
    assert kinds == {"json", "jsonl", "png", "safetensors", "tfevents"}


def test_a_stranger_s_pickle_is_not_opened(trained: Path, tmp_path: Path) -> None:
    """Neither instead of the weights nor beside them."""
    folder = pra.save(pra.load(trained), tmp_path / "model")
    (folder / "model.pt").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    pra.load(folder)
    shutil.move(folder / "model.pt", folder / "model.safetensors")
    refused(lambda: pra.load(folder), "cannot be read")
    assert not Path("owned").exists()


# --- checkpoints --------------------------------------------------------------------------------------------


def damage(run: Path, step: int, name: str = "model.safetensors") -> None:
    path = run / "checkpoints" / f"step-{step:08d}" / name
    path.write_bytes(path.read_bytes()[:-1])


def test_a_damaged_checkpoint_is_passed_over_and_it_says_so(run: Path) -> None:
    previous = pra.load(run / "checkpoints" / "step-00000010")
    shard = "optimizer/shard-00001-model-00001-of-00001.safetensors"
    for place, name in enumerate(("model.safetensors", "ema.safetensors", shard, "config.json", "state.json")):
        copy = Path(shutil.copytree(run, run.with_name(str(place))))
        damage(copy, 20, name)
        if name == "state.json":
            (copy / "checkpoints" / "step-00000020" / name).write_text('{"step"')
        with pytest.warns(UserWarning, match="step-00000020 is damaged .*step-00000010, is used"):
            assert same_weights(pra.load(copy), previous)


def test_a_checkpoint_that_lacks_a_file(run: Path) -> None:
    (run / "checkpoints" / "step-00000020" / "ema.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"ema.safetensors is missing"):
        assert weights.newest_checkpoint(run) == run / "checkpoints" / "step-00000010"


@pytest.mark.parametrize("state", ["[]", '{"sizes": 3}', '{"sizes": [1]}', "{}"])
def test_a_manifest_that_says_nothing(run: Path, state: str) -> None:
    (run / "checkpoints" / "step-00000020" / "state.json").write_text(state)
    with pytest.warns(UserWarning, match=r"no readable state.json"):
        weights.newest_checkpoint(run)


def closed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Folders of this name cannot be listed. (Root may list every folder, so permissions are no test.)"""
    for listing in ("listdir", "scandir"):
        original = getattr(os, listing)

        def refuse(path: Any = ".", original: Any = original) -> Any:
            if Path(os.fspath(path)).name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return original(path)

        monkeypatch.setattr(os, listing, refuse)


def test_a_closed_folder_of_checkpoints_is_not_an_empty_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed(monkeypatch, "checkpoints")
    refused(lambda: pra.load(run), f"{run / 'checkpoints'} cannot be read (Permission denied)")
    assert weights.last_good(run) == "the earlier checkpoints cannot be read"
    metrics = (run / "metrics.jsonl").read_bytes()
    config = pra.config.override(pra.recipe("tiny"), "train.steps", "30")
    refused(lambda: pra.train(config, run, device="cpu", progress=False), "checkpoints cannot be read")
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_checkpoints_that_are_no_folder(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("")
    refused(lambda: pra.load(run), "checkpoints cannot be read (Not a directory)")


def test_no_checkpoint_is_whole(run: Path) -> None:
    damage(run, 10)
    damage(run, 20)
    refused(lambda: pra.load(run), "step-00000010 is damaged", "step-00000020 is damaged", "remove them")
    assert weights.last_good(run) == "there is no earlier checkpoint"


# --- pictures -----------------------------------------------------------------------------------------------


def random_images(count: int, channels: int, height: int = 8, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator).to(torch.uint8)


def test_every_byte_survives_the_way_through_floats() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(values)), values)
    assert from_uint8(values).aminmax() == (-1.0, 1.0)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_one_picture(channels: int, mode: str) -> None:
    image = random_images(1, channels)[0]
    picture = to_pil(from_uint8(image))
    assert (picture.mode, picture.size) == (mode, (6, 8))
    assert np.array_equal(np.asarray(picture).reshape(8, 6, channels), image.permute(1, 2, 0))


def test_channels_that_no_picture_has() -> None:
    refused(lambda: to_pil(random_images(1, 2)[0]), "2 channels", ".npz")


def test_a_grid() -> None:
    cells = random_images(5, 3)
    sheet = contact_sheet(cells, columns=2, upscale=1)
    assert sheet.size == (2 * (6 + GAP) + GAP, 3 * (8 + GAP) + GAP)
    pixels = np.asarray(sheet)
    for index, cell in enumerate(cells):
        top, left = (GAP + n * (size + GAP) for n, size in zip(divmod(index, 2), (8, 6), strict=True))
        assert np.array_equal(pixels[top : top + 8, left : left + 6], cell.permute(1, 2, 0))
    assert (pixels[-10:, -8:] == 255).all()  # the sixth place is empty


def test_a_grid_of_small_images_is_enlarged() -> None:
    assert contact_sheet(random_images(2, 1), columns=2).height == 64 + 2 * GAP
    assert contact_sheet(random_images(2, 1, 100, 100), columns=2).height == 100 + 2 * GAP
    assert contact_sheet(random_images(1, 1), columns=1).size == (6, 8)  # alone, it is itself


# --- output -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ending"),
    [("a.png", ".png"), ("a.PNG", ".png"), ("a.npz", ".npz"), ("a", ""), ("guidance-1.5", ""), ("a.b/c", "")],
)
def test_endings(name: str, ending: str) -> None:
    assert output_format(Path(name)) == ending


@pytest.mark.parametrize("name", ["a.jpg", "a.npy", "a.pt"])
def test_unknown_endings(name: str) -> None:
    refused(lambda: output_format(Path(name)), name, "FILE.png, FILE.npz or a folder")


def test_output_that_exists(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "elsewhere")
    for name in ("a.png", "folder", "link.png"):
        refused(lambda: check_output(tmp_path / name), name, "exists already", "--out")  # noqa: B023
    refused(lambda: check_output(tmp_path / "a.png" / "b.png"), "a.png is a file")
    refused(lambda: save_images(random_images(1, 1), [0], ["x"], 1, tmp_path / "a.png"), "exists already")
    assert (tmp_path / "a.png").read_text() == "mine"


def test_output_where_nobody_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    refused(lambda: check_output(tmp_path / "new" / "a.png"), f"{tmp_path} cannot be written to")


def test_arrays(tmp_path: Path) -> None:
    cells = random_images(3, 3)
    save_images(from_uint8(cells), [2, 0, 1], ["a", "b", "c"], 1, tmp_path / "new" / "x.npz")
    with np.load(tmp_path / "new" / "x.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1"]
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], cells.permute(0, 2, 3, 1))
        assert arrays["arr_1"].tolist() == [2, 0, 1]


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    cells = random_images(2, 1)
    save_images(cells, [0, 1], ["a", "b"], 1, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "b.png")), cells[1, 0])


@pytest.mark.parametrize("name", ["x.png", "x.npz", "x"])
def test_pictures_on_a_full_disk(tmp_path: Path, full_disk: FullDisk, name: str) -> None:
    cells = random_images(64, 3, 32, 32)
    with full_disk(1000):
        refused(
            lambda: save_images(cells, [0] * 64, [str(n) for n in range(64)], 8, tmp_path / name),
            name,
            "cannot be written: File too large; nothing was left half-written",
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EFBIG, "raise the limit on the size of files (ulimit -f)"),
        (errno.EACCES, "choose another place, or make this one writable"),
        (errno.EROFS, "choose another place, or make this one writable"),
        (errno.ENOTDIR, "choose another place"),
        (errno.EIO, "look after the disk"),
    ],
)
def test_the_advice_fits_the_error(tmp_path: Path, code: int, advice: str) -> None:
    def fail(_: object) -> None:
        raise OSError(code, os.strerror(code))

    def fill() -> None:
        with new_folder(tmp_path / "folder"):
            fail(None)

    for do in (lambda: write_atomically(tmp_path / "file", fail), fill):
        with pytest.raises(pra.PraError) as raised:
            do()
        assert f"cannot be written: {os.strerror(code)}; nothing was left half-written; {advice}" in str(raised.value)
        assert ("space" in str(raised.value).rpartition(";")[2]) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_written_keep_the_system_s_number(tmp_path: Path, full_disk: FullDisk) -> None:
    with full_disk(10), pytest.raises(OSError, match="File too large") as raised:
        weights.write_tensors({"a": torch.zeros(4096)}, tmp_path / "a.safetensors")
    assert raised.value.errno == errno.EFBIG


def test_a_file_that_could_not_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert contents(tmp_path) == {"file": b"old"}


def test_files_get_the_permissions_that_others_expect(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "new") as folder:  # noqa: PT012
        (folder / "a").write_text("a")
        assert not (tmp_path / "new").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "new") as folder:
        (folder / "a").write_text("a")
    assert contents(tmp_path) == {"new/a": b"a"}


def test_what_a_killed_process_left_of_a_folder_is_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "old").write_text("old")
    with new_folder(tmp_path / "new") as folder:
        (folder / "a").write_text("a")
    assert contents(tmp_path) == {"new/a": b"a"}


def test_a_disk_that_cannot_sync_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems report a full disk only then. That a folder cannot be synced is nothing to worry about."""
    original = os.fsync

    def fail(kind: Callable[[int], bool]) -> Callable[[int], None]:
        def sync(descriptor: int) -> None:
            if kind(os.fstat(descriptor).st_mode):
                raise OSError(28, "No space left on device")
            original(descriptor)

        return sync

    model = PRA(pra.recipe("tiny").model)
    monkeypatch.setattr(os, "fsync", fail(stat.S_ISREG))
    refused(lambda: pra.save(model, tmp_path / "model"), "No space left on device")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "fsync", fail(stat.S_ISDIR))
    assert same_weights(pra.load(pra.save(model, tmp_path / "model")), model)


def test_save_replaced_part_is_refused(tmp_path: Path) -> None:
    """It could not be loaded: the configuration builds another part."""
    model = PRA(pra.recipe("tiny").model)
    model.codec.decoder.out = torch.nn.Sequential(model.codec.decoder.out, torch.nn.Tanh())
    refused(lambda: pra.save(model, tmp_path / "model"), "cannot be saved", "codec.decoder.out.weight is missing")
    assert not (tmp_path / "model").exists()

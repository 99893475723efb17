"""What users give to ``pra eval``: broken ``.npz`` files, statistics that say nonsense, folders of all sorts."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.refusal import refused
from torch import Tensor

from pra.commands.eval import evaluate_command
from pra.data import Source, open_source
from pra.errors import PraError
from pra.evaluation import classifier
from pra.evaluation.classifier import Classifier, cache_folder
from pra.evaluation.features import Features
from pra.evaluation.reference import from_file, recorded_features
from pra.evaluation.samples import common_shape, pictures
from pra.sampling.batches import NpzBatch

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
ROWS = np.random.default_rng(1).normal(size=(30, 5))
DESCRIPTION = {
    "format": 1, "name": "them", "features": "inception", "fingerprint": "0" * 64, "shape": [1, 8, 8],
    "fit": "pad", "count": 30,
}  # fmt: skip
STATISTICS: dict[str, Any] = {
    "mu": ROWS.mean(axis=0),
    "sigma": np.cov(ROWS.T),
    "pra": json.dumps(DESCRIPTION),
    "features": ROWS.astype(np.float32),
}


class Blind:
    """An extractor that must not be asked."""

    name = "inception"
    fingerprint = "0" * 64
    dim = 5
    device = CPU
    classes: tuple[str, ...] | None = None
    accuracy: float | None = None

    def __call__(self, images: Tensor) -> Features:
        raise AssertionError("the images are read too early")


# --- broken archives ----------------------------------------------------------------------------------------


def patched(data: bytes, local: int, central: int, value: int) -> bytes:
    """The bytes of an archive, changed at these places of all its entries."""
    changed = bytearray(data)
    for mark, place in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        found = changed.find(mark)
        while found >= 0:
            changed[found + place] = value
            found = changed.find(mark, found + 1)
    return bytes(changed)


def torn_header(data: bytes) -> bytes:
    """The same archive, in which no array's header closes its brackets."""
    torn = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(torn, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"}", b"{", 1).replace(b")", b"(", 1))
    return torn.getvalue()


BREAKS: dict[str, Callable[[bytes], bytes]] = {
    "encrypted": lambda data: patched(data, 6, 8, 1),
    "unknown compression": lambda data: patched(data, 8, 10, 77),
    "damaged compression": lambda data: data[:90] + bytes(n ^ 255 for n in data[90:130]) + data[130:],
    "torn header": torn_header,
    "half of it": lambda data: data[: len(data) // 2],
    "nothing": lambda data: b"",
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_archive_is_one_line(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "b.npz"
    np.savez_compressed(path, arr_0=IMAGES, arr_1=np.arange(20))
    assert len(list(NpzBatch(path).batches(8))) == 3
    path.write_bytes(BREAKS[broken](path.read_bytes()))
    refused(lambda: list(NpzBatch(path).batches(8)), str(path), "write it again")
    refused(lambda: evaluate_command(path, features="classifier", reference="digits"), str(path), "write it again")
    np.savez_compressed(path, **STATISTICS)
    from_file(path, Blind())
    path.write_bytes(BREAKS[broken](path.read_bytes()))
    for read in (lambda: from_file(path, Blind()), lambda: recorded_features(path)):
        refused(read, str(path), "cannot be read as .npz", "give statistics, a batch, or a data source")


def test_members_that_are_no_arrays(tmp_path: Path) -> None:
    path = tmp_path / "b.npz"
    np.savez(path, arr_0=IMAGES)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("arr_1.npy", "0, 1, 2")
    refused(lambda: NpzBatch(path), str(path), "arr_1 is no array")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", "1")
        archive.writestr("sigma.npy", "1")
    refused(lambda: from_file(path, Blind()), str(path), "mu is no array")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a\nb", "1")
    refused(lambda: from_file(path, Blind()), str(path), r"'a\nb'")
    refused(lambda: NpzBatch(path), str(path), r"'a\nb'")


def test_batches_that_are_not_what_they_say(tmp_path: Path) -> None:
    path = tmp_path / "b.npz"
    np.savez(path, IMAGES[:0])
    refused(lambda: evaluate_command(path, features="classifier", reference="digits"), str(path), "is empty, (0, 8, 8")
    np.savez(path, IMAGES[:1])
    refused(lambda: evaluate_command(path, features="classifier", reference="digits"), str(path), "one image")
    np.savez(path, IMAGES, np.where(np.arange(20) == 7, -1, 3))
    refused(lambda: NpzBatch(path), str(path), "arr_1 has the label -1")
    for shape, what in (((30, 8, 8, 1), "20 of 30"), ((19, 8, 8, 1), "20 of 19"), ((-20, 8, 8, 1), "uint8 (-20,")):
        with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(IMAGES.tobytes())
        refused(lambda: NpzBatch(path), str(path), what)  # as the reference too it is refused before it is read
        refused(lambda: from_file(path, Blind()), str(path), what)


# --- statistics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"pra": "[]"}, ["damaged", "list in place of an object"]),
        ({"pra": "[" * 100_000}, ["damaged"]),
        ({"pra": '{"format": 1}'}, ["damaged", "has name None"]),
        ({"pra": json.dumps(DESCRIPTION | {"features": 3})}, ["damaged", "has features 3"]),
        ({"pra": json.dumps(DESCRIPTION | {"shape": [8, "8", 1]})}, ["damaged", "shape [8, '8', 1]"]),
        ({"pra": json.dumps(DESCRIPTION | {"features": "classifier", "fingerprint": None})}, ["lacks the fingerprint"]),
        ({"features": ROWS[:, :4]}, ["features is float64 (30, 4)", "(n, 5)"]),
        ({"features": ROWS[0]}, ["features is float64 (5,)", "(n, 5)"]),
        ({"features": np.full((30, 5), "a")}, ["features is <U1 (30, 5)"]),
        ({"features": np.full((30, 5), np.nan)}, ["features", "not finite"]),
        ({"mu": np.full(5, "a")}, ["mu is <U1", "not real numbers"]),
        ({"sigma": np.eye(5) + 1j}, ["sigma complex128", "not real numbers"]),
        ({"mu_s": np.zeros(4)}, ["mu_s is (4,)", "sigma_s (0,)"]),
    ],
)
def test_statistics_of_our_own_that_say_nonsense(tmp_path: Path, change: dict[str, Any], parts: list[str]) -> None:
    path = tmp_path / "s.npz"
    np.savez(path, **(STATISTICS | change))
    refused(lambda: from_file(path, Blind()), str(path), *parts)
    if "pra" in change:
        refused(lambda: recorded_features(path), str(path), *parts)


def test_statistics_of_our_own_without_numbers(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    np.savez(path, pra=STATISTICS["pra"], arr_0=IMAGES)
    refused(lambda: from_file(path, Blind()), str(path), "mu is (0,)")


def test_statistics_of_our_own_in_another_precision(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **(STATISTICS | {"features": ROWS.astype(">f8")}))
    kept = from_file(tmp_path / "s.npz", Blind()).kept
    assert kept is not None
    assert torch.equal(kept, torch.from_numpy(ROWS.astype(np.float32)))


def test_statistics_are_refused_before_the_images_beside_them_are_read(tmp_path: Path) -> None:
    path, other = tmp_path / "s.npz", Blind()
    np.savez(path, mu=np.zeros(5), sigma=np.eye(4), arr_0=IMAGES)
    refused(lambda: from_file(path, Blind()), str(path), "(4, 4)")
    np.savez(path, mu=np.zeros(5), sigma=np.eye(5), arr_0=IMAGES)
    other.name = "classifier"
    refused(lambda: from_file(path, other), str(path), "--features inception")


# --- folders of pictures ------------------------------------------------------------------------------------


def folder(path: Path, images: list[Image.Image], ending: str = "png") -> Source:
    path.mkdir()
    for number, image in enumerate(images):
        image.save(path / f"{number}.{ending}")
    return open_source(f"folder:{path}")


GREY, COLOUR = (lambda size=(6, 4): Image.new("L", size, 90)), (lambda: Image.new("RGB", (6, 4), (200, 100, 0)))


def test_one_picture_of_colour_is_enough(tmp_path: Path) -> None:
    mixed = folder(tmp_path / "mixed", [GREY(), GREY(), COLOUR(), GREY()])
    assert common_shape(mixed) == ((4, 6), 3)
    [batch] = pictures(mixed, range(4), 9)
    assert batch.images[:, :, 0, 0].tolist() == [[90] * 3, [90] * 3, [200, 100, 0], [90] * 3]
    [part] = pictures(mixed, [0, 1], 9)  # those that are judged are shown as all would be
    assert part.images.shape == (2, 3, 4, 6)
    with_palette = folder(tmp_path / "palette", [GREY(), COLOUR().quantize(4)])
    assert common_shape(with_palette) == ((4, 6), 3)


def test_figures_do_not_depend_on_how_small_a_picture_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "RECIPE", classifier.Recipe(epochs=1))
    reference = tmp_path / "reference"
    for number in range(20):
        (reference / f"class {number % 2}").mkdir(parents=True, exist_ok=True)
        Image.effect_noise((8, 8), 9 * number).save(reference / f"class {number % 2}" / f"{number}.png")
    grey, rest = Image.effect_noise((8, 8), 50), [Image.new("RGB", (8, 8), (99, 60 * n, 0)) for n in range(4)]
    figures = []
    for name, first in (("small", grey), ("large", grey.convert("RGB"))):
        folder(tmp_path / name, [first, *rest])
        out = tmp_path / f"{name}.json"
        options: dict[str, Any] = {"features": "classifier", "reference": f"folder:{reference}", "device": "cpu"}
        evaluate_command(tmp_path / name, out=out, **options)
        figures.append(json.loads(out.read_text())["figures"])
    assert figures[0] == figures[1]


def test_grey_pictures_of_any_depth_stay_grey(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((4, 6), 51 * 257, np.uint16))
    grey = folder(tmp_path / "grey", [Image.new("1", (6, 4), 1), GREY(), deep])
    assert common_shape(grey) == ((4, 6), 1)
    [batch] = pictures(grey, range(3), 9)
    assert batch.images[:, 0, 0, 0].tolist() == [255, 90, 51]


def test_what_is_transparent_is_judged_on_white(tmp_path: Path) -> None:
    source = folder(tmp_path / "alpha", [Image.new("RGBA", (6, 4), (0, 0, 0, 0)), Image.new("LA", (6, 4), (10, 255))])
    [batch] = pictures(source, range(2), 9)
    assert batch.images[:, :, 0, 0].tolist() == [[255] * 3, [10] * 3]


def test_the_first_picture_of_another_size_is_named_before_any_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = folder(tmp_path / "odd", [GREY(), GREY(), GREY((4, 6)), GREY((7, 7))])
    monkeypatch.setattr(type(odd), "image", None)
    parts = f"{tmp_path}/odd/2.png is 6x4", f"{tmp_path}/odd/0.png 4x6", "one size"
    refused(lambda: common_shape(odd), *parts)
    refused(lambda: evaluate_command(tmp_path / "odd", features="classifier", reference="digits"), *parts)


def test_the_size_is_that_of_the_picture_held_upright(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    for ending in ("jpg", "png"):
        source = folder(tmp_path / ending, [GREY(), GREY()], ending)
        GREY((4, 6)).save(tmp_path / ending / f"1.{ending}", exif=turned)
        assert common_shape(source) == ((4, 6), 1)
        [batch] = pictures(source, range(2), 9)
        assert batch.images.shape == (2, 1, 4, 6)


def test_a_broken_picture_is_named_without_advice_for_training(tmp_path: Path) -> None:
    source = folder(tmp_path / "broken", [GREY(), GREY(), Image.effect_noise((6, 4), 50)])
    path = tmp_path / "broken" / "2.png"
    whole = path.read_bytes()
    for data, problem in ((whole[:60], "cannot be decoded"), (b"text", "not an image"), (b"", "not an image")):
        path.write_bytes(data)
        with pytest.raises(PraError, match=problem) as raised:
            list(pictures(source, range(3), 9))
        assert str(raised.value).startswith(f"{path}: ")
        assert "remove it" in str(raised.value)
        assert "on_corrupt" not in str(raised.value)
    path.unlink()
    Image.new("F", (6, 4)).save(path, "TIFF")
    refused(lambda: common_shape(source), str(path), "floating-point", "remove it")


# --- the classifier's file ----------------------------------------------------------------------------------


def test_only_a_broken_file_of_the_cache_is_to_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache_folder().mkdir(parents=True)
    for path, way_out in (
        (cache_folder() / f"{'0a' * 16}.safetensors", "remove it to have it fitted anew"),
        (tmp_path / "mine.safetensors", "give another --weights, or none to fit one"),
    ):
        path.write_bytes(b"nonsense")
        refused(lambda path=path: Classifier(path, CPU), str(path), way_out)  # type: ignore[misc]

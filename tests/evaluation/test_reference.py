"""Statistics and batches in files: ours, those of others, and broken ones."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from support.judging import Projection, judged, pixels, reference_of
from support.refusal import refused

from pra.evaluation.reference import from_file, recorded_classifier
from pra.sampling.batches import NpzBatch
from pra.utils.provenance import file_sha256

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
ROWS = np.random.default_rng(1).normal(size=(30, 5))
DESCRIPTION = {
    "format": 1, "name": "them", "features": "inception", "fingerprint": "0" * 64, "shape": [1, 8, 8],
    "fit": "pad", "count": 30,
}  # fmt: skip
STATISTICS = {
    "mu": ROWS.mean(axis=0),
    "sigma": np.cov(ROWS.T),
    "pra": json.dumps(DESCRIPTION),
    "features": ROWS.astype(np.float32),
}
INCEPTION = Projection(name="inception")


def test_statistics_go_through_a_file(tmp_path, full_disk):
    extractor = Projection()
    reference = reference_of(pixels(30), extractor)
    with full_disk(500):
        refused(lambda: reference.save(tmp_path / "s.npz"), f"{tmp_path}/s.npz", "nothing was left")
    assert not any(tmp_path.iterdir())
    reference.save(tmp_path / "s.npz")
    read = from_file(tmp_path / "s.npz", extractor, progress=False)
    assert (read.features, read.fingerprint, read.shape, read.fit, read.count) == (
        "projection", "0" * 64, (1, 4, 4), "pad", 30
    )  # fmt: skip
    assert read.sha256 == reference.sha256
    assert read.file_sha256 == file_sha256(tmp_path / "s.npz")
    assert judged(pixels(20), read, extractor).figures == judged(pixels(20), reference, extractor).figures
    with np.load(tmp_path / "s.npz") as file:  # the keys that ADM's evaluator reads
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file.files)
        arrays = dict(file)
    older = json.loads(str(arrays["pra"]))
    del older["images_sha256"], older["prepared"]
    np.savez(
        tmp_path / "older.npz", **arrays | {"pra": json.dumps(older), "features": arrays["features"].astype(">f8")}
    )
    read = from_file(tmp_path / "older.npz", extractor, progress=False)
    assert read.images_sha256 is None
    assert read.kept is not None
    assert torch.equal(read.kept, torch.from_numpy(arrays["features"]))


def test_statistics_of_others(tmp_path):
    path = tmp_path / "s.npz"
    own = reference_of(pixels(30), Projection())
    assert own.spatial is not None
    adm = dict(zip(("mu", "sigma", "mu_s", "sigma_s"), (*own.pool, *own.spatial), strict=True))
    np.savez(path, **{key: array.astype(np.float32) for key, array in adm.items()})
    read = from_file(path, INCEPTION, progress=False)
    assert (read.features, read.fingerprint, read.kept) == ("inception", None, None)
    figures = judged(pixels(20, seed=1), read, INCEPTION).figures["adm"]
    expected = judged(pixels(20, seed=1), own, Projection()).figures["adm"]
    assert figures["fid"] == pytest.approx(expected["fid"], rel=1e-5)
    assert figures["sfid"] == pytest.approx(expected["sfid"], rel=1e-5)
    assert "kid" not in figures
    refused(lambda: from_file(path, Projection(), progress=False), code="mismatch", path=path)
    np.savez(path, mu=np.zeros(9, np.float16), sigma=np.eye(9, dtype=np.float16))  # no warning of an overflow
    assert np.array_equal(from_file(path, INCEPTION).pool[1], np.eye(9))
    np.savez(path, mu=own.pool[0], sigma=own.pool[1])  # torch-fidelity's and JiT's keys
    assert judged(pixels(20), from_file(path, INCEPTION), INCEPTION).figures["adm"]["sfid"] is None


def test_batch_is_a_reference_with_statistics_or_without(tmp_path):
    path = tmp_path / "b.npz"
    images = pixels(30).permute(0, 2, 3, 1).numpy()
    np.savez(path, arr_0=images)
    own = reference_of(pixels(30), Projection())
    read = from_file(path, Projection(), progress=False)
    found, expected = (judged(pixels(20), reference, Projection()).figures["adm"] for reference in (read, own))
    assert found == pytest.approx(expected, rel=1e-6)
    # ADM's files: statistics of the whole data set beside a tenth of its images.
    np.savez(path, arr_0=images[:8], mu=own.pool[0], sigma=own.pool[1])
    read = from_file(path, INCEPTION, progress=False)
    assert read.sha256 != own.sha256  # no spatial statistics
    assert np.array_equal(read.pool[0], own.pool[0])
    assert read.kept is not None
    assert len(read.kept) == 8
    assert read.shape == (1, 4, 4)


def patched(data, local, central, value):
    """The bytes of an archive, changed at these places of all its entries."""
    changed = bytearray(data)
    for mark, place in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        found = changed.find(mark)
        while found >= 0:
            changed[found + place] = value
            found = changed.find(mark, found + 1)
    return bytes(changed)


def torn_header(data):
    """The same archive, in which no array's header closes its brackets."""
    torn = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(torn, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"}", b"{", 1).replace(b")", b"(", 1))
    return torn.getvalue()


BREAKS = {
    "encrypted": lambda data: patched(data, 6, 8, 1),
    "unknown compression": lambda data: patched(data, 8, 10, 77),
    "damaged compression": lambda data: data[:90] + bytes(n ^ 255 for n in data[90:130]) + data[130:],
    "torn header": torn_header,
    "half of it": lambda data: data[: len(data) // 2],
    "nothing": lambda data: b"",
}


@pytest.mark.parametrize("broken", BREAKS)
def test_broken_archive_is_one_line(tmp_path, broken):
    path = tmp_path / "b.npz"
    np.savez_compressed(path, arr_0=IMAGES, arr_1=np.arange(20))
    assert len(list(NpzBatch(path).batches(8))) == 3
    path.write_bytes(BREAKS[broken](path.read_bytes()))
    refused(lambda: list(NpzBatch(path).batches(8)), str(path))
    np.savez_compressed(path, **STATISTICS)
    from_file(path, INCEPTION)
    path.write_bytes(BREAKS[broken](path.read_bytes()))
    for read in (lambda: from_file(path, INCEPTION), lambda: recorded_classifier(path)):
        refused(read, str(path), "cannot be read as .npz")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"pra": "[]"}, "list in place of an object"),
        ({"pra": "[" * 100_000 + "]" * 100_000}, "deeper"),
        ({"pra": '{"format": 1}'}, "damaged"),
        ({"pra": '{"format": 2}'}, "newer pra"),
        ({"pra": json.dumps(DESCRIPTION | {"features": 3})}, "damaged"),
        ({"pra": json.dumps(DESCRIPTION | {"shape": 8})}, "damaged"),
        ({"features": ROWS[:, :4]}, "features"),
        ({"features": ROWS[0]}, "features"),
        ({"features": np.full((30, 5), "a")}, "features"),
        ({"features": np.full((30, 5), np.nan)}, "features"),
        ({"mu": np.full(5, "a")}, "mu"),
        ({"sigma": np.eye(5) + 1j}, "sigma"),
        ({"mu_s": np.zeros(4)}, "sigma_s"),
        ({"pra": json.dumps(DESCRIPTION | {"count": "many"})}, "count"),
        ({"pra": json.dumps(DESCRIPTION | {"shape": [1e9, "x"]})}, "shape"),
        ({"sigma": np.diag([1, 1, 1, 1, 1e308])}, "sigma"),
        ({"sigma": np.diag([1, 1, 1, 1, np.inf])}, "sigma"),
        ({"sigma": np.diag([1, 1, 1, 1, -0.5])}, "sigma has the eigenvalue -0.5"),
        ({"sigma": np.eye(5) + 2 * np.eye(5)[::-1]}, "has the eigenvalue -1"),
        ({"sigma": np.eye(5) + np.eye(5, k=1) / 9}, "not symmetric"),
        ({"sigma": np.full((5, 5), None)}, "cannot be read as .npz"),
        ({"sigma": np.eye(4)}, "sigma"),
        ({"mu": np.full(5, 1e300)}, "mu"),
        ({"mu_s": np.zeros(3), "sigma_s": -np.eye(3)}, "sigma_s"),
        ({"mu_s": np.zeros(0), "sigma_s": np.zeros((0, 0)), "mu": np.zeros(0)}, "sigma"),
    ],
)
def test_statistics_of_our_own_with_nonsense_are_refused(tmp_path, change, name):
    path = tmp_path / "s.npz"
    np.savez(path, **(STATISTICS | change))
    refused(lambda: from_file(path, INCEPTION), str(path), name)
    if "pra" in change:
        refused(lambda: recorded_classifier(path), str(path), name)


@pytest.mark.parametrize(
    ("arrays", "part"),
    [
        ({"mu": np.array([object()]), "sigma": np.eye(1)}, "cannot be read"),
        ({"mean": np.zeros(5), "cov": np.eye(5)}, "mean, cov"),
        ({"mu": np.zeros(5), "sigma": np.eye(4), "arr_0": IMAGES}, "(4, 4)"),  # before the images are read
        ({"mu": np.full(5, np.nan), "sigma": np.eye(5)}, "finite"),
        ({"mu": np.zeros(7), "sigma": np.eye(7)}, "7"),
        ({"pra": STATISTICS["pra"], "arr_0": IMAGES}, "mu"),
    ],
)
def test_statistics_of_others_with_nonsense_are_refused(tmp_path, arrays, part):
    path = tmp_path / "s.npz"
    np.savez(path, **arrays)
    refused(lambda: judged(pixels(9), from_file(path, INCEPTION), INCEPTION), str(path), part)


def test_members_that_are_not_arrays_are_refused(tmp_path):
    path = tmp_path / "b.npz"
    np.savez(path, arr_0=IMAGES)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("arr_1.npy", "0, 1, 2")
    refused(lambda: NpzBatch(path), str(path), "arr_1")
    for members, part in ((("mu.npy", "sigma.npy"), "mu"), (("a\nb",), r"a\nb")):
        with zipfile.ZipFile(path, "w") as archive:
            for name in members:
                archive.writestr(name, "1")
        refused(lambda: from_file(path, INCEPTION), str(path), part)


# --- batches ------------------------------------------------------------------------------------------------


def test_batches_of_another_length_than_they_say_are_refused(tmp_path):
    path = tmp_path / "b.npz"
    for shape, what in (((30, 8, 8, 1), "20 of 30"), ((19, 8, 8, 1), "20 of 19"), ((-20, 8, 8, 1), "uint8 (-20,")):
        with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(IMAGES.tobytes())
        refused(lambda: NpzBatch(path), str(path), what)  # as the reference too it is refused before it is read
        refused(lambda: from_file(path, INCEPTION), str(path), what)


def test_reference_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "s.npz")
    for read in (lambda: from_file(tmp_path / "s.npz", INCEPTION), lambda: NpzBatch(tmp_path / "s.npz")):
        refused(read, "not a regular file", code="unreadable", path=tmp_path / "s.npz")


def test_spatial_statistics_of_another_size_give_no_sfid(tmp_path):
    own = reference_of(pixels(30), Projection())
    np.savez(tmp_path / "s.npz", mu=own.pool[0], sigma=own.pool[1], mu_s=np.zeros(7), sigma_s=np.eye(7))
    read = from_file(tmp_path / "s.npz", INCEPTION)
    with pytest.warns(UserWarning, match="no sFID"):
        figures = judged(pixels(20), read, INCEPTION).figures["adm"]
    assert figures["sfid"] is None
    assert figures["fid"] is not None

"""Hugging Face data sets from local files, whole and streamed in lanes."""

import os
import pickle
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from support.data import config, jpeg, picture, same_batches, same_jpeg, write_parquet
from support.refusal import refused

from pra.data import TrainingSet, batches, hf, loader, open_source
from pra.data.hf import LANES, UNIT, Lanes
from pra.data.images import CorruptImage

STREAM = "&streaming=true&window=4"
SIZES = (6, 8, 7, 6, 6, 9, 6, 9)
"""Rows of the files."""


@pytest.fixture(scope="module")
def rows(hub, tmp_path_factory):
    """A folder with 11 rows of several columns, the image ``i`` that of seed ``i``. To be read only."""
    path = tmp_path_factory.mktemp("rows")
    animals, pair = hub.ClassLabel(names=["cat", "dog", "emu"]), hub.ClassLabel(names=["a", "b"])
    labels = {
        "animal": (animals, lambda i: i % 3),
        "number": (hub.Value("int32"), lambda i: i % 4),
        "name": (hub.Value("string"), lambda i: "yx"[i % 2]),
        "some": (pair, lambda i: -1),
        "id": (hub.Value("int64"), lambda i: 10**15 if i == 1 else i),
    }
    write_parquet(path / "train.parquet", range(11), **labels)
    hub.Dataset.from_parquet(str(path / "train.parquet")).save_to_disk(path / ".saved")
    return path


@pytest.mark.parametrize("stream", ["", STREAM])
@pytest.mark.parametrize("file", ["", "/train.parquet", "/.saved/data-00000-of-00001.arrow"])
def test_hf_rows_are_read_in_any_order(rows, file, stream):
    source = open_source(f"hf:{rows}{file}?label=animal{stream}")
    assert source.classes == ("cat", "dog", "emu")
    assert source.labels.tolist() == [i % 3 for i in range(11)]
    assert source.labels.dtype == np.int64
    assert all(same_jpeg(source.image(index), index) for index in (10, 0, 5, 4, 9))
    assert source.where(4) == f"row 4 of {source.name}"


@pytest.mark.parametrize("stream", ["", STREAM])
@pytest.mark.parametrize(
    ("label", "classes", "labels"),
    [("number", "0123", [0, 1, 2, 3]), ("name", "xy", [1, 0, 1, 0]), ("none", ["image"], [0] * 4)],
)
def test_hf_labels_of_any_kind(rows, label, classes, labels, stream):
    source = open_source(f"hf:{rows}?label={label}{stream}")
    assert (source.classes, source.labels[:4].tolist(), len(source)) == (tuple(classes), labels, 11)


@pytest.mark.usefixtures("hub")
def test_hf_folder_of_images_names_classes(tmp_path):
    for name in ("cat/0.png", "cat/1.png", "dog/0.png"):
        path = tmp_path / "animals" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed=len(name)).save(path)
    for stream in ("?streaming=true", ""):
        source = open_source(f"hf:{tmp_path}/animals{stream}")
        assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [0, 0, 1])
        assert (np.asarray(source.image(2)) == np.asarray(picture(seed=9))).all()
    path.unlink()
    refused(lambda: source.image(2), f"{path}: No such file", code="unreadable", where=source.where(2))


@pytest.mark.usefixtures("hub")
def test_hf_folder_pictures_left_out_are_counted(tmp_path):
    for name in ("cat/0.png", "dog/0.png", "dog/1.heic", "dog/2.HEIC", "dog/notes.txt", "__MACOSX/3.heic"):
        path = tmp_path / "animals" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture().save(path, "PNG")
    with pytest.warns(UserWarning, match=f"2 left out, such as {tmp_path}/animals/dog/1.heic: .*folder:"):
        assert len(open_source(f"hf:{tmp_path}/animals")) == 2


@pytest.mark.usefixtures("cache")
def test_stream_labels_are_kept_while_files_stay(rows, capfd):
    def read_again():
        open_source(f"hf:{rows}?label=animal{STREAM}")
        return "reading labels" in capfd.readouterr().err

    assert read_again()
    assert not read_again()
    status = (rows / "train.parquet").stat()
    os.utime(rows / "train.parquet", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert read_again()


def test_hf_corrupt_images_are_named(hub, tmp_path):
    images = [{"bytes": jpeg(0)[:200], "path": None}, None]
    kinds = hub.Features({"image": hub.Image()})
    hub.Dataset.from_dict({"image": images}, features=kinds).to_parquet(str(tmp_path / "x.parquet"))
    for stream in ("", "&streaming=true"):
        source = open_source(f"hf:{tmp_path}/x.parquet?label=none{stream}")
        for index, problem in enumerate(("cannot be decoded", "has no image")):
            where = source.where(index)
            error = refused(lambda i=index: source.image(i), problem, code="unreadable", where=where)  # noqa: B023
            assert isinstance(error, CorruptImage)


@pytest.mark.parametrize(
    ("query", "code", "parts"),
    [
        ("", "invalid", ["label=COLUMN", "label=none", "animal, id, image, name, number, some"]),
        ("?label=animla", "unknown", ["'animla'", "did you mean 'animal'?"]),
        ("?image=img", "unknown", ["'img'"]),
        ("?image=name&label=none", "invalid", ["'name' holds Value"]),
        ("?image=none&label=none", "invalid", ["'none'"]),
        ("?label=image", "invalid", ["'image' holds no classes"]),
        ("?label=some", "invalid", ["row 0 has class -1", "label=none"]),
        ("?label=id", "invalid", ["row 1: class 1000000000000000", "label=none"]),
        ("?label=animal&split=test", "unreadable", ["test"]),
        ("?config=big&label=animal", "unreadable", ["'big' not found"]),
        ("?lable=label", None, ["lable", "did you mean 'label'?"]),
        *((f"?{key}=", "invalid", [f"{key}= lacks its value"]) for key in ("label", "revision", "split", "window")),
        ("?path=cifar10", "unknown", ["no setting 'path'"]),
        ("?streaming=yes", None, ["streaming", "'yes'"]),
        ("?streaming=true&window=0", None, ["window", "[1, 1e+06]"]),
        ("?streaming=true&label=some", "invalid", ["row 0 has class -1"]),
        ("@test", "invalid", ["?split=test"]),
    ],
)
def test_hf_bad_settings_are_refused(rows, query, code, parts):
    refused(lambda: open_source(f"hf:{rows}{query}"), *parts, code=code)


@pytest.mark.usefixtures("hub")
def test_hf_bad_paths_are_refused(rows, tmp_path, monkeypatch):
    refused(lambda: open_source("hf:"), code="missing", name="hf:")
    refused(lambda: open_source(f"hf:{tmp_path}/none"), code="missing", path=tmp_path / "none")
    (tmp_path / "a.txt").write_text("")
    refused(lambda: open_source(f"hf:{tmp_path}/a.txt"), ".parquet", code="missing", path=tmp_path / "a.txt")
    (tmp_path / "train.parquet").write_bytes((rows / "train.parquet").read_bytes()[:1000])
    for stream in ("", STREAM):
        name = f"hf:{tmp_path}/train.parquet?label=animal{stream}"
        refused(lambda name=name: open_source(name), code="unreadable", name=name)
    refused(lambda: open_source(f"hf:{rows}/.saved"), "save_to_disk", "to_parquet", path=rows / ".saved")
    monkeypatch.setattr("datasets.load_dataset", Mock(side_effect=ImportError("install zstandard")))
    refused(lambda: open_source(f"hf:{rows}"), "install zstandard", code="unreadable", name=f"hf:{rows}")


def test_stream_that_breaks_off_is_refused(rows, tmp_path):
    data = tmp_path / "train.parquet"
    data.write_bytes((rows / "train.parquet").read_bytes())
    source = open_source(f"hf:{data}?label=animal{STREAM}")
    write_parquet(data, range(6))
    assert same_jpeg(source.image(5), 5)
    refused(lambda: source.image(6), "Start again", row=6)
    data.unlink()
    refused(lambda: pickle.loads(pickle.dumps(source)).image(0), code="unreadable", name=source.name)


@pytest.fixture(scope="module")
def files(hub, tmp_path_factory):
    """A data set of files with rows 0 to 56, the image ``i`` that of seed ``i``."""
    folder = tmp_path_factory.mktemp("stream")
    for number, end in enumerate(np.cumsum(SIZES).tolist()):
        labels = {"label": (hub.ClassLabel(num_classes=3), lambda i: i % 3)}
        write_parquet(folder / f"train-{number}.parquet", range(end - SIZES[number], end), **labels)
    return folder


@pytest.fixture
def stream(files, monkeypatch):
    """Opens the data set as a stream."""
    monkeypatch.setattr(hf, "UNIT", 2)
    return lambda: open_source(f"hf:{files}?streaming=true&window=24")


@pytest.fixture
def read(monkeypatch):
    """The pieces that are opened for images, and at which row."""
    import datasets

    seen = []
    shard = datasets.IterableDataset.shard

    def noted(rows, pieces, piece):
        part = shard(rows, pieces, piece)
        skip = part.skip
        part.skip = lambda count: seen.append((piece, count)) or skip(count)
        return part

    monkeypatch.setattr(datasets.IterableDataset, "shard", noted)
    return seen


def test_stream_has_the_rows_of_all_files_in_order(stream, read):
    for _ in range(2):  # the second time with the labels kept by the first
        source = stream()
        assert (len(source), source.lanes) == (57, 8)
        assert source.labels.tolist() == [i % 3 for i in range(57)]
    assert all(same_jpeg(source.image(index), index) for index in (54, 55, 56, 49))
    # The window of each lane is three rows, the last file has rows 48 to 56; going back begins it again.
    assert read == [(7, 6), (7, 0)]
    assert all(same_jpeg(source.image(index), index) for index in (0, 5, 6, 8, 7, 21, 20, 33, 56, 55))


def test_stream_workers_share_the_reading(stream, read):
    """Four workers: as a DataLoader gives them their batches, each reads two files, once."""
    for worker in range(4):
        read.clear()
        data = TrainingSet(stream(), (8, 8), 3, config(), seed=0)
        for batch in range(worker, 24, 4):  # until the shortest lane ends: from there the others move up
            assert [data[g].index for g in (2 * batch, 2 * batch + 1)] == [2 * batch, 2 * batch + 1]
        assert read == [(worker, 0), (worker + 4, 0)]
    read.clear()
    list(batches(TrainingSet(stream(), (8, 8), 3, config(), seed=0), 0, 3, stop=114))
    assert sorted(read) == sorted(2 * [(piece, 0) for piece in range(8)])


def test_stream_resumes_anywhere(stream):
    source = stream()
    same_batches(source, pickle.loads(pickle.dumps(source)), start=54, stop=76, workers=2)


def test_stream_starts_no_worker_without_a_lane(stream, monkeypatch, recwarn):
    started = []
    monkeypatch.setattr(loader, "from_workers", lambda work, blocks, workers, **_: started.append(workers))
    source = stream()
    for workers in (0, 8, 12):
        assert not recwarn.list
        batches(TrainingSet(source, (8, 8), 3, config(workers=workers), seed=0), 0, 2)
    assert started == [0, 8, 8]
    (warning,) = recwarn.list
    assert "at 8 place(s) at once: of 12 data.workers 8 are started" in str(warning.message)
    assert "\n" not in str(warning.message)


def test_lanes_shuffle_within_their_windows():
    shared = Lanes(np.array([0, 300, 301, 700, 1000]), window=400)
    assert (shared.count, shared.lane_window) == (4, 100)
    orders = [shared.arranged(torch.randperm(1000), 1000 * epoch) for epoch in range(2)]
    for order in orders:
        assert order.sort().values.tolist() == list(range(1000))
        for first, last in ((0, 300), (300, 301), (301, 700), (700, 1000)):
            lane = order[(order >= first) & (order < last)] - first
            assert (lane // 100).diff().ge(0).all()
            assert last - first < 2 or not lane[:100].equal(lane[:100].sort().values)
    assert orders[0][:UNIT].max() < 300
    assert orders[0][UNIT] == 300
    assert not orders[0].equal(orders[1])
    one = Lanes(np.array([0, 50]), window=20).arranged(torch.randperm(50), 0)
    assert [sorted(part.tolist()) for part in one.split(20)] == [[*range(20)], [*range(20, 40)], [*range(40, 50)]]


@pytest.mark.parametrize(("readers", "lanes_of_each"), [(1, 16), (2, 8), (8, 2), (16, 1), (96, 1), (12, 4)])
def test_lanes_readers_meet_the_same_in_every_epoch(readers, lanes_of_each):
    """Readers in turn: the workers of all processes."""
    count = LANES * UNIT * 12 + 5  # not a multiple of anything
    starts = np.linspace(0, count, 3 * LANES + 1).astype(int)
    shared = Lanes(starts, window=1000)
    met = [set() for _ in range(readers)]
    for epoch in range(3):
        order, start = shared.arranged(torch.randperm(count), epoch * count), epoch * count
        for place in range(-start % UNIT, count - 3 * LANES * UNIT, UNIT):  # lanes end at slightly other places
            reader = (start + place) // UNIT % readers
            met[reader] |= {(epoch, shared.place(int(index))[0]) for index in order[place : place + UNIT : 8]}
    for epoch in range(3):
        assert max(len({lane for e, lane in own if e == epoch}) for own in met) == lanes_of_each

"""Streams in lanes: which images are read where, so that workers share the reading and a run resumes anywhere."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.data import config, same_batches, same_jpeg, write_parquet

from pra.data import TrainingSet, batches, lanes, loader, open_source
from pra.data.lanes import LANES, UNIT, Lanes

SIZES = (6, 8, 7, 6, 6, 9, 6, 9)
"""Rows of the files."""


@pytest.fixture(scope="module")
def files(hub: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of files with rows 0 to 56, the image ``i`` that of seed ``i``."""
    folder = tmp_path_factory.mktemp("stream")
    for number, end in enumerate(np.cumsum(SIZES).tolist()):
        labels = {"label": (hub.ClassLabel(num_classes=3), lambda i: i % 3)}
        write_parquet(folder / f"train-{number}.parquet", range(end - SIZES[number], end), **labels)
    return folder


@pytest.fixture
def stream(files: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Opens the data set as a stream."""
    monkeypatch.setattr(lanes, "UNIT", 2)
    return lambda: open_source(f"hf:{files}?streaming=true&window=24")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The pieces that are opened for images, and at which row."""
    import datasets

    seen: list[tuple[int, int]] = []
    shard, skip = datasets.IterableDataset.shard, datasets.IterableDataset.skip

    def noted_shard(rows: Any, pieces: int, piece: int) -> Any:
        part = shard(rows, pieces, piece)
        part.piece = piece
        return part

    def noted_skip(rows: Any, count: int) -> Any:
        seen.append((rows.piece, count))
        return skip(rows, count)

    monkeypatch.setattr(datasets.IterableDataset, "shard", noted_shard)
    monkeypatch.setattr(datasets.IterableDataset, "skip", noted_skip)
    return seen


def test_stream_has_the_rows_of_all_files_in_order(stream: Callable[[], Any], read: list[tuple[int, int]]) -> None:
    for _ in range(2):  # the second time with the labels kept by the first
        source = stream()
        assert (len(source), source.lanes) == (57, 8)
        assert source.labels.tolist() == [i % 3 for i in range(57)]
    assert all(same_jpeg(source.image(index), index) for index in (54, 55, 56, 49))
    # The window of each lane is three rows, the last file has rows 48 to 56; going back begins it again.
    assert read == [(7, 6), (7, 0)]
    assert all(same_jpeg(source.image(index), index) for index in (0, 5, 6, 8, 7, 21, 20, 33, 56, 55))


def test_stream_workers_share_the_reading(stream: Callable[[], Any], read: list[tuple[int, int]]) -> None:
    """Of four workers, as a DataLoader gives them their batches, each reads two files, once."""
    for worker in range(4):
        read.clear()
        data = TrainingSet(stream(), (8, 8), 3, config(), seed=0)
        for batch in range(worker, 24, 4):  # until the shortest lane ends: from there the others move up
            assert [data[g].index for g in (2 * batch, 2 * batch + 1)] == [2 * batch, 2 * batch + 1]
        assert read == [(worker, 0), (worker + 4, 0)]
    read.clear()
    list(batches(TrainingSet(stream(), (8, 8), 3, config(), seed=0), 0, 3, stop=114))
    assert sorted(read) == sorted(2 * [(piece, 0) for piece in range(8)])


def test_stream_resumes_anywhere(stream: Callable[[], Any]) -> None:
    source = stream()
    same_batches(source, pickle.loads(pickle.dumps(source)), start=54, stop=76, workers=2)


def test_stream_starts_no_worker_without_a_lane(
    stream: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    started: list[int] = []
    monkeypatch.setattr(loader, "from_workers", lambda work, blocks, workers, **_: started.append(workers))
    source = stream()
    for workers in (0, 8, 12):
        assert not recwarn.list
        batches(TrainingSet(source, (8, 8), 3, config(workers=workers), seed=0), 0, 2)
    assert started == [0, 8, 8]
    (warning,) = recwarn.list
    assert "at 8 place(s) at once: of 12 data.workers 8 are started" in str(warning.message)
    assert "\n" not in str(warning.message)


def test_lanes_shuffle_within_their_windows() -> None:
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
def test_lanes_readers_meet_the_same_in_every_epoch(readers: int, lanes_of_each: int) -> None:
    """Readers in turn: the workers of all processes."""
    count = LANES * UNIT * 12 + 5  # not a multiple of anything
    starts = np.linspace(0, count, 3 * LANES + 1).astype(int)
    shared = Lanes(starts, window=1000)
    met: list[set[tuple[int, int]]] = [set() for _ in range(readers)]
    for epoch in range(3):
        order, start = shared.arranged(torch.randperm(count), epoch * count), epoch * count
        for place in range(-start % UNIT, count - 3 * LANES * UNIT, UNIT):  # lanes end at slightly other places
            reader = (start + place) // UNIT % readers
            met[reader] |= {(epoch, shared.place(int(index))[0]) for index in order[place : place + UNIT : 8]}
    for epoch in range(3):
        assert max(len({lane for e, lane in own if e == epoch}) for own in met) == lanes_of_each

"""Streams: which images are read where, so that several workers share the reading, and a run goes on anywhere."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_data import config, jpeg, same_jpeg
from test_data_sources import same_batches

from pra.data import TrainingSet, batches, lanes, loader, open_source
from pra.data.lanes import LANES, UNIT, Lanes

SIZES = (6, 8, 7, 6, 6, 9, 6, 9)
"""Rows of the files."""


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Opens a streamed data set of files with rows 0 to 56, the image ``i`` that of seed ``i``."""
    datasets = pytest.importorskip("datasets", reason="datasets is in the extra 'hf'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(lanes, "UNIT", 2)
    (tmp_path / "data").mkdir()
    for number in range(len(SIZES)):
        rows = range(sum(SIZES[:number]), sum(SIZES[: number + 1]))
        columns = {"image": [{"bytes": jpeg(i), "path": None} for i in rows], "label": [i % 3 for i in rows]}
        kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
        datasets.Dataset.from_dict(columns, kinds).to_parquet(str(tmp_path / "data" / f"train-{number}.parquet"))
    return lambda: open_source(f"hf:{tmp_path}/data?streaming=true&window=24")


def opened(source: Any) -> list[tuple[int, int]]:
    """The pieces that are opened from here on, and at which row."""
    seen, rows = [], source._rows

    class Rows:
        def shard(self, pieces: int, piece: int) -> Any:
            self.piece, self.stream = piece, rows.shard(pieces, piece)
            return self

        def skip(self, count: int) -> Any:
            seen.append((self.piece, count))
            return self.stream.skip(count)

    source._rows = Rows()
    return seen


def test_a_stream_has_the_rows_of_all_files_in_order(stream: Callable[[], Any]) -> None:
    for _ in range(2):  # the second time from what is kept of the first
        source = stream()
        assert (len(source), source.lanes) == (57, 8)
        assert source.labels.tolist() == [i % 3 for i in range(57)]
        assert source._lanes.starts.tolist() == [0, *np.cumsum(SIZES)]
    assert all(same_jpeg(source.image(index), index) for index in (56, 0, 5, 6, 8, 7, 21, 20, 33, 56, 55))


def test_an_image_far_behind_is_reached_without_the_files_before(stream: Callable[[], Any]) -> None:
    source = stream()
    seen = opened(source)
    for index in (54, 55, 56, 49):
        assert same_jpeg(source.image(index), index)
    # The window of each lane is three rows, the last file has rows 48 to 56; going back begins it anew.
    assert seen == [(7, 6), (7, 0)]


def test_workers_share_the_reading(stream: Callable[[], Any]) -> None:
    """Four of them, as a DataLoader gives them their batches: each file is read by one, once."""
    for worker in range(4):
        source = stream()
        seen = opened(source)
        data = TrainingSet(source, (8, 8), 3, config(), seed=0)
        for batch in range(worker, 24, 4):  # until the shortest has ended: from there the others move up
            for g in range(2 * batch, 2 * batch + 2):
                _ = data[g]
        assert seen == [(worker, 0), (worker + 4, 0)]


def test_one_worker_reads_every_file_once_an_epoch(stream: Callable[[], Any]) -> None:
    source = stream()
    seen = opened(source)
    list(batches(TrainingSet(source, (8, 8), 3, config(), seed=0), 0, 3, stop=114))
    assert sorted(seen) == sorted(2 * [(piece, 0) for piece in range(8)])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_run_goes_on_in_the_middle_of_an_epoch(stream: Callable[[], Any], workers: int) -> None:
    """With any number of workers, though each reads other parts then."""
    source = stream()
    for start in (14, 54):
        same_batches(source, pickle.loads(pickle.dumps(source)), start=start, stop=120, workers=workers)


def test_no_more_workers_than_places_to_read_at(
    stream: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    started = []
    monkeypatch.setattr(loader, "from_workers", lambda work, blocks, workers, **_: started.append(workers))
    for workers in (0, 8, 12):
        assert not recwarn.list
        batches(TrainingSet(stream(), (8, 8), 3, config(workers=workers), seed=0), 0, 2)
    assert started == [0, 8, 8]
    (warning,) = recwarn.list
    assert "can be read at 8 place(s) at once: of 12 data.workers 8 are started" in str(warning.message)
    assert "\n" not in str(warning.message)


# --- the order ----------------------------------------------------------------------------------------------


def test_the_order_is_shuffled_within_the_windows_of_each_lane() -> None:
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


def test_data_in_one_piece_are_shuffled_within_windows() -> None:
    order = Lanes(np.array([0, 50]), window=20).arranged(torch.randperm(50), 0)
    assert [set(part.tolist()) for part in order.split(20)] == [set(range(20)), set(range(20, 40)), set(range(40, 50))]


@pytest.mark.parametrize(("readers", "lanes_of_each"), [(1, 16), (2, 8), (8, 2), (16, 1), (96, 1), (12, 4)])
def test_batches_meet_the_same_lanes_in_every_epoch(readers: int, lanes_of_each: int) -> None:
    """Readers in turn: the workers of all processes."""
    count = LANES * UNIT * 12 + 5  # no multiple of anything
    starts = np.linspace(0, count, 3 * LANES + 1).astype(int)
    shared = Lanes(starts, window=1000)
    met: list[set[tuple[int, int]]] = [set() for _ in range(readers)]
    for epoch in range(3):
        order, start = shared.arranged(torch.randperm(count), epoch * count), epoch * count
        for place in range(-start % UNIT, count - 3 * LANES * UNIT, UNIT):  # lanes end at slightly other places
            reader = (start + place) // UNIT % readers
            met[reader] |= {(epoch, shared.place(int(index))[0]) for index in order[place : place + UNIT]}
    for epoch in range(3):
        assert max(len({lane for e, lane in own if e == epoch}) for own in met) == lanes_of_each

"""The order of samples, batches from worker processes, and corrupt images in training."""

import errno
import functools
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image
from support.data import config, picture, same, write_idx
from support.refusal import refused

from pra.config import Fit, OnCorrupt, OnSmall
from pra.data import TrainingSet, batches, load_images, open_source, prepare
from pra.data.images import CorruptImage, corrupt
from pra.data.loader import from_workers
from pra.method import noise
from pra.utils.signals import handled


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Seven images of 4x6 whose pixels hold their index."""
    return open_source(f"idx:{write_idx(tmp_path_factory.mktemp('data') / 'numbered')}")


def training_set(source, seed=0, **changes):
    return TrainingSet(source, (4, 6), 1, config(fit=Fit.PAD, **changes), seed)


def test_order_each_epoch_is_its_own_permutation(numbered):
    data = training_set(numbered)
    expected = [data.source_index(g) for g in range(140)]
    epochs = [expected[7 * e : 7 * e + 7] for e in range(20)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 15
    assert [training_set(numbered, seed=1).source_index(g) for g in range(140)] != expected
    shuffled = np.random.default_rng(0).permutation(60).tolist()
    assert [data.source_index(g) for g in shuffled] == [expected[g] for g in shuffled]
    for g in (0, 6, 7, 10**12):
        sample = data[g]
        assert (sample.index, sample.source_index, sample.skipped) == (g, data.source_index(g), 0)
        assert sample.label == sample.source_index % 3
        assert (sample.image == sample.source_index).all()


def test_augmentation_is_a_function_of_seed_and_index(tmp_path):
    picture(20, 24).save(tmp_path / "a.png")
    source = open_source(f"folder:{tmp_path}")
    data = TrainingSet(source, (8, 8), 3, config(fit=Fit.RANDOM_CROP, flip=True), seed=4)
    for g in (0, 1, 100):
        expected = prepare(source.image(0), (8, 8), 3, data.config, noise.keys(4, torch.tensor(g)), "")
        assert torch.equal(data[g].image, torch.from_numpy(expected))
    assert len({data[g].image.numpy().tobytes() for g in range(20)}) > 10
    other = TrainingSet(source, (8, 8), 3, data.config, seed=5)
    assert not torch.equal(data[0].image, other[0].image)


def test_batches_follow_the_global_index(numbered):
    data = training_set(numbered)
    found = list(batches(data, 5, 4, stop=19))
    expected = [range(5, 9), range(9, 13), range(13, 17), range(17, 19)]
    assert [batch.indices.tolist() for batch in found] == [list(block) for block in expected]
    for batch in found:
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (len(batch.indices), 1, 4, 6)
        assert batch.labels.dtype == batch.indices.dtype == torch.int64
        assert batch.images[:, 0, 0, 0].tolist() == [data.source_index(int(g)) for g in batch.indices]
        assert batch.labels.tolist() == (batch.images[:, 0, 0, 0] % 3).tolist()
        assert batch.skipped == 0
    assert list(batches(data, 19, 4, stop=19)) == []


def test_batches_workers_and_start_change_nothing(numbered):
    state = torch.get_rng_state()
    alone, one, two = (list(batches(training_set(numbered, workers=w, flip=True), 0, 4, stop=40)) for w in (0, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(same(a, b) and same(a, c) for a, b, c in zip(alone, one, two, strict=True))
    for start in range(1, 10):
        resumed = batches(training_set(numbered, flip=True), 4 * start, 4, stop=40)
        assert all(same(a, b) for a, b in zip(alone[start:], resumed, strict=True))


def test_workers_leave_signals_to_the_main_process(numbered):
    others = multiprocessing.active_children()
    stream = batches(training_set(numbered, workers=1), 0, 2)
    next(stream)
    [worker] = [process for process in multiprocessing.active_children() if process not in others]
    assert worker.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    for _ in range(10):
        next(stream)
    assert worker.is_alive()
    del stream
    worker.join(10)
    assert not worker.is_alive()


@pytest.fixture
def damaged(tmp_path):
    """Six images of 4x6 of which 1, 2 and 4 are corrupt."""
    for index in range(6):
        Image.new("L", (6, 4), index).save(tmp_path / f"{index}.png")
    for index in (1, 2, 4):
        path = tmp_path / f"{index}.png"
        path.write_bytes(path.read_bytes()[:50])
    return open_source(f"folder:{tmp_path}")


def test_corrupt_images_skipped_are_counted(damaged, tmp_path):
    data = training_set(damaged, on_corrupt=OnCorrupt.SKIP)
    for g in range(24):
        epoch = g - g % 6
        ahead = [data.source_index(epoch + (g + i) % 6) for i in range(6)]
        taken = next(i for i, index in enumerate(ahead) if index in (0, 3, 5))
        sample = data[g]
        assert (sample.index, sample.source_index, sample.skipped) == (g, ahead[taken], taken)
        assert (sample.image == sample.source_index).all()
    total = sum(data[g].skipped for g in range(12))
    assert total > 0
    [batch] = batches(data, 0, 12, stop=12)
    assert batch.skipped == total
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"")
    refused(lambda: data[0], "none of the 6 images", ".png", code="unreadable", name=damaged.name)


def test_narrow_pictures_count_as_corrupt(tmp_path, monkeypatch):
    """Scaled to cover a crop of 64x64, a thread would take hundreds of megabytes, and of 256x256 gigabytes."""
    Image.new("L", (20_000, 1)).save(tmp_path / "a.png")
    Image.new("L", (64, 64), 7).save(tmp_path / "b.png")
    source = open_source(f"folder:{tmp_path}")
    data = TrainingSet(source, (64, 64), 1, config(on_corrupt=OnCorrupt.SKIP), seed=0)
    assert sorted(data[g].skipped for g in range(2)) == [0, 1]
    assert all((data[g].image == 7).all() for g in range(2))
    assert load_images(source, [0], (64, 64), 1, data.config)[0].eq(7).all()
    strict = TrainingSet(source, (64, 64), 1, config(), seed=0)
    parts = ("20000x1", "on_corrupt=skip", "PRA_MAX_ASPECT")
    refused(lambda: [strict[g] for g in range(2)], *parts, code="too-large", where=source.where(0))
    wide = TrainingSet(source, (1, 2000), 1, config(on_corrupt=OnCorrupt.SKIP, on_small=OnSmall.UPSCALE), seed=0)
    monkeypatch.setenv("PRA_MAX_ASPECT", "20000")
    assert [wide[g].skipped for g in range(2)] == [0, 0]


def test_errors_of_workers_arrive_unchanged(damaged):
    data = training_set(damaged, workers=1)
    bad = next(g for g in range(6) if data.source_index(g) in (1, 2, 4))
    where = damaged.where(data.source_index(bad))
    error = refused(lambda: list(batches(data, bad, 1, stop=bad + 1)), code="unreadable", where=where)
    assert isinstance(error, CorruptImage)
    large = TrainingSet(damaged, (8, 8), 1, config(workers=1, on_corrupt=OnCorrupt.SKIP), seed=0)
    refused(lambda: next(batches(large, 0, 2)), code="mismatch", pixels="4x6", size="8x8")


class UnportableError(Exception):
    """An object that can be pickled but not unpickled."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def failing(how, item):
    """The work of a worker, which fails at the fifth item."""
    if item < 4:
        return item
    if how == "unsendable":
        return lambda: None
    if how == "local":
        raise type("Local", (Exception,), {})("the user's mistake")
    if how == "unportable":
        raise UnportableError("the user's", "mistake")
    if how == "value":
        raise ValueError("the user's mistake")
    if how == "stuck":
        time.sleep(1000)
    if how == "exit":
        sys.exit(3)
    if how == "files":
        raise OSError(errno.EMFILE, "Too many open files")
    if how == "memory":
        raise MemoryError
    os.kill(os.getpid(), getattr(signal, how))


def results(how, count=2):
    """Return the results of failing workers up to the failure, and check that they are gone."""
    before, found = multiprocessing.active_children(), []
    try:
        with closing(from_workers(functools.partial(failing, how), itertools.count(), count)) as stream:
            found.extend(stream)
    finally:
        assert multiprocessing.active_children() == before


TOO_LITTLE = ("data.workers", "docker run --memory", "ulimit -n")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("SIGKILL", ("SIGKILL", *TOO_LITTLE)),
        ("SIGBUS", ("SIGBUS", *TOO_LITTLE)),
        ("memory", ("MemoryError", *TOO_LITTLE)),
        ("files", ("Too many open files", *TOO_LITTLE)),
        ("exit", ("with exit code 3", "0 workers")),
        ("SIGUSR1", ("by SIGUSR1", "0 workers")),
    ],
)
def test_workers_that_end_are_one_line(how, said):
    refused(lambda: results(how), *said, code="lost")


def large(item):
    """A result that is larger than a pipe."""
    return torch.full((20_000_000,), item, dtype=torch.uint8)


def test_worker_killed_while_it_sends_is_one_line():
    with closing(from_workers(large, itertools.count(), 1)) as stream:
        next(stream)
        time.sleep(0.5)  # the next result is half sent
        os.kill(multiprocessing.active_children()[-1].pid, signal.SIGKILL)
        refused(lambda: list(stream), "SIGKILL", *TOO_LITTLE, code="lost")


def test_workers_that_send_to_a_pinning_thread_end_at_once(monkeypatch):
    """The worker ends while the thread has read half of a result."""
    accelerator = {"is_available": True, "current_device_index": 0, "set_device_index": None}
    for name, value in accelerator.items():
        monkeypatch.setattr(torch.accelerator, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for _ in range(3):
        with closing(from_workers(large, itertools.count(), 2, pin_memory=True)) as stream:
            assert next(stream).eq(0).all()
            begin = time.monotonic()
        assert time.monotonic() - begin < 3


@pytest.mark.parametrize(
    ("how", "kind"), [("value", ValueError), ("local", RuntimeError), ("unportable", RuntimeError)]
)
def test_workers_users_exception_arrives_with_traceback(how, kind):
    with pytest.raises(kind, match=r"the user's.* mistake") as raised:
        results(how)
    [note] = raised.value.__notes__
    assert "in failing" in note


def test_workers_that_are_stuck_end_at_once():
    stream = from_workers(functools.partial(failing, "stuck"), itertools.count(), 2)
    for _ in range(4):
        next(stream)
    begin = time.monotonic()
    stream.close()
    assert time.monotonic() - begin < 3


@pytest.mark.slow
def test_workers_that_are_left_do_not_keep_a_process():
    """A script that forgets to close the iterator, with stuck workers, ends silently."""
    script = (
        "import itertools, time\n"
        "from pra.data.loader import from_workers\n"
        "stream = from_workers(lambda item: item if item < 2 else time.sleep(1000), itertools.count(), 2)\n"
        "print(next(stream), next(stream))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 1\n", "")


def test_workers_too_few_processes_are_one_line(monkeypatch):
    whole, left, before = multiprocessing.Process.start, iter(range(1)), multiprocessing.active_children()

    def start(process):
        if next(left, None) is None:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        whole(process)

    monkeypatch.setattr(multiprocessing.Process, "start", start)
    refused(lambda: results("value"), "Resource temporarily unavailable", "data.workers", code="lost")
    assert multiprocessing.active_children() == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_workers_signal_at_their_start_ends_them(monkeypatch, signum):
    """A fork's hooks swallow what a handler raises, so it runs after all have started."""
    whole, started = multiprocessing.Process.start, []

    def start(process):
        signal.raise_signal(signum)
        whole(process)
        started.append(process)

    def stop(*_):
        assert len(started) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(multiprocessing.Process, "start", start)
    with handled((signum,), stop), pytest.raises(KeyboardInterrupt):
        results("value")
    assert not any(process.is_alive() for process in started)


def test_images_not_opened_for_want_of_files_are_not_skipped(numbered, monkeypatch):
    """Images that cannot be opened now are not corrupt: they can be read later."""

    def image(index):
        try:
            raise OSError(errno.EMFILE, "Too many open files")
        except OSError as error:
            raise corrupt("1.png", error.strerror) from error

    monkeypatch.setattr(numbered, "image", image)
    refused(lambda: training_set(numbered, on_corrupt=OnCorrupt.SKIP)[0], "Too many open files", code="unreadable")


def test_load_images_does_not_augment_or_stop(numbered, damaged):
    images, labels = load_images(numbered, [4, 0, 4], (8, 8), 3, config(fit=Fit.PAD, flip=True))
    assert images.dtype == torch.uint8
    assert images.shape == (3, 3, 8, 8)
    assert images.amax((1, 2, 3)).tolist() == [4, 0, 4]
    assert labels.tolist() == [1, 0, 1]
    assert labels.dtype == torch.int64
    how = config(fit=Fit.RANDOM_CROP, flip=True)
    plain, _ = load_images(numbered, [1], (4, 4), 1, config())
    assert torch.equal(load_images(numbered, [1], (4, 4), 1, how)[0], plain)
    assert load_images(numbered, [], (4, 4), 1, how)[0].shape == (0, 1, 4, 4)
    refused(lambda: load_images(damaged, [0, 1], (4, 6), 1, config()), code="unreadable", where=damaged.where(1))
    skip = config(on_corrupt=OnCorrupt.SKIP)
    assert load_images(damaged, [0, 1, 4], (4, 6), 1, skip)[0].amax((1, 2, 3)).tolist() == [0, 3, 5]

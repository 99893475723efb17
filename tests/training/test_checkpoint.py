"""Checkpoints: whole or not at all, written while training continues, and which ones stay."""

import errno
import json
import os
import runpy
import shutil
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.files import change, contents
from support.refusal import refused
from support.training import assert_same, pictures, steps_logged, tensors, tiny, train
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

import pra
from pra.models import weights
from pra.models.pra import PRA
from pra.training import callbacks, checkpoint
from pra.training.averages import EMA, exponential
from pra.training.checkpoint import Unlogged, restore_unlogged, step_of
from pra.training.optimizer import build_optimizer
from pra.training.run import read_metrics
from pra.utils.distributed import World

SHARD = "optimizer/shard-00001-model-00001-of-00001.safetensors"
"""Rank 0's part of the optimizer's state."""


@pytest.fixture
def copy(straight, tmp_path):
    return Path(shutil.copytree(straight, tmp_path / "copy"))


def step(run, number):
    return run / "checkpoints" / f"step-{number:08d}"


def test_resume_repeats_the_steps_since_the_last_checkpoint(straight, copy):
    for number in (4, 5, 6):
        shutil.rmtree(step(copy, number))
    partial = copy / "checkpoints" / ".step-00000015.partial"  # killed while it wrote
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tot')
    train(tiny("train.steps=6", "train.log_every=2", "train.keep_checkpoints=2"), copy)
    assert_same(copy, straight)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    assert steps_logged(copy) == [2, 4, 6]
    rows, expected = read_metrics(copy), read_metrics(straight)
    assert (rows[0]["total"], rows[2]["total"]) == (expected[0]["total"], expected[2]["total"])
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(copy / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("total")] == [2, 4, 6]


def test_damaged_checkpoint_costs_the_steps_since_the_one_before(straight, copy):
    path = step(copy, 6) / SHARD
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step-00000006 is damaged .*step-00000005, is used"):
        assert train(tiny("train.steps=6"), copy).new_steps == 1
    assert_same(copy, straight)


def test_damaged_checkpoints_do_not_count_as_kept(straight, copy):
    for number in (5, 6):
        (step(copy, number) / "state.json").unlink()
    with pytest.warns(UserWarning, match="damaged"):
        train(tiny("train.steps=5", "train.keep_checkpoints=1"), copy)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["step-00000005", "step-00000006"]
    assert_same(copy, straight, 5)
    for folder in (copy / "checkpoints").iterdir():
        (folder / "state.json").write_text("{")
    before = contents(copy)
    refused(lambda: train(tiny("train.steps=9"), copy), "step-00000005", "Put back the named files")
    assert contents(copy) == before


def test_garbage_in_the_optimizer_costs_the_steps_since(straight, copy):
    shard = step(copy, 6) / SHARD
    good = shard.read_bytes()
    shard.write_bytes(good[:-40_000] + b"\xff" * 40_000)
    with pytest.warns(UserWarning, match=rf"content of {SHARD} is not what was saved.*step-00000005, is used"):
        assert train(tiny("train.steps=6", "train.log_every=2"), copy).new_steps == 1
    assert_same(copy, straight)


def test_optimizer_state_without_digest_is_checked(copy):
    """Refuse weights of another model, unreadable files, and nan."""
    shard = step(copy, 6) / SHARD
    good = shard.read_bytes()
    change(step(copy, 6) / "state.json", sha256=None)
    misnamed = good.replace(b"auxiliary.weight/", b"auxiliary.waight/")
    for bad in (misnamed, b"\xff" * len(good), good[:-40_000] + b"\xff" * 40_000):
        shard.write_bytes(bad)
        error = refused(lambda: train(tiny("train.steps=7"), copy), code="unreadable", path=shard.parent)
        assert "learning" not in str(error)
        assert "train.optimizer.lr" not in str(error)


def test_unlogged_metrics_have_their_types(tmp_path):
    state, good = tmp_path / "state.json", {"sums": {"flow": [3.0, 2], "where": [1, 1]}, "skipped": 4}
    state.write_text(json.dumps({"unlogged": good}))
    assert restore_unlogged(tmp_path) == Unlogged({"flow": (3.0, 2), "where": (1, 1)}, 4)
    state.write_text("{}")  # of an earlier version
    assert restore_unlogged(tmp_path) == Unlogged()
    for sums in (7, {"flow": 3}, {"flow": [3.0, 0]}, {"flow": ["x", 1]}, {"flow": [1, 2, 3]}):
        state.write_text(json.dumps({"unlogged": good | {"sums": sums}}))
        refused(lambda: restore_unlogged(tmp_path), "is damaged", code="unreadable", path=state)
    for unlogged in (7, {}, good | {"skipped": -1}, good | {"skipped": 1.5}):
        state.write_text(json.dumps({"unlogged": unlogged or {"sums": {}}}))
        refused(lambda: restore_unlogged(tmp_path), "is damaged", code="unreadable", path=state)


def test_resume_repeats_the_lines_of_the_metrics(tmp_path):
    """Lines that began before the checkpoint are repeated too, and corrupt images keep counting. Times differ."""
    source = pictures(tmp_path / "data", "ab" * 6)
    (tmp_path / "data" / "a" / "04.png").write_bytes(b"\x89PNG")
    data = f"data.source={source}", "model.num_classes=2", "data.on_corrupt=skip"
    rhythm = "train.log_every=5", "train.checkpoint_every=3", "train.keep_checkpoints=9"
    config, run = tiny("train.steps=7", *data, *rhythm), tmp_path / "run"
    train(config, run)

    def lines():
        return [row | {"images_per_second": 0} for row in read_metrics(run)]

    expected = lines()
    for number in (6, 3):
        for folder in weights.checkpoints(run):
            if step_of(folder) > number:
                shutil.rmtree(folder)
        train(config, run)
        assert lines() == expected


def test_keep_every_keeps_checkpoints_for_good(straight, tmp_path):
    run, settings = tmp_path / "run", ("train.checkpoint_every=1", "train.keep_checkpoints=1")
    train(tiny("train.steps=5", "train.keep_every=2", *settings), run)
    assert [path.name for path in weights.checkpoints(run)] == [f"step-{number:08d}" for number in (2, 4, 5)]
    assert_same(run, straight, 2)
    assert weights.load(step(run, 2)).config == tiny().model
    (step(run, 2) / "state.json").unlink()  # a damaged checkpoint lacks its step
    (run / "checkpoints" / "step-00000001-mine").mkdir()
    train(tiny("train.steps=6", "train.keep_every=4", *settings), run)
    assert [path.name for path in weights.checkpoints(run)] == ["step-00000004", "step-00000006"]


def test_training_goes_on_while_a_checkpoint_is_written(straight, tmp_path, monkeypatch):
    """The state of its step is still written."""
    written, original = threading.Event(), weights.write_tensors

    def slowly(*arguments):
        assert written.wait(60), "training waits for the checkpoint"
        original(*arguments)

    class Watch(callbacks.Callback):
        def on_step(self, trainer):
            if trainer.step == 3:
                assert list((tmp_path / "run" / "checkpoints").glob("step-*")) == []
                written.set()

    monkeypatch.setattr(weights, "write_tensors", slowly)
    config = tiny("train.steps=5", "train.checkpoint_every=2", "train.keep_checkpoints=3")
    train(config, tmp_path / "run", callbacks=[Watch()])
    assert weights.checkpoints(tmp_path / "run") == [step(tmp_path / "run", number) for number in (2, 4, 5)]
    for number in (2, 4):
        assert_same(tmp_path / "run", straight, number)


def test_full_disk_leaves_older_checkpoints(run, full_disk):
    """The disk is full within the configuration or metrics, the weights, or the optimizer's state."""
    before = contents(run / "checkpoints")
    for size in (3_000, 120_000, 400_000):
        with full_disk(size):
            refused(lambda: train(tiny("train.steps=21"), run), "File too large", "size of files")
        assert contents(run / "checkpoints") == before
        assert not [path for path in run.rglob(".*") if path.name != ".lock"]
    with full_disk(120_000):
        refused(lambda: train(tiny("train.steps=21"), run), str(step(run, 21)), str(step(run, 20)))
    assert train(tiny("train.steps=21"), run).new_steps == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_only_a_full_disk_asks_for_space(run, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint.weights, "write_tensors", fail)
    with pytest.raises(pra.PraError, match=os.strerror(code)) as raised:
        train(tiny("train.steps=21"), run)
    assert ("free some space" in str(raised.value)) == (code == errno.ENOSPC)


def test_checkpoint_is_written_on_the_gpu_of_the_process(tmp_path, monkeypatch):
    """The current GPU in torch's thread is the first."""
    calls = []
    write = HuggingFaceStorageWriter.write_data

    def note(what):
        calls.append((threading.current_thread().name, what))

    def written(*arguments):
        note("write")
        return write(*arguments)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", written)
    monkeypatch.setattr(torch.cuda, "set_device", note)
    model = PRA(tiny().model)  # type: ignore[arg-type]
    adam = build_optimizer(model, tiny().train.optimizer)
    for number, gpu in enumerate([torch.device("cuda", 3), None]):
        calls.clear()
        saver = checkpoint.Saver(tmp_path, 1, World(), torch.device("cpu"))
        saver.gpu = gpu
        with saver.working():
            saver.save(number, model, {"ema": EMA(model, exponential(0.5))}, adam)
            saver.wait()
        threads, what = zip(*calls, strict=True)
        assert threading.main_thread().name not in threads
        assert len(set(threads)) == 1
        assert what == (("write",) if gpu is None else (gpu, "write"))


def test_saving_filters_no_warnings_of_others(tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        for steps in (1, 2):  # the second loads what the first has saved
            train(tiny(f"train.steps={steps}"), tmp_path / "run")
        runpy.run_path(checkpoint.__file__)  # as at its first import
        assert list(warnings.filters) == before
    assert [one for one in seen if "torch.distributed is disabled" in str(one.message)] == []
    assert load_file(weights.checkpoints(tmp_path / "run")[-1] / "ema.safetensors").keys() == {
        name.removeprefix("ema/") for name in tensors(tmp_path / "run") if name.startswith("ema/")
    }

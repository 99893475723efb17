"""``pra sample`` of many images: the same on any number of processes, and resumed after a kill."""

import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support import processes
from support.answer import caller
from support.files import contents
from support.models import PIXEL, random_model
from support.refusal import refused

import pra
from pra.config import Precision
from pra.models import weights
from pra.sampling.batches import NpzBatch, sampled
from pra.sampling.many import sample_many, shards_of
from pra.sampling.requests import grid, numbered
from pra.utils.distributed import ALONE
from pra.utils.files import file_mode
from pra.utils.locks import locked
from pra.utils.pixels import to_uint8
from pra.utils.provenance import file_sha256


@pytest.fixture
def call(capsys):
    """``pra sample`` of a run, on the CPU."""
    return functools.partial(caller(capsys), "sample", "--device", "cpu")


def arrays(path):
    with np.load(path) as found:
        return found["arr_0"], found["arr_1"]


def test_requests_are_a_grid_or_take_turns():
    pairs = grid((3, 7), (5, 6, 9))
    assert pairs.part(range(6)) == ([3, 3, 3, 7, 7, 7], [5, 6, 9, 5, 6, 9], None)
    assert pairs.part(range(2, 4)) == ([3, 7], [9, 5], None)
    assert pairs.plan == {"labels": [3, 7], "seeds": [5, 6, 9]}
    requests = numbered(11, (4, 0, 9))
    assert requests.labels == [4, 0, 9, 4, 0, 9, 4, 0, 9, 4, 0]
    assert requests.part(range(8, 11)) == ([9, 4, 0], range(8, 11), None)
    assert requests.plan == {"count": 11, "labels": [4, 0, 9], "order": "in turn"}


def test_random_labels_depend_on_index_and_seed_alone():
    labels = numbered(8_000, range(10), label_seed=1).labels
    assert numbered(800, range(10), label_seed=1).labels == labels[:800]
    assert numbered(800, range(10), label_seed=2).labels != labels[:800]
    counts = np.bincount(labels, minlength=10)
    # Ten binomials of mean 800 and standard deviation 27; balanced they are not.
    assert 680 < counts.min() < 800 < counts.max() < 920


def test_images_are_those_that_an_evaluation_makes(trained, tmp_path, call):
    assert call(trained, "--num", 14, "--batch-size", 5, "--out", tmp_path / "a.npz").code == 0
    pixels, labels = arrays(tmp_path / "a.npz")
    model, requests = pra.load(trained), numbered(14, range(10))
    [whole] = sampled(pra.Sampler(model), requests, range(14), 14)
    assert whole.labels is not None
    assert labels.tolist() == whole.labels.tolist() == [index % 10 for index in range(14)]
    [part] = sampled(pra.Sampler(model), requests, range(3, 5), 100)
    assert part.start == 3
    assert torch.allclose(part.images, whole.images[3:5], atol=1e-4)
    expected = to_uint8(whole.images).permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels.astype(int) - expected).max() <= 1  # in other batches, so up to rounding
    plan = NpzBatch(tmp_path / "a.npz").plan
    newest = weights.model_folder(trained)
    made = {"file": "ema.safetensors", "sha256": file_sha256(newest / "ema.safetensors")}
    assert (plan["weights"], plan["images"]) == (made, requests.plan)
    assert plan["sampling"]["guidance"] == model.sampling.guidance
    assert (tmp_path / "a.npz").stat().st_mode & 0o777 == file_mode()
    call(trained, "--labels", "3", "--seeds", "13", "--out", tmp_path / "one.npz")  # its seed in a grid
    assert np.abs(arrays(tmp_path / "one.npz")[0].astype(int) - expected[13]).max() <= 1


def test_killed_processes_resume_bitwise(trained, tmp_path, call):
    """Two processes, killed and started again, make the images of one process, and nothing twice."""
    line = [trained, "--num", 24, "--random-labels", "--batch-size", 1]
    out, partial = tmp_path / "two" / "out", tmp_path / "two" / ".out.partial"
    shared = ["sample", *line, "--device", "cpu", "--out", out]
    with processes.started(tmp_path / "said", 2, *shared) as group:
        group.wait_for(lambda: len(list(partial.glob("shard-*"))) >= 3)
    assert not out.exists()
    shards = list(partial.glob("shard-*/*.png"))
    made = {picture.name: (picture.stat().st_ino, picture.stat().st_mtime_ns) for picture in shards}
    assert 3 <= len(made) < 24
    (partial / ".shard-000023.partial").mkdir(exist_ok=True)  # as of a kill in the middle of a shard
    (partial / ".shard-000023.partial" / "0003-3-seed000023.png").write_bytes(b"half")
    two = processes.run(tmp_path / "said", 2, *shared)
    assert [outcome.code for outcome in two] == [0, 0], two
    assert (two[1].out, two[1].error) == ("", "")
    assert f"{24 - len(made)} new images" in two[0].out
    assert "on 2 processes" in two[0].out
    for name, identity in made.items():
        assert ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) == identity
    assert call(*line, "--out", tmp_path / "whole").code == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert os.listdir(out.parent) == ["out"]  # nothing unfinished is left
    again = processes.run(tmp_path / "again", 2, *shared)
    assert [outcome.code for outcome in again] == [2, 2]
    (said,) = "".join(outcome.out + outcome.error for outcome in again).splitlines()
    assert said.startswith(f"pra: error: {out} exists already")


def test_kill_while_shards_are_joined_does_no_harm(trained, tmp_path, call, monkeypatch):
    line = [trained, "--num", 9, "--batch-size", 2]
    call(*line, "--out", tmp_path / "whole")
    rename, moved = Path.rename, []

    def stop(self, target):
        if self.suffix == ".png":
            moved.append(self)
            if len(moved) == 4:
                raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        assert call(*line, "--out", tmp_path / "out").code == 130
    assert not (tmp_path / "out").exists()
    assert "0 new images" in call(*line, "--out", tmp_path / "out").out
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def stopped(sampler, out, count, batches):
    """Some shards of a set, and no more: the next batch is a kill."""
    made = [sampler.sample] * batches
    sampler.sample = lambda *given: made.pop()(*given)  # type: ignore[method-assign]
    with pytest.raises(IndexError):
        many(sampler, out, count)


def many(sampler, out, count, batch_size=2, weights="a"):
    requests = numbered(count, range(5))
    return sample_many(sampler, requests, {"sha256": weights}, out, 3, batch_size, "{}-{}".format, ALONE)[0]


def test_unfinished_set_is_of_one_request_and_model(tmp_path, monkeypatch):
    model, out = random_model(PIXEL), tmp_path / "out.npz"
    many(pra.Sampler(model), tmp_path / "whole.npz", 10)
    stopped(pra.Sampler(model), out, 10, batches=2)
    held = f"{tmp_path}/.out.npz.partial holds an unfinished sampling", "remove the folder"
    guided = pra.Sampler(model, guidance=3.0)
    refused(lambda: many(guided, out, 10), "sampling.guidance: 1.0 there, 3.0 asked for", *held)
    refused(lambda: many(pra.Sampler(model), out, 11), "images.count: 10 there, 11 asked for", *held)
    refused(lambda: many(pra.Sampler(model), out, 10, weights="b"), 'weights.sha256: "a" there, "b" asked for', *held)
    lowered = pra.Sampler(model, precision=Precision.BFLOAT16)  # as "auto" is on a GPU
    refused(lambda: many(lowered, out, 10), 'sampling.precision: "float32" there, "bfloat16" asked for', *held)
    # Another batch size is the same request: the shards stay as they were cut.
    assert many(pra.Sampler(model), out, 10, batch_size=7) == 6
    for found, expected in zip(arrays(out), arrays(tmp_path / "whole.npz"), strict=True):
        assert np.array_equal(found, expected)
    assert NpzBatch(out).plan == NpzBatch(tmp_path / "whole.npz").plan
    assert sorted(os.listdir(tmp_path)) == ["out.npz", "whole.npz"]


@pytest.mark.parametrize("name", ["out.png", "out.npz"])
def test_broken_shard_is_named_and_made_again(name, tmp_path):
    sampler, out = pra.Sampler(random_model(PIXEL)), tmp_path / name
    whole = tmp_path / f"whole-{name}"
    many(sampler, whole, 4)
    stopped(sampler, out, 4, batches=1)
    (shard,) = tmp_path.glob(f".{name}.partial/shard-*.npz")
    shard.write_bytes(shard.read_bytes()[:-40])
    refused(lambda: many(pra.Sampler(random_model(PIXEL)), out, 4), shard.name, "write it again")
    shard.unlink()
    many(pra.Sampler(random_model(PIXEL)), out, 4)
    assert out.read_bytes() == whole.read_bytes() if name == "out.png" else arrays(out)[0].shape[0] == 4


def test_set_without_images_leaves_nothing(tmp_path, full_disk):
    model, out = random_model(PIXEL), tmp_path / "out"
    stopped(pra.Sampler(model), out, 10, batches=0)
    with full_disk(600):
        attempt = lambda: many(pra.Sampler(model), tmp_path / "out.npz", 10, batch_size=10)  # noqa: E731
        refused(attempt, "shard-000000.npz cannot be written", "nothing was left")
    assert os.listdir(tmp_path) == []
    partial = tmp_path / ".out.partial"  # as a kill before the first shard leaves it
    partial.mkdir()
    (partial / "plan.json").write_text(json.dumps({"images_per_shard": 3, "images": {"count": 7}}))
    assert many(pra.Sampler(model), out, 10) == 10
    assert len(contents(out)) == 10


def test_two_commands_do_not_write_one_output(tmp_path):
    model, out = random_model(PIXEL), tmp_path / "out.npz"
    stopped(pra.Sampler(model), out, 10, batches=1)
    with locked(tmp_path / ".out.npz.partial", "filled", "wait"):
        before = contents(tmp_path)
        refused(lambda: many(pra.Sampler(model), out, 10), ".out.npz.partial is being filled", "another --out")
        assert contents(tmp_path) == before
    assert many(pra.Sampler(model), out, 10) == 8


@pytest.mark.parametrize("name", ["out.png", "out.npz", "out"])
def test_killed_clean_up_is_finished_by_the_next_call(name, tmp_path, monkeypatch):
    sampler, out = pra.Sampler(random_model(PIXEL)), tmp_path / name
    whole, partial = tmp_path / "whole" / name, tmp_path / f".{name}.partial"
    many(sampler, whole, 4)
    for parts_go in (False, True):
        with monkeypatch.context() as patch:  # killed after the output appeared, and while its parts go
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            patch.setattr(Path, "unlink", Path.unlink if parts_go else lambda *_, **__: None)
            many(sampler, out, 4)
        assert partial.exists()
        if parts_go:
            refused(lambda: many(sampler, out, 5), f"{out} exists already", code="exists")  # of another request
        else:
            assert many(sampler, out, 4) == 0
        assert sorted(os.listdir(tmp_path)) == sorted([name, "whole"])
        assert held(out) == held(whole)
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    stopped(sampler, out, 4, batches=1)
    out.touch()  # of somebody else: the finished images stay
    (partial / "joined.json").write_text("5")
    refused(lambda: many(sampler, out, 4), code="exists")
    assert any(partial.glob("shard-*"))


def held(path):
    """The arrays of an archive, whose bytes tell the time, or the bytes of a file or of all files of a folder."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return [np.asarray(arrays[name]).tobytes() for name in arrays.files]
    return [file.read_bytes() for file in (sorted(path.iterdir()) if path.is_dir() else [path])]


def test_half_written_shard_does_not_count(tmp_path):
    shards = shards_of(tmp_path, 10, 4, ".npz")
    assert shards.images == [range(4), range(4, 8), range(8, 10)]
    for name in (".shard-000000.npz.x1y2", "shard-000002.npz"):
        (tmp_path / name).write_bytes(b"")
    assert shards.missing() == [0, 1]
    assert shards.images_there() == 2

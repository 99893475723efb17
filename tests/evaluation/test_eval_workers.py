"""Images for an evaluation that other processes read ahead: bitwise the same, by as many as are worth it."""

import json
import multiprocessing
from contextlib import closing
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from support.judging import noise_pictures, run_command, saved_model
from support.models import random_model
from support.refusal import refused

import pra
from pra.commands.eval import evaluate_command
from pra.config import DataConfig, Precision, SamplingConfig
from pra.data import loader, open_source
from pra.errors import PraError
from pra.evaluation import rollout_gap
from pra.evaluation.classifier import fit_classifier
from pra.evaluation.reference import from_source
from pra.evaluation.samples import pictures, prepared
from pra.sampling import Sampler

CPU = torch.device("cpu")
SIZE = (6, 8)
COUNT = 45


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of three classes."""
    folder = tmp_path_factory.mktemp("photos")
    noise_pictures(folder, dict.fromkeys("abc", COUNT // 3))
    return folder


@pytest.fixture
def source(photos):
    return open_source(f"folder:{photos}")


@pytest.fixture
def started(monkeypatch):
    """Record the number of workers of each call, with limits low enough for small sets to use workers."""
    counts = []
    whole = loader.from_workers

    def counted(work, items, workers):
        counts.append(workers)
        return whole(work, items, workers)

    monkeypatch.setattr(loader, "from_workers", counted)
    monkeypatch.setattr(loader, "WORTH_A_WORKER", 5)
    monkeypatch.setattr(loader, "PIECE", 4)
    return counts


def how(workers):
    return DataConfig(source="", workers=workers)


def test_batches_are_the_same(source, started):
    read = []
    for workers in (0, 2):
        with closing(prepared(source, range(COUNT)[::-1], SIZE, 3, how(workers), 7, range(3, 40))) as batches:
            read.append(list(batches))
    for none, two in zip(*read, strict=True):
        assert none.start == two.start
        assert torch.equal(none.images, two.images)
        assert torch.equal(none.labels, two.labels)
    assert [batch.start for batch in read[0]] == [3, 10, 17, 24, 31, 38]
    assert started == [0, 2]


def test_the_command_takes_the_setting(photos, tmp_path, classifiers, started, capsys):
    saved = saved_model(tmp_path / "model", ["a", "b", "c"])
    reports = []
    for workers in (0, 1):
        for name, target, settings in (("run", saved, ["sampling.steps=1"]), ("folder", photos, [])):
            out = tmp_path / f"{name}-{workers}.json"
            run_command(
                evaluate_command, target, reference=f"folder:{photos}", batch_size=10, out=out,
                num=12 if name == "run" else None, reconstruction=name == "run",
                settings=(*settings, f"data.workers={workers}"),
            )  # fmt: skip
            reports.append(json.loads(out.read_text())["figures"])
    assert reports[:2] == reports[2:]
    # The run's reference is read for the classifier, for the statistics and for reconstructions; of the folder the
    # pictures as well.
    assert started == [0] * 6 + [1] * 6


def test_few_images_start_no_process(source, started, monkeypatch):
    for worth, expected in ((COUNT, 1), (COUNT + 1, 0), (20, 2)):
        monkeypatch.setattr(loader, "WORTH_A_WORKER", worth)
        stream = prepared(source, range(COUNT), SIZE, 3, how(8), 10)
        next(stream)
        stream.close()
        assert started.pop() == expected


def test_one_process_reads_a_stream(source, started):
    source.lanes, source.arranged = 8, lambda order, start: order  # as of a source that can only be read forward
    none, two = (list(prepared(source, range(COUNT), SIZE, 3, how(workers), 10)) for workers in (0, 4))
    assert all(torch.equal(a.images, b.images) for a, b in zip(none, two, strict=True))
    assert started == [0, 1]


def test_no_images_are_no_batches(source):
    assert list(prepared(source, [], SIZE, 3, how(2), 10)) == []


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_errors_arrive_as_they_were_and_no_process_stays(photos, tmp_path, classifiers, started):
    other = tmp_path / "other"
    (other / "a").mkdir(parents=True)
    for index in range(30):
        Image.new("RGB", (8, 6), (index, 0, 0)).save(other / "a" / f"{index:02d}.png")
    broken = other / "a" / "20.png"
    broken.write_bytes(broken.read_bytes()[:50])
    damaged, whole = open_source(f"folder:{other}"), open_source(f"folder:{photos}")
    before = multiprocessing.active_children()
    judge = fit_classifier(whole, SIZE, 3, how(0), CPU, progress=False)
    with pytest.raises(PraError) as kept:  # with its traceback, that holds all that was under way
        from_source(damaged, SIZE, 3, how(2), judge, batch_size=4, progress=False)
    assert str(kept.value).startswith(f"{broken}: ")
    assert multiprocessing.active_children() == before
    refused(lambda: list(pictures(damaged, range(30), (SIZE, 3), 4, workers=2)), code="unreadable", path=broken)
    assert started[-2:] == [2, 2]


# --- the rollout gap ----------------------------------------------------------------------------------------


def test_gap_samples_in_float32(monkeypatch):
    opened = Mock(side_effect=Sampler)
    monkeypatch.setattr(rollout_gap, "Sampler", opened)
    model, config = random_model().eval(), pra.recipe("tiny").train
    rollout_gap.rollout_gap(
        model, config.rollout, torch.rand(3, 3, *SIZE), torch.arange(3), SamplingConfig(steps=1), config.objective
    )
    assert [call.args[2] for call in opened.call_args_list] == [Precision.FLOAT32]

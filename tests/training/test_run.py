"""A run's folder: what is in it, what may change between two commands, and where its data may lie."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.files import contents
from support.refusal import refused
from support.training import assert_same, pictures, steps_logged, tiny, train

import pra
from pra.data import open_source
from pra.data.images import ArraySource
from pra.models import weights
from pra.recipes import distill
from pra.training import callbacks
from pra.training import run as runs
from pra.training.optimizer import learning_rate
from pra.training.plots import draw_curves
from pra.training.run import COMMON, loss_terms, points_of, read_metrics, read_run
from pra.utils.distributed import World


def test_run_folder_and_metrics(trained):
    assert sorted(path.name for path in trained.iterdir()) == [
        "checkpoints", "config.json", "curves.png", "environment.json", "metrics.jsonl", "reconstructions", "samples",
        "tensorboard",
    ]  # fmt: skip
    assert [path.name for path in weights.checkpoints(trained)] == ["step-00000010", "step-00000020"]
    environment = json.loads((trained / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["hardware"]["threads"] == 1
    rows, config = read_metrics(trained), read_run(trained).train
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert all(row.keys() == {*COMMON, "pixel", "flow", "auxiliary"} for row in rows)
    assert loss_terms(rows) == ["pixel", "flow", "auxiliary"]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[-1]["total"] < rows[0]["total"]
    assert rows[-1]["epoch"] == pytest.approx(20 * 8 / len(open_source("digits")))
    for row in rows:
        assert row["learning_rate"] == learning_rate(config.optimizer, int(row["step"]) - 1, config.steps)


# Written by version 0.1 before the terms had names of their own; 0 stood for what was not computed.
OLD_LINE = {
    "step": 1, "total": 2.9, "flow": 1.9, "reconstruction": 0.8, "auxiliary": 1.1, "shortcut": 0.0, "state_std": 0.6,
    "gradient_norm": 4.2, "learning_rate": 0.001, "images_per_second": 300.0, "epoch": 0.01, "skipped": 0,
}  # fmt: skip


def test_metrics_of_old_runs_draw_and_resume(run, monkeypatch):
    """The curves of a run that resumes have the old name and the new ones."""
    monkeypatch.setattr(callbacks, "draw_curves", draw_curves)
    old = [OLD_LINE | {"step": 10, "flow": 0.0}, OLD_LINE | {"step": 20}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    assert loss_terms(old) == ["reconstruction", "auxiliary", "flow"]
    assert points_of(old, "flow") == [(20, 1.9)]
    (run / "curves.png").unlink()
    pra.train(tiny("train.steps=21"), run, device="cpu", progress=False)
    assert (run / "curves.png").exists()
    rows = read_metrics(run)
    assert rows[:2] == old
    assert loss_terms(rows) == ["reconstruction", "auxiliary", "flow", "pixel"]


def test_config_of_an_earlier_version_resumes(straight, tmp_path):
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    values = json.loads((run / "config.json").read_text())
    del values["initial_average"], values["data"]["validation"]
    del values["train"]["averages"], values["train"]["validate_every"], values["train"]["optimizer"]["matrices"]
    values["train"]["shortcut_only"] = values["train"].pop("trainable") == ["shortcut"]
    (run / "config.json").write_text(json.dumps(values))
    assert train(tiny("train.steps=7"), run).new_steps == 1
    assert weights.averages(weights.checkpoints(run)[-1]) == ["ema", "raw"]


def test_resume_may_change_what_changes_no_weight(run):
    config = tiny(
        "train.steps=21", "train.keep_checkpoints=1", "train.micro_batch_size=4", "train.parallel=fsdp",
        "train.activation_checkpointing=true", "data.workers=1", "data.on_corrupt=skip", "data.on_small=upscale",
        "sampling.guidance=3",
    )  # fmt: skip
    assert train(config, run).new_steps == 1
    assert pra.load(run).sampling.guidance == 3.0
    assert read_run(run) == config


def test_resume_of_another_configuration_is_refused(trained):
    before = contents(trained)
    changed = {
        "train.batch_size=4": "train.batch_size: 8 in the run, 4 asked for",
        "train.optimizer.lr=0.5": "train.optimizer.lr: 0.001 in the run, 0.5 asked for",
        "model.backbone.depth=3": "model.backbone.depth: 2 in the run, 3 asked for",
        "data.flip=true": "data.flip: false in the run, true asked for",
        "train.rollout=Clean": 'train.rollout.type: "Parallel" in the run, "Clean" asked for',
        "train.trainable=head.*": 'train.trainable: ["all"] in the run, ["head.*"] asked for',
        "train.averages=[0.1]": "train.averages: [] in the run, [0.1] asked for",
        "train.optimizer.matrices=Muon": "train.optimizer.matrices: null in the run",
        "data.validation=0.1": "data.validation: null in the run, 0.1 asked for",
    }
    for settings in (["data.flip=true"], ["train.averages=[0.1]"], changed):
        parts, config = [changed[setting] for setting in settings], tiny("train.steps=30", *settings)
        refused(lambda: train(config, trained), *parts, "another --run-dir", code="mismatch", path=trained)  # noqa: B023
    classes = tiny("train.steps=30", "model.num_classes=11")
    refused(lambda: train(classes, trained), "(model.num_classes: 10 in the run, 11 asked for)", code="mismatch")
    assert contents(trained) == before


def test_run_folder_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "mine").write_text("x")
    refused(lambda: train(tiny(), tmp_path), "another --run-dir", code="exists", path=tmp_path)
    refused(lambda: train(tiny(), tmp_path / "mine"), str(tmp_path / "mine"))
    refused(lambda: runs.check_run(tmp_path / "mine", tiny(), {}), code="exists", path=tmp_path / "mine")
    refused(lambda: train(tiny("train.steps=1"), tmp_path / "mine" / "run"), str(tmp_path / "mine" / "run"))
    assert contents(tmp_path) == {"mine": b"x"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".lock").write_text("process 1 on elsewhere")  # left by a killed process
    assert train(tiny("train.steps=1"), tmp_path / "empty").steps == 1
    assert not (tmp_path / "empty" / ".lock").exists()


def test_run_folder_whose_path_is_not_utf8_is_refused(tmp_path):
    folder = tmp_path / "r\udce9un"
    refused(lambda: train(tiny(), folder), "not a path in UTF-8", "Use another --run-dir", path=folder)
    assert not folder.exists()


def test_damaged_files_of_a_run_are_named(run):
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"step"', "step", 1))
    refused(lambda: train(tiny("train.steps=30"), run), "metrics.jsonl, line 1", code="unreadable")
    (run / "config.json").write_text('{"recipe": ')
    before = contents(run)
    refused(lambda: train(tiny("train.steps=30"), run), "config.json")
    assert contents(run) == before


def test_full_disk_while_logging_loses_no_line(run, full_disk, monkeypatch):
    original = callbacks.Metrics.on_log

    def write(self, trainer, row):
        with full_disk(self.path.stat().st_size + 10):
            original(self, trainer, row)

    monkeypatch.setattr(callbacks.Metrics, "on_log", write)
    path = run / "metrics.jsonl"
    refused(lambda: train(tiny("train.steps=30"), run), "step-00000020", code="unwritable", path=path)
    monkeypatch.undo()
    train(tiny("train.steps=21"), run)
    assert steps_logged(run) == [5, 10, 15, 20, 21]


def test_claimed_finds_machines_that_see_another_folder(tmp_path, monkeypatch):
    class Elsewhere(World):
        def combine(self, value, how):
            return how(["process 7 on a machine", value])

        def barrier(self, patient=False):
            waited.append(patient)

    def claim():
        with runs.claimed(tmp_path, tiny(), Elsewhere(1, 2, 0), {}):
            pass

    waited = []
    monkeypatch.setattr(runs, "SEEN_WITHIN", 0.0)
    (tmp_path / ".lock").write_text("process 7 on a machine")
    claim()
    assert waited == [True]  # the lock stays until all have seen it
    (tmp_path / ".lock").write_text("process 7 on another")  # which was killed, long ago
    refused(claim, "--run-dir", path=tmp_path, rank=1)
    (tmp_path / ".lock").unlink()
    refused(claim, "process 7 on a machine", code="missing")


def configured(source, *settings):
    return tiny(f"data.source={source}", "model.num_classes=2", "train.steps=1", *settings)


@pytest.fixture
def begun(tmp_path):
    """A run of a step on the pictures in the folder ``a``."""
    train(configured(pictures(tmp_path / "a", "abb")), tmp_path / "run")
    return tmp_path / "run"


def test_moved_data_resume(begun, tmp_path):
    known = runs.recorded(begun)["data"]
    assert known == runs.contents(open_source(f"folder:{tmp_path / 'a'}"))
    assert known["images"] == 3
    here = f"folder:{(tmp_path / 'a').rename(tmp_path / 'b')}"
    changed = configured(here, "train.steps=2", "train.seed=5")  # no other difference is hidden
    refused(lambda: train(changed, begun), "train.seed: 0 in the run, 5 asked for", here, code="mismatch")
    assert train(configured(here, "train.steps=2"), begun).new_steps == 1
    assert read_run(begun).data.source == here
    assert runs.recorded(begun)["data"] == known
    train(configured(here, "train.steps=2"), tmp_path / "straight")
    assert_same(begun, tmp_path / "straight")


@pytest.mark.parametrize(("classes", "held"), [("abbb", "holds 4"), ("aab", "holds others"), ("zbb", "holds others")])
def test_other_data_are_refused(begun, tmp_path, classes, held):
    before = contents(begun)
    other = pictures(tmp_path / "b", classes.replace("z", "a"), (8, 9) if "z" in classes else (8, 8))
    config, known = configured(other, "train.steps=2"), f"folder:{tmp_path / 'a'}"
    refused(lambda: train(config, begun), held, "(3 images)", code="mismatch", path=begun, source=other, known=known)
    assert contents(begun) == before


def test_moved_data_of_a_run_without_a_record_are_refused(begun, tmp_path):
    there, record = f"folder:{tmp_path / 'a'}", runs.recorded(begun)
    del record["data"]
    here = f"folder:{shutil.copytree(tmp_path / 'a', tmp_path / 'b')}"
    for text in (json.dumps(record), None):
        (begun / "environment.json").write_text(text) if text else (begun / "environment.json").unlink()
        refused(lambda: train(configured(here, "train.steps=2"), begun), "(data.source: ", there, here, code="mismatch")
    assert train(configured(there, "train.steps=2"), begun).new_steps == 1
    assert train(configured(here, "train.steps=3"), begun).new_steps == 1  # now there is a record


def test_contents_tell_data_from_others(tmp_path):
    name, labels = pictures(tmp_path, "aaa"), np.zeros(3, np.int64)
    arrays = [ArraySource("in memory", np.full((3, 4, 4), grey, np.uint8), labels, ("a",)) for grey in (0, 0, 9)]
    files, memory, same, other = (runs.contents(source) for source in (open_source(name), *arrays))
    assert memory == same != other
    assert files["labels_sha256"] == memory["labels_sha256"]
    (tmp_path / "a" / "00.png").write_bytes(b"no picture")
    assert runs.contents(open_source(name)) != files  # of a file, whatever it holds
    gone = open_source(name)
    (tmp_path / "a" / "00.png").unlink()
    assert runs.contents(gone) == files | {"first_image_sha256": None}


def test_moved_first_weights_resume(begun, tmp_path):
    def short(start, steps):
        return distill.configure(str(start), steps)

    run = tmp_path / "short"
    train(short(begun, 1), run)
    record = runs.recorded(run)["initial"]
    other = begun.rename(tmp_path / "other")
    assert train(short(other, 2), run).new_steps == 1
    assert read_run(run).initial == str(other)
    assert runs.recorded(run)["initial"] == record
    train(configured(f"folder:{tmp_path / 'a'}", "train.steps=2"), other)
    renamed = other.rename(tmp_path / "renamed")
    refused(lambda: train(short(renamed, 3), run), "(initial: ", str(other), str(renamed), code="mismatch")
    config = pra.config.apply_settings(short(renamed, 3), [f"initial={other}"])
    assert train(config, run).new_steps == 1

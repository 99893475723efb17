"""A run's folder: its files, the changes allowed between two commands, and moved data."""

import io
import json
import math
import os
import shutil
from dataclasses import replace
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
from pra.data.pack import Packing, pack
from pra.models import weights
from pra.recipes import distill
from pra.training import callbacks, plots
from pra.training import run as runs
from pra.training.callbacks import overfits
from pra.training.optimizer import learning_rate
from pra.training.plots import draw_curves
from pra.training.run import COMMON, loss_terms, points_of, read_metrics, read_run, training_seconds
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
    found = runs.contents(gone)
    assert {name for name, value in found.items() if value != files[name]} == {"first_image_sha256", "files_sha256"}


@pytest.mark.parametrize("change", ["one more", "one less", "another name", "another size", "another class"])
def test_changed_data_are_noticed_and_named(begun, tmp_path, change):
    folder = tmp_path / "a"
    if change == "one more":
        pictures(folder, "abbb")
    elif change == "one less":
        (folder / "b" / "02.png").unlink()
    elif change == "another name":
        (folder / "b" / "02.png").rename(folder / "b" / "03.png")
    elif change == "another size":
        pictures(folder, "abb", (9, 9))
    else:
        (folder / "b" / "01.png").rename(folder / "a" / "01.png")
    count = {"one more": "4", "one less": "2"}.get(change, "others")
    there = f"folder:{folder}/"  # another spelling of the path
    text = runs.check_data(begun, configured(there), open_source(there))
    assert text.startswith(f"{there} has changed since {begun} was last trained on its 3 images: it holds {count} now.")
    assert "--run-dir" in text


def test_packed_data_are_the_same(begun, tmp_path):
    pack(open_source(f"folder:{tmp_path}/a"), tmp_path / "packed", Packing(), workers=0)
    packed = f"wds:{tmp_path}/packed"
    assert runs.check_data(begun, configured(packed), open_source(packed)) == ""


def test_changed_data_move_held_out_images(tmp_path):
    there, run = pictures(tmp_path / "a", "aabb"), tmp_path / "run"
    train(configured(there, "data.validation=0.3"), run)
    pictures(tmp_path / "a", "aabbb")
    with pytest.warns(UserWarning, match="holds 5 now.* Other images are held out now: some were learned from"):
        train(configured(there, "data.validation=0.3", "train.steps=2"), run)
    assert train(configured(there, "data.validation=0.3", "train.steps=3"), run).new_steps == 1  # warned about once


@pytest.mark.parametrize("record", [None, {"images": 3}, {"images": 3, "labels_sha256": ""}])
def test_older_records_resume(begun, tmp_path, record):
    known = runs.recorded(begun)
    labels = known.pop("data")["labels_sha256"]
    if record is not None:
        known["data"] = record | {name: labels for name in record if name != "images"}
    (begun / "environment.json").write_text(json.dumps(known))
    assert train(configured(f"folder:{tmp_path}//a/", "train.steps=2"), begun).new_steps == 1


def test_other_classes_are_refused(begun, tmp_path):
    there = pictures(tmp_path / "a", "abbc")
    config = tiny(f"data.source={there}", "model.num_classes=3")
    refused(lambda: train(config, begun), f"other classes than {there}", "2 in the run", code="mismatch", path=begun)


def gaps(labels, classes):
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8), np.uint8)
    return ArraySource("gaps", images, np.array(labels), tuple(classes))


def test_classes_without_images_are_left_out(tmp_path):
    config, source = tiny("data.source=gaps", "model.num_classes=2", "train.steps=1"), gaps([2, 2, 3, 3], "0123")
    with pytest.warns(UserWarning, match="classes of gaps without images are left out: 0, 1"):
        model = train(config, tmp_path / "run", source=source).model
    assert model.classes == ("2", "3")
    train(replace(config, train=replace(config.train, steps=2)), tmp_path / "run", source=source)
    whole = gaps([0, 0, 1, 1], "23")  # the same images and classes
    train(config, tmp_path / "same", source=whole)
    assert_same(tmp_path / "run", tmp_path / "same", step=1)


def test_older_run_goes_on_with_empty_classes(tmp_path):
    config, source = tiny("data.source=gaps", "model.num_classes=4", "train.steps=1"), gaps([2, 2, 3, 3], "0123")
    with pytest.warns(UserWarning, match="2 of the model's 4 classes have no images in gaps .*num_classes to 2"):
        train(config, tmp_path / "run", source=source)
    assert runs.class_count(tmp_path / "run", source) == 4
    assert runs.class_count(tmp_path / "other", source) == 2
    again = replace(config, train=replace(config.train, steps=2))
    assert train(again, tmp_path / "run", source=source).model.classes == ("0", "1", "2", "3")


def test_new_run_of_two_classes_of_one_name_is_refused(tmp_path):
    config, source = tiny("data.source=gaps", "model.num_classes=2"), gaps([0, 1], ("crane", "crane"))
    refused(lambda: train(config, tmp_path / "run", source=source), "both called", code="conflict", value="crane")


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


GOOD = {"step": 12, "total": 1.0, "flow": 1.0, "images_per_second": 300.0, "epoch": 0.1}
DAMAGED = {
    "no step": {name: value for name, value in GOOD.items() if name != "step"},
    "another name": {"stp": 12} | {name: value for name, value in GOOD.items() if name != "step"},
    "text": {"step": "x"},
    "no rate": GOOD | {"images_per_second": 0},
    "rate below any": GOOD | {"images_per_second": 1e-300},
    "beyond any float": GOOD | {"step": 10**400},
    "list for a number": GOOD | {"flow": [1]},
    "step of infinity": json.dumps(GOOD).replace("12", "1e999"),
    "brackets": "[" * 100_000 + "]" * 100_000,
    "torn": '{"step": 12, "to',
    "nothing": "",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_metrics_never_stop_a_run(run, kind, recwarn):
    path, line = run / "metrics.jsonl", DAMAGED[kind]
    line = (line if isinstance(line, str) else json.dumps(line)) + "\n"
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, line, *others]) + '{"step": 99')
    train(tiny("train.steps=21"), run)
    assert path.read_text().startswith("".join([first, line, *others]))  # nothing of the user's is lost
    assert steps_logged(run) == [5, 10, 15, 20, 21]
    rows, config = read_metrics(run), read_run(run)
    assert 0 < training_seconds(rows, config.train.batch_size) < 60
    told = [str(warning.message) for warning in recwarn if "damaged" in str(warning.message)]
    assert told == [f"{path}: 1 damaged line(s) are left out, the first is line 2. Repair or remove them"]


def test_strange_names_and_numbers_in_metrics_draw(run):
    rows = [GOOD | {"step": step, "$\\frac{": 3e38, "inf": 1e400, "a" * 101: 1.0} for step in (5, 10)]
    rows += [GOOD | {"step": 15, **{f"term{number}": 1.0 for number in range(100)}}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(loss_terms(read_metrics(run))) == 24
    assert not any({"inf", "a" * 101} & row.keys() for row in read_metrics(run))
    assert not overfits(read_metrics(run) * 5)
    figure = plots.curves({"a $b$": read_metrics(run), "b": read_metrics(run)}, {"flow": "$\\frac{", "$\\frac{": "b"})
    figure.savefig(io.BytesIO())


def test_metrics_that_are_not_a_file_are_refused(run):
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (run / "metrics.jsonl").unlink()
        make(run / "metrics.jsonl")
        refused(lambda: train(tiny("train.steps=30"), run), code="unreadable", path=run / "metrics.jsonl")
    (run / "metrics.jsonl").unlink()
    with (run / "metrics.jsonl").open("wb") as file:
        file.truncate(2**29)  # takes no space
    refused(lambda: read_metrics(run), "536,870,912 bytes", code="unreadable", path=run / "metrics.jsonl")
    (run / "metrics.jsonl").write_text("{\n" * 10**6)
    refused(lambda: read_metrics(run), "100,000 damaged lines", code="unreadable", path=run / "metrics.jsonl")


@pytest.mark.parametrize("name", ["checkpoints", "samples", "tensorboard"])
def test_run_with_a_link_to_elsewhere_is_refused(run, tmp_path, name):
    (run / name).rename(tmp_path / "mine")
    (run / name).symlink_to(tmp_path / "mine")
    before = contents(tmp_path)
    refused(lambda: train(tiny("train.steps=30"), run), code="unwritable", path=run / name)
    assert contents(tmp_path) == before
    (run / name).unlink()
    (tmp_path / "mine").rename(run / name)
    (tmp_path / "link").symlink_to(run)  # the user's own choice
    assert train(tiny("train.steps=21"), tmp_path / "link").steps == 21


@pytest.mark.parametrize("part", [{"data": 5}, {"losses": "x"}, {"initial": []}, {"data": {"images": {}}}])
def test_environment_of_wrong_types_is_one_line(run, part):
    (run / "environment.json").write_text(json.dumps(part))
    other = tiny("train.steps=30", "data.source=digits@test")
    refused(lambda: train(other, run), code="mismatch" if part == {"data": {"images": {}}} else "unreadable")

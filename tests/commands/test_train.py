"""``pra train``: its output, the configuration it makes, and its refusals. Own pictures: tests/recipes."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from support.files import contents
from support.refusal import refused

import pra
from pra.commands import train
from pra.data.source import check_name
from pra.evaluation.report import write_report

# Twenty steps may do that.
pytestmark = pytest.mark.filterwarnings("ignore:a state dimension varies little")

QUICK = ("--steps", "3", "--set", "train.sample_every=0")


def test_train_tells_what_it_does_and_what_comes_next(call, pictures, monkeypatch):
    monkeypatch.setattr(train, "write_report", write_report)
    command = ("train", "tiny", "--run-dir", "my run", "--data", pictures("data"))
    code, text, errors = call(*command, *QUICK)
    assert (code, errors) == (0, [])
    lines = text.splitlines()
    assert lines[:2] == [
        "classes: 2 in folder:data (the recipe has 10)",
        "run: my run (new), recipe tiny, 12 images from folder:data, on cpu",
    ]
    assert re.fullmatch(r"trained 3 steps to 3 in \d+ s", lines[2])
    assert "  report: my run/report.html" in lines
    assert lines[-1] == "next: pra sample 'my run'"
    assert pra.load("my run").classes == ("cat", "dog")
    assert call(*shlex.split(lines[-1])[2:], "--labels", "dog", "--seeds", "0", "--out", "out").code == 0
    assert [path.name for path in Path("out").iterdir()] == ["0001-dog-seed000000.png"]
    assert "trained 1 step to 4" in call(*command, "--steps", "4", *QUICK[2:]).out  # with the classes of its data


def test_options_and_settings_reach_the_configuration(call):
    settings = ["train.optimizer.lr=1e-4", "train.rollout=Clean", "data.fit=random-crop", "train.batch_size=4"]
    options = [part for setting in settings for part in ("--set", setting)]
    assert call("train", "tiny:states", "--seed", "7", *QUICK, *options).code == 0
    config = json.loads(Path("runs/tiny-states/config.json").read_text())
    assert config["train"]["optimizer"]["lr"] == 1e-4
    assert config["train"]["rollout"] == {"type": "Clean"}
    assert config["data"]["fit"] == "random-crop"
    assert (config["train"]["batch_size"], config["train"]["steps"], config["train"]["seed"]) == (4, 3, 7)


def test_same_command_resumes_with_more_steps(call, run):
    before = contents(run)
    for steps in ("20", "7"):
        code, text, errors = call("train", "tiny", "--run-dir", run, "--steps", steps)
        assert (code, errors) == (0, [])
        assert f"nothing to train: the run has 20 steps already and {steps} are asked for" in text
        assert contents(run) == before
    code, text, _ = call("train", "tiny", "--run-dir", run, "--steps", "22", "--set", "train.sample_every=0")
    assert code == 0
    assert f"run: {run} (resumed), " in text
    assert "trained 2 steps to 22 in " in text


def test_bad_options_are_refused(call):
    for options, parts in (
        ("", ["RECIPE", "--data folder:PHOTOS"]),
        ("tinny", ["'tinny'", "did you mean 'tiny'?"]),
        ("tiny:exct", ["'exct'", "did you mean 'exact'?"]),
        ("tiny --from run", ["--from", "tiny", "RECIPE"]),
        ("tiny --minutes 3", ["--minutes", "tiny"]),
        ("--data digits --minutes 3 --steps 3", ["--minutes", "--steps"]),
        ("tiny --data folder:nowhere", ["nowhere"]),
        ("tiny --data digit", ["'digit'", "did you mean 'digits'?"]),
        ("tiny --set model.patch_size=3", ["8x8", "patch_size 3"]),
        ("tiny --set train.optimiser.lr=1", ["'train.optimiser.lr'", "did you mean 'optimizer'?"]),
        ("tiny --set train.optimizer.lr=fast", ["train.optimizer.lr", "'fast'"]),
        ("tiny --set train.optimizer.lr=-1", ["lr", "-1"]),
        ("tiny --set train.batch_size", ["'train.batch_size'", "KEY=VALUE"]),
        ("tiny --set train.micro_batch_size=3", ["batch_size 8", "micro_batch_size 3"]),
        ("tiny --set train.objective.perceptual_weight=1", ["16x16", "8x8"]),
        ("tiny --steps 0", ["steps"]),
        ("tiny --seed -1", ["seed"]),
        ("tiny --device meta", ["'meta'"]),
    ):
        assert call("train", *options.split()).is_refusal(*parts)
    assert not contents(Path())


def test_bad_data_are_refused(call, pictures):
    command = ("train", "tiny", "--run-dir", "run", *QUICK, "--data")
    Path("empty").mkdir()
    assert call(*command, "folder:empty").is_refusal("empty")
    small = pictures("small", 8, 7)
    assert call(*command, small).is_refusal("7x8 pixels", "--set data.on_small=upscale")
    assert call(*command, small, "--set", "data.workers=1").is_refusal("7x8 pixels")
    data, broken = pictures("data"), Path("data/cat/4.png")
    broken.write_bytes(broken.read_bytes()[:60])
    assert call(*command, data).is_refusal(broken, "--set data.on_corrupt=skip")  # in step 2: step 1 is saved
    code, text, _ = call(*command, data, "--set", "data.on_corrupt=skip")
    assert code == 0
    assert re.search(r"^trained 2 steps to 3 in \d+ s, 2 corrupt images skipped$", text, re.MULTILINE)


def test_bad_run_folders_are_refused(call, run, pictures):
    before = contents(run)
    command = ("train", "tiny", "--steps", "30", "--run-dir")
    answer = call(*command, run, "--seed", "1", "--set", "train.batch_size=16")
    assert answer.is_refusal("train.seed: 0", "train.batch_size: 8")
    answer = call(*command, run, "--data", pictures("others"))
    assert answer.is_refusal("model.num_classes: 10")
    assert "run: " not in answer.out
    for wrong, part in ((run / "config.json", "config.json"), (run / "samples", "samples")):
        assert call(*command, wrong).is_refusal(part)
    assert call(*command, run / "config.json" / "x").is_refusal("Not a directory")
    assert contents(run) == before
    (run / "config.json").write_text("{}")
    assert call(*command, run).is_refusal("config.json")


def test_minutes_of_a_begun_run_have_no_effect(call, run):
    answer = call("train", "--data", "digits", "--run-dir", run, "--minutes", "5")
    assert answer.code == 0
    assert answer.out.splitlines()[1].startswith("--minutes 5 has no effect on a run that has begun")
    assert "--minutes" not in call("train", "--data", "digits", "--run-dir", run).out


def test_fine_tuning_another_model_is_refused(call, trained, pictures, tmp_path):
    line = ["train", "--from", trained, "--data", pictures("photos"), "--steps", "1", "--run-dir", tmp_path / "run"]
    answer = call(*line, "--set", "model.image_size=[16,16]")
    assert answer.is_refusal("model.image_size: [8, 8] there, [16, 16] asked for")
    assert not (tmp_path / "run").exists()


def test_path_without_a_kind_gets_advice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, spec, meant in (
        ("mine/cat/a.jpg", "mine/", "folder:mine/"),
        ("one/a.jpg", "one/a.jpg", "folder:one"),
        ("my own/a.jpg", "my own", "'folder:my own'"),
        ("shards/a-0.tar", "shards", "wds:shards"),
        ("shards/a-0.tar", "shards/a-0.tar", "wds:shards/a-0.tar"),
        ("mnist/train-images-idx3-ubyte", "mnist", "idx:mnist"),
        ("test/t10k-images-idx3-ubyte.gz", "test", "idx:test"),
    ):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
        refused(lambda spec=spec: check_name(spec), repr(spec), f"Write {meant}")
        check_name(shlex.split(meant)[0])


def test_misspelt_source_is_not_another_configuration(call, trained, pictures):
    pictures("photos")
    shutil.copytree(trained, "runs/own-photos")
    Path("runs/own-photos/environment.json").unlink()  # so that only the name tells the data
    for spec, said in (("photos", "Write folder:photos"), ("foldr:photos", "did you mean 'folder'?")):
        for recipe in ((), ("tiny", "--run-dir", "runs/own-photos")):
            answer = call("train", *recipe, "--data", spec)
            assert answer.is_refusal(said)
            assert answer.out == ""

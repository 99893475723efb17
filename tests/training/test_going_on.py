"""Going on with a run whose data or first weights lie elsewhere now, and which of its checkpoints stay."""

from __future__ import annotations

import json
import runpy
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.refusal import refused

import pra
from pra.config import RunConfig, apply_settings
from pra.data import open_source
from pra.data.images import ArraySource
from pra.models import weights
from pra.recipes import distill
from pra.training import callbacks, checkpoint, loop
from pra.training.moved import contents
from pra.training.run import read_run

pytestmark = pytest.mark.filterwarnings("ignore:a state dimension varies little")


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "draw_curves", lambda run: None)


def pictures(folder: Path, classes: str = "abb", colour: int = 0) -> Path:
    """A small picture for each letter, its class."""
    for number, name in enumerate(classes):
        place = folder / name / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (colour, 40 * number, 200)).save(place)
    return folder


def configured(source: str, *settings: str) -> RunConfig:
    usual = (f"data.source={source}", "model.num_classes=2", "train.sample_every=0", "train.checkpoint_every=1")
    return apply_settings(pra.recipe("tiny"), [*usual, *settings])


def train(config: RunConfig, folder: Path) -> loop.Trained:
    return pra.train(config, folder, device="cpu", progress=False)


# --- data ---------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_its_data_have_moved_to(tmp_path: Path) -> None:
    there, run = pictures(tmp_path / "a"), tmp_path / "run"
    train(configured(f"folder:{there}", "train.steps=1"), run)
    known = json.loads((run / "environment.json").read_text())["data"]
    assert known == contents(open_source(f"folder:{there}"))
    assert known["images"] == 3
    here = there.rename(tmp_path / "b")
    moved = configured(f"folder:{here}", "train.steps=2")
    assert train(moved, run).new_steps == 1
    assert read_run(run).data.source == f"folder:{here}"
    assert json.loads((run / "environment.json").read_text())["data"] == known
    straight = tmp_path / "straight"
    train(moved, straight)
    one, other = (weights.load(folder, average="raw").state_dict() for folder in (run, straight))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("classes", "colour", "held"), [("abbb", 0, "holds 4"), ("aab", 0, "holds others"), ("abb", 9, "holds others")]
)
def test_other_data_are_refused(tmp_path: Path, classes: str, colour: int, held: str) -> None:
    there, run = pictures(tmp_path / "a"), tmp_path / "run"
    train(configured(f"folder:{there}", "train.steps=1"), run)
    before = (run / "config.json").read_bytes(), (run / "environment.json").read_bytes()
    other = pictures(tmp_path / "b", classes, colour)
    config = configured(f"folder:{other}", "train.steps=2")
    refused(lambda: train(config, run), str(run), f"folder:{there} (3 images)", f"folder:{other} {held}", "--run-dir")
    assert ((run / "config.json").read_bytes(), (run / "environment.json").read_bytes()) == before


def test_a_run_that_has_no_record_of_its_data_keeps_to_their_name(tmp_path: Path) -> None:
    there, run = pictures(tmp_path / "a"), tmp_path / "run"
    train(configured(f"folder:{there}", "train.steps=1"), run)
    record = json.loads((run / "environment.json").read_text())
    del record["data"]
    here = shutil.copytree(there, tmp_path / "b")
    moved = configured(f"folder:{here}", "train.steps=2")
    for text in (json.dumps(record), None):
        (run / "environment.json").write_text(text) if text else (run / "environment.json").unlink()
        refused(lambda: train(moved, run), "another configuration (data.source: ", str(there), str(here))
    assert train(configured(f"folder:{there}", "train.steps=2"), run).new_steps == 1
    moved = configured(f"folder:{here}", "train.steps=3")
    assert train(moved, run).new_steps == 1  # now there is one


def test_a_moved_source_hides_no_other_difference(tmp_path: Path) -> None:
    there, run = pictures(tmp_path / "a"), tmp_path / "run"
    train(configured(f"folder:{there}", "train.steps=1"), run)
    here = there.rename(tmp_path / "b")
    changed = configured(f"folder:{here}", "train.steps=2", "train.seed=5")
    refused(lambda: train(changed, run), "another configuration (", "train.seed: 0 in the run, 5 asked for", str(here))


def test_what_tells_data_from_others(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "plain", "aaa")
    labels = np.zeros(3, np.int64)
    arrays = [ArraySource("in memory", np.full((3, 4, 4), grey, np.uint8), labels, ("a",)) for grey in (0, 0, 9)]
    files, memory, same, other = (contents(source) for source in (open_source(f"folder:{folder}"), *arrays))
    assert memory == same != other
    assert files["labels_sha256"] == memory["labels_sha256"]
    (folder / "a" / "0.png").write_bytes(b"no picture")
    assert contents(open_source(f"folder:{folder}")) != files  # of a file, whatever it holds
    gone = open_source(f"folder:{folder}")
    (folder / "a" / "0.png").unlink()
    assert contents(gone) == files | {"first_image_sha256": None}


# --- first weights ------------------------------------------------------------------------------------------


def test_a_distilled_run_goes_on_where_the_first_has_moved_to(tmp_path: Path) -> None:
    base, run, source = tmp_path / "a", tmp_path / "short", f"folder:{pictures(tmp_path / 'pictures')}"
    train(configured(source, "train.steps=1"), base)

    def short(start: Path, steps: int) -> RunConfig:
        return distill.configure(str(start), steps)

    train(short(base, 1), run)
    record = json.loads((run / "environment.json").read_text())["initial"]
    moved = base.rename(tmp_path / "b")
    assert train(short(moved, 2), run).new_steps == 1
    assert read_run(run).initial == str(moved)
    assert json.loads((run / "environment.json").read_text())["initial"] == record
    train(configured(source, "train.steps=2"), moved)
    renamed = moved.rename(tmp_path / "c")
    refused(lambda: train(short(renamed, 3), run), "another configuration (initial: ", str(moved), str(renamed))
    assert train(apply_settings(short(renamed, 3), [f"initial={moved}"]), run).new_steps == 1


# --- checkpoints --------------------------------------------------------------------------------------------


def test_checkpoints_that_stay_for_good_can_be_loaded(tmp_path: Path) -> None:
    run, source = tmp_path / "run", f"folder:{pictures(tmp_path / 'a')}"
    settings = ["train.steps=9", "train.keep_every=3", "train.keep_checkpoints=1"]
    train(configured(source, *settings), run)
    assert [path.name for path in weights.checkpoints(run)] == [f"step-{step:08d}" for step in (3, 6, 9)]
    early = weights.load(run / "checkpoints" / "step-00000003")
    train(configured(source, "train.steps=3"), tmp_path / "straight")
    straight = weights.load(tmp_path / "straight").state_dict()
    assert all(torch.equal(tensor, straight[name]) for name, tensor in early.state_dict().items())
    # From here on only the newest.
    (run / "checkpoints" / "step-00000003" / "state.json").unlink()  # a damaged one says no step
    (run / "checkpoints" / "step-00000004-mine").mkdir()
    train(configured(source, *settings, "train.steps=10", "train.keep_every=6"), run)
    assert [path.name for path in weights.checkpoints(run)] == ["step-00000006", "step-00000010"]


# --- beside the run ------------------------------------------------------------------------------------------


def test_nobody_else_s_warnings_are_filtered(tmp_path: Path) -> None:
    source, of_torch = pictures(tmp_path / "a"), "torch.distributed is disabled"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        for steps in (1, 2):  # the second loads what the first has saved
            train(configured(f"folder:{source}", f"train.steps={steps}"), tmp_path / "run")
        runpy.run_path(checkpoint.__file__)  # as at its first import
        assert list(warnings.filters) == before
    assert [str(one.message) for one in seen if of_torch in str(one.message)] == []

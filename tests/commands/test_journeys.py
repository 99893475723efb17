"""One command after the other, as a person gives them: what is printed leads on, and a slip is named as what it is."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.answer import Pra, caller
from support.files import contents
from support.models import LEARNED, random_model
from support.refusal import refused

import pra
from pra.config import SamplingConfig, Solver, TimeGrid
from pra.data.source import check_name
from pra.recipes import fine_tune
from pra.sampling import many
from pra.utils.files import first_free

ONE = ("--labels", "0", "--seeds", "0", "--steps", "1")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pra:
    """A command in this process, on the CPU and in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return caller(capsys)


def pictures(folder: Path, mode: str = "RGB", count: int = 4) -> Path:
    """8x8 pixels, of two classes."""
    for index in range(count):
        path = folder / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(values).convert(mode).save(path)
    return folder


# --- where the output goes ----------------------------------------------------------------------------------


def test_samples_without_a_name_take_the_first_that_is_free(call: Pra, trained: Path) -> None:
    for seed, name in enumerate(["samples.png", "samples-2.png", "samples-3.png"]):
        answer = call("sample", trained, "--labels", "0", "--seeds", seed, "--steps", "1")
        assert (answer.code, answer.out.splitlines()[-1]) == (0, f"1 images (1 labels x 1 seeds): {name}")
    Path("samples-2.png").unlink()
    assert call("sample", trained, *ONE).out.endswith(": samples-2.png\n")
    before = contents(Path())
    answer = call("sample", trained, *ONE, "--out", "samples.png")
    assert answer == (2, "", ["pra: error: samples.png exists already; choose another --out or remove it"])
    assert contents(Path()) == before


def test_completions_without_a_name_take_the_first_that_is_free(call: Pra, trained: Path) -> None:
    Image.new("L", (8, 8)).save("mine.png")
    for name in ("completions.png", "completions-2.png"):
        answer = call("complete", trained, "mine.png", "--rows", "2", "--seeds", "0")
        assert answer.out.endswith(f", 1 times each: {name}\n")
        assert Path(name).exists()
    answer = call("complete", trained, "mine.png", "--rows", "2", "--out", "mine.png")
    assert answer.errors == ["pra: error: mine.png exists already; choose another --out or remove it"]


def test_a_link_to_nowhere_takes_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    assert first_free(tmp_path / "a.png") == tmp_path / "a-2.png"
    assert first_free(tmp_path / "b.png") == tmp_path / "b.png"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("RUN", "--labels", "10"), "label 10 is out of range"),
        (("RUN", "--guidance", "nan"), "guidance must lie in"),
        (("RUN", "--num", "0"), "--num 0 must be at least 1"),
        (("nowhere",), "no run or model at nowhere: the folder does not exist"),
        (("taken.png",), "no run or model at taken.png: it is a file"),
        (("RUN", *ONE), "taken.png exists already"),
    ],
)
def test_a_slip_is_named_before_the_output_that_is_there(
    call: Pra, trained: Path, words: tuple[str, ...], said: str
) -> None:
    Path("taken.png").write_bytes(b"mine")
    answer = call("sample", *(str(trained) if word == "RUN" else word for word in words), "--out", "taken.png")
    assert (answer.code, answer.out, len(answer.errors)) == (2, "", 1)
    assert said in answer.errors[0]
    assert Path("taken.png").read_bytes() == b"mine"


def test_what_comes_next_can_be_copied_from_a_folder_with_spaces(call: Pra, trained: Path) -> None:
    shutil.copytree(trained, "my run")
    told = call("train", "tiny", "--run-dir", "my run", "--steps", "20").out.splitlines()[-1]
    assert told == "next: pra sample 'my run'"
    assert call(*shlex.split(told)[2:], *ONE).code == 0
    pictures(Path("my pictures"))
    answer = call("data", "pack", "folder:my pictures", "my shards", "--workers", "0")
    assert answer.out.splitlines()[-1] == "next: pra train RECIPE --data 'wds:my shards'"
    again = call("data", "pack", "folder:my pictures", "my shards")
    assert again.errors == ["pra: error: my shards exists already; choose another folder or remove it"]


@pytest.mark.parametrize(("count", "labels"), [(5, "5 labels"), (1, "1 label"), (12, "10 labels")])
def test_only_labels_that_were_sampled_are_told(call: Pra, trained: Path, count: int, labels: str) -> None:
    answer = call("sample", trained, "--num", count, "--steps", "1", "--out", "many.npz")
    assert answer.out.splitlines()[-1] == f"{count} images (in turn, {labels}): many.npz"


# --- stopped by Ctrl-C --------------------------------------------------------------------------------------


@pytest.fixture
def stopped_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ctrl-C when so many shards are made."""
    make = many._make

    def stop(after: int) -> None:
        made = iter([make] * after)

        def limited(*arguments: Any) -> None:
            if (one := next(made, None)) is None:
                raise KeyboardInterrupt
            one(*arguments)

        monkeypatch.setattr(many, "_make", limited)

    return stop


def test_ctrl_c_while_sampling_says_what_is_kept_and_how_to_go_on(
    call: Pra, trained: Path, stopped_after: Callable[[int], None]
) -> None:
    words = ["sample", str(trained), "--num", "7", "--batch-size", "2", "--steps", "1"]
    stopped_after(2)
    code, out, errors = call(*words)
    kept = "stopped with 4 of 7 images, which lie in .samples.png.partial; the same command goes on from there"
    assert (code, out, errors) == (130, "", [f"pra: {kept}: {shlex.join(['pra', *words])}"])
    stopped_after(2)
    answer = call(*shlex.split(errors[0].rpartition(": ")[2])[1:])
    assert answer.out.startswith("3 new images")
    assert answer.out.endswith(": samples.png\n")
    assert [path.name for path in Path().iterdir()] == ["samples.png"]


def test_ctrl_c_before_the_first_image_leaves_nothing(
    call: Pra, trained: Path, stopped_after: Callable[[int], None]
) -> None:
    stopped_after(0)
    assert call("sample", trained, "--num", "7", "--steps", "1") == (130, "", ["pra: interrupted"])
    assert not contents(Path())


# --- the data's name ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "spec", "meant"),
    [
        (["mine/a.jpg"], "mine", "folder:mine"),
        (["mine/cat/a.jpg"], "mine/", "folder:mine/"),
        (["mine/a.jpg"], "mine/a.jpg", "folder:mine"),
        (["my own/a.jpg"], "my own", "'folder:my own'"),
        (["shards/a-0.tar", "shards/classes.json"], "shards", "wds:shards"),
        (["shards/a-0.tar"], "shards/a-0.tar", "wds:shards/a-0.tar"),
        (["mnist/train-images-idx3-ubyte"], "mnist", "idx:mnist"),
        (["mnist/t10k-images-idx3-ubyte.gz"], "mnist", "idx:mnist"),
        (["mnist/train-images-idx3-ubyte.gz"], "mnist/train-images-idx3-ubyte.gz", "idx:mnist"),
    ],
)
def test_a_path_alone_gets_the_name_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], spec: str, meant: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in files:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    refused(lambda: check_name(spec), f"data source {spec!r} does not say what is there. Write {meant}")
    check_name(shlex.split(meant)[0])


@pytest.mark.parametrize(
    ("spec", "said"), [("photos", "Write folder:photos"), ("foldr:photos", "did you mean 'folder'?")]
)
@pytest.mark.parametrize("recipe", [[], ["tiny", "--run-dir", "runs/own-photos"]])
def test_a_misspelt_source_is_no_other_configuration(
    call: Pra, trained: Path, spec: str, said: str, recipe: list[str]
) -> None:
    """The folder of its name may be there."""
    pictures(Path("photos"))
    shutil.copytree(trained, "runs/own-photos")
    (Path("runs/own-photos/environment.json")).unlink()  # so that only the name tells the data
    answer = call("train", *recipe, "--data", spec)
    assert (answer.code, answer.out, len(answer.errors)) == (2, "", 1)
    assert said in answer.errors[0]


def test_a_run_is_announced_when_it_can_begin(call: Pra, run: Path, tmp_path: Path) -> None:
    answer = call("train", "tiny", "--run-dir", run, "--data", f"folder:{pictures(tmp_path / 'others')}")
    assert (answer.code, len(answer.errors)) == (2, 1)
    assert "model.num_classes: 10 in the run, 2 asked for" in answer.errors[0]
    assert "run: " not in answer.out


def test_minutes_of_a_run_that_has_begun(call: Pra, run: Path) -> None:
    answer = call("train", "--data", "digits", "--run-dir", run, "--minutes", "5")
    assert answer.code == 0
    assert answer.out.splitlines()[:2] == [
        f"settings: those of {run}, chosen when it began",
        "--minutes 5 has no effect here, it counts when a run begins: this one keeps its 20 steps, and a larger "
        "--steps trains longer",
    ]
    assert "--minutes" not in call("train", "--data", "digits", "--run-dir", run).out


def test_another_model_than_the_one_to_go_on_from_is_refused_at_once(
    call: Pra, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(Path("photos"))
    monkeypatch.setattr(fine_tune, "look", lambda data: pytest.fail("the pictures are looked at"))
    words = ["train", "--from", trained, "--data", "folder:photos"]
    answer = call(*words, "--set", "model.image_size=[16,16]")
    assert (answer.code, answer.out, len(answer.errors)) == (2, "", 1)
    assert "of another model (model.image_size: [8, 8] there, [16, 16] asked for)" in answer.errors[0]
    fine_tune.check_settings(str(trained), ["model.num_classes=3", "train.batch_size=4"])


# --- evaluation ---------------------------------------------------------------------------------------------


def test_where_grey_meets_colour_a_line_says_so(call: Pra, trained: Path) -> None:
    """A reference of too few images stops the command behind it."""
    for mode, line in (
        ("RGB", "the reference folder:RGB has colour, and turns grey, like the images that are judged\n"),
        ("L", ""),
    ):
        pictures(Path(mode), mode)
        answer = call("eval", trained, "--features", "classifier", "--reference", f"folder:{mode}", "--num", "4")
        assert (answer.code, answer.out) == (2, line)
        assert "a classifier needs 20" in answer.errors[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--export-npz", "e.png"), "e.png: the images are written as .npz"),
        (("--export-statistics", "stats"), "stats: the statistics are written as .npz"),
        (("--out", "there.json"), "there.json exists already"),
        (("--export-npz", "there.npz"), "there.npz exists already"),
    ],
)
def test_files_that_an_evaluation_cannot_write(call: Pra, trained: Path, words: tuple[str, str], said: str) -> None:
    for name in ("there.json", "there.npz"):
        Path(name).write_text(json.dumps({}))
    before = contents(Path())
    answer = call("eval", trained, *words)
    assert (answer.code, answer.out, len(answer.errors)) == (2, "", 1)
    assert said in answer.errors[0]
    assert contents(Path()) == before


# --- words --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"steps": 3}, "steps 3"),
        ({"steps": 4, "shift": 2.0}, "shift 2"),
        ({"steps": 3, "time_grid": TimeGrid.COSINE}, "steps 3, time_grid cosine"),
        ({"steps": 2, "times": (0.0, 0.5, 1.0)}, "times of one's own"),
    ],
)
def test_only_what_is_wrong_about_a_shortcut_is_named(changes: dict[str, Any], wrong: str) -> None:
    model = random_model(LEARNED, head=LEARNED.head.__class__(depth=2, width=24, modulations=2, shortcut=True))
    sampling = SamplingConfig(solver=Solver.SHORTCUT, **changes)
    with pytest.raises(pra.PraError) as raised:
        pra.Sampler(model, sampling)
    assert str(raised.value).endswith(f"which is what the head has learnt; not {wrong}")


def test_who_has_no_second_head_is_told_where_it_comes_from(call: Pra, trained: Path) -> None:
    answer = call("sample", trained, "--solver", "shortcut")
    assert len(answer.errors) == 1
    assert "`pra distill RUN` gives a trained run one" in answer.errors[0]


@pytest.mark.parametrize(("group", "own"), [("data", {"check", "pack"}), ("bench", {"sample", "train"})])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_the_help_of_a_group_is_of_its_own_commands(call: Pra, group: str, own: set[str], option: str) -> None:
    code, text, errors = call(group, option)
    assert (code, errors) == (0, [])
    assert text.splitlines()[0] == f"usage: pra {group} [-h] {{{','.join(sorted(own))}}}"
    assert "distill" not in text


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("sample", "[RUN]"),
        ("train", "[RECIPE]"),
        ("show", "[RECIPE|RUN]"),
        ("demo", "[RUN] [RUN2]"),
        ("push", "RUN USER/MODEL"),
    ],
)
def test_what_may_be_left_out_is_in_brackets(call: Pra, command: str, usage: str) -> None:
    assert f" {usage}" in call(command, "--help").out.splitlines()[0]

"""``pra sample``: files, settings, refusals. Sets of many images: tests/sampling/test_many.py."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.files import contents, flip
from support.models import random_model

import pra
from pra.config import GuidanceSchedule, Solver, TimeGrid
from pra.models import weights
from pra.utils.files import first_free
from pra.utils.pixels import GAP

ONE = ("--labels", "2", "--seeds", "5")


def test_arrays_and_files_are_the_sampler_s_images(call, trained):
    words = ("sample", trained, "--labels", "3,7", "--seeds", "0,9,4", "--out")
    for out in ("a.npz", "guidance-1.5/", "new/grid.png"):  # labels down, seeds across
        assert call(*words, out).out.splitlines()[-1] == f"6 images (2 labels x 3 seeds): {out.rstrip('/')}"
    with Image.open("new/grid.png") as grid:
        assert grid.size == (3 * (64 + GAP) + GAP, 2 * (64 + GAP) + GAP)
    labels = [3, 3, 3, 7, 7, 7]
    expected = pra.Sampler(pra.load(trained)).sample(labels, 2 * [0, 9, 4])
    with np.load("a.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], pra.to_uint8(expected).permute(0, 2, 3, 1))
        assert arrays["arr_1"].tolist() == labels
        names = [f"000{label}-{label}-seed00000{seed}.png" for label in (3, 7) for seed in (0, 9, 4)]
        assert {path.name for path in Path("guidance-1.5").iterdir()} == {*names}
        for name, pixels in zip(names, arrays["arr_0"], strict=True):
            with Image.open(Path("guidance-1.5") / name) as one:
                assert np.array_equal(np.asarray(one), pixels[..., 0])


def test_options_reach_the_sampler(call, trained):
    solvers = [solver for solver in Solver if solver is not Solver.SHORTCUT]
    for options, changes in (
        *((("--solver", solver.value), {"solver": solver}) for solver in solvers),
        (("--schedule", "linear", "--guidance", "3"), {"schedule": GuidanceSchedule.LINEAR, "guidance": 3.0}),
        (("--schedule", "constant", "--guidance", "3"), {"schedule": GuidanceSchedule.CONSTANT, "guidance": 3.0}),
        (("--steps=1", "--temperature=0.5"), {"steps": 1, "temperature": 0.5}),
        (("--time-grid", "cosine", "--shift", "2"), {"time_grid": TimeGrid.COSINE, "shift": 2.0}),
        (("--guidance=3", "--guidance-interval", "0.2, 0.9"), {"guidance": 3.0, "guidance_interval": (0.2, 0.9)}),
        (("--average", "raw"), {}),
        ((), {}),
    ):
        model = pra.load(trained, average="raw" if "raw" in options else "ema")
        expected = pra.Sampler(model, replace(model.sampling, **changes)).sample([2], [5])
        assert call("sample", trained, "--out", "a.npz", *ONE, *options).code == 0
        with np.load("a.npz") as arrays:
            assert np.array_equal(arrays["arr_0"][0, :, :, 0], pra.to_uint8(expected)[0, 0])
        Path("a.npz").unlink()


def test_bad_options_are_named_before_the_output(call, trained):
    Path("taken.png").write_bytes(b"mine")
    for options, parts in (
        ("--labels 12", ["label 12", "0 to 9"]),
        ("--labels cat", ["'cat'", "Known: 0, 1"]),
        ("--seeds 5-1", ["--seeds", "'5-1'", "0-15"]),
        ("--solver eulr", ["'eulr'", "did you mean 'euler'?"]),
        ("--schedule LINEAR", ["'LINEAR'", "constant, linear"]),
        ("--steps 0", ["steps"]),
        ("--steps 1000000000000000000000", ["steps", "10000"]),
        ("--guidance nan", ["guidance"]),
        ("--temperature -1", ["temperature"]),
        ("--guidance-interval 0.2", ["guidance_interval"]),
        ("--times 0,x,1", ["--times", "'0,x,1'"]),
        ("--batch-size 0", ["--batch-size 0"]),
        ("--num 0", ["--num 0"]),
        ("--num 5 --labels 12", ["label 12"]),
        ("--num 5 --seeds 0-4", ["--num 5", "--seeds"]),
        ("--random-labels", ["--random-labels", "--num"]),
        ("--num 5 --label-seed 1", ["--label-seed", "--random-labels"]),
        ("--device gpu", ["'gpu'"]),
        ("--solver shortcut", ["`pra distill RUN`"]),
    ):
        assert call("sample", trained, "--out", "taken.png", *options.split()).is_refusal(*parts)
    assert contents(Path()) == {"taken.png": b"mine"}


@pytest.mark.parametrize(("command", "own"), [("sample", ("--labels", "3")), ("complete", ("x.png", "--rows", "1"))])
def test_output_is_checked_before_the_work(call, trained, picture, command, own):
    picture("x.png")
    Path("taken.png").write_bytes(b"mine")
    Path("taken").mkdir()
    before = contents(Path())
    for out, part in (("taken.png", "exists"), ("taken", "exists"), ("a.jpg", "'.jpg'"), ("taken.png/b.png", "file")):
        assert call(command, trained, *own, "--out", out).is_refusal(out.removesuffix("/b.png"), part)
    answer = call(command, trained, *own, "--seeds", "0,1", "--guidance", "1e300", "--out", "b.png")
    assert answer.is_refusal("2 of 2 images are not finite", "1e+300")
    assert contents(Path()) == before


@pytest.mark.filterwarnings("always:checkpoint .* is damaged")
def test_damaged_checkpoint_is_passed_over_with_a_line(call, run):
    newest = run / "checkpoints" / "step-00000020"
    flip(newest / "ema.safetensors")
    warning = r"pra: warning: checkpoint .*step-00000020 is damaged .*step-00000010, is used"
    for command in (("sample", run, *ONE), ("export", run, "exported")):
        code, _, errors = call(*command)
        assert (code, len(errors)) == (0, 1)
        assert re.fullmatch(warning, errors[0])
    assert call("sample", newest, *ONE).is_refusal("ema.safetensors is damaged")
    assert call("sample", newest, "--average", "raw", *ONE)[0] == 0


def test_output_without_a_name_is_the_first_free_one(call, trained, picture, tmp_path):
    picture("mine.png")
    for words, name in (
        (("sample", trained, *ONE, "--steps", "1"), "samples.png"),
        (("sample", trained, *ONE, "--steps", "1"), "samples-2.png"),
        (("complete", trained, "mine.png", "--rows", "2", "--seeds", "0"), "completions.png"),
        (("complete", trained, "mine.png", "--rows", "2", "--seeds", "0"), "completions-2.png"),
    ):
        assert call(*words).out.endswith(f": {name}\n")
        assert Path(name).exists()
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")  # takes its name although it leads nowhere
    assert first_free(tmp_path / "a.png") == tmp_path / "a-2.png"


def test_num_tells_the_labels_that_were_sampled(call, trained):
    for count, images, labels in (
        (5, "5 images", "5 labels"),
        (1, "1 image", "1 label"),
        (12, "12 images", "10 labels"),
    ):
        answer = call("sample", trained, "--num", count, "--steps", "1", "--out", f"{count}.npz")
        assert answer.out.splitlines()[-1] == f"{images} (in turn, {labels}): {count}.npz"


def test_sheet_of_many_classes_shows_some_of_them(call, tmp_path, monkeypatch):
    weights.write_model(random_model(num_classes=30), tmp_path)
    short = ("sample", tmp_path, "--steps", "1", "--seeds", "4")
    answer = call(*short)
    assert answer.out.splitlines()[-2:] == [
        "20 of 30 classes, evenly chosen: --labels all draws every one",
        "20 images (20 labels x 1 seed): samples.png",
    ]
    for words in (("--labels", "all", "--out", "all.png"), ("--out", "all.npz"), ("--num", 30)):
        assert "evenly" not in call(*short[: 4 if "--num" in words else 6], *words).out
    with np.load("all.npz") as arrays:
        assert arrays["arr_1"].tolist() == list(range(30))
    monkeypatch.setattr(pra.Sampler, "sample", lambda *_: pytest.fail("sampled before it is refused"))
    size = call(*short[:4], "--num", 3_000_000)
    assert size.is_refusal("one sheet of 3,000,000 images has", "Write FILE.npz or a folder DIR/")
    for words in (("--num", 10**12), ("--seeds", "0-9999999", "--labels", "all")):
        assert call("sample", tmp_path, *words).is_refusal("images are more than 100,000,000")


def test_ctrl_c_says_what_is_kept_and_how_to_resume(call, trained, monkeypatch):
    sample = pra.Sampler.sample

    def stopped_after(count):
        """Press Ctrl-C after this number of batches."""
        made = iter([sample] * count)

        def limited(*arguments):
            if (one := next(made, None)) is None:
                raise KeyboardInterrupt
            return one(*arguments)

        monkeypatch.setattr(pra.Sampler, "sample", limited)

    words = ["sample", str(trained), "--num", "7", "--batch-size", "2", "--steps", "1"]
    stopped_after(0)
    assert call(*words) == (130, "", ["pra: interrupted"])
    assert not contents(Path())
    stopped_after(2)
    code, out, errors = call(*words)
    kept = "stopped with 4 of 7 images, which lie in .samples.png.partial; the same command resumes from there"
    assert (code, out, errors) == (130, "", [f"pra: {kept}: {shlex.join(['pra', *words])}"])
    stopped_after(2)
    answer = call(*shlex.split(errors[0].rpartition(": ")[2])[1:])
    assert answer.out.startswith("3 new images")
    assert answer.out.endswith(": samples.png\n")
    assert [path.name for path in Path().iterdir()] == ["samples.png"]

"""One's own pictures: what is chosen for them, and that the choice holds."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from support.data import PHOTOS, noisy
from support.refusal import refused

import pra
from pra.data.survey import Range
from pra.recipes import own
from pra.recipes.own import propose, seconds_per_step
from pra.training.run import read_run

CPU = torch.device("cpu")


def work(config):
    """Roughly the arithmetic of a step: a number that grows with the model."""
    body = config.model.backbone  # type: ignore[union-attr]
    return config.model.num_patches * body.depth * body.width**2 / 1e6


def by_size(seconds):
    """``seconds`` per unit of :func:`work`."""
    return lambda config, device: seconds * work(config)


def proposed(pictures, minutes, steps, speed, compiler=False):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "seconds_per_step", speed)
        patch.setattr(own, "can_compile", lambda device: compiler)
        return propose(pictures, minutes, steps, CPU)


@pytest.mark.parametrize(
    ("side", "channels", "expected"),
    [
        (5, 1, (8, 2, 4)),
        (8, 1, (8, 2, 4)),
        (12, 3, (16, 2, 6)),
        (28, 1, (32, 4, 6)),
        (32, 3, (32, 4, 8)),
        (100, 3, (128, 16, 16)),
        (3000, 3, (256, 16, 16)),
    ],
)
def test_propose_with_enough_time_takes_the_pictures_size(side, channels, expected):
    pictures = dataclasses.replace(
        PHOTOS, images=10**6, short_side=Range(side, side, side), grey=500 if channels == 1 else 0
    )
    config, reasons = proposed(pictures, 10_000, None, by_size(1e-4))
    model = config.model
    assert (*model.image_size, model.channels) == (expected[0], expected[0], channels)
    assert (model.patch_size, model.state_dim) == expected[1:]
    assert "the largest there is for such pictures" in " ".join(reasons)
    assert ("enlarged" in " ".join(reasons)) == (side < expected[0])


def test_propose_uses_all_time_and_more_makes_more():
    sizes = []
    for minutes in (0.1, 5, 30, 120, 1000, 10_000):
        config, _ = proposed(PHOTOS, minutes, None, by_size(0.5))
        sizes.append((*config.model.image_size, work(config)))
        seconds = config.train.steps * by_size(0.5)(config, CPU)
        assert 0.75 < seconds / 60 / minutes < 0.86 or config.train.steps * 32 >= 400 * PHOTOS.images
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 3


def test_propose_few_pictures_get_a_small_model():
    for count in (1, 7):
        config, reasons = proposed(dataclasses.replace(PHOTOS, images=count), 10_000, None, by_size(1e-4))
        assert config.train.steps * config.train.batch_size == own.FEWEST_IMAGES
        assert config.model.backbone.width == 64
        assert f"{count} pictures are few" in " ".join(reasons)
        assert f"a larger one would need more than {count} pictures" in " ".join(reasons)


@pytest.mark.parametrize(("count", "streamed", "share"), [(199, False, None), (200, False, 0.05), (200, True, None)])
def test_propose_holds_out_where_there_are_enough(count, streamed, share):
    pictures = dataclasses.replace(PHOTOS, images=count, streamed=streamed)
    config, reasons = proposed(pictures, None, 1000, by_size(1e-4))
    assert (config.data.validation, config.train.validate_every) == (share, 50 if share else 0)
    assert ("10 pictures are held out" in " ".join(reasons)) == (share is not None)


def test_propose_reasons_name_what_limits():
    config, reasons = proposed(dataclasses.replace(PHOTOS, seconds_per_image=0.1), 1, None, lambda *_: 0.5)
    text = " ".join(reasons)
    for words in (
        "the next larger choice (images of 32 x 32",
        "of that is reading",
        "expect blurs",
        "cut to the middle",
        "2 classes",
    ):
        assert words in text
    assert config.data.workers > 0
    config, _ = proposed(PHOTOS, 1, None, lambda *_: 0.5)
    assert (config.data.workers, config.train.steps) == (0, 102)


def test_propose_without_classes_has_no_guidance():
    single = dataclasses.replace(PHOTOS, classes={"image": 20_000})
    for pictures, guidance in ((single, 1.0), (PHOTOS, 3.0)):
        config, _ = proposed(pictures, 1, None, lambda *_: 0.5)
        assert (config.sampling.guidance, config.model.num_classes) == (guidance, len(pictures.classes))


def test_propose_perturbs_colour_more_than_grey():
    grey = dataclasses.replace(PHOTOS, grey=PHOTOS.opened)
    for pictures, t_min, guidance in ((grey, 0.9, 1.5), (PHOTOS, 0.6, 3.0)):
        config, _ = proposed(pictures, 1, None, lambda *_: 0.5)
        assert (config.train.rollout.t_min, config.sampling.guidance) == (t_min, guidance)


def test_propose_skips_models_too_large_for_the_device(monkeypatch):
    def build(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("pra.bench.training.build_model", build)
    assert seconds_per_step(pra.recipe("tiny"), CPU) == float("inf")
    speed = by_size(1e-4)
    config, reasons = proposed(
        PHOTOS,
        100_000,
        None,
        lambda config, device: speed(config, device) if config.model.image_size[0] < 64 else float("inf"),
    )
    assert config.model.image_size == (32, 32)
    assert "needs more memory than the device has" in " ".join(reasons)


def test_propose_steps_choose_as_time_does():
    for steps, side in ((100, 16), (40_000 // 32, 32), (60_000 // 32, 64)):
        config, reasons = proposed(PHOTOS, None, steps, by_size(10.0))
        assert (config.train.steps, config.model.image_size) == (steps, (side, side))
        assert config == own.with_steps(config, steps)  # the warm-up and the average are of this length
        assert f" {steps:,} steps" in " ".join(reasons)
    text = " ".join(proposed(PHOTOS, None, 100, by_size(10.0))[1])
    assert "the next larger choice (images of 32 x 32" in text
    assert "needs 1,250 steps" in text
    assert "more --steps than 100 help" in text
    config, _ = proposed(PHOTOS, None, 10**6, lambda config, _: math.inf if config.model.image_size[0] > 32 else 1)
    assert config.model.image_size == (32, 32)


@pytest.mark.parametrize(("minutes", "compiler", "compiled"), [(10, True, True), (10, False, False), (2, True, False)])
def test_propose_compiles_long_trainings(minutes, compiler, compiled):
    config, reasons = proposed(PHOTOS, minutes, None, lambda *_: 0.5, compiler)
    factor = own.COMPILED if compiled else 1.0
    assert config.train.compile == compiled
    assert config.train.steps == int(0.85 * 60 * minutes / (0.5 * factor))
    assert ("once compiled" in " ".join(reasons)) == compiled


def test_seconds_per_step_are_measured():
    seconds = seconds_per_step(pra.recipe("tiny"), CPU, patience=0.0)
    assert 0 < seconds < 10


def test_propose_without_time_is_refused():
    for minutes in (0.0, -1.0, math.nan, math.inf):
        refused(lambda: proposed(PHOTOS, minutes, None, by_size(1)), "must be positive", option="--minutes")  # noqa: B023


def test_run_folder_is_named_after_the_pictures():
    for data, name in (
        ("folder:~/My Photos/", "own-My-Photos"),
        ("folder:cats", "own-cats"),
        ("digits", "own-digits"),
        ("wds:a-{00..03}.tar", "own-a--00..03-.tar"),
        ("folder:.", "own-pictures"),
        ("folder:" + 250 * "日", "own-" + 40 * "日"),
    ):
        assert own.run_folder(data) == Path("runs") / name


@pytest.mark.filterwarnings("ignore:this training will take")  # on a busy machine
def test_command_chooses_trains_and_resumes_as_chosen(tmp_path, train, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(7):
        mode = ("RGB", "L", "RGBA")[number % 3]
        noisy(Path(f"photos/{number}.png"), (9 + 5 * number, 16), mode, number)
    Path("photos/broken.png").write_bytes(b"nonsense")
    command = ["--data", "folder:photos", "--set", "train.batch_size=4"]
    code, text = train(*command, "--minutes", "0.05")
    assert code == 0, text
    for words in (
        "found in folder:photos:",
        "8 pictures without classes",
        "chosen:",
        "trained 2 steps",
        "1 corrupt image skipped",
    ):
        assert words in text
    folder = Path("runs/own-photos")
    config = read_run(folder)
    assert (config.recipe, config.model.num_classes, config.model.channels) == ("own", 1, 3)

    monkeypatch.setattr(own, "propose", lambda *_: pytest.fail("chosen again"))
    code, text = train(*command)
    assert (code, read_run(folder)) == (0, config)
    assert "settings: those of runs/own-photos, chosen when it began" in text
    assert "nothing to train" in text
    assert "trained 1 step to 3" in train("--run-dir", folder, "--steps", 3, *command[2:])[1]
    assert train("--data", "digits", "--run-dir", folder)[0] == 2
    assert json.loads((folder / "config.json").read_text())["data"]["source"] == "folder:photos"

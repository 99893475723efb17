"""The held-out loss: the held-out images, the measurements, and the warning about overfitting."""

import warnings

import numpy as np
import pytest
from support.refusal import refused
from support.training import assert_same, tiny
from support.training import train as run_training

import pra
from pra.config import apply_settings
from pra.data import open_source
from pra.data.source import Part
from pra.training import callbacks
from pra.training.callbacks import overfits
from pra.training.plots import curves, panels
from pra.training.run import loss_terms, read_metrics

SHARE = ("data.validation=0.1", "train.validate_every=2")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Use a few held-out images: they are enough."""
    monkeypatch.setattr(callbacks, "HELD_OUT", 64)


def train(folder, *settings, recipe="tiny", **more):
    return run_training(tiny("train.steps=4", *settings, recipe=recipe), folder, **more).run


def held_out_values(folder):
    """The held-out values of each step that has them."""
    rows = {row["step"]: {n: v for n, v in row.items() if n.startswith("validation_")} for row in read_metrics(folder)}
    return {step: values for step, values in rows.items() if values}


def test_validation_terms_are_in_lines_curves_and_report(tmp_path):
    settings = ("data.validation=test", "train.validate_every=3", "train.log_every=10")
    run = train(tmp_path / "run", *settings)
    rows, config = read_metrics(run), apply_settings(pra.recipe("tiny"), list(settings))
    assert [row["step"] for row in rows] == [3, 4]
    found = held_out_values(run)
    assert list(found) == [3, 4]
    terms = ["pixel", "flow", "auxiliary"]
    assert all(list(values) == [f"validation_{term}" for term in terms] for values in found.values())
    assert loss_terms(rows) == terms
    figure = curves({"run": rows}, panels(rows, config.train.objective))
    flow = next(axes for axes in figure.axes if axes.get_title() == "flow (dashed: held out)")
    assert sorted(line.get_linestyle() for line in flow.lines) == ["-", "--"]
    assert "gradient norm" in [axes.get_title() for axes in figure.axes]


def test_validation_resumes_bitwise_and_changes_no_weight(straight, tmp_path):
    settings = ("data.validation=test", "train.validate_every=2")
    one = train(tmp_path / "one", *settings)
    train(tmp_path / "resumed", *settings, "train.steps=2")
    resumed = train(tmp_path / "resumed", *settings)
    assert held_out_values(one) == held_out_values(resumed)
    for run in (one, resumed):
        assert_same(run, straight, 4)


def test_validation_noise_is_fixed_and_ignores_micro_batches(tmp_path):
    """Weights that do not move have one held-out loss, though the training noise differs in every step."""
    still = ("train.optimizer.lr=1e-30", "train.optimizer.weight_decay=0", *SHARE)
    first, second = held_out_values(train(tmp_path / "run", *still)).values()
    assert first == second
    parts = held_out_values(train(tmp_path / "parts", *still, "train.micro_batch_size=2"))
    assert parts[2] == pytest.approx(first, rel=1e-4)


def test_validation_of_jit_and_of_users_terms(tmp_path):
    jit = train(tmp_path / "jit", *SHARE, "train.steps=2", recipe="tiny:jit")
    assert [*held_out_values(jit)[2]] == ["validation_flow"]
    own = train(tmp_path / "own", *SHARE, "train.steps=2", losses={"mine": (1.0, lambda known: known.images.mean())})
    assert "validation_mine" in held_out_values(own)[2]


def test_validation_in_codec_warmup_has_no_flow(tmp_path):
    run = train(tmp_path / "run", *SHARE, "train.codec_warmup=3")
    assert [[*values] for values in held_out_values(run).values()] == [
        ["validation_pixel"], ["validation_pixel", "validation_flow", "validation_auxiliary"],
    ]  # fmt: skip


def test_validation_settings_may_change(straight, tmp_path):
    run = train(tmp_path / "run", "train.steps=1")
    train(run, "train.steps=2", "data.validation=test", "train.validate_every=1")
    train(run, "train.steps=3")
    assert list(held_out_values(run)) == [1, 2]  # the step that the run stood at, too
    assert_same(run, straight, 3)
    refused(lambda: train(run, "train.steps=4", *SHARE), "data.validation: null in the run, 0.1 asked for")


def lines(flow, held_out):
    """A line of metrics per validation."""
    pairs = enumerate(zip(flow, held_out, strict=True), start=1)
    return [{"step": 10.0 * place, "flow": a, "validation_flow": b} for place, (a, b) in pairs]


FALLING = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]


@pytest.mark.parametrize(
    ("flow", "held_out", "expected"),
    [
        (FALLING, [1.0, 0.9, 0.8, 0.85, 0.9, 0.95], True),
        (FALLING, [1.0, 0.8, 0.9, 0.9, 0.9, 0.9], True),  # a plateau above the lowest value
        (FALLING, [1.0, 0.9, 0.8, 0.75, 0.7, 0.65], False),  # both fall
        (FALLING, [1.0, 0.9, 0.8, 0.79, 0.9, 0.95], False),  # two validations only
        (FALLING, [1.0, 0.9, 0.8, 0.81, 0.81, 0.81], False),  # by 1 %: only noise
        (FALLING[::-1], [1.0, 0.9, 0.8, 0.85, 0.9, 0.95], False),  # both rise: the states have become harder
        (FALLING[:3], [0.8, 0.9, 1.0], False),  # too few
        ([], [], False),
    ],
)
def test_overfits_rule(flow, held_out, expected):
    assert overfits(lines(flow, held_out)) is expected


def test_overfits_is_said_once_and_after_resuming(tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "overfits", lambda rows: len(rows) >= 3)
    for steps, expected in ((2, 0), (5, 1)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(tmp_path / "run", "data.validation=test", "train.validate_every=1", f"train.steps={steps}")
        assert len([one for one in caught if "training overfits" in str(one.message)]) == expected


def test_overfits_few_images_for_long_says_so(tmp_path):
    """A real run on four pictures, without a codec, whose states would move."""
    source, often = Part(open_source("digits"), np.arange(4)), ("train.log_every=4", "train.validate_every=4")
    fast = ("train.steps=40", "train.optimizer.lr=0.02", "train.optimizer.ema_decay=0.5")
    with pytest.warns(UserWarning, match="training overfits: validation_flow was lowest at step"):
        train(tmp_path / "run", "data.validation=test", *often, *fast, recipe="tiny:teacher-forced", source=source)

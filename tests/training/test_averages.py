"""Averages by name: kept by a run, resumed, made afterwards, and chosen by every command."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.refusal import refused
from support.training import tiny as plain
from support.training import train

import pra
from pra.commands.eval import evaluate_command
from pra.config import apply_settings
from pra.models import PRA, weights
from pra.recipes import distill
from pra.training.averages import EMA, exponential, gamma_of, power
from pra.training.posthoc import fitted, posthoc, profile_products
from pra.utils.provenance import file_sha256

LENGTHS = (0.05, 0.1)
NAMES = ("ema", "power-0.05", "power-0.1")


def tiny(*settings):
    """Two averages more."""
    return plain("train.averages=[0.05,0.1]", *settings)


def held(run, name):
    """The weights of that name in the newest checkpoint."""
    checkpoint = weights.newest_checkpoint(run)
    assert checkpoint is not None
    return load_file(checkpoint / weights.weights_name(checkpoint, name))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A run that keeps eight snapshots of two averages. To be read only."""
    folder = tmp_path_factory.mktemp("averages") / "run"
    config = tiny("train.steps=48", "train.checkpoint_every=6", "train.keep_checkpoints=8", "train.log_every=48")
    return train(config, folder).run


@pytest.fixture
def run(many, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(many, tmp_path / "many"))


def test_gamma_is_the_one_of_the_paper():
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of(0.1) == pytest.approx(6.94, abs=0.01)
    for length in (0.001, 0.01, 0.25, 0.28):
        gamma = gamma_of(length)
        assert math.sqrt((gamma + 1) / (gamma + 2) ** 2 / (gamma + 3)) == pytest.approx(length)


def test_power_average_is_the_weighted_mean_of_its_profile():
    model = PRA(pra.recipe("tiny").model)
    ema, gamma, steps = EMA(model, power(0.2)), gamma_of(0.2), 9
    values = []
    for step in range(steps):
        with torch.no_grad():
            model.backbone.next_position.fill_(float(step**2))
        ema.update(model, step)
        values.append(float(step**2))
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    expected = float(np.diff(edges) @ np.array(values))
    torch.testing.assert_close(
        ema.model.backbone.next_position, torch.full_like(model.backbone.next_position, expected)
    )


def test_exponential_average_is_short_at_first():
    model = PRA(pra.recipe("tiny").model)  # type: ignore[arg-type]
    ema = EMA(model, exponential(0.5))
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5]):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0 + step)
        ema.update(model, step)
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    for name, parameter in ema.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name])
        assert not parameter.requires_grad


@pytest.mark.parametrize("averages", ["[0.0]", "[0.3]", "[0.1,-0.1]", "[NaN]", "[0.1,0.1]"])
def test_averages_out_of_range_or_twice_are_refused(averages):
    refused(lambda: plain(f"train.averages={averages}"), "twice" if averages == "[0.1,0.1]" else "[0.001, 0.28]")


def test_checkpoints_hold_every_average(many):
    checkpoint = weights.newest_checkpoint(many)
    assert checkpoint is not None
    assert weights.averages(checkpoint) == [*NAMES, "raw"]
    sizes = json.loads((checkpoint / "state.json").read_text())["sizes"]
    assert {f"{name}.safetensors" for name in NAMES} <= sizes.keys()
    kept = [held(many, name) for name in (*NAMES, "raw")]
    assert not any(same(one, other) for place, one in enumerate(kept) for other in kept[:place])


def test_averages_resume_bitwise_and_change_no_weight(straight, tmp_path):
    one = train(tiny("train.steps=4"), tmp_path / "one").run
    train(tiny("train.steps=2"), tmp_path / "resumed")
    resumed = train(tiny("train.steps=4"), tmp_path / "resumed").run
    assert all(same(held(one, name), held(resumed, name)) for name in (*NAMES, "raw"))
    without = straight / "checkpoints" / "step-00000004"
    for name, file in (("ema", "ema.safetensors"), ("raw", "model.safetensors")):
        assert same(load_file(without / file), held(one, name))


def test_load_takes_an_average_by_name(many, tmp_path):
    for name in (*NAMES, "raw"):
        assert same(dict(pra.load(many, average=name).state_dict()), held(many, name))
    assert same(dict(pra.load(many).state_dict()), held(many, "ema"))
    refused(lambda: pra.load(many, average="power-0.2"), "no average 'power-0.2'", "ema, power-0.05, power-0.1", "raw")
    pra.save(pra.load(many), tmp_path / "saved")
    refused(lambda: pra.load(tmp_path / "saved", average="power-0.1"), "no average 'power-0.1'. Use one of raw")


def test_export_of_an_average_says_which(many, tmp_path):
    pra.export(many, tmp_path / "power", average="power-0.1")
    assert same(load_file(tmp_path / "power" / "model.safetensors"), held(many, "power-0.1"))
    assert "power-function average of relative length 0.1" in (tmp_path / "power" / "README.md").read_text()
    pra.export(many, tmp_path / "raw", average="raw")
    assert "the weights are those of the last step" in (tmp_path / "raw" / "README.md").read_text()


def test_distill_begins_with_the_average_named(many, tmp_path):
    config = apply_settings(distill.configure(str(many), steps=1, average="power-0.1"), ["train.averages=[]"])
    run = train(config, tmp_path / "run").run
    start, made = held(many, "power-0.1"), held(run, "raw")
    assert all(torch.equal(made[name], tensor) for name, tensor in start.items())


def test_eval_of_finished_images_refuses_an_average(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((4, 8, 8, 3), np.uint8))
    refused(lambda: evaluate_command(tmp_path / "a.npz", average="raw"), "--average raw", "finished")


def test_profile_products_are_the_integrals():
    time = (np.arange(200_000) + 0.5) / 200_000

    def profile(t, gamma):
        return np.where(time <= t, (gamma + 1) * time**gamma / t ** (gamma + 1), 0.0)

    for a, b in (((1.0, 7.0), (0.5, 17.0)), ((0.25, 17.0), (0.75, 7.0)), ((0.5, 1.0), (0.5, 3.0))):
        expected = float((profile(*a) * profile(*b)).mean())
        assert float(profile_products(*a, *b)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("place", [0, 3, 7])
def test_fit_of_a_stored_profile_is_that_snapshot(place):
    steps = np.repeat([10, 20, 30, 40], 2)[: place + 1]
    gammas = np.array([gamma_of(length) for length in LENGTHS * 4][: place + 1])
    coefficients, error = fitted(steps / steps[-1], gammas, gammas[-1])
    assert coefficients == pytest.approx([0.0] * place + [1.0], abs=1e-6)
    assert error < 1e-6
    assert fitted(steps / steps[-1], gammas, gamma_of(0.07))[0].sum() == pytest.approx(1.0)


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """The same run, with other averages."""
    config = plain("train.averages=[0.04,0.07,0.15]", "train.steps=48", "train.log_every=48")
    return train(config, tmp_path_factory.mktemp("exact") / "run").run


def test_posthoc_equals_the_averages_that_were_kept(run, exact):
    """A second call does not build on the average of the first."""

    def distance(one, other):
        return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))

    raw = held(exact, "raw")
    for length in (0.04, 0.07, 0.15):
        file, count, error = posthoc(run, length)
        made, kept = load_file(file), held(exact, f"power-{length:g}")
        assert error < 0.05
        assert count == 16
        nearest = min(distance(held(run, name), kept) for name in (*NAMES, "raw"))
        assert distance(made, kept) < 0.2 * nearest
        assert distance(made, kept) < 0.02 * distance(kept, raw)
        assert same(dict(pra.load(run, average=file.stem).state_dict()), made)
        assert json.loads((file.parent / "state.json").read_text())["sha256"][file.name] == file_sha256(file)
        assert weights.newest_checkpoint(run, average=None) == file.parent
        refused(lambda: posthoc(run, length), code="exists", name=f"power-{length:g}")  # noqa: B023


def test_posthoc_of_too_few_snapshots_is_refused(many, tmp_path):
    refused(lambda: posthoc(many / "checkpoints" / "step-00000006", 0.2), code="unsupported", name="power-0.2", count=2)
    refused(lambda: posthoc(many, 0.5), "out of range")
    without = train(plain("train.steps=1"), tmp_path / "without").run
    refused(lambda: posthoc(without, 0.1), "train.averages=[0.05,0.1]", code="missing", path=without)
    pra.save(pra.load(without), tmp_path / "saved")
    refused(lambda: posthoc(tmp_path / "saved", 0.1), code="mismatch", path=tmp_path / "saved")

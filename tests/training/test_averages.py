"""Averages by name: what a run keeps, what resumes, what is made afterwards, and which one every command takes."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.refusal import refused
from torch import Tensor

import pra
from pra.commands.eval import evaluate_command
from pra.config import RunConfig
from pra.models import PRA, weights
from pra.recipes import distill
from pra.training import callbacks
from pra.training.averages import EMA, gamma_of, power
from pra.training.posthoc import Snapshot, fitted, posthoc, profile_products

LENGTHS = (0.05, 0.1)
NAMES = ("ema", "power-0.05", "power-0.1")

pytestmark = pytest.mark.filterwarnings("ignore:a state dimension varies little")


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the steps."""
    monkeypatch.setattr(callbacks, "draw_curves", lambda run: None)


def tiny(**train: Any) -> RunConfig:
    """The recipe with two averages more, and without pictures."""
    config = pra.recipe("tiny")
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, **{"sample_every": 0, "averages": LENGTHS, **train})
    )


def trained(config: RunConfig, folder: Path) -> Path:
    pra.train(config, folder, device="cpu", progress=False)
    return folder


def held(run: Path, name: str) -> dict[str, Tensor]:
    """The weights of that name in the newest checkpoint."""
    checkpoint = weights.newest_checkpoint(run)
    assert checkpoint is not None
    return load_file(checkpoint / weights.weights_name(checkpoint, name))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps eight snapshots of two averages. To be read only."""
    folder = tmp_path_factory.mktemp("averages") / "run"
    config = tiny(steps=48, checkpoint_every=6, keep_checkpoints=8, averages=LENGTHS, log_every=48)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "draw_curves", lambda run: None)
        return trained(config, folder)


@pytest.fixture
def run(many: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(many, tmp_path / "many"))


# --- the rule -----------------------------------------------------------------------------------------------


def test_gamma_is_the_one_of_the_paper() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma_of(0.1) == pytest.approx(6.94, abs=0.01)
    for length in (0.001, 0.01, 0.25, 0.28):
        gamma = gamma_of(length)
        assert math.sqrt((gamma + 1) / (gamma + 2) ** 2 / (gamma + 3)) == pytest.approx(length)


def test_power_average_is_the_weighted_mean_of_its_profile() -> None:
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


@pytest.mark.parametrize("averages", [(0.0,), (0.3,), (0.1, -0.1), (float("nan"),)])
def test_averages_out_of_range_are_refused(averages: tuple[float, ...]) -> None:
    refused(lambda: tiny(averages=averages), "average of relative length", "[0.001, 0.28]")


def test_averages_of_one_length_twice_are_refused() -> None:
    refused(lambda: tiny(averages=(0.1, 0.1)), "averages [0.1, 0.1]", "twice")


# --- in a run -----------------------------------------------------------------------------------------------


def test_checkpoints_hold_every_average(many: Path) -> None:
    checkpoint = weights.newest_checkpoint(many)
    assert checkpoint is not None
    assert weights.averages(checkpoint) == [*NAMES, "raw"]
    sizes = json.loads((checkpoint / "state.json").read_text())["sizes"]
    assert {f"{name}.safetensors" for name in NAMES} <= sizes.keys()
    kept = [held(many, name) for name in (*NAMES, "raw")]
    assert not any(same(one, other) for place, one in enumerate(kept) for other in kept[:place])


def test_averages_leave_the_training_as_it_is(tmp_path: Path) -> None:
    plain, more = (trained(tiny(steps=4, averages=own), tmp_path / str(own)) for own in ((), LENGTHS))
    assert same(held(plain, "ema"), held(more, "ema"))
    assert same(held(plain, "raw"), held(more, "raw"))


def test_averages_resume_bitwise(tmp_path: Path) -> None:
    straight = trained(tiny(steps=6), tmp_path / "straight")
    trained(tiny(steps=3), tmp_path / "resumed")
    resumed = trained(tiny(steps=6), tmp_path / "resumed")
    assert all(same(held(straight, name), held(resumed, name)) for name in (*NAMES, "raw"))


def test_averages_added_to_a_run_are_refused(tmp_path: Path) -> None:
    run = trained(tiny(steps=2, averages=()), tmp_path / "run")
    refused(lambda: trained(tiny(steps=4), run), "train.averages: [] in the run, [0.05, 0.1] asked for")


def test_config_without_averages_loads(tmp_path: Path) -> None:
    run = trained(tiny(steps=2, averages=()), tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    del config["train"]["averages"], config["initial_average"]
    (run / "config.json").write_text(json.dumps(config))
    trained(tiny(steps=3, averages=()), run)
    assert weights.averages(run / "checkpoints" / "step-00000003") == ["ema", "raw"]


# --- by name ------------------------------------------------------------------------------------------------


def test_load_takes_an_average_by_name(many: Path) -> None:
    for name in (*NAMES, "raw"):
        assert same(dict(pra.load(many, average=name).state_dict()), held(many, name))
    assert same(dict(pra.load(many).state_dict()), held(many, "ema"))


def test_load_of_an_average_not_held_names_those_there(many: Path, tmp_path: Path) -> None:
    refused(lambda: pra.load(many, average="power-0.2"), "no average 'power-0.2'", "ema, power-0.05, power-0.1", "raw")
    pra.save(pra.load(many), tmp_path / "saved")
    refused(lambda: pra.load(tmp_path / "saved", average="power-0.1"), "no average 'power-0.1'. Use one of raw")


def test_export_of_an_average_says_which(many: Path, tmp_path: Path) -> None:
    pra.export(many, tmp_path / "power", average="power-0.1")
    assert same(load_file(tmp_path / "power" / "model.safetensors"), held(many, "power-0.1"))
    assert "power-function average of relative length 0.1" in (tmp_path / "power" / "README.md").read_text()
    pra.export(many, tmp_path / "raw", average="raw")
    assert "the weights are those of the last step" in (tmp_path / "raw" / "README.md").read_text()


def test_distill_begins_with_the_average_named(many: Path, tmp_path: Path) -> None:
    config = distill.configure(str(many), steps=1, average="power-0.1")
    run = trained(dataclasses.replace(config, train=dataclasses.replace(config.train, averages=())), tmp_path / "run")
    start, made = held(many, "power-0.1"), held(run, "raw")
    assert all(torch.equal(made[name], tensor) for name, tensor in start.items())


def test_eval_of_finished_images_refuses_an_average(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.zeros((4, 8, 8, 3), np.uint8))
    refused(lambda: evaluate_command(tmp_path / "a.npz", average="raw"), "--average raw", "finished")


# --- afterwards ---------------------------------------------------------------------------------------------


def test_profile_products_are_the_integrals() -> None:
    time = (np.arange(200_000) + 0.5) / 200_000

    def profile(t: float, gamma: float) -> Any:
        return np.where(time <= t, (gamma + 1) * time**gamma / t ** (gamma + 1), 0.0)

    for a, b in (((1.0, 7.0), (0.5, 17.0)), ((0.25, 17.0), (0.75, 7.0)), ((0.5, 1.0), (0.5, 3.0))):
        expected = float((profile(*a) * profile(*b)).mean())
        assert float(profile_products(*a, *b)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("place", [0, 3, 7])
def test_fit_of_a_stored_profile_is_that_snapshot(place: int) -> None:
    stored = [Snapshot(Path(), step, gamma_of(length)) for step in (10, 20, 30, 40) for length in LENGTHS]
    own = stored[: place + 1]
    fit = fitted(own, own[-1].step, LENGTHS[place % 2])
    assert fit.coefficients == pytest.approx([0.0] * place + [1.0], abs=1e-6)
    assert fit.error < 1e-6


@pytest.mark.parametrize("length", [0.04, 0.07, 0.15])
def test_posthoc_equals_the_average_that_was_kept(length: float, run: Path, tmp_path: Path) -> None:
    exact = trained(tiny(steps=48, averages=(length,), checkpoint_every=48, log_every=48), tmp_path / "exact")
    file, fit = posthoc(run, length)
    made, kept, raw = load_file(file), held(exact, f"power-{length:g}"), held(exact, "raw")
    assert fit.error < 0.05
    assert sum(fit.coefficients) == pytest.approx(1.0)

    def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))

    nearest = min(distance(held(run, name), kept) for name in (*NAMES, "raw"))
    assert distance(made, kept) < 0.2 * nearest
    assert distance(made, kept) < 0.02 * distance(kept, raw)
    assert same(dict(pra.load(run, average=file.stem).state_dict()), made)
    refused(lambda: posthoc(run, length), f"power-{length:g} is there already")


def test_posthoc_does_not_build_on_what_it_made(run: Path) -> None:
    _, before = posthoc(run, 0.06)
    _, after = posthoc(run, 0.065)
    assert len(before.coefficients) == len(after.coefficients) == 16


def test_posthoc_of_too_few_snapshots_is_refused(many: Path, tmp_path: Path) -> None:
    refused(lambda: posthoc(many / "checkpoints" / "step-00000006", 0.2), "2 stored averages", "miss the profile")
    refused(lambda: posthoc(many, 0.5), "out of range")
    plain = trained(tiny(steps=1, averages=()), tmp_path / "plain")
    refused(lambda: posthoc(plain, 0.1), "keeps no power-function averages", "train.averages=[0.05,0.1]")
    pra.save(pra.load(plain), tmp_path / "saved")
    refused(lambda: posthoc(tmp_path / "saved", 0.1), "is not a checkpoint of a run")

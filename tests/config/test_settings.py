"""Settings: several changed at once, types looked at in Python as in JSON, and ways out that can be taken."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.models import JIT
from support.refusal import refused

import pra
from pra import config
from pra.config import RunConfig, SamplingConfig, TrainConfig, TransformerConfig, apply_settings, from_dict, to_dict
from pra.recipes import RECIPES
from pra.training.run import FREE
from studies.run import run_key

# --- several settings at once -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("fashion", ["model.image_size=[28,28]", "model.patch_size=7"]),
        ("tiny", ["model.head.depth=3", "model.head.modulations=3"]),
        ("tiny", ["model.backbone.width=36", "model.backbone.heads=9"]),
    ],
)
def test_settings_that_fit_together_only_are_changed_in_any_order(recipe: str, settings: list[str]) -> None:
    run = pra.recipe(recipe)
    changed = apply_settings(run, settings)
    assert changed == apply_settings(run, settings[::-1])
    for setting in settings:
        refused(lambda setting=setting: apply_settings(run, [setting]), setting.partition("=")[0].rpartition(".")[2])
        values: Any = to_dict(changed)
        path, _, text = setting.partition("=")
        for name in path.split("."):
            values = values[name]
        assert str(values).replace(" ", "") == text


def test_a_later_setting_changes_what_an_earlier_one_has_begun() -> None:
    run = pra.recipe("tiny")
    exact = ["model.patch_size=4", "train.rollout=Exact", "train.rollout.t_min=0.25", "model.image_size=[12, 12]"]
    assert apply_settings(run, exact).train.rollout == config.Exact(t_min=0.25)
    assert apply_settings(run, ["train.seed=1", "train.seed=2"]).train.seed == 2
    settings = [f"model={json.dumps(to_dict(JIT))}", "train.rollout=Clean", "model.class_tokens=3"]
    assert apply_settings(run, settings).model == dataclasses.replace(JIT, class_tokens=3)


def test_of_several_settings_the_wrong_one_is_named() -> None:
    run = pra.recipe("tiny")
    good = "model.head.width=32"
    refused(lambda: apply_settings(run, [good, "train.steps=many"]), "setting.train.steps: expected int, got 'many'")
    refused(lambda: apply_settings(run, [good, "train.stepps=1"]), "no setting 'train.stepps'", "did you mean 'steps'")
    refused(lambda: apply_settings(run, [good, "train"]), "--set 'train' needs the form KEY=VALUE")
    refused(lambda: apply_settings(run, [good, 'train.rollout={"type": ["Clean"]}']), "setting.train.rollout", "Known")
    refused(lambda: apply_settings(run, [good, "train.steps=0"]), "setting.train: steps must be positive")
    assert run == pra.recipe("tiny")


def test_settings_of_a_single_class_need_no_type() -> None:
    for value in (config.Noised(sigma=0.5), JIT):
        values = to_dict(value)
        assert values.pop("type") == type(value).__name__
        assert from_dict(type(value), values) == value
        assert from_dict(type(value), to_dict(value)) == value


# --- types --------------------------------------------------------------------------------------------------


def parts_of(value: Any) -> dict[type, Any]:
    """An object of every class of settings below one."""
    below = [getattr(value, f.name) for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    return ({type(value): value} if below or dataclasses.is_dataclass(value) else {}) | {
        kind: part for one in below for kind, part in parts_of(one).items()
    }


def every_part() -> dict[type, Any]:
    run = pra.recipe("pra-l-256")
    objects = (JIT, run, config.Exact(), config.Noised(sigma=0.1), config.Muon())
    return {kind: part for one in objects for kind, part in parts_of(one).items()}


def test_every_class_of_settings_looks_at_every_type() -> None:
    """No setting is an object of no class, so nothing but a setting without a type would pass."""
    checked = 0
    parts = every_part()
    classes = {value for value in vars(config).values() if isinstance(value, type) and dataclasses.is_dataclass(value)}
    assert {kind for kind in classes - parts.keys() if dataclasses.fields(kind)} == {config.ImageConfig}
    for part in parts.values():
        for field in dataclasses.fields(part):
            wrong: Callable[[], object] = lambda p=part, f=field: dataclasses.replace(p, **{f.name: object()})  # noqa: E731
            refused(wrong, f"{field.name}: ", "object object at")
            checked += 1
    assert checked > 70


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingConfig(steps=2.5), "steps: expected int, got 2.5"),
        (lambda: SamplingConfig(steps="3"), "steps: expected int, got '3'"),
        (lambda: SamplingConfig(steps=True), "steps: expected int, got True"),
        (lambda: SamplingConfig(guidance="2"), "guidance: expected float, got '2'"),
        (lambda: SamplingConfig(guidance=10**400), "guidance: expected float, got 1000"),
        (lambda: SamplingConfig(renormalise=1), "renormalise: expected bool, got 1"),
        (lambda: SamplingConfig(renormalise=np.True_), "renormalise: expected bool"),
        (lambda: SamplingConfig(times=3), "times: expected a list, got 3"),
        (lambda: SamplingConfig(times=[0, "1"]), "times: expected float, got '1'"),
        (lambda: SamplingConfig(guidance_interval=(0.0, 0.5, 1.0)), "guidance_interval: expected 2 values"),
        (lambda: SamplingConfig(steps=torch.zeros(40, 40)), "steps: expected int, got tensor([[0., 0."),
        (lambda: TrainConfig(steps=1, batch_size=8, rollout="Clean"), "rollout: expected Clean or Noised or"),
        (lambda: TrainConfig(steps=1, batch_size=8, optimizer={}), "optimizer: expected OptimizerConfig, got {}"),
        (lambda: TransformerConfig(depth=1.0, width=8, heads=2), "depth: expected int, got 1.0"),
        (lambda: config.DataConfig(source=3), "source: expected str, got 3"),
    ],
)
def test_in_python_types_are_looked_at_too(make: Callable[[], object], message: str) -> None:
    refused(make, message)


def test_numbers_of_other_kinds_become_python_s() -> None:
    found = SamplingConfig(steps=np.int64(3), guidance=2, temperature=np.float32(0.5), shift=np.int32(2))
    assert found == SamplingConfig(steps=3, guidance=2.0, temperature=0.5, shift=2.0)
    assert [type(value) for value in (found.steps, found.guidance, found.temperature, found.shift)] == [
        int,
        *[float] * 3,
    ]
    assert from_dict(SamplingConfig, json.loads(json.dumps(to_dict(found)))) == found
    whole = dataclasses.replace(pra.recipe("tiny").train.optimizer, lr=1, betas=[0, np.float64(0.5)])
    assert (repr(whole.lr), repr(whole.betas)) == ("1.0", "(0.0, 0.5)")


# --- ways out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", range(1, 13))
@pytest.mark.parametrize("width", [4, 65, 96, 130, 132, 768])
def test_the_advice_on_heads_can_be_taken(width: int, heads: int) -> None:
    try:
        TransformerConfig(depth=1, width=width, heads=heads)
    except pra.PraError as error:
        advised = re.search(r"try (?:heads=(\d+) or )?a width of (\d+)$", str(error))
        assert advised
        assert (advised[1] is None) == bool(width % 4)
        TransformerConfig(depth=1, width=int(advised[2]), heads=heads)
        if advised[1]:
            TransformerConfig(depth=1, width=width, heads=int(advised[1]))
    else:
        assert width % (4 * heads) == 0


@pytest.mark.parametrize("size", [(28, 28), (9, 8), (30, 12), (7, 7), (1, 9)])
def test_the_advice_on_patches_can_be_taken(size: tuple[int, int]) -> None:
    model = pra.recipe("tiny").model

    def cut(size: tuple[int, int], patch: int) -> None:
        dataclasses.replace(model, image_size=size, patch_size=patch)

    for patch in (2, 4, 5, 8):
        if size[0] % patch or size[1] % patch:
            with pytest.raises(pra.PraError) as raised:
                cut(size, patch)
            advised = re.search(r"the nearest size is (\d+)x(\d+), the nearest patch_size (\d+)$", str(raised.value))
            assert advised, raised.value
            cut(size, int(advised[3]))
            cut((int(advised[1]), int(advised[2])), patch)


@pytest.mark.parametrize(
    ("settings", "words", "ways"),
    [
        (["model.head.depth=6", "model.head.modulations=4"], "take modulations=3 or a depth of 4",
         [["model.head.depth=6", "model.head.modulations=3"], ["model.head.depth=4", "model.head.modulations=4"]]),
        (["train.batch_size=12", "train.micro_batch_size=5"], "the nearest that divides it is 4",
         [["train.batch_size=12", "train.micro_batch_size=4"]]),
        (["train.checkpoint_every=10", "train.keep_every=27"], "the nearest is 30",
         [["train.checkpoint_every=10", "train.keep_every=30"]]),
        (["train.checkpoint_every=10", "train.keep_every=3"], "the nearest is 10", [["train.keep_every=10"]]),
        (["model.image_size=[0, 8]"], "image_size must be two positive numbers, got 0x8", []),
    ],
)  # fmt: skip
def test_other_ways_out(settings: list[str], words: str, ways: list[list[str]]) -> None:
    run = pra.recipe("tiny")
    refused(lambda: apply_settings(run, settings), words)
    for way in ways:
        apply_settings(run, way)


# --- recipes ------------------------------------------------------------------------------------------------


def test_the_presets_are_compiled_and_nothing_else() -> None:
    compiled = {name for name in RECIPES if pra.recipe(name).train.compile}
    assert compiled == {"pra-s-256", "pra-b-256", "pra-l-256"}
    assert "compile" in FREE["train"]  # a run that began without goes on


def test_which_checkpoints_are_kept_tells_no_run_from_another() -> None:
    run = pra.recipe("tiny")
    kept = dataclasses.replace(run, train=dataclasses.replace(run.train, keep_every=100))
    assert isinstance(run, RunConfig)
    assert run_key(kept) == run_key(run)

"""Configurations as JSON: written, read back, compared, and changed by settings."""

import dataclasses
import json

import pytest
from support.models import JIT
from support.refusal import refused

import pra
from pra import config, recipe
from pra.config import RunConfig, apply_settings, differences, from_dict, override, to_dict
from pra.recipes import RECIPES
from pra.recipes.systems import SYSTEMS
from pra.training.run import FREE
from studies.run import run_key


def test_every_recipe_survives_json():
    for name in [*RECIPES, *(f"fashion:{system}" for system in SYSTEMS)]:
        run = recipe(name)
        assert run.recipe == name
        assert from_dict(RunConfig, json.loads(json.dumps(to_dict(run)))) == run
        assert run.train.compile == (name not in ("tiny", "digits"))


def test_systems_are_what_the_paper_compares():
    ours, rollouts = recipe("fashion"), {}
    for name in SYSTEMS:
        run = recipe(f"fashion:{name}")
        rollouts[name] = type(run.train.rollout)
        pixel = name in ("teacher-forced", "x-prediction", "input-noise", "input-noise-x", "jit")
        assert (run.model.codec is None) == pixel
        objective = run.train.objective if name == "jit" else ours.train.objective
        # Nothing else moves.
        assert dataclasses.replace(run.train, rollout=ours.train.rollout, objective=ours.train.objective) == ours.train
        assert run.train.objective == objective
        assert run.data == ours.data
    assert isinstance(ours.train.rollout, config.Parallel)
    assert rollouts["teacher-forced"] is rollouts["states"] is rollouts["jit"] is config.Clean
    assert rollouts["input-noise"] is config.Noised
    assert rollouts["reconstructed"] is config.Reconstructed
    assert rollouts["exact"] is config.Exact


def test_override_reads_types():
    run = recipe("tiny")
    assert override(run, "train.optimizer.lr", "1").train.optimizer.lr == 1.0
    assert override(run, "data.source", "folder:x y").data.source == "folder:x y"
    assert override(run, "train.rollout", "Clean").train.rollout == config.Clean()
    assert override(run, "train.rollout", '{"type": "Noised", "sigma": 0.2}').train.rollout == config.Noised(sigma=0.2)
    assert override(run, "train.rollout.t_min", "0.25").train.rollout == config.Parallel(t_min=0.25)
    assert override(run, "model.codec", "null").model.codec is None
    assert override(run, "model.image_size", "[16, 8]").model.image_size == (16, 8)
    assert override(run, "sampling.solver", "heun").sampling.solver is config.Solver.HEUN
    assert override(run, "train.micro_batch_size", "4").train.micro_batch_size == 4
    jit = apply_settings(recipe("tiny:jit"), ["model.transformer.depth=3", "model.bottleneck=5"])
    assert (jit.model.transformer.depth, jit.model.bottleneck) == (3, 5)


@pytest.mark.parametrize(
    ("path", "text", "code", "words"),
    [
        ("train.optimizer.lrr", "1", "unknown", ["train.optimizer.lrr", "did you mean 'lr'"]),
        ("trian.seed", "1", "unknown", ["did you mean 'train'"]),
        ("train.seed.x", "1", "unknown", ["train.seed.x"]),
        ("train.steps", "many", "invalid", ["setting.train.steps", "int", "'many'"]),
        ("train.steps", "0", "invalid", ["setting.train", "steps", "positive"]),
        ("train.optimizer.betas", "[1, 1]", "invalid", ["betas", "[0, 1)"]),
        ("model", '{"type": "JitConfig"}', "unknown", ["did you mean 'JiTConfig'"]),
        ("model", '{"type": "JiTConfig"}', "missing", ["image_size, channels, patch_size, num_classes, transformer"]),
        ("model", "3", "invalid", ["ModelConfig", "3"]),
        ("model.transformer.depth", "3", "unknown", ["model.transformer.depth"]),
        ("train.rollout", "Paralel", "unknown", ["did you mean 'Parallel'"]),
        ("train.rollout", '{"type": "Noised"}', "missing", ["sigma"]),
        ("train.rollout", '{"type": ["Clean"]}', "unknown", ["Known"]),
        ("train.rollout", '{"type": "Exact", "t_min": 0.8, "t_max": 0.5}', "invalid", ["t_min", "[0, 0.5]"]),
        ("train.trainable", "[]", "invalid", ["trainable"]),
        ("train.averages", "[0.05, 0.05]", "conflict", ["averages"]),
        ("data.fit", "crop", "unknown", ["data.fit", "center-crop"]),
        ("data.validation", "1.5", "invalid", ["validation 1.5", "between 0 and 1", "0.05"]),
        ("data.validation", "0", "invalid", ["between 0 and 1"]),
        ("data.validation", "[1]", "invalid", ["expected float or str"]),
        ("train.validate_every", "10", "conflict", ["validate_every 10", "needs held-out images"]),
        ("train.precision", "[1]", "unknown", ["train.precision", "bfloat16"]),
        ("model.image_size", "[8]", "invalid", ["2 values"]),
        ("model.image_size", "[0, 8]", "invalid", ["image_size"]),
        ("model.codec", "3", "invalid", ["CodecConfig"]),
        ("model.codec.state_dim", "2", "invalid", ["state_dim 2"]),
        ("train.codec_warmup", "-1", "invalid", ["codec_warmup"]),
        (":jit model.transformer.depht", "3", "unknown", ["did you mean 'depth'"]),
        (":jit model.transformer.width", "30", "conflict", ["width 30", "2 heads"]),
        (":jit model.class_tokens", "-1", "invalid", ["class_tokens"]),
        (":jit model.bottleneck", "0", "invalid", ["bottleneck"]),
        (":jit model.image_size", "[2, 2]", "conflict", ["single patch"]),
        (":jit model.codec", "null", "unknown", ["model.codec"]),
        (":jit train.codec_warmup", "3", "conflict", ["codec_warmup 3"]),
        (":jit train.rollout", "Parallel", "conflict", ["train.rollout Parallel", "train.rollout=Clean"]),
        (":jit sampling.schedule", "linear", "unsupported", ["schedule linear", "constant"]),
    ],
)
def test_setting_out_of_place_is_refused(path, text, code, words):
    kind, _, path = path.rpartition(" ")
    refused(lambda: override(recipe(f"tiny{kind}"), path, text), *words, code=code)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fashion", ["model.image_size=[28,28]", "model.patch_size=7"]),
        ("tiny", ["model.head.depth=3", "model.head.modulations=3"]),
        ("tiny", ["model.backbone.width=36", "model.backbone.heads=9"]),
    ],
)
def test_settings_that_fit_together_have_no_order(name, settings):
    run = recipe(name)
    changed = apply_settings(run, settings)
    assert changed == apply_settings(run, settings[::-1])
    for setting in settings:
        refused(lambda setting=setting: apply_settings(run, [setting]), setting.partition("=")[0].rpartition(".")[2])
        values = to_dict(changed)
        path, _, text = setting.partition("=")
        for part in path.split("."):
            values = values[part]
        assert str(values).replace(" ", "") == text


def test_later_setting_changes_what_an_earlier_began():
    run = recipe("tiny")
    exact = ["model.patch_size=4", "train.rollout=Exact", "train.rollout.t_min=0.25", "model.image_size=[12, 12]"]
    assert apply_settings(run, exact).train.rollout == config.Exact(t_min=0.25)
    assert apply_settings(run, ["train.seed=1", "train.seed=2"]).train.seed == 2
    settings = [f"model={json.dumps(to_dict(JIT))}", "train.rollout=Clean", "model.class_tokens=3"]
    assert apply_settings(run, settings).model == dataclasses.replace(JIT, class_tokens=3)


def test_one_wrong_setting_of_several_is_named():
    run, good = recipe("tiny"), "model.head.width=32"
    refused(lambda: apply_settings(run, [good, "train.steps=many"]), "setting.train.steps", code="invalid")
    refused(lambda: apply_settings(run, [good, "train.stepps=1"]), code="unknown", path="train.stepps")
    refused(lambda: apply_settings(run, [good, "train"]), "KEY=VALUE", option="--set", value="train")
    assert run == recipe("tiny")


def test_json_without_type_is_read_by_its_place():
    for value in (config.Noised(sigma=0.5), JIT):
        values = to_dict(value)
        assert values.pop("type") == type(value).__name__
        assert from_dict(type(value), values) == value
        assert from_dict(type(value), to_dict(value)) == value
    # Files written before there were two kinds of model, and before the times' mean and deviation.
    run = recipe("tiny")
    values = to_dict(run)
    assert "type" not in values["model"]
    del values["train"]["objective"]["time_mean"], values["train"]["objective"]["time_std"]
    assert from_dict(RunConfig, values) == run
    values["train"]["optimiser"] = {}
    refused(lambda: from_dict(RunConfig, values), "did you mean 'optimizer'", code="unknown", name="optimiser")


def test_unknown_recipes_name_the_nearest():
    refused(lambda: recipe("fashon"), "'fashon'", "did you mean 'fashion'")
    refused(lambda: recipe("fashion:teacher"), "'teacher'", "did you mean 'teacher-forced'")


def test_differences_name_the_path():
    old, new = (to_dict(override(recipe("tiny"), "train.batch_size", size)) for size in ("8", "16"))
    assert differences(old, new) == ["train.batch_size: 8 in the run, 16 asked for"]
    assert differences(old, old) == []


def test_kept_checkpoints_do_not_change_a_runs_key():
    assert "compile" in FREE["train"]  # a run may resume with it
    run = pra.recipe("tiny")
    kept = dataclasses.replace(run, train=dataclasses.replace(run.train, keep_every=100))
    assert run_key(kept) == run_key(run)

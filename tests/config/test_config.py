"""Configurations: checked, written, read back, compared, overridden; recipes."""

import dataclasses
import enum
import json
import typing

import pytest

from pra import PraError, config, recipe
from pra.config import RunConfig, differences, from_dict, override, to_dict
from pra.recipes import RECIPES
from pra.recipes.systems import SYSTEMS
from studies.run import run_key

EVERY = [base + system for base in RECIPES for system in ("", *(f":{s}" for s in SYSTEMS))]


@pytest.mark.parametrize("name", EVERY)
def test_every_recipe_survives_json(name):
    run = recipe(name)
    assert run.recipe == name
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(run)))) == run


def test_systems_are_what_the_paper_compares():
    pra, rollouts = recipe("fashion"), {}
    for name in SYSTEMS:
        run = recipe(f"fashion:{name}")
        rollouts[name] = type(run.train.rollout)
        pixel = name in ("teacher-forced", "x-prediction", "input-noise", "input-noise-x", "jit")
        assert (run.model.codec is None) == pixel
        objective = run.train.objective if name == "jit" else pra.train.objective
        # Nothing else moves.
        assert dataclasses.replace(run.train, rollout=pra.train.rollout, objective=pra.train.objective) == pra.train
        assert run.train.objective == objective
        assert run.data == pra.data
    assert isinstance(pra.train.rollout, config.Parallel)
    assert rollouts["teacher-forced"] is rollouts["states"] is config.Clean
    assert rollouts["input-noise"] is config.Noised
    assert rollouts["reconstructed"] is config.Reconstructed
    assert rollouts["exact"] is config.Exact
    assert rollouts["jit"] is config.Clean


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


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("train.optimizer.lrr", "1", "no setting 'train.optimizer.lrr'.*did you mean 'lr'"),
        ("trian.seed", "1", "'trian' is unknown; did you mean 'train'"),
        ("train.seed.x", "1", "no setting 'train.seed.x'"),
        ("train.steps", "many", "train.steps: expected int, got 'many'"),
        ("train.steps", "true", "expected int, got True"),
        ("train.steps", "1.5", "expected int, got 1.5"),
        ("train.steps", "0", "steps must be positive"),
        ("train.optimizer.betas", "[1, 1]", r"betas must lie in \[0, 1\)"),
        ("model", '{"type": "JitConfig"}', "'JitConfig' is unknown; did you mean 'JiTConfig'"),
        ("model", '{"type": "JiTConfig"}', "model: image_size, channels, patch_size, num_classes, transformer missing"),
        ("model", "3", "model: expected the fields of ModelConfig, got 3"),
        ("model.transformer.depth", "3", "no setting 'model.transformer.depth'"),
        ("train.objective.time_std", "0", "time_std must be positive"),
        ("train.rollout", "Paralel", "'Paralel' is unknown; did you mean 'Parallel'"),
        ("train.rollout", '{"type": "Noised"}', "sigma missing"),
        ("data.fit", "crop", "data.fit: 'crop' is unknown.*center-crop"),
        ("train.precision", "[1]", r"train.precision: \[1\] is unknown.*bfloat16"),
        ("model.image_size", "[8]", "expected 2 values"),
        ("model.image_size", "[9, 8]", "9x8 is not divisible by patch_size 2"),
        ("train.micro_batch_size", "3", "batch_size 8 is not divisible by micro_batch_size 3"),
        ("model.codec", "3", "expected the fields of CodecConfig"),
        ("model.codec.state_dim", "2", "state_dim 2 is below 3"),
        ("model.head.modulations", "3", "head depth 2 is not divisible by modulations 3"),
    ],
)
def test_bad_settings_name_the_value_and_the_way_out(path, text, message):
    with pytest.raises(PraError, match=message):
        override(recipe("tiny"), path, text)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("model.transformer.depht", "3", "'depht' is unknown; did you mean 'depth'"),
        ("model.transformer.width", "30", "width 30 with 2 heads"),
        ("model.class_tokens", "-1", "class_tokens must lie in"),
        ("model.bottleneck", "0", "bottleneck must be positive"),
        ("model.image_size", "[2, 2]", "single patch"),
        ("model.codec", "null", "no setting 'model.codec'"),
        ("train.rollout", "Parallel", "train.rollout Parallel is for autoregressive models.*train.rollout=Clean"),
        ("sampling.schedule", "linear", "schedule linear rises along the raster.*constant"),
    ],
)
def test_bad_settings_of_jit(path, text, message):
    with pytest.raises(PraError, match=message):
        override(recipe("tiny:jit"), path, text)


def _replaced(name, **changes):
    run = recipe("tiny")
    part = {"train": run.train, "data": run.data, "sampling": run.sampling, "head": run.model.head}.get(name)
    part = part or {"objective": run.train.objective, "optimizer": run.train.optimizer, "model": run.model}[name]
    return dataclasses.replace(part, **changes)


@pytest.mark.parametrize(
    ("part", "field", "expected"),
    [
        ("sampling", "schedule", config.GuidanceSchedule.CONSTANT),
        ("sampling", "solver", config.Solver.HEUN),
        ("sampling", "time_grid", config.TimeGrid.COSINE),
        ("train", "precision", config.Precision.BFLOAT16),
        ("train", "parallel", config.Parallelism.FSDP),
        ("objective", "pixel_loss", config.PixelLoss.L1),
        ("optimizer", "schedule", config.LearningRate.COSINE),
        ("head", "prediction", config.Prediction.DATA),
        ("data", "fit", config.Fit.PAD),
        ("data", "on_small", config.OnSmall.UPSCALE),
        ("data", "on_corrupt", config.OnCorrupt.SKIP),
    ],
)
def test_a_value_in_place_of_an_enum_is_its_member(part, field, expected):
    found = _replaced(part, **{field: expected.value})
    assert getattr(found, field) is expected
    assert found == _replaced(part, **{field: expected})
    wrong = f"{expected.value}q"
    with pytest.raises(PraError, match=f"^{field}: '{wrong}' is unknown; did you mean '{expected.value}'"):
        _replaced(part, **{field: wrong})
    with pytest.raises(PraError, match=f"^{field}: None is unknown"):
        _replaced(part, **{field: None})


def test_no_setting_that_is_an_enum_is_left_out_above():
    run = recipe("tiny")
    parts = {type(part): part for part in (run.model.head, run.data, run.train, run.train.objective, run.sampling)}
    parts |= {type(run.train.optimizer): run.train.optimizer}
    classes = [value for value in vars(config).values() if dataclasses.is_dataclass(value)]
    for kind in classes:
        for name, hint in typing.get_type_hints(kind).items():
            if isinstance(hint, enum.EnumType):
                with pytest.raises(PraError, match=f"^{name}: 'nothing' is unknown"):
                    dataclasses.replace(parts[kind], **{name: "nothing"})


def test_a_list_in_place_of_a_tuple_is_the_same_run():
    run = recipe("tiny")
    listed = dataclasses.replace(
        run,
        model=_replaced("model", image_size=list(run.model.image_size)),
        train=_replaced("train", optimizer=_replaced("optimizer", betas=list(run.train.optimizer.betas))),
        sampling=_replaced("sampling", guidance_interval=[0.0, 1.0], times=[0.0, 0.3, 1.0]),
    )
    same = dataclasses.replace(run, sampling=_replaced("sampling", times=(0.0, 0.3, 1.0)))
    assert listed == same
    assert hash(listed) == hash(same)
    assert run_key(listed) == run_key(same)


def test_jit_is_overridden_like_any_model():
    run = recipe("tiny:jit")
    assert override(run, "model.transformer.depth", "3").model.transformer.depth == 3
    assert override(run, "model.bottleneck", "5").model.bottleneck == 5
    assert override(run, "model.num_classes", "3").model.num_classes == 3


def test_files_written_before_there_were_two_kinds_of_model_load():
    """A model without a type is the autoregressive one; of the times' mean and deviation there was no word."""
    run = recipe("tiny")
    values = to_dict(run)
    assert "type" not in values["model"]
    assert to_dict(recipe("tiny:jit"))["model"]["type"] == "JiTConfig"
    del values["train"]["objective"]["time_mean"], values["train"]["objective"]["time_std"]
    assert from_dict(RunConfig, values) == run


def test_unknown_keys_in_a_file():
    values = to_dict(recipe("tiny"))
    values["train"]["optimiser"] = {}
    with pytest.raises(PraError, match=r"train\.optimiser is unknown; did you mean 'optimizer'"):
        from_dict(RunConfig, values)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashon", "no recipe 'fashon'; did you mean 'fashion'"),
        ("fashion:teacher", "no system 'teacher' for recipe 'fashion'; did you mean 'teacher-forced'"),
    ],
)
def test_unknown_recipes(name, message):
    with pytest.raises(PraError, match=message):
        recipe(name)


def test_differences_name_the_path():
    old, new = (to_dict(override(recipe("tiny"), "train.batch_size", size)) for size in ("8", "16"))
    assert differences(old, new) == ["train.batch_size: 8 in the run, 16 asked for"]
    assert differences(old, old) == []

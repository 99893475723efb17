"""Settings check the types and ranges of their fields, and name fixes that work."""

import dataclasses
import enum
import itertools
import json
import re
import typing

import numpy as np
import pytest
import torch
from support.models import CAPTIONED, JIT
from support.refusal import refused

import pra
from pra import config
from pra.config import (
    SamplingConfig,
    TrainConfig,
    TransformerConfig,
    apply_settings,
    from_dict,
    model_from_dict,
    to_dict,
)
from studies.run import run_key


def parts_of(value):
    """An object of every class of settings below one."""
    if not dataclasses.is_dataclass(value):
        return {}
    below = [parts_of(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return {type(value): value} | {kind: part for parts in below for kind, part in parts.items()}


def every_part():
    objects = (JIT, pra.recipe("pra-l-256"), config.Exact(), config.Noised(sigma=0.1), config.Muon())
    objects += (config.DeblockConfig(), CAPTIONED, config.FrozenConfig(name="x", width=8))
    return {kind: part for one in objects for kind, part in parts_of(one).items()}


def test_every_field_of_settings_is_checked():
    """Every setting is an object of a settings class; an enum's field takes the values of its members."""
    parts = every_part()
    classes = {value for value in vars(config).values() if isinstance(value, type) and dataclasses.is_dataclass(value)}
    assert {kind for kind in classes - parts.keys() if dataclasses.fields(kind)} == {config.ImageConfig}
    checked = 0
    for part in parts.values():
        for name, hint in typing.get_type_hints(type(part)).items():
            if name not in {field.name for field in dataclasses.fields(part)}:
                continue
            refused(lambda p=part, n=name: dataclasses.replace(p, **{n: object()}), "object object at", name=name)
            checked += 1
            if isinstance(hint, enum.EnumType):
                for member in hint:
                    assert getattr(dataclasses.replace(part, **{name: member.value}), name) is member
                wrong = f"{member.value}q"
                change = lambda p=part, n=name, w=wrong: dataclasses.replace(p, **{n: w})  # noqa: E731
                refused(change, f"did you mean '{member.value}'", code="unknown", name=name, value=wrong)
    assert checked > 70


def test_list_in_place_of_a_tuple_is_the_same_run():
    run = pra.recipe("tiny")
    optimizer = dataclasses.replace(run.train.optimizer, betas=list(run.train.optimizer.betas))  # type: ignore[arg-type]
    sampling = dataclasses.replace(run.sampling, guidance_interval=[0.0, 1.0], times=[0.0, 0.3, 1.0])  # type: ignore[arg-type]
    listed = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, image_size=list(run.model.image_size)),
        train=dataclasses.replace(run.train, optimizer=optimizer),
        sampling=sampling,
    )
    same = dataclasses.replace(run, sampling=dataclasses.replace(run.sampling, times=(0.0, 0.3, 1.0)))
    assert listed == same
    assert hash(listed) == hash(same)
    assert run_key(listed) == run_key(same)


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (lambda: SamplingConfig(steps=2.5), "steps", "int, got 2.5"),
        (lambda: SamplingConfig(steps="3"), "steps", "int, got '3'"),
        (lambda: SamplingConfig(steps=True), "steps", "int, got True"),
        (lambda: SamplingConfig(guidance="2"), "guidance", "float, got '2'"),
        (lambda: SamplingConfig(guidance=10**400), "guidance", "float, got 1000"),
        (lambda: SamplingConfig(renormalise=1), "renormalise", "bool, got 1"),
        (lambda: SamplingConfig(renormalise=np.True_), "renormalise", "bool"),
        (lambda: SamplingConfig(times=3), "times", "a list, got 3"),
        (lambda: SamplingConfig(times=[0, "1"]), "times", "float, got '1'"),
        (lambda: SamplingConfig(guidance_interval=(0.0, 0.5, 1.0)), "guidance_interval", "2 values"),
        (lambda: SamplingConfig(steps=torch.zeros(40, 40)), "steps", "int, got tensor([[0., 0."),
        (lambda: TrainConfig(steps=1, batch_size=8, rollout="Clean"), "rollout", "Clean or Noised or"),
        (lambda: TrainConfig(steps=1, batch_size=8, optimizer={}), "optimizer", "OptimizerConfig, got {}"),
        (lambda: TransformerConfig(depth=1.0, width=8, heads=2), "depth", "int, got 1.0"),
        (lambda: config.DataConfig(source=3), "source", "str, got 3"),
    ],
)
def test_value_of_another_type_is_refused(make, name, expected):
    refused(make, f"expected {expected}", code="invalid", name=name)


def test_numpy_numbers_become_python_numbers():
    found = SamplingConfig(steps=np.int64(3), guidance=2, temperature=np.float32(0.5), shift=np.int32(2))  # type: ignore[arg-type]
    assert found == SamplingConfig(steps=3, guidance=2.0, temperature=0.5, shift=2.0)
    kinds = [type(value) for value in (found.steps, found.guidance, found.temperature, found.shift)]
    assert kinds == [int, float, float, float]
    assert from_dict(SamplingConfig, json.loads(json.dumps(to_dict(found)))) == found
    whole = dataclasses.replace(pra.recipe("tiny").train.optimizer, lr=1, betas=[0, np.float64(0.5)])  # type: ignore[arg-type]
    assert (repr(whole.lr), repr(whole.betas)) == ("1.0", "(0.0, 0.5)")


def advised(make):
    """The numbers at the end of an error's advice; None where there is no error."""
    try:
        make()
    except pra.PraError as error:
        return [int(number) for number in re.search(r"(\d+)(?:x(\d+))?$", str(error)).groups() if number]  # type: ignore[union-attr]
    return None


def test_advised_sizes_fit():
    for width, heads in itertools.product((4, 65, 96, 130, 132, 768), range(1, 13)):
        make = lambda width, heads=heads: TransformerConfig(depth=1, width=width, heads=heads)  # noqa: E731
        advice = advised(lambda width=width, make=make: make(width))  # type: ignore[misc]
        assert (advice is None) == (width % (4 * heads) == 0)
        make(*(advice or [width]))
    model = pra.recipe("tiny").model
    for size, patch in itertools.product([(28, 28), (9, 8), (30, 12), (7, 7), (1, 9)], (2, 4, 5, 8)):
        change = lambda size, patch=patch: dataclasses.replace(model, image_size=size, patch_size=patch)  # noqa: E731
        if size[0] % patch or size[1] % patch:
            change(tuple(advised(lambda size=size, change=change: change(size)) or ()))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "name", "value", "way"),
    [
        (["model.head.depth=6", "model.head.modulations=4"], "head depth", 6, "model.head.depth=4"),
        (["train.batch_size=12", "train.micro_batch_size=5"], "batch_size", 12, "train.batch_size=10"),
        (["train.checkpoint_every=10", "train.keep_every=27"], "keep_every", 27, "train.keep_every=30"),
        (["train.checkpoint_every=10", "train.keep_every=3"], "keep_every", 3, "train.keep_every=10"),
    ],
)
def test_advised_multiple_is_taken(settings, name, value, way):
    run = pra.recipe("tiny")
    refused(lambda: apply_settings(run, settings), way.partition("=")[2], code="conflict", name=name, value=value)
    apply_settings(run, [*settings, way])


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ("[1,3]", "group 1x3 does not divide the 4x4 patches of an image. Use rows that divide 4"),
        ("[3,1]", "group 3x1 does not divide"),
        ("[4,4]", "group 4x4 is the whole image"),
        ("[0,1]", "group must lie in [1,"),
        ("[2]", "expected 2 values"),
        ("2", "expected 2 values"),
    ],
)
def test_impossible_group_is_refused(group, words):
    refused(lambda: apply_settings(pra.recipe("tiny"), [f"model.group={group}"]), words)


def test_model_of_an_older_file_has_no_groups():
    model = pra.recipe("tiny").model
    older = {name: value for name, value in to_dict(model).items() if name != "group"}
    assert model_from_dict(older, "model") == model
    assert (model.num_groups, model.group_dim, model.group_state_dim) == (16, 4, 4)


def test_sizes_without_an_end_are_refused_at_once():
    for setting, part in (
        ("num_classes=1000000000000", "num_classes must lie in"),
        ("backbone.width=4611686018427387904", "width must lie in"),
        ("image_size=[1000000,1000000]", "65,536 at most"),
    ):
        refused(lambda setting=setting: apply_settings(pra.recipe("tiny"), [f"model.{setting}"]), part)


def test_list_without_an_end_is_refused_at_once():
    refused(lambda: from_dict(SamplingConfig, {"times": [0] * 10**6}), "at most 100,000 values")

"""Trainable parameters: ``train.trainable``, from the setting to the weights that change."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from support.models import JIT, LEARNED, PIXEL
from support.refusal import refused
from support.training import tiny as configured
from support.training import train as run_training

import pra
from pra.config import TrainConfig, to_dict
from pra.models import build_model
from pra.recipes import distill
from pra.training.optimizer import codec_learns, set_trainable
from pra.training.run import read_run
from studies.run import run_key

MUON = ("train.optimizer.matrices=Muon", "train.activation_checkpointing=true")
TWO_HEADS = dataclasses.replace(LEARNED, head=dataclasses.replace(LEARNED.head, shortcut=True))


def train(folder, config):
    """The parameters that a run from scratch changes."""
    run_training(config, folder)
    before = build_model(config.model, config.train.seed).state_dict()
    after = load_file(max((folder / "checkpoints").iterdir()) / "model.safetensors")
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def test_trainable_string_is_a_list_of_one():
    assert configured("train.trainable=head.*").train.trainable == ("head.*",)
    assert configured('train.trainable=["head.*", "codec.*"]').train.trainable == ("head.*", "codec.*")
    assert TrainConfig(steps=1, batch_size=1, trainable="all") == TrainConfig(steps=1, batch_size=1)  # type: ignore[arg-type]


def test_trainable_of_a_wrong_type_is_refused():
    for value, message in (
        ("[]", "trainable: the list is empty"),
        ("true", "trainable: expected a list, got True"),
        ("[1]", "trainable: expected str, got 1"),
        ("shortcut", "is for the second head"),
    ):
        refused(lambda value=value: configured(f"train.trainable={value}"), message)


def test_set_trainable_sets_requires_grad():
    model = build_model(TWO_HEADS)
    names = [name for name, _ in model.named_parameters()]
    for entries, learning in (
        (("shortcut",), [name for name in names if name.startswith("shortcut.")]),
        (("all-but-codec",), [name for name in names if not name.startswith("codec.")]),
        (("head.*", "shortcut"), [name for name in names if name.startswith(("head.", "shortcut."))]),
        (("*.blocks.1.*", "auxiliary.bias"), [n for n in names if ".blocks.1." in n or n == "auxiliary.bias"]),
        (("all",), names),
    ):
        set_trainable(model, TrainConfig(steps=1, batch_size=1, trainable=entries))
        assert [name for name, p in model.named_parameters() if p.requires_grad] == learning


def test_pattern_that_matches_nothing_names_the_nearest():
    model = build_model(TWO_HEADS)
    for entry, nearest in (
        ("hed.*", "Use head.*"),
        ("codec.decodr.out.weight", "Use codec.decoder.out.weight"),
        ("shortcuts", "Use shortcut"),
        ("xyz", "or backbone.* or codec.* or condition.* or head.* or shortcut.*"),
    ):
        train = TrainConfig(steps=1, batch_size=1, trainable=("head.*", entry))
        refused(lambda train=train: set_trainable(model, train), nearest, code="unknown", value=entry)


def test_codec_learns_where_one_of_its_parameters_does():
    assert codec_learns(build_model(LEARNED))
    assert not codec_learns(build_model(PIXEL))
    assert not codec_learns(build_model(JIT))


@pytest.mark.parametrize(
    ("recipe", "entries", "prefixes"),
    [
        ("tiny", ["all-but-codec"], ("backbone.", "condition.", "head.", "auxiliary.")),
        ("tiny", ["head.*", *MUON], ("head.",)),
        ("tiny", ["auxiliary.*", *MUON], ("auxiliary.",)),  # it has no block, so nothing is left for Muon
        ("tiny", ['["auxiliary.bias", "codec.decoder.*"]'], ("auxiliary.bias", "codec.decoder.")),
        ("tiny:jit", ["blocks.*"], ("blocks.",)),
    ],
)
def test_training_changes_only_what_learns(recipe, entries, prefixes, tmp_path):
    found = train(tmp_path / "run", configured(f"train.trainable={entries[0]}", *entries[1:], recipe=recipe))
    assert all(name.startswith(prefixes) for name in found)
    assert all(any(name.startswith(prefix) for name in found) for prefix in prefixes)


def test_frozen_codec_loads_no_perceptual_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("pra.method.perceptual.lpips_distance", lambda *_: pytest.fail("loaded"))
    train(tmp_path / "run", configured("train.objective.perceptual_weight=1", "train.trainable=all-but-codec"))


def test_warm_up_of_a_frozen_codec_is_refused(tmp_path):
    config = configured("train.codec_warmup=1", "train.trainable=head.*")
    refused(lambda: train(tmp_path / "run", config), "Set train.codec_warmup=0", code="conflict", value=1)
    config = configured("train.codec_warmup=1", 'train.trainable=["codec.*", "head.*"]')
    assert {name.partition(".")[0] for name in train(tmp_path / "run", config)} == {"codec", "head"}


def test_run_with_shortcut_only_loads(tmp_path):
    config = distill.second_head(pra.recipe("tiny"), "base", 100)
    values = to_dict(config)
    values["train"]["shortcut_only"] = values["train"].pop("trainable") == ["shortcut"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_run(tmp_path) == config


def test_run_key_of_a_distilled_run_is_that_of_published_tables():
    tiny = pra.recipe("tiny")
    assert run_key(distill.second_head(tiny, "base", 100)) == "a893ccf0f72f"
    assert run_key(tiny) == "f4046f105e5f"

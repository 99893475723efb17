"""Frozen text encoders that read captions: tiny ones with random weights."""

import copy
import dataclasses
import importlib.util
import os
import pickle

import pytest
import torch
from support.captions import TEXT, WORDS
from support.models import CAPTIONED, batch, random_model
from support.refusal import refused
from support.training import assert_same, tiny, train

import pra
from pra.config import FrozenConfig
from pra.models import count_parameters, frozen
from pra.models.text import NOTHING

transformers = pytest.importorskip("transformers", reason="needs pip install 'pra-pixels[text]'")


@pytest.fixture(scope="module", autouse=True)
def importable(request):
    """Make torchvision importable if it is installed: transformers then imports it."""
    if importlib.util.find_spec("torchvision") is not None:
        request.getfixturevalue("torchvision_shim")


def tokenizer(folder):
    """Save a tokenizer with one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["[PAD]", "[UNK]", "a", "the", "digit", *WORDS, *map(str, range(10))]
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder)


def bert():
    size = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.BertModel(transformers.BertConfig(vocab_size=40, **size))


def t5():
    size = {"d_model": 12, "d_kv": 6, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return transformers.T5Model(transformers.T5Config(vocab_size=40, **size))


def clip():
    size = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    text = transformers.CLIPTextConfig(vocab_size=40, **size)
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text.to_dict(), vision_config=size))


@pytest.fixture(scope="module", params=[bert, t5, clip], ids=lambda build: build.__name__)
def encoder(importable, request, tmp_path_factory):
    """Save an encoder of each kind with its tokenizer, and return the folder."""
    folder = tmp_path_factory.mktemp("encoder") / request.param.__name__
    torch.manual_seed(0)
    request.param().save_pretrained(folder)
    tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert_folder(importable, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    torch.manual_seed(0)
    bert().save_pretrained(folder)
    tokenizer(folder)
    return str(folder)


def with_encoder(name, width=12):
    text = dataclasses.replace(TEXT, max_length=6, frozen=FrozenConfig(name=name, width=width))
    return dataclasses.replace(CAPTIONED, text=text)


def test_encoder_tokens_depend_on_their_text_alone(encoder):
    condition = random_model(with_encoder(encoder)).condition
    texts = ["a three", "the digit 3", "", "a " * 9]
    with pytest.warns(UserWarning, match="9 tokens, and this model reads the first 6"):
        rows = condition.parse(None, WORDS[:5], texts)
    assert (rows[:, 1:] != NOTHING).sum(1).tolist() == [2, 3, 0, 6]
    tokens = condition(rows)
    assert tokens.shape == (4, 3 + TEXT.tokens, 32)
    for place in range(4):
        torch.testing.assert_close(condition(rows[place : place + 1])[0], tokens[place], atol=1e-6, rtol=1e-5)
    assert torch.pdist(tokens.flatten(1)).min() > 1e-3


def test_features_are_computed_once_and_not_pickled(bert_folder, monkeypatch):
    model = random_model(with_encoder(bert_folder))
    _, rows, _ = batch(CAPTIONED)
    rows = model.condition.parse(None, WORDS[:5], ["a one", "a two", "a one"])
    first = model.condition(rows)
    monkeypatch.setattr(frozen, "_network", None)  # the encoder must not run again
    assert torch.equal(model.condition(rows), first)
    assert torch.equal(copy.deepcopy(model).condition(rows), first)
    assert len(pickle.dumps(model.condition.features)) < 500
    assert pickle.loads(pickle.dumps(model.condition.row))(1, "a one").tolist() == [1, *rows[0, 1:].tolist()]
    names = {name for name, _ in model.named_parameters()}
    assert not any("features" in name for name in names)
    assert count_parameters(with_encoder("nowhere"))["condition"] == sum(
        p.numel() for p in model.condition.parameters()
    )


def test_run_with_a_frozen_encoder_resumes_and_moves(bert_folder, tmp_path):
    text = {"max_length": 6, "tokens": 3, "transformer": dataclasses.asdict(TEXT.transformer)}
    text["frozen"] = {"name": bert_folder, "width": 12}
    settings = ["data.source=spoken", "model.num_classes=1", f"model.text={text}".replace("'", '"')]
    run = train(tiny(*settings, "train.steps=4"), tmp_path / "whole").run
    for steps, workers in ((2, 0), (4, 1)):
        train(tiny(*settings, f"train.steps={steps}", f"data.workers={workers}"), tmp_path / "parts")
    assert_same(run, tmp_path / "parts", 4)
    expected = pra.Sampler(pra.load(run)).sample(captions=["a one"], seeds=[1])
    moved = f"{bert_folder}-moved"
    os.rename(bert_folder, moved)
    try:
        frozen._tokenizer.cache_clear(), frozen._network.cache_clear()
        model = pra.load(run)
        refused(lambda: pra.Sampler(model).sample(captions=["a one"], seeds=[1]), "cannot be opened", code="missing")
        model.condition.use(moved)
        assert torch.equal(pra.Sampler(model).sample(captions=["a one"], seeds=[1]), expected)
    finally:
        os.rename(moved, bert_folder)


def test_encoder_of_another_width_is_refused(bert_folder):
    condition = random_model(with_encoder(bert_folder, width=8)).condition
    rows = condition.parse(None, WORDS[:5], ["a one"])
    refused(lambda: condition(rows), "width 12, and model.text.frozen.width is 8", code="mismatch")


def test_model_without_encoder_refuses_weights():
    refused(lambda: random_model().condition.use("x"), "--weights", code="conflict")

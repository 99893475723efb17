"""The life of a run that learns from captions: training, resume, pictures, sampling, figures, card, fine-tuning."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.answer import caller
from support.captions import SETTINGS, WORDS, Spoken
from support.data import config
from support.judging import run_command
from support.refusal import refused
from support.training import assert_same, tiny, train

import pra
from pra.commands.eval import evaluate_command
from pra.config import OnCorrupt
from pra.data import TrainingSet, batches, load_images, open_source
from pra.data.captions import corrupt_caption
from pra.evaluation.flops import sampling_flops
from pra.evaluation.report import write_report
from pra.evaluation.samples import captions_like
from pra.models.text import ByteRow
from pra.training.run import read_metrics

ROW = ByteRow(16)
HELD = ("data.validation=0.1", "train.validate_every=2", "train.steps=4")


def text_of(row):
    return bytes(row[row >= 0][1:].tolist()).decode() if row[0] >= 0 else ""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four steps on captions, with pictures. To be read only."""
    folder = tmp_path_factory.mktemp("captions") / "run"
    return train(tiny(*SETTINGS, *HELD, "train.sample_every=4"), folder).run


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return caller(capsys)


def test_captions_are_a_function_of_seed_and_sample():
    source = open_source("spoken:ten")
    data = [TrainingSet(source, (8, 8), 1, config(workers=w), 3, ROW) for w in (0, 1)]
    alone, worker = (torch.cat([b.labels for b in batches(one, 0, 16, 64)]) for one in data)
    assert torch.equal(alone, worker)
    texts = [text_of(row) for row in alone]
    assert {text.split()[0] for text in texts} == {"a", "the"}  # either caption of an image
    for g, (row, text) in enumerate(zip(alone, texts, strict=True)):
        index = data[0].source_index(g)
        assert text in source.captions(index)
        assert row[0] == source.labels[index]
    other = TrainingSet(source, (8, 8), 1, config(), 4, ROW)
    epochs = [text_of(torch.from_numpy(other[g].label)) for g in range(64)]
    assert epochs != texts
    _, rows = load_images(source, [5, 5, 9], (8, 8), 1, config(), ROW)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(load_images(source, [5], (8, 8), 1, config())[1], torch.tensor([source.labels[5]]))


def test_run_that_reads_captions_resumes_bitwise(run, tmp_path):
    for steps, workers in ((2, 0), (4, 1)):
        train(tiny(*SETTINGS, *HELD, f"train.steps={steps}", f"data.workers={workers}"), tmp_path / "run")
    assert_same(run, tmp_path / "run", 4)


def test_model_carries_captions_and_draws_them(run):
    model = pra.load(run)
    assert 2 <= len(model.captions) <= 10
    assert all(caption.split()[-1] in WORDS for caption in model.captions)
    with Image.open(run / "samples" / "step-00000004.png") as sheet:
        assert sheet.height > sheet.width * len(model.captions) / 10  # a row per caption
    assert read_metrics(run)[-1]["validation_flow"] > 0
    assert "a row per caption" in write_report(run).read_text()


def test_sampler_takes_captions_beside_any_others(run):
    sampler = pra.Sampler(pra.load(run), guidance=2.0)
    together = sampler.sample(captions=["a one", "the digit 7", ""], seeds=[3, 4, 5])
    assert torch.pdist(together.flatten(1)).min() > 1e-3
    for place, (caption, seed) in enumerate((("a one", 3), ("the digit 7", 4), ("", 5))):
        torch.testing.assert_close(sampler.sample(captions=caption, seeds=seed)[0], together[place])
    null = sampler.sample(labels=[1], seeds=[5])  # no class, and no text
    torch.testing.assert_close(null[0], together[2])
    *_, streamed = sampler.stream(captions=["a one"], seeds=[3])
    torch.testing.assert_close(streamed[0], together[0])
    kept = sampler.complete(together[:1], 1, seeds=[3], captions=["a two"])
    assert torch.equal(kept[:, :, :2], together[:1, :, :2])
    refused(lambda: sampler.sample(seeds=[0]), "neither captions nor labels", code="missing")
    refused(lambda: sampler.sample(captions=["a", "b"], seeds=[0]), "2 labels and 1 seeds", code="mismatch")


def test_sample_command_draws_captions(run, call):
    out = call("sample", run, "--caption", "a one", "--caption", "x/../<b>", "--seeds", "0-1", "--out", "d/").out
    assert out.splitlines()[-1] == "4 images (2 captions x 2 seeds): d"
    names = {f"{place}-seed00000{seed}.png" for place in ("0000-a-one", "0001-x-----b-") for seed in (0, 1)}
    assert {path.name for path in Path("d").iterdir()} == names
    Path("lines.txt").write_text("a two\n\nthe digit 3\n")
    assert call("sample", run, "--captions", "lines.txt", "--num", "5", "--out", "b.npz").code == 0
    with np.load("b.npz") as arrays:
        assert arrays["captions"].tolist() == ["a two", "the digit 3", "a two", "the digit 3", "a two"]
        assert arrays["arr_1"].tolist() == [0] * 5
    assert "captions are examples that the model carries" in call("sample", run, "--seeds", "0").out
    assert call("complete", run, "d/0000-a-one-seed000000.png", "--rows", "1", "--caption", "a one").code == 0


def test_sample_command_refuses_bad_captions(run, trained, call):
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    Path("empty.txt").write_text("\n")
    for options, parts in (
        ((trained, "--caption", "a one"), ["reads no captions"]),
        ((run, "--captions", "latin.txt"), ["latin.txt", "byte 3 is not UTF-8"]),
        ((run, "--captions", "empty.txt"), ["empty.txt", "is empty"]),
        ((run, "--captions", "gone.txt"), ["gone.txt"]),
        ((run, "--caption", "a", "--caption", "b", "--labels", "0,0,0"), ["2 captions and 3 labels"]),
    ):
        assert call("sample", *options).is_refusal(*parts)


TEN = ("data.source=spoken:ten", "model.num_classes=10", "train.steps=1")


def test_eval_gives_the_captions_of_the_reference(classifiers, tmp_path):
    run = train(tiny(*SETTINGS, *TEN), tmp_path / "run").run
    options = {"features": "classifier", "num": 12, "settings": ("sampling.steps=1",)}
    run_command(evaluate_command, run, **options, export_npz=tmp_path / "b.npz", out=tmp_path / "o.json")
    with np.load(tmp_path / "b.npz") as arrays:
        assert {caption.split()[0] for caption in arrays["captions"]} == {"a", "the"}
    known = json.loads((tmp_path / "o.json").read_text())["provenance"]["images"]
    assert known["captions"] == "of images of spoken:ten"
    refused(lambda: run_command(evaluate_command, run, **options | {"reference": "spoken"}), code="mismatch")


def test_card_and_words_tell_of_captions(run, tmp_path):
    card = (pra.export(run, tmp_path / "model") / "README.md").read_text()
    caption = pra.load(run).captions[0]
    for told in ('"text-to-image"', f'captions=["{caption}"], seeds=[0]', f"--caption '{caption}'", "first 16 bytes"):
        assert told in card
    assert pra.load(tmp_path / "model").captions == pra.load(run).captions


def test_data_without_captions_are_refused(tmp_path):
    settings = [setting for setting in SETTINGS if not setting.startswith("data.")]
    refused(lambda: train(tiny(*settings, "model.num_classes=10"), tmp_path), "digits has no captions", code="missing")
    refused(
        lambda: train(tiny(*SETTINGS, *HELD, "data.validation=digits", "model.num_classes=1"), tmp_path),
        code="mismatch",
    )


def test_image_without_caption_ends_the_run_or_is_passed_over(tmp_path, monkeypatch):
    captions = Spoken.captions

    def some(source, index):
        if index % 2:
            raise corrupt_caption(source.where(index), "it has no caption")
        return captions(source, index)

    monkeypatch.setattr(Spoken, "captions", some)
    refused(lambda: train(tiny(*SETTINGS), tmp_path / "run"), "no caption", "data.on_caption=skip", code="unreadable")
    found = train(tiny(*SETTINGS, "data.on_caption=skip"), tmp_path / "run")
    assert found.skipped > 3
    places, texts = captions_like(source := open_source("spoken:ten"), 40, OnCorrupt.SKIP)
    assert [text.split()[-1] for text in texts] == [
        WORDS[label] if text[0] == "a" else str(label) for label, text in zip(source.labels[places], texts, strict=True)
    ]
    refused(lambda: captions_like(source, 40, OnCorrupt.ERROR), "no caption", code="unreadable")


def test_changed_captions_are_told(run, tmp_path, monkeypatch):
    train(tiny(*SETTINGS), tmp_path / "run")
    monkeypatch.setattr(Spoken, "captions", lambda source, index: ("something else",))
    with pytest.warns(UserWarning, match="spoken has changed since"):
        train(tiny(*SETTINGS, "train.steps=3"), tmp_path / "run")


@pytest.mark.parametrize("start", ["captions", "classes"])
def test_fine_tuning_keeps_what_the_other_model_knows(start, run, trained, tmp_path):
    """A model of classes learns to read: the reader is new, and everything else is kept."""
    other = run if start == "captions" else trained
    settings = [*SETTINGS, *(["data.source=spoken:ten", "model.num_classes=10"] if start == "classes" else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = train(
            tiny(*settings, f"initial={other}", "train.steps=1", "train.optimizer.lr=1e-12"), tmp_path / "run"
        )
    before, after = pra.load(other).state_dict(), found.model.state_dict()
    kept = [name for name in before if name != "condition.embedding.weight" or start == "captions"]
    for name in kept:
        torch.testing.assert_close(after[name], before[name])
    assert before.keys() <= after.keys()


def test_reading_captions_counts_once_an_image():
    base = tiny(*SETTINGS)
    deeper = SETTINGS[2].replace('"depth": 1', '"depth": 5')
    parts = [sampling_flops(one) for one in (base, tiny(*SETTINGS[:2], deeper))]
    assert parts[0]["head"] == parts[1]["head"]
    width, tokens = 16, 16 + 3
    blocks = 2 * 4 * (2 * tokens * width * (4 * width + 3 * 42) + 4 * tokens**2 * width)  # two streams
    assert parts[1]["backbone"] - parts[0]["backbone"] == blocks


def test_hostile_captions_break_no_page(run, tmp_path):
    """A model's captions hold HTML, a fence of Markdown, line breaks, and half a megabyte."""
    model = pra.load(run)
    model.captions = ("<script>alert(1)</script>", "```\n# x\n```\x1b[31m", '" + evil', "\u202e" * 3, "x" * 500_000)
    folder = pra.save(model, tmp_path / "model")
    found = pra.load(folder).captions
    assert len(found[4]) == 4096
    card = (pra.export(folder, tmp_path / "export") / "README.md").read_text()
    assert 'captions=["<script>alert(1)</script>"]' in card  # in a block of code
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    checkpoint = copied / "checkpoints" / "step-00000004"
    shutil.copy(folder / "config.json", checkpoint / "config.json")
    (checkpoint / "state.json").write_text(json.dumps({"step": 4, "sizes": {}}))
    page = write_report(copied).read_text()
    assert "&lt;script&gt;alert" in page
    assert "<script>alert" not in page
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"captions": ["x"] * 101, "sha256": {}}))
    refused(lambda: pra.load(folder), '"captions"', "at most 100", code="unreadable")

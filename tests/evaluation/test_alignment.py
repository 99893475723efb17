"""Alignment of images with captions: the fitted dual encoder, its figures, CLIP, and `pra eval --alignment`."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from support.answer import caller
from support.captions import SETTINGS
from support.data import config
from support.judging import pixels
from support.refusal import refused
from support.training import tiny, train

from pra.data import open_source
from pra.evaluation import alignment, classifier
from pra.evaluation.alignment import CaptionEncoder, Clip, figures, fit_captions, obeyed, styles_of

CPU = torch.device("cpu")


class Spelled:
    """Features of a text are one of so many axes; images are made of these."""

    name, fingerprint, device = "spelled", "0" * 64, CPU

    def __init__(self, texts):
        self.places = {text: place for place, text in enumerate(texts)}

    def texts(self, texts):
        return torch.eye(len(self.places))[[self.places[text] for text in texts]]


@pytest.fixture(scope="module")
def short(classifiers):
    """Fits of a few steps on few words, in an empty cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "RECIPE", classifier.Recipe(epochs=4, batch=128))
        patch.setattr(alignment, "BUCKETS", 2**9)
        yield classifiers


def spoken_encoder():
    return fit_captions(open_source("spoken"), (8, 8), 1, config(), CPU, progress=False)


def test_encoder_is_fitted_once_and_the_same_again(short, monkeypatch):
    monkeypatch.setattr(alignment, "RECIPE", classifier.Recipe(epochs=0))
    state = torch.get_rng_state()
    first = spoken_encoder()
    assert torch.equal(torch.get_rng_state(), state)
    content = first.path.read_bytes()
    assert spoken_encoder().path == first.path  # out of the cache
    first.path.unlink()
    assert spoken_encoder().path.read_bytes() == content  # the same fit, bitwise
    source = open_source("spoken")
    source.captions = lambda index: ("another",)
    other = fit_captions(source, (8, 8), 1, config(), CPU, progress=False)
    assert other.path != first.path


def test_fitted_encoder_finds_captions_of_digits(short):
    encoder, source = spoken_encoder(), open_source("spoken")
    images = torch.from_numpy(np.stack([np.asarray(source.image(i)) for i in range(200)])).unsqueeze(1)
    captions = [source.captions(i)[i % 2] for i in range(200)]
    seen = encoder.images(images)
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(200))
    found = figures(seen, captions, encoder, ())
    assert found["retrieval_r10"] > 0.8  # chance is 0.5, and two captions of 20 fit each image
    assert found["retrieval_r1"] > 0.2
    torch.testing.assert_close(encoder.images(images[:1]), seen[:1])
    assert encoder.texts(["", "\U0001f60a"]).isfinite().all()
    refused(lambda: encoder.images(pixels(2, shape=(3, 8, 8))), "fitted on 1x8x8", code="mismatch")


def test_retrieval_counts_better_captions(monkeypatch):
    texts = [f"{number:03d}" for number in range(150)]
    aligner = Spelled(texts)
    right = torch.eye(150)
    assert figures(right, texts, aligner, ())["retrieval_r1"] == 1.0
    wrong = torch.roll(right, 1, 0)  # the caption of another image is best, and draws with the rest
    assert figures(wrong, texts, aligner, ())["retrieval_r10"] == 0.0
    monkeypatch.setattr(alignment, "AMONG", 5)
    weak = 0.5 * right + torch.roll(right, 1, 0)  # one caption is better, where it is drawn
    found = figures(weak, texts, aligner, ())
    assert found["retrieval_r1"] == pytest.approx(1 - 4 / 149, abs=0.03)
    assert found["retrieval_r10"] == 1.0
    assert found["style_obeyed"] is None
    assert alignment.chance(texts, (), found) == {"retrieval_r1": 0.2, "retrieval_r10": 1.0}


def test_style_is_obeyed_where_its_caption_is_best():
    captions = ["cat, Round style", "Flat style, dog", "no style", "hat, Old style"] * 2
    styles = styles_of([text] for text in captions)
    assert styles == ["Flat", "Old", "Round", "no"]
    assert styles_of([["a, Flat style"]] * 3) == []
    texts = [f"{what}, {style} style" for what in ("cat", "hat") for style in ("Flat", "Old", "Round")]
    aligner = Spelled([*texts, *(f"{style} style, dog" for style in ("Flat", "Old", "Round"))])
    seen = aligner.texts(["cat, Round style", "Old style, dog", "cat, Flat style", "hat, Old style"])
    assert obeyed(seen, captions[:4], aligner, ("Flat", "Old", "Round")) == pytest.approx(2 / 3)
    assert obeyed(seen, ["plain"] * 4, aligner, ("Flat", "Old")) is None


def test_a_file_that_is_no_encoder_is_refused(tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"nonsense")
    refused(lambda: CaptionEncoder(path, CPU), "encoder of captions", "--weights", code="unreadable", path=path)


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A step on captions. To be read only."""
    return train(tiny(*SETTINGS, "train.steps=1"), tmp_path_factory.mktemp("aligned") / "run").run


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return caller(capsys)


def test_eval_command_judges_alignment(run, short, call, tmp_path):
    options = ("--num", "40", "--set", "sampling.steps=1", "--device", "cpu")
    out = call("eval", run, "--alignment", *options, "--batch-size", "16", "--out", "o.json").out
    assert out.split()[:3] == ["generated", "real", "chance"]
    assert "40 images of" in out
    report = json.loads((tmp_path / "o.json").read_text())
    columns, known = report["figures"], report["provenance"]
    among = known["among"]
    assert columns["chance"] == {"retrieval_r1": 1 / among, "retrieval_r10": 10 / among}
    assert columns["real"]["retrieval_r10"] > 0.5
    assert known["features"]["name"] == "captions"
    assert known["images"]["captions"] == "of images of spoken"
    assert (known["images"]["seeds"], known["count"]) == ("0-39", 40)
    assert 10 < among <= 20
    (tmp_path / "lines.txt").write_text("a one\nthe digit 7\na two\n")
    weights = max(short.iterdir(), key=lambda path: path.stat().st_mtime)
    again = call("eval", run, "--alignment", "--captions", "lines.txt", "--weights", weights, *options[2:])
    assert again.out.split()[:2] == ["generated", "chance"]
    assert "3 images of" in again.out


def test_eval_command_refuses_what_alignment_lacks(run, trained, call, tmp_path):
    (tmp_path / "lines.txt").write_text("a one\n")
    for options, part in (
        ((run, "--captions", "lines.txt"), "--captions needs --alignment"),
        ((run, "--alignment", "clap"), "--alignment clap is unknown"),
        ((run, "--alignment", "--reconstruction"), "--reconstruction and --alignment exclude each other"),
        (
            (run, "--alignment", "--reference", "spoken", "--captions", "lines.txt"),
            "--captions and --reference exclude each other",
        ),
        ((trained, "--alignment"), "reads no captions"),
        ((run, "--alignment", "--reference", "digits"), "digits"),
        ((run, "--alignment", "--captions", "lines.txt"), "all captions are"),
    ):
        assert call("eval", *options, "--device", "cpu").is_refusal(part)


# --- CLIP -------------------------------------------------------------------------------------------------------


class FakeClip(torch.nn.Module):
    """Features of images are their mean colours, those of texts their letters r, g and b."""

    def encode_image(self, pixels):
        return pixels.mean(dim=(2, 3))

    def encode_text(self, tokens):
        return tokens.float()


@pytest.fixture
def open_clip(monkeypatch):
    """A module of that name."""
    made = types.ModuleType("open_clip")
    prepare = lambda picture: torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255  # noqa: E731
    made.create_model_from_pretrained = lambda name, pretrained: (FakeClip(), prepare)
    made.get_tokenizer = lambda name: lambda texts: torch.tensor([[text.count(c) for c in "rgb"] for text in texts])
    made.get_pretrained_cfg = lambda name, tag: {}
    made.download_pretrained = lambda found: (_ for _ in ()).throw(RuntimeError("no network"))
    monkeypatch.setitem(sys.modules, "open_clip", made)


def test_clip_score_is_a_hundred_cosines(open_clip, tmp_path):
    (tmp_path / "w.pt").write_bytes(b"weights")
    clip = Clip(tmp_path / "w.pt", CPU)
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    images[0, 0], images[1, 1], images[2, :2] = 255, 255, 255
    found = figures(clip.images(images), ["r", "g", "b"], clip, ())
    assert found["clip_score"] == pytest.approx(200 / 3)
    assert found["retrieval_r1"] == pytest.approx(2 / 3)
    assert clip.images(images[:, :1]).shape == (3, 3)
    refused(lambda: Clip(None, CPU), "no network", "--weights FILE", code="unreachable")


def test_clip_without_its_package_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    refused(
        lambda: Clip(tmp_path / "w.pt", CPU), "--alignment clip needs open_clip_torch", "clip]", code="not-installed"
    )

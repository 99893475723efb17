"""The small classifier that is fitted on the reference, and its cache."""

import pytest
import torch
from PIL import Image
from support.judging import judged, pixels
from support.refusal import refused

import pra
from pra.config import DataConfig, Fit
from pra.data import open_source
from pra.evaluation import classifier
from pra.evaluation.classifier import Classifier, fit_classifier
from pra.evaluation.evaluate import evaluate
from pra.evaluation.reference import from_source
from pra.evaluation.samples import prepared
from pra.utils.provenance import file_sha256

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and fits of one step."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "RECIPE", classifier.Recipe(epochs=0))
    return tmp_path / "cache" / "pra" / "classifiers"


def digits_classifier(**changes):
    return fit_classifier(open_source("digits"), (8, 8), 1, DataConfig(source="digits", **changes), CPU, progress=False)


def test_classifier_is_fitted_once_and_the_same_again(cache):
    state = torch.get_rng_state()
    first = digits_classifier()
    assert torch.equal(torch.get_rng_state(), state)
    assert first.classes == tuple("0123456789")
    [path] = cache.iterdir()
    content = path.read_bytes()
    assert first.fingerprint == file_sha256(path)
    again = digits_classifier()  # out of the cache
    images = pixels(5, shape=(1, 8, 8))
    assert torch.equal(first(images).pool, again(images).pool)
    alone = torch.cat([first(image.unsqueeze(0)).pool for image in images])
    assert torch.allclose(alone, first(images).pool, atol=1e-5)
    assert first(images).pool.shape == (5, first.dim)
    assert first(images).spatial is None
    path.unlink()
    assert digits_classifier().fingerprint == first.fingerprint  # the same fit, bitwise
    assert path.read_bytes() == content
    assert classifier.find_classifier(first.fingerprint, CPU).fingerprint == first.fingerprint
    refused(lambda: classifier.find_classifier("f" * 64, CPU), str(cache), code="missing", sha256="f" * 12)


def test_another_set_or_recipe_is_another_classifier(cache, monkeypatch):
    digits_classifier()
    source = open_source("digits")
    fit_classifier(source, (12, 12), 1, DataConfig(source="", fit=Fit.PAD), CPU, progress=False)
    source.labels[:] = source.labels[::-1].copy()
    fit_classifier(source, (8, 8), 1, DataConfig(source=""), CPU, progress=False)
    monkeypatch.setattr(classifier, "RECIPE", classifier.Recipe(epochs=0, seed=1))
    digits_classifier()
    assert len(list(cache.iterdir())) == 4


def test_classifier_bad_input_is_refused(cache, tmp_path, monkeypatch):
    fitted, digits, data = digits_classifier(), open_source("digits"), DataConfig(source="")
    refused(lambda: fitted(pixels(2, shape=(3, 8, 8))), code="mismatch", images="3x8x8", fitted="1x8x8")
    (tmp_path / "one").mkdir()
    for index in range(3):
        Image.new("L", (6, 4), index).save(tmp_path / "one" / f"{index}.png")
    one = open_source(f"folder:{tmp_path / 'one'}")
    refused(lambda: fit_classifier(one, (4, 6), 1, data, CPU), "one class", code="unsupported", source=one.name)
    with monkeypatch.context() as few:
        few.setattr(type(digits), "__len__", lambda self: 19)
        refused(lambda: fit_classifier(digits, (8, 8), 1, data, CPU), "19 images", "20", code="unsupported")
    monkeypatch.setattr(classifier, "LARGEST", 1000)
    refused(lambda: fit_classifier(digits, (8, 8), 1, data, CPU), "1000", code="unsupported")


def test_cache_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(torch.optim, "AdamW", None)  # nothing is fitted that could not be kept
    refused(digits_classifier, f"{tmp_path}/file/pra/classifiers", "set XDG_CACHE_HOME")


def test_a_file_that_is_not_a_classifier_is_refused(tmp_path):
    path = tmp_path / "mine.safetensors"
    refused(lambda: Classifier(path, CPU), str(path))
    path.write_bytes(b"nonsense")
    refused(lambda: Classifier(path, CPU), "Remove it", "--weights", code="unreadable", path=path)
    pra.models.weights.write_tensors({"a": torch.zeros(2)}, path)
    refused(lambda: Classifier(path, CPU), code="unreadable", path=path)


def test_recipe_reads_digits(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(classifier, "RECIPE", classifier.Recipe(epochs=6))
    fitted = digits_classifier()
    assert fitted.accuracy is not None
    assert fitted.accuracy >= 0.95
    config = DataConfig(source="digits")
    reference = from_source(open_source("digits"), (8, 8), 1, config, fitted, progress=False)
    assert (reference.name, reference.fit, reference.count) == ("digits", "center-crop", 1498)
    unseen = open_source("digits@test")
    batches = prepared(unseen, range(len(unseen)), (8, 8), 1, config, 100)
    good = evaluate(batches, reference, fitted, len(unseen), progress=False).figures["adm"]
    bad = judged(pixels(299, shape=(1, 8, 8)), reference, fitted, size=100).figures["adm"]
    assert good["accuracy"] is not None
    assert good["accuracy"] > 0.95
    assert good["fid"] is not None
    assert bad["fid"] is not None
    assert good["fid"] < 0.1 * bad["fid"]

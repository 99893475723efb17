"""The linear probe: features without labels, classifiers that do not use the held-out set, bad input."""

import json
import weakref
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.answer import caller
from support.files import contents
from support.models import JIT, LEARNED, PIXEL, batch, random_jit, random_model
from support.refusal import refused

from pra.commands.probe import Reading, features_command, probe_command
from pra.config import DataConfig
from pra.data import open_source
from pra.evaluation import probe
from pra.evaluation.probe import LINEAR, Layers, Linear, Pixels, Task, accuracy, check_memory, held_out, poolings
from pra.models import weights
from pra.utils.distributed import World
from pra.utils.pixels import from_uint8

CPU = torch.device("cpu")


# --- features -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LEARNED, PIXEL], ids=["states", "pixels"])
def test_features_are_clean_tokens_under_the_null_class(config):
    model = random_model(config)
    images, labels, _ = batch(config)

    def tokens(classes):
        backbone = model.backbone
        x = torch.cat([model.condition(classes), backbone.patch_in(model.patchify(images)[:, :-1])], dim=1)
        for layer, block in enumerate(backbone.transformer.blocks):
            x = block(x, backbone.transformer.rotary[:, : x.shape[1]], None, layer)
        return F.rms_norm(x[:, config.class_tokens :], x.shape[-1:], eps=1e-6)

    with torch.no_grad():
        null, labelled = tokens(torch.full((3,), config.num_classes)), tokens(labels)
    found = Layers(model, [2])(images, 0)
    mean, last = found.values()
    torch.testing.assert_close(mean, null.mean(dim=1))
    torch.testing.assert_close(last, null[:, -1])
    assert not torch.allclose(mean, labelled.mean(dim=1), atol=1e-3)
    assert [(layer, name) for layer, name, _ in poolings(found)] == [(2, "mean"), (2, "last"), (2, "both")]
    assert torch.equal([*poolings(found)][2][2], torch.cat([mean, last], dim=1))
    # Asking leaves no hook behind, and for more layers changes none.
    assert torch.equal(Layers(model, [2, 1])(images, 0)[2, "mean"], mean)
    assert not any(block._forward_hooks for block in model.backbone.transformer.blocks)


def test_last_patch_is_an_input_of_jit_alone():
    images, _, _ = batch(LEARNED)
    other = images.clone()
    other[:, :, -2:, -2:] = 0.0
    for model, time, same in ((random_model(), None, True), (random_jit(), 1.0, False)):
        one, two = (Layers(model, [1, 2], time)(given, 0).values() for given in (images, other))
        assert [torch.equal(a, b) for a, b in zip(one, two, strict=True)] == [same] * len(one)


def test_jit_is_read_at_a_time_with_noise_of_each_image():
    images, _, _ = batch(JIT, 6)
    model = random_jit()

    def read(time, first, last, start):
        found = Layers(model, [1, 2], time)(images[first:last], start)
        assert list(found) == [(1, "mean"), (2, "mean")]
        return torch.stack([*found.values()])

    whole = read(0.5, 0, 6, 0)
    torch.testing.assert_close(torch.cat([read(0.5, 0, 2, 0), read(0.5, 2, 6, 2)], dim=1), whole)
    assert not torch.allclose(read(0.5, 0, 6, 1), whole, atol=1e-3)
    assert torch.equal(read(1.0, 0, 6, 1), read(1.0, 0, 6, 0))
    assert not torch.allclose(read(1.0, 0, 6, 0), whole, atol=1e-3)


def test_pixels_are_the_image_up_to_a_size():
    images = torch.rand(2, 3, 6, 8)
    large = torch.rand(2, 1, 64, 32)
    for given, expected in ((images, images), (large, (large[:, :, ::2] + large[:, :, 1::2]) / 2)):
        assert torch.equal(Pixels()(given, 0)[None, None], expected.flatten(1))


# --- classifiers ----------------------------------------------------------------------------------------------


def separable(count=300):
    """Three classes by a matrix, of numbers far from standardised, and one that never varies."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, generator=generator)
    y = (x[:, :4] @ torch.randn(4, 3, generator=generator)).argmax(dim=1)
    x[:, 4] = 7.0
    return x * 100 + 50, y


@pytest.mark.parametrize("name", LINEAR)
def test_linear_classifier_finds_nothing_in_noise(name):
    x, y = separable()
    found = accuracy(LINEAR[name], (x[:200], y[:200]), (x[200:], y[200:]), 3, CPU)
    assert min(found[:2]) > 0.9  # on the held-out set, in validation
    noise = torch.randint(3, (300,), generator=torch.Generator().manual_seed(1))
    assert accuracy(LINEAR[name], (x[:60], noise[:60]), (x[200:], noise[200:]), 3, CPU)[0] < 0.5


def test_the_held_out_set_chooses_nothing():
    seen = []

    def fit(x, y, queries, classes, values, device):
        seen.append((len(x), len(queries), tuple(values)))
        # Right about the validation images with the value 2 alone.
        right = (queries[:, 0] > 0).long()
        return torch.stack([right if value == 2 else torch.zeros_like(right) for value in values])

    x = torch.tensor([[1.0], [-1.0]] * 25)[torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    linear, y = Linear("l", "s", (1.0, 2.0, 3.0), fit), (x[:, 0] > 0).long()
    for truth in (y, 1 - y):
        found = accuracy(linear, (x, y), (x, truth), 2, CPU)
        assert found == (1.0 if truth is y else 0.0, 1.0, 2.0)
    assert seen == [(45, 5, (1.0, 2.0, 3.0)), (50, 50, (2.0,))] * 2


def test_rates_side_by_side_learn_as_alone():
    x, y = separable(100)
    x = (x - x.mean(dim=0)) / 100
    fit, rates = LINEAR["sgd"].fit, (0.001, 1.0)
    together = fit(x, y, x, 3, rates, CPU)
    for place, rate in enumerate(rates):
        assert torch.equal(fit(x, y, x, 3, [rate], CPU)[0], together[place])
    assert not torch.equal(together[0], together[1])


# --- the commands ---------------------------------------------------------------------------------------------


def test_probe_writes_a_table_and_a_report(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(LINEAR, "logistic", LINEAR["logistic"]._replace(values=(0.01, 0.1)))
    out, before = tmp_path / "probe.json", contents(trained)
    probe_command(trained, layers="2,1", classifier="logistic", out=out, options=Reading(num=100, device="cpu"))
    said = capsys.readouterr().out.splitlines()
    report = json.loads(out.read_text())
    assert set(report["figures"]) == set(report["chosen"]) == {"run", "random", "pixels"}
    for name in ("run", "random"):
        figures = report["figures"][name]
        assert [(f["layer"], f["pooling"]) for f in figures] == [
            (layer, pooling) for layer in (2, 1) for pooling in ("mean", "last", "both")
        ]
        assert [f["dim"] for f in figures] == [32, 32, 64] * 2
        assert report["chosen"][name]["validation"] == max(f["validation"] for f in figures)
        assert all(0.15 < f["top1"] < 0.95 for f in figures)
    (pixels,) = report["figures"]["pixels"]
    assert (pixels["layer"], pixels["dim"]) == (None, 64)
    assert pixels["top1"] > 0.7
    known = report["provenance"]
    assert known["data"] == {"train": "digits", "fitted": 100, "test": "digits@test", "judged": 100}
    assert known["label"] == "null class"
    assert known["protocol"]["classifier"] == "logistic"
    assert len(known["weights_sha256"]) == 64
    assert "commit" in known["environment"]
    assert said[0].split()[:4] == ["run", "mean", "run", "last"]
    assert said[2].split()[:3] == ["layer", "2", f"{100 * report['figures']['run'][0]['top1']:.1f}"]
    assert any("pixels: " in line for line in said)
    assert contents(trained) == before

    refused(lambda: probe_command(trained, out=out), str(out))
    probe_command(trained, layers="2", classifier="logistic", only_run=True, options=Reading(num=100, device="cpu"))
    assert len(capsys.readouterr().out.splitlines()) == 5


class Two(World):
    """Two processes one after the other: the second leaves what it has to the first."""

    left: ClassVar[list[Any]] = []

    def combine(self, value, how):
        if not self.is_first:
            self.left.append(value)
            return None
        return how([value, self.left.pop(0)])


def test_processes_share_the_images_and_the_first_fits(trained):
    task = Task.open(DataConfig(source=""), "digits", "digits@test", 41)
    vectors, linear = Layers(weights.load(trained), [1]), LINEAR["logistic"]
    one = task.figures(vectors, linear, (8, 8), 1, CPU, progress=False)
    assert task.figures(vectors, linear, (8, 8), 1, CPU, 7, progress=False, world=Two(1, 2)) == []
    shared = task.figures(vectors, linear, (8, 8), 1, CPU, 7, progress=False, world=Two(0, 2))
    assert not Two.left
    assert [asdict(ours) for ours in one] == [pytest.approx(asdict(theirs)) for theirs in shared]


def test_features_are_written_whole_by_batches_or_not_at_all(trained, tmp_path, full_disk, monkeypatch):
    out = tmp_path / "f.npz"
    made = []
    whole = Layers.__call__

    def recorded(self, images, start):
        assert not any(found() is not None for found in made)  # of earlier batches
        vectors = whole(self, images, start)
        made.extend(map(weakref.ref, vectors.values()))
        return vectors

    options = Reading("digits@test", num=50, batch_size=7, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(Layers, "__call__", recorded)
        features_command(trained, layer=1, out=out, pooling="both", options=options)
    assert len(made) == 2 * 8
    with np.load(out, allow_pickle=False) as arrays:
        features, labels, known = arrays["features"], arrays["labels"], json.loads(str(arrays["pra"]))
    source = open_source("digits@test")
    pixels = np.stack([np.asarray(source.image(place * len(source) // 50)) for place in range(50)])
    images = from_uint8(torch.from_numpy(pixels).unsqueeze(1))
    expected = torch.cat([*Layers(weights.load(trained), [1])(images, 0).values()], dim=1)
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert (features.dtype, labels.dtype) == (np.float32, np.int64)
    assert labels.tolist() == [int(source.labels[place * len(source) // 50]) for place in range(50)]
    assert (known["layer"], known["pooling"], known["source"], known["count"]) == (1, "both", "digits@test", 50)
    assert known["classes"] == list(source.classes)

    refused(lambda: features_command(trained, layer=1, out=out), str(out))
    other = tmp_path / "other.npz"
    with full_disk(4096):
        refused(lambda: features_command(trained, layer=1, out=other), "other.npz", "cannot be written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.npz"]


# --- bad input ------------------------------------------------------------------------------------------------


def folder_of(root, classes, side=8, each=15):
    """Grey pictures of a few classes, one letter each."""
    for letter in classes:
        (root / letter).mkdir(parents=True)
        for number in range(each):
            Image.new("L", (side, side), (37 * number + ord(letter)) % 256).save(root / letter / f"{number:02}.png")
    return f"folder:{root}"


def test_data_that_no_probe_can_be_made_of(trained, tmp_path):
    one = folder_of(tmp_path / "one", "a", each=30)
    two_classes, others = folder_of(tmp_path / "two", "ab"), folder_of(tmp_path / "others", "bc")
    small, again = folder_of(tmp_path / "small", "ab", side=4), folder_of(tmp_path / "again", "ab")
    folder_of(tmp_path / "lopsided", "a", each=40)
    lopsided = folder_of(tmp_path / "lopsided", "b", each=1)

    def fails(data, test, *parts, num=None, **fields):
        options = Reading(data, num=num)
        refused(lambda: probe_command(trained, test=test, only_run=True, options=options), *parts, **fields)

    fails(one, one, "one class", code="conflict", train=one)
    fails(two_classes, None, "--test", code="missing", source=two_classes)
    fails("digits@test", None, "--test", code="missing", source="digits@test")
    fails(two_classes, others, "a, b (2)", "b, c (2)")
    fails(small, again, "4x4", "on_small")
    for same in (again, f"{again}/", again.replace("/again", "/two/../again")):
        fails(again, same, same, "other images")
    fails(None, None, "10 images", "20", num=10, code="conflict", train="digits")
    fails("digts", "digits@test", "digts", "digits")
    fails(lopsided, again, "20 images", "one class", num=20, code="conflict")
    task = Task.open(DataConfig(source=""), two_classes, again)
    assert (len(task.chosen), len(task.asked)) == (30, 30)
    assert held_out("idx:/data") == "idx:/data@test"
    saved = weights.save(weights.load(trained), tmp_path / "saved")
    refused(lambda: probe_command(saved), "--data SRC", code="missing", path=saved)
    refused(lambda: probe_command(tmp_path / "none"), "none")


def test_layers_times_and_sizes_that_cannot_be(monkeypatch):
    model, jit = random_model(), random_jit()
    for layer in (0, 3):
        refused(lambda layer=layer: Layers(model, [layer]), "1 to 2", code="unknown", layer=layer)
    for asked, time in ((model, 0.5), (jit, 1.5), (jit, None)):
        refused(lambda asked=asked, time=time: Layers(asked, [1], time), code="invalid", value=time)
    monkeypatch.setattr(probe.os, "sysconf", lambda name: 2**12 if name == "SC_PAGE_SIZE" else 2**18)
    check_memory(2**30)
    refused(lambda: check_memory(2**32), "4 GiB", "1", code="too-large")


def test_a_wrong_line_is_answered_in_one(trained, tmp_path, capsys):
    run, out = trained, tmp_path / "f.npz"
    for words, part in (
        (["probe", run, "--layers", "9"], "layer 9"),
        (["probe", run, "--layers", "first"], "--layers"),
        (["probe", run, "--classifier", "svm"], "'svm'"),
        (["probe", run, "--num", "0"], "--num 0"),
        (["probe", run, "--time", "0.5"], "--time"),
        (["probe", run, "--set", "data.fits=pad"], "fits"),
        (["features", run, "--layer", "1", "--out", tmp_path / "f.pt"], ".npz"),
        (["features", run, "--layer", "7", "--out", out], "layer 7"),
        (["features", run, "--layer", "1", "--pooling", "max", "--out", out], "'max'"),
        (["features", run, "--out", out], "--layer"),
    ):
        assert caller(capsys)(*words).is_refusal(part)
    assert not list(tmp_path.iterdir())

"""The work of `pra eval` around the figures: files that appear together, labels, provenance, refusals."""

import errno
import hashlib
import importlib
import json
import os
import signal
import warnings
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from support.files import contents
from support.judging import noise_pictures, run_command, saved_model
from support.models import BLIND, PIXEL, random_model
from support.refusal import refused

import pra
from pra.commands.eval import evaluate_command
from pra.data import open_source
from pra.evaluation.collect import digest_sum
from pra.evaluation.evaluate import Report, evaluate
from pra.evaluation.outputs import publish, staged
from pra.evaluation.samples import labels_like
from pra.sampling.requests import Requests
from pra.utils.distributed import ALONE
from pra.utils.provenance import file_sha256
from studies import measures

pytestmark = pytest.mark.usefixtures("classifiers")

COUNTS = {"rare": 4, "common": 22, "usual": 6}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Pictures of three classes, most of them of one."""
    return noise_pictures(tmp_path_factory.mktemp("mixed"), COUNTS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved model of these classes."""
    return saved_model(tmp_path_factory.mktemp("saved") / "model", sorted(COUNTS))


def run(target, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*every class is sampled equally often")
        run_command(evaluate_command, target, **{"num": 12, "settings": ("sampling.steps=1",)} | options)


def provenance(path):
    return json.loads(path.read_text())["provenance"]


def refuse(target, *parts, code=None, fields=None, **options):
    refused(lambda: run(target, **options), *parts, code=code, **fields or {})


# --- labels -------------------------------------------------------------------------------------------------


def test_labels_are_as_frequent_as_in_the_reference(model, mixed, tmp_path):
    run(model, reference=mixed, num=64, labels="reference", export_npz=tmp_path / "b.npz", out=tmp_path / "o.json")
    with np.load(tmp_path / "b.npz") as arrays:
        labels = arrays["arr_1"]
    assert np.bincount(labels).tolist() == [2 * COUNTS[name] for name in sorted(COUNTS)]
    assert (np.diff(labels) < 0).any()  # not one class after the other, as in the source
    assert provenance(tmp_path / "o.json")["images"]["labels"] == f"as frequent as in {mixed}, shuffled"
    source = open_source(mixed)
    assert sorted(labels) == sorted(labels_like(source, 64).tolist())
    assert measures.labels_like is labels_like  # studies sample by the same rule
    assert labels_like(source, 16).tolist() == [int(source.labels[2 * place]) for place in range(16)]


def test_balanced_labels_warn_of_an_unbalanced_reference(model, mixed, tmp_path):
    given = {"reference": mixed, "settings": ("sampling.steps=1",)}
    with pytest.warns(UserWarning, match=r"69% of folder:.* are 'common'.*--labels reference") as warned:
        run_command(evaluate_command, model, num=12, export_npz=tmp_path / "b.npz", **given)
    assert len(warned) == 1
    with np.load(tmp_path / "b.npz") as arrays:
        assert np.bincount(arrays["arr_1"]).tolist() == [4, 4, 4]
    run_command(evaluate_command, model, num=12, labels="reference", **given)  # nothing to say
    run_command(evaluate_command, tmp_path / "b.npz", reference=mixed)  # nothing to choose


def test_labels_that_cannot_be_had_are_refused(model, mixed, tmp_path):
    batch, statistics = tmp_path / "b.npz", tmp_path / "s.npz"
    np.savez(batch, np.zeros((5, 6, 8, 3), np.uint8))
    np.savez(statistics, mu=np.zeros(5), sigma=np.eye(5))
    refuse(model, reference=mixed, labels="as-there", code="unknown", fields={"value": "as-there"})
    finished = {"num": 5, "reference": mixed, "settings": ()}
    refuse(batch, **finished, labels="reference", code="conflict", fields={"option": "--labels reference"})
    refuse(model, reference=str(statistics), labels="reference", code="missing", fields={"path": statistics})
    other = saved_model(tmp_path / "other", ["common", "rare", "common too"])
    parts = "class 2 is 'usual' in folder:", "'common too' in the model"
    refuse(other, *parts, reference=mixed, labels="reference", code="mismatch", fields={"option": "--labels reference"})


def test_reference_labels_go_by_names(mixed, tmp_path):
    other = saved_model(tmp_path / "other", ["usual", "new", "common", "rare"])
    run(other, reference=mixed, num=64, labels="reference", export_npz=tmp_path / "b.npz")
    with np.load(tmp_path / "b.npz") as arrays:
        assert np.bincount(arrays["arr_1"]).tolist() == [12, 0, 44, 8]


def test_judged_labels_go_by_names(mixed, tmp_path, monkeypatch):
    other, seen = saved_model(tmp_path / "other", ["usual", "common"]), []

    def watched(batches, *given, **options):
        return evaluate((seen.append(batch.labels) or batch for batch in batches), *given, **options)

    monkeypatch.setattr("pra.evaluation.judging.evaluate", watched)
    run(other, reference=mixed, num=6, export_npz=tmp_path / "b.npz")
    assert sorted(torch.cat(seen).tolist()) == [0, 0, 0, 2, 2, 2]  # of common, rare, usual
    with np.load(tmp_path / "b.npz") as arrays:
        assert sorted(arrays["arr_1"]) == [0, 0, 0, 1, 1, 1]  # the model's


def test_reconstruction_needs_labels_of_the_same_meaning(model, mixed, classifiers, tmp_path, monkeypatch):
    asked = {"reference": mixed, "reconstruction": True}
    with monkeypatch.context() as nothing_done:
        nothing_done.setattr("pra.evaluation.judging.fit_classifier", None)
        fewer = saved_model(tmp_path / "fewer", ["common", "rare"])
        refuse(fewer, "has 3 classes, the model 2", **asked, code="mismatch", fields={"option": "--reconstruction"})
        renamed = saved_model(tmp_path / "renamed", ["common", "sparse", "usual"])
        refuse(renamed, "class 1 is 'rare'", "'sparse'", **asked, code="mismatch")
    run(model, **asked, out=tmp_path / "o.json")
    assert provenance(tmp_path / "o.json")["reconstruction"]["count"] == 12
    blind = saved_model(tmp_path / "blind", ["one"], codec=BLIND.codec)  # its encoder does not see labels
    run(blind, **asked, weights=next(classifiers.iterdir()))


# --- files --------------------------------------------------------------------------------------------------


def test_one_file_for_two_outputs_is_refused(model, mixed, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path)
    for other in ("in/x.npz", "in/../in/x.npz", "link/x.npz", tmp_path / "in" / "x.npz"):
        twice = {"out": Path("in/x.npz"), "export_npz": Path(other)}
        refuse(model, "report and images", reference=mixed, **twice, code="conflict", fields={"path": other})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "link"]


def outputs(folder):
    return {"out": folder / "o.json", "export_npz": folder / "b.npz", "export_statistics": folder / "s.npz"}


def test_what_fails_late_leaves_nothing(model, mixed, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as broken:
        broken.setattr("pra.evaluation.judging.reconstruct", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model, reference=mixed, reconstruction=True, **outputs(tmp_path / "out"))
    assert not any((tmp_path / "out").iterdir())

    def quicker(*_):
        assert {path.name for path in (tmp_path / "out").iterdir()} == {".b.npz.eval", ".o.json.eval", ".s.npz.eval"}
        (tmp_path / "out" / "b.npz").touch()

    monkeypatch.setattr(Report, "save", quicker)
    batch = tmp_path / "out" / "b.npz"
    refused(lambda: run(model, reference=mixed, **outputs(tmp_path / "out")), code="exists", path=batch)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.npz"]
    assert "inception_score" in capsys.readouterr().out  # the figures are not lost


def test_second_command_on_a_file_is_refused(tmp_path):
    files, folder = {"images": tmp_path / "b.npz"}, tmp_path / ".b.npz.eval"
    folder.mkdir()
    for name in (".b.npz.abc", "b.npz", "b.npz.part1"):  # of a killed command
        (folder / name).touch()
    with staged(files, ALONE) as places:
        assert [path.name for path in folder.iterdir()] == [".lock"]
        places["images"].write_bytes(b"1")
        parts = "is being filled by process", "choose another file"
        refused(lambda: staged(files, ALONE).__enter__(), *parts, code="busy", path=folder)
        publish(places, files)
    assert contents(tmp_path) == {"b.npz": b"1"}


def test_unfinished_folder_that_is_a_link_stays_whole(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    (tmp_path / ".b.npz.eval").symlink_to(tmp_path / "mine")
    do = staged({"images": tmp_path / "b.npz"}, ALONE).__enter__
    refused(do, "is a link", code="unwritable", path=tmp_path / ".b.npz.eval")
    assert (tmp_path / "mine" / "file").read_text() == "kept"


def test_report_stays_where_its_figures_cannot_be_printed(model, mixed, tmp_path, monkeypatch):
    def closed(_):
        raise BrokenPipeError

    monkeypatch.setattr(Report, "table", closed)
    with pytest.raises(BrokenPipeError):
        run(model, reference=mixed, out=tmp_path / "o.json")
    assert list(contents(tmp_path)) == ["o.json"]
    stage = tmp_path / ".o.json.eval"  # of a command that was killed at its end
    stage.mkdir()
    (stage / ".lock").touch()
    refuse(model, "exists already", reference=mixed, out=tmp_path / "o.json")
    assert list(contents(tmp_path)) == ["o.json"]
    assert not stage.exists()


def test_failure_to_publish_leaves_no_file(tmp_path, monkeypatch):
    files = {"report": tmp_path / "o.json", "images": tmp_path / "b.npz"}
    replace = os.replace

    def full(source, target):
        if target.name == "o.json":
            assert (tmp_path / "b.npz").is_file()
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("pra.evaluation.outputs.os.replace", full)
    with staged(files, ALONE) as places:
        for path in places.values():
            path.touch()
        refused(lambda: publish(places, files), "No space left", code="unwritable", path=tmp_path / "o.json")
    assert not any(tmp_path.iterdir())


def test_command_stopped_by_a_signal_leaves_nothing(model, mixed, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", Requests.part
    out.mkdir()
    signals = [signal.SIGTERM, signal.SIGINT]

    def stopped(self, indices):
        if indices.start == 8 and signals:
            assert len(list(out.iterdir())) == 3  # amid the images
            os.kill(os.getpid(), signals.pop(0))
        return whole(self, indices)

    given = {"reference": mixed, "labels": "reference", "batch_size": 4} | outputs(out)
    monkeypatch.setattr(Requests, "part", stopped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
    for end, arguments in ((SystemExit, (128 + signal.SIGTERM,)), (KeyboardInterrupt, ())):
        with pytest.raises(end) as stop:
            run(model, **given)
        assert stop.value.args == arguments
        assert not any(out.iterdir())
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGINT, before)
    run(model, **given)
    assert len(list(out.iterdir())) == 3


# --- provenance ---------------------------------------------------------------------------------------------


def by_definition(images):
    total = 0
    for image in images:
        channels, height, width = image.shape
        head = f"{channels}x{height}x{width} ".encode()
        total += int(hashlib.sha256(head + image.contiguous().numpy().tobytes()).hexdigest(), 16)
    return f"{total % 2**256:064x}"


def test_the_identity_of_images_knows_no_order(model, mixed, tmp_path):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (9, 3, 4, 5), generator=random, dtype=torch.uint8)
    expected = by_definition(images)
    assert f"{digest_sum(images):064x}" == expected
    assert digest_sum(images.flip(0).permute(0, 1, 3, 2).permute(0, 1, 3, 2)) == digest_sum(images)
    assert (digest_sum(images[:4]) + digest_sum(images[4:])) % 2**256 == digest_sum(images)
    assert digest_sum(images.view(9, 3, 5, 4)) != digest_sum(images)
    run(model, reference=mixed, num=20, export_npz=tmp_path / "b.npz", out=tmp_path / "a.json", batch_size=3)
    run(model, reference=mixed, num=20, out=tmp_path / "b.json", batch_size=20)
    one, other = provenance(tmp_path / "a.json"), provenance(tmp_path / "b.json")
    assert one["reference"]["images_sha256"] == other["reference"]["images_sha256"]
    with np.load(tmp_path / "b.npz") as arrays:
        assert one["images_sha256"]["adm"] == by_definition(torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2))
    assert one["images_sha256"]["adm"] != one["images_sha256"]["torch-fidelity"]
    source = open_source(mixed)
    pixels = torch.from_numpy(np.stack([source.image(index) for index in range(len(source))]))
    assert one["reference"]["images_sha256"] == by_definition(pixels.permute(0, 3, 1, 2))


# --- messages -----------------------------------------------------------------------------------------------


def test_command_without_a_target_judges_the_shipped_model(model, mixed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pra.models.weights.SHIPPED", model)
    refuse(None, "the model that comes with pra", "--reference", code="missing")
    run(None, reference=mixed)
    said = capsys.readouterr().out
    assert "12 images of the model that comes with pra against folder:" in said
    assert "12 images are few" in said
    assert "not saved. Use --out FILE.json" in said
    monkeypatch.setattr(importlib.import_module("pra.evaluation.evaluate"), "FEW", 12)  # a function has the short name
    run(None, reference=mixed, out=tmp_path / "o.json")
    said = capsys.readouterr().out
    assert "are few" not in said
    assert "not kept" not in said
    assert provenance(tmp_path / "o.json")["images"]["model"] == str(model)


def test_command_on_a_run(trained, tmp_path, capsys):
    sampling = "sampling.guidance=2", "sampling.steps=1"
    run(
        trained, num=40, reconstruction=True, out=tmp_path / "a.json", export_npz=tmp_path / "b.npz",
        export_statistics=tmp_path / "s.npz", settings=("data.on_corrupt=skip", *sampling),
    )  # fmt: skip
    report = json.loads((tmp_path / "a.json").read_text())
    assert set(report["figures"]) == {"adm", "torch-fidelity", "reconstruction"}
    assert report["figures"]["reconstruction"]["psnr"] > 0
    known = report["provenance"]
    assert known["environment"]["versions"]["torch"] == torch.__version__
    assert known["images"]["sampling"]["guidance"] == 2
    assert known["images"]["sampling"]["precision"] == "float32"  # what "auto" is here
    assert known["images"]["seeds"] == "0-39"
    assert known["images"]["weights_sha256"] == file_sha256(Path(known["images"]["model"]) / "ema.safetensors")
    assert known["reference"]["name"] == "digits"
    assert known["reference"]["prepared"] == {"on_small": "error", "on_corrupt": "skip"}
    assert known["reconstruction"] == {"source": "digits", "count": 40}
    assert known["date"].endswith("+00:00")
    assert known["seconds"] > 0
    assert known["kid"] == {"subsets": 100, "size": 40}
    assert known["precision_recall"] == {"neighbours": 3}
    assert known["features"]["versions"] == {}  # torch alone
    assert "torch-fidelity" in capsys.readouterr().out
    # The batch against the statistics: the same figures, under the protocol that rounded it.
    finished = {"reference": str(tmp_path / "s.npz"), "num": None, "settings": (), "patch_size": 2}
    run(tmp_path / "b.npz", **finished, out=tmp_path / "c.json")
    again = json.loads((tmp_path / "c.json").read_text())
    figures, expected = again["figures"]["adm"], report["figures"]["adm"]
    assert figures.pop("sfid") is expected.pop("sfid") is None
    assert figures == pytest.approx(expected, rel=1e-6)
    assert again["provenance"]["comparable_sha256"] == known["comparable_sha256"]
    for key in ("images_sha256", "prepared", "fit", "count", "sha256"):
        assert again["provenance"]["reference"][key] == known["reference"][key]
    refuse(trained, f"{tmp_path}/a.json", out=tmp_path / "a.json")
    # Another arithmetic, other images.
    run(trained, num=40, settings=sampling, precision="bfloat16", out=tmp_path / "d.json")
    report = json.loads((tmp_path / "d.json").read_text())
    assert report["provenance"]["images"]["sampling"]["precision"] == "bfloat16"
    assert report["figures"]["adm"]["fid"] != expected["fid"]


def test_command_on_a_folder_takes_evenly_spread_pictures(classifiers, tmp_path):
    source = open_source("digits@test")
    (tmp_path / "samples").mkdir()
    for index in range(30):
        source.image(index).save(tmp_path / "samples" / f"{index:03d}.png")
    before = {*classifiers.iterdir()}
    asked = {"reference": "digits", "num": 20, "settings": ()}
    run(tmp_path / "samples", **asked, out=tmp_path / "a.json")
    report = json.loads((tmp_path / "a.json").read_text())
    assert (report["provenance"]["count"], report["provenance"]["images"]["of"]) == (20, 30)
    fitted = report["provenance"]["features"]["sha256"]
    [path] = [path for path in {*classifiers.iterdir()} if file_sha256(path) == fitted]
    assert before | {path} == {*classifiers.iterdir()}
    run(tmp_path / "samples", **asked, weights=path, out=tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["figures"] == report["figures"]


def test_command_bad_input_is_refused(model, mixed, trained, tmp_path):
    batch, nowhere = tmp_path / "b.npz", tmp_path / "none"
    np.savez(batch, np.zeros((5, 8, 8, 1), np.uint8))
    pra.save(random_model(PIXEL), tmp_path / "pixel")
    digits = {"reference": "digits", "num": None, "settings": ()}
    refuse(nowhere, settings=(), code="missing", fields={"path": nowhere})
    refuse(batch, str(batch), **digits | {"reference": None}, code="missing")
    refuse(batch, "--num 6", **digits | {"num": 6}, code="invalid", fields={"path": batch, "count": 5})
    refuse(batch, **digits | {"num": 1}, code="invalid", fields={"option": "--num", "value": 1})
    refuse(batch, "did you mean 'inception'?", **digits, features="inceptoin", code="unknown")
    refuse(batch, **digits, batch_size=0, code="invalid", fields={"option": "--batch-size", "value": 0})
    refuse(batch, **digits, precision="float16", fields={})
    refuse(batch, "'data.fit'", **digits | {"settings": ("data.fit",)})
    refuse(batch, "'fitt'", "'fit'", **digits | {"settings": ("data.fitt=pad",)})
    refuse(batch, **digits | {"reference": str(batch)}, code="mismatch", fields={"path": batch})
    for option, changes in (
        ("--reconstruction", {"reconstruction": True}),
        ("--precision float32", {"precision": "float32"}),
        ("--average raw", {"average": "raw"}),
        ("--set sampling.guidance=2", {"settings": ("sampling.guidance=2",)}),
    ):
        refuse(batch, **digits | changes, code="conflict", fields={"option": option})
    setting = "data.flip=true"
    refuse(model, reference=mixed, settings=(setting,), code="invalid", fields={"value": setting})
    refuse(tmp_path / "pixel", reference="digits", reconstruction=True, code="unsupported")
    refuse(tmp_path / "pixel", code="missing")
    np.savez(tmp_path / "one.npz", np.zeros((1, 8, 8, 1), np.uint8))
    refuse(tmp_path / "one.npz", **digits, fields={"path": tmp_path / "one.npz", "count": 1})
    np.savez(batch, np.zeros((5, 9, 9, 1), np.uint8))
    refuse(batch, "8x8", "9x9", **digits)
    (tmp_path / "file").touch()
    refuse(batch, "file", **digits, out=tmp_path / "file" / "a.json")

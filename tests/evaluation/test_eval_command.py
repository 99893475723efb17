"""What `pra eval` does around the figures: files that come together, labels, provenance, what it refuses."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import BLIND, random_model
from support.refusal import refused

import pra
from pra.commands.eval import evaluate_command
from pra.config import DataConfig
from pra.data import open_source
from pra.evaluation import metrics
from pra.evaluation.collect import collect, digest_sum
from pra.evaluation.evaluate import all_figures, describe
from pra.evaluation.features import Features
from pra.evaluation.outputs import Outputs
from pra.evaluation.reference import from_file, from_source, summarise
from pra.evaluation.samples import labels_like
from pra.sampling.batches import Batch
from pra.sampling.requests import Listed
from pra.utils.distributed import ALONE
from pra.utils.provenance import package_version
from studies import measures

pytestmark = pytest.mark.usefixtures("classifiers")

COUNTS = {"rare": 4, "common": 22, "usual": 6}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pictures of three classes, most of them of one."""
    folder, random = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    for name, count in COUNTS.items():
        (folder / name).mkdir()
        for index in range(count):
            noise = random.integers(0, 256, (6, 8, 3), np.uint8)
            Image.fromarray(noise).save(folder / name / f"{index:02d}.png")
    return f"folder:{folder}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A saved model of these classes."""
    return saved(tmp_path / "model", sorted(COUNTS))


def saved(folder: Path, classes: list[str], **changes: Any) -> Path:
    model = random_model(num_classes=len(classes), **changes)
    model.classes = tuple(classes)
    return pra.save(model, folder)


def run(target: Path | None, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*every class is sampled equally often")
        given = {"features": "classifier", "device": "cpu", "num": 12, "settings": ("sampling.steps=1",)} | options
        evaluate_command(target, **given)


def provenance(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["provenance"]  # type: ignore[no-any-return]


# --- labels -------------------------------------------------------------------------------------------------


def test_labels_as_frequent_as_in_the_reference(model: Path, mixed: str, tmp_path: Path) -> None:
    run(model, reference=mixed, num=64, labels="reference", export_npz=tmp_path / "b.npz", out=tmp_path / "o.json")
    with np.load(tmp_path / "b.npz") as arrays:
        labels = arrays["arr_1"]
    assert np.bincount(labels).tolist() == [2 * COUNTS[name] for name in sorted(COUNTS)]
    assert (np.diff(labels) < 0).any()  # not one class after the other, as in the source
    assert provenance(tmp_path / "o.json")["images"]["labels"] == f"as frequent as in {mixed}, shuffled"
    source = open_source(mixed)
    assert sorted(labels) == sorted(labels_like(source, 64).tolist())


def test_studies_sample_by_the_same_rule(mixed: str) -> None:
    assert measures.labels_like is labels_like
    source = open_source(mixed)
    assert labels_like(source, 16).tolist() == [int(source.labels[2 * place]) for place in range(16)]


def test_balanced_labels_against_an_unbalanced_reference(model: Path, mixed: str, tmp_path: Path) -> None:
    given: Any = {"reference": mixed, "features": "classifier", "device": "cpu", "settings": ("sampling.steps=1",)}
    with pytest.warns(UserWarning, match=r"69% of folder:.* are 'common'.*--labels reference") as warned:
        evaluate_command(model, num=12, export_npz=tmp_path / "b.npz", **given)
    assert len(warned) == 1
    with np.load(tmp_path / "b.npz") as arrays:
        assert np.bincount(arrays["arr_1"]).tolist() == [4, 4, 4]
    evaluate_command(model, num=12, labels="reference", **given)  # nothing to say
    evaluate_command(tmp_path / "b.npz", **given | {"settings": ()})  # nothing to choose


def test_labels_that_cannot_be_had(model: Path, mixed: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", np.zeros((5, 6, 8, 3), np.uint8))
    np.savez(tmp_path / "s.npz", mu=np.zeros(5), sigma=np.eye(5))
    refused(lambda: run(model, reference=mixed, labels="as-there"), "--labels 'as-there'", "balanced, reference")
    refused(
        lambda: run(tmp_path / "b.npz", num=5, reference=mixed, labels="reference", settings=()),
        *("--labels reference", "are finished"),
    )
    refused(
        lambda: run(model, reference=str(tmp_path / "s.npz"), labels="reference"),
        *("--labels reference", "s.npz", "data source"),
    )
    other = saved(tmp_path / "other", ["common", "rare", "common too"])
    refused(
        lambda: run(other, reference=mixed, labels="reference"),
        *("--labels reference", "class 2 is 'usual' in folder:", "'common too' in the model"),
    )


# --- reconstruction -----------------------------------------------------------------------------------------


def test_reconstruction_with_labels_of_another_meaning(
    model: Path, mixed: str, classifiers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as nothing_done:
        nothing_done.setattr("pra.evaluation.truth.fit_classifier", None)
        fewer = saved(tmp_path / "fewer", ["common", "rare"])
        refused(
            lambda: run(fewer, reference=mixed, reconstruction=True),
            *("--reconstruction", "has 3 classes, the model 2", "--reference"),
        )
        renamed = saved(tmp_path / "renamed", ["common", "sparse", "usual"])
        refused(lambda: run(renamed, reference=mixed, reconstruction=True), "class 1 is 'rare'", "'sparse'")
    run(model, reference=mixed, reconstruction=True, out=tmp_path / "o.json")
    assert provenance(tmp_path / "o.json")["reconstruction"]["count"] == 12
    blind = saved(tmp_path / "blind", ["one"], codec=BLIND.codec)  # whose encoder sees no label
    run(blind, reference=mixed, reconstruction=True, weights=next(classifiers.iterdir()))


# --- files --------------------------------------------------------------------------------------------------


def test_one_file_for_two_outputs(model: Path, mixed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path)
    for other in ("in/x.npz", "in/../in/x.npz", "link/x.npz", tmp_path / "in" / "x.npz"):
        refused(
            lambda path=Path(other): run(model, reference=mixed, out=Path("in/x.npz"), export_npz=path),  # type: ignore[misc]
            *("x.npz cannot be both the report and the images", "another file"),
        )
    refused(
        lambda: run(model, reference=mixed, export_npz=Path("x.npz"), export_statistics=Path("x.npz")),
        "both the images and the statistics",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "link", "model"]


def outputs(folder: Path) -> dict[str, Path]:
    return {
        "out": folder / "o.json", "export_npz": folder / "b.npz", "export_statistics": folder / "s.npz"
    }  # fmt: skip


def test_files_come_together_at_the_end(
    model: Path, mixed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    there: list[list[str]] = []

    def publish(self: Outputs, staged: Outputs) -> None:
        there.append(sorted(path.name for path in (tmp_path / "out").iterdir()))
        there.append(sorted(path.parent.name for path in staged.named().values() if path.is_file()))
        whole(self, staged)

    whole = Outputs.publish
    monkeypatch.setattr(Outputs, "publish", publish)
    run(model, reference=mixed, **outputs(tmp_path / "out"))
    folders = [".b.npz.eval", ".o.json.eval", ".s.npz.eval"]
    assert there == [folders, folders]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.npz", "o.json", "s.npz"]


def test_what_fails_late_leaves_nothing(
    model: Path, mixed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as broken:
        broken.setattr("pra.commands.eval.reconstruct", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(model, reference=mixed, reconstruction=True, **outputs(tmp_path / "out"))
    assert not any((tmp_path / "out").iterdir())

    def quicker(*_: object) -> None:
        (tmp_path / "out" / "b.npz").touch()

    monkeypatch.setattr("pra.evaluation.reference.Reference.save", quicker)
    refused(lambda: run(model, reference=mixed, **outputs(tmp_path / "out")), "b.npz exists already")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.npz"]
    assert "inception_score" in capsys.readouterr().out  # the figures are not lost


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_what_a_killed_command_left_is_removed_and_a_living_one_is_not_disturbed(tmp_path: Path) -> None:
    wanted = Outputs(images=tmp_path / "b.npz")
    (tmp_path / ".b.npz.eval").mkdir()
    (tmp_path / ".b.npz.eval" / ".b.npz.abc").touch()
    with wanted.staged(ALONE) as staged:
        assert staged.images is not None
        assert [path.name for path in staged.images.parent.iterdir()] == [".lock"]
        staged.images.write_bytes(b"1")
        refused(lambda: wanted.staged(ALONE).__enter__(), "is being filled by process", "choose another file")
        wanted.publish(staged)
    assert [path.name for path in tmp_path.iterdir()] == ["b.npz"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, as it does in a terminal; a shell's background jobs begin with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "end"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_stopped_by_a_signal_it_leaves_nothing_and_begins_anew(
    number: signal.Signals, end: type[BaseException], model: Path, mixed: str, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    whole = Listed.seeds

    def stopped(self: Listed, indices: range) -> list[int]:
        if indices.start == 8:
            assert len(list((tmp_path / "out").iterdir())) == 3  # amid the images
            os.kill(os.getpid(), number)
        return whole(self, indices)

    given: Any = {"reference": mixed, "labels": "reference", "batch_size": 4} | outputs(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Listed, "seeds", stopped)
        with pytest.raises(end) as stop:
            run(model, **given)
    assert end is not SystemExit or stop.value.args == (128 + signal.SIGTERM,)
    assert not any((tmp_path / "out").iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    run(model, **given)
    assert len(list((tmp_path / "out").iterdir())) == 3


# --- provenance ---------------------------------------------------------------------------------------------


def by_definition(images: torch.Tensor) -> str:
    total = 0
    for image in images:
        channels, height, width = image.shape
        head = f"{channels}x{height}x{width} ".encode()
        total += int(hashlib.sha256(head + image.contiguous().numpy().tobytes()).hexdigest(), 16)
    return f"{total % 2**256:064x}"


def test_the_identity_of_images_knows_no_order(model: Path, mixed: str, tmp_path: Path) -> None:
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


def test_provenance(model: Path, mixed: str, tmp_path: Path) -> None:
    statistics = tmp_path / "s.npz"
    run(
        model, reference=mixed, out=tmp_path / "a.json", export_statistics=statistics,
        settings=("data.on_corrupt=skip", "sampling.steps=1"),
    )  # fmt: skip
    known = provenance(tmp_path / "a.json")
    assert known["date"].endswith("+00:00")
    assert known["seconds"] > 0
    assert known["kid"] == {"subsets": 100, "size": 12}
    assert known["precision_recall"] == {"neighbours": 3}
    assert known["features"]["versions"] == {}  # torch alone
    assert known["reference"]["prepared"] == {"on_small": "error", "on_corrupt": "skip"}
    run(model, reference=str(statistics), out=tmp_path / "b.json")
    for key in ("images_sha256", "prepared", "fit", "count", "sha256"):
        assert provenance(tmp_path / "b.json")["reference"][key] == known["reference"][key]


@pytest.mark.parametrize(("name", "package"), [("inception", "torch-fidelity"), ("dinov2", "timm")])
def test_versions_of_the_packages_that_features_come_from(name: str, package: str) -> None:
    extractor: Any = Constant()
    extractor.name = name
    versions = _describe(extractor)["versions"]
    assert versions[package] == package_version(package)
    assert "torchvision" in versions


def test_statistics_of_an_older_pra(mixed: str, tmp_path: Path) -> None:
    extractor = Constant()
    from_source(open_source(mixed), (6, 8), 3, DataConfig(source=mixed), extractor, progress=False).save(
        tmp_path / "new.npz"
    )
    with np.load(tmp_path / "new.npz") as file:
        arrays = dict(file)
    known = json.loads(str(arrays["pra"]))
    del known["images_sha256"], known["prepared"]
    np.savez(tmp_path / "old.npz", **arrays | {"pra": np.array(json.dumps(known))})
    assert from_file(tmp_path / "old.npz", extractor, progress=False).describe()["images_sha256"] is None


class Constant:
    """Features that cost nothing."""

    name, fingerprint, dim, device = "constant", "0" * 64, 4, torch.device("cpu")
    classes = accuracy = None

    def __call__(self, images: torch.Tensor) -> Features:
        return Features(images.flatten(1)[:, :4].float(), None, None)


# --- neighbours ---------------------------------------------------------------------------------------------


def test_the_references_neighbours_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    whole = metrics.Balls.__init__

    def counted(self: metrics.Balls, features: torch.Tensor, *rest: Any, **options: Any) -> None:
        found.append(len(features))
        whole(self, features, *rest, **options)

    monkeypatch.setattr(metrics.Balls, "__init__", counted)
    random = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (30, 1, 2, 2), generator=random, dtype=torch.uint8)
    made = torch.rand((20, 1, 2, 2), generator=random) * 2 - 1
    extractor = Constant()
    measured = collect([Batch(real, None, 0)], extractor, 30, 30, progress=False)
    reference = summarise(measured[metrics.Protocol.ADM], "real", None)
    judged = collect([Batch(made, None, 0)], extractor, 20, 20, progress=False)
    figures = all_figures(judged, reference)
    assert found == [30, 20, 20]
    assert reference.kept is not None
    for protocol, collector in judged.items():
        expected = metrics.precision_recall(collector.kept, reference.kept)
        assert (figures[protocol.value]["precision"], figures[protocol.value]["recall"]) == expected


# --- what it says, and what it refuses ----------------------------------------------------------------------


def test_few_images_are_said_to_be_few(
    model: Path, mixed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model, reference=mixed)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "images are few" in line]
    assert line.startswith("12 images are few")
    assert "1911.07023" in line
    monkeypatch.setattr(importlib.import_module("pra.evaluation.evaluate"), "FEW", 12)  # a function has the short name
    run(model, reference=mixed)
    assert "are few" not in capsys.readouterr().out


def test_that_figures_are_not_kept_is_said_where_they_are_not(
    model: Path, mixed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model, reference=mixed)
    assert "not kept: --out FILE.json" in capsys.readouterr().out
    run(model, reference=mixed, out=tmp_path / "figures.json")
    assert "not kept" not in capsys.readouterr().out


def test_settings_without_effect(model: Path, mixed: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", np.zeros((5, 6, 8, 3), np.uint8))
    refused(lambda: run(model, reference=mixed, settings=("data.flip=true",)), "--set data.flip=true", "no effect")
    refused(
        lambda: run(tmp_path / "b.npz", num=5, reference=mixed, settings=("sampling.guidance=2",)),
        *("--set sampling.guidance=2", "are finished"),
    )


def test_without_a_target_it_judges_the_model_that_comes_with_pra(
    model: Path, mixed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pra.models.weights.SHIPPED", model)
    refused(lambda: run(None), "the model that comes with pra does not say which data", "--reference")
    run(None, reference=mixed, out=tmp_path / "o.json")
    assert provenance(tmp_path / "o.json")["images"]["model"] == str(model)
    assert "12 images of the model that comes with pra against folder:" in capsys.readouterr().out

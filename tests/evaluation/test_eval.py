"""Figures, references, sources of samples and the report; without torch-fidelity (see test_eval_inception)."""

from __future__ import annotations

import json
import math
import weakref
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from support.models import PIXEL, random_model
from support.refusal import refused
from torch import Tensor

import pra
from pra.commands.eval import evaluate_command
from pra.config import DataConfig, Fit
from pra.data import Source, open_source
from pra.evaluation import classifier, metrics
from pra.evaluation.classifier import Classifier, fit_classifier
from pra.evaluation.collect import Collector, collect
from pra.evaluation.evaluate import Report, evaluate, reconstruct
from pra.evaluation.features import Features
from pra.evaluation.metrics import InceptionScore, Moments, Protocol, frechet_distance
from pra.evaluation.reference import Reference, from_file, from_source, summarise
from pra.evaluation.samples import pictures, prepared, spread
from pra.sampling.batches import Batch, NpzBatch, exported, sampled
from pra.sampling.requests import Numbered
from pra.utils.provenance import file_sha256

CPU = torch.device("cpu")
Array = npt.NDArray[np.float64]


class Projection:
    """Features that cost nothing: fixed random projections of the pixels."""

    name = "projection"
    fingerprint = "0" * 64
    device = CPU
    accuracy: float | None = None

    def __init__(self, shape: tuple[int, int, int] = (1, 4, 4), dim: int = 5, classes: int = 0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.dim = dim
        self.classes = tuple(map(str, range(classes))) or None
        self.weights = [torch.randn(math.prod(shape), n, generator=generator) for n in (dim, 3, classes or 4)]

    def __call__(self, images: Tensor) -> Features:
        # Rounded once: in float32 a product may depend on how many rows it has.
        pixels = images.flatten(1).double() / 255
        pool, spatial, logits = ((pixels @ weights.double()).float() for weights in self.weights)
        return Features(pool.sin(), spatial, logits)


def pixels(count: int, seed: int = 0, shape: tuple[int, int, int] = (1, 4, 4)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), generator=generator).to(torch.uint8)


def stream(images: Tensor, size: int = 7, labels: Tensor | None = None) -> list[Batch]:
    starts = range(0, len(images), size)
    return [Batch(images[s : s + size], None if labels is None else labels[s : s + size], s) for s in starts]


def reference_of(images: Tensor, extractor: Any) -> Reference:
    return summarise(collect(stream(images), extractor, len(images), 1000, progress=False)[Protocol.ADM], "them", "pad")


def judged(images: Tensor, reference: Reference, extractor: Any, size: int = 7, **options: Any) -> Report:
    return evaluate(stream(images, size), reference, extractor, len(images), progress=False, **options)


# --- Fréchet distance ---------------------------------------------------------------------------------------


def covariance(dim: int, rank: int, seed: int) -> Array:
    factor = np.random.default_rng(seed).normal(size=(dim, rank))
    return factor @ factor.T


@pytest.mark.parametrize("rank", [1, 3, 40])
def test_equal_gaussians_have_distance_zero(rank: int) -> None:
    matrix = 1e4 * covariance(40, rank, 0)
    assert frechet_distance(np.ones(40), matrix, np.ones(40), matrix) <= 1e-10 * np.trace(matrix)


def test_closed_form_of_gaussians_that_commute() -> None:
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[0]
    a, b = np.random.default_rng(1).uniform(0, 4, (2, 12))
    mean1, mean2 = np.random.default_rng(2).normal(size=(2, 12))
    expected = ((mean1 - mean2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(mean1, rotation * a @ rotation.T, mean2, rotation * b @ rotation.T)
    assert found == pytest.approx(expected, rel=1e-12)


def test_closed_form_of_gaussians_that_do_not_commute() -> None:
    a, b = covariance(2, 2, 0), covariance(2, 2, 1)
    # In two dimensions tr M^(1/2) = sqrt(tr M + 2 sqrt(det M)).
    cross = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * cross
    assert frechet_distance(np.zeros(2), a, np.zeros(2), b) == pytest.approx(expected, rel=1e-12)


def test_singular_covariances() -> None:
    a, b = np.diag([4.0, 0.0, 9.0]), np.diag([1.0, 25.0, 0.0])
    assert frechet_distance(np.zeros(3), a, np.zeros(3), b) == pytest.approx(1 + 25 + 9, rel=1e-12)
    assert frechet_distance(np.zeros(3), np.zeros((3, 3)), np.ones(3), np.zeros((3, 3))) == 3.0
    # Nearly singular: square roots of eigenvalues of the product would be wrong in the eighth digit.
    tiny = np.diag([1.0, 1e-20])
    assert frechet_distance(np.zeros(2), tiny, np.zeros(2), np.eye(2)) == pytest.approx(1 - 2e-10, rel=1e-12)


# --- what accumulates ---------------------------------------------------------------------------------------


def test_moments_are_numpys_however_the_rows_arrive() -> None:
    rows = np.random.default_rng(0).normal(1e4, 1, (101, 6))  # far from the origin: sums of squares would cancel
    for sizes in ([101], [1] * 101, [50, 51], [3, 0, 98]):
        moments = Moments(6)
        for part in np.split(rows, np.cumsum(sizes)[:-1]):
            moments.update(part)
        assert moments.count == 101
        np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(moments.covariance, np.cov(rows, rowvar=False), rtol=0, atol=1e-10)


def test_figures_do_not_depend_on_batches() -> None:
    extractor = Projection()
    reference = reference_of(pixels(60, seed=1), extractor)
    whole = judged(pixels(53), reference, extractor, size=53).figures
    assert whole["adm"]["sfid"] is not None
    for size in (1, 7, 52):
        for column, figures in judged(pixels(53), reference, extractor, size=size).figures.items():
            assert figures == pytest.approx(whole[column], rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("keep", [1000, 20])
def test_processes_that_share_a_set_agree_with_one(keep: int) -> None:
    extractor = Projection(classes=4)
    images, labels = pixels(53), torch.arange(53) % 4
    alone = Collector(extractor, 53, keep)
    alone.add(images, labels, 0)
    parts = [Collector(extractor, 53, keep) for _ in range(3)]
    for turn, start in enumerate(range(0, 53, 5)):  # in turns, so that merged features are out of order
        parts[turn % 3].add(images[start : start + 5], labels[start : start + 5], start)
    parts.append(Collector(extractor, 53, keep))  # one that saw nothing
    merged = parts.pop()
    for part in parts:
        merged.merge(part)
    merged.check_complete()
    assert len(alone.kept) == min(keep, 53)
    assert torch.allclose(merged.kept, alone.kept)
    assert merged.accuracy == alone.accuracy
    np.testing.assert_allclose(merged.pool.mean, alone.pool.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.pool.scatter, alone.pool.scatter, rtol=1e-6)
    assert merged.spatial is not None
    assert alone.spatial is not None
    np.testing.assert_allclose(merged.spatial.scatter, alone.spatial.scatter, rtol=1e-6)
    for protocol in Protocol:
        assert merged.scores[protocol].result() == pytest.approx(alone.scores[protocol].result(), rel=1e-6)


def test_kept_features_are_spread_over_the_set() -> None:
    collector = Collector(Projection(), 100, 10)
    for batch in stream(pixels(100)):
        collector.add(*batch)
    everything = Projection()(pixels(100)).pool
    assert torch.allclose(collector.kept, everything[9::10])


def test_identical_sets() -> None:
    extractor = Projection()
    report = judged(pixels(60), reference_of(pixels(60), extractor), extractor)
    for figures in report.figures.values():
        assert figures["fid"] == pytest.approx(0, abs=1e-10)
        assert figures["sfid"] == pytest.approx(0, abs=1e-10)
        assert (figures["precision"], figures["recall"]) == (1, 1)
        assert figures["kid"] is not None
        assert figures["kid"] < 0  # unbiased: equal sets count their own pairs on one side only


# --- Inception Score, KID, precision and recall -------------------------------------------------------------


def test_inception_score_of_certain_and_of_blind_classifiers() -> None:
    certain = InceptionScore(400, Protocol.ADM)
    certain.update(1000.0 * torch.eye(4).repeat(100, 1), 0)
    assert certain.result() == pytest.approx((4, 0))
    blind = InceptionScore(400, Protocol.TORCH_FIDELITY)
    blind.update(torch.zeros(400, 4), 0)
    assert blind.result() == pytest.approx((1, 0))
    assert InceptionScore(9, Protocol.TORCH_FIDELITY).result() is None


def test_inception_score_by_its_definition_with_the_parts_of_both_protocols() -> None:
    logits = torch.randn(10_050, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits.softmax(dim=1).numpy()
    order = np.random.RandomState(2020).permutation(len(p))
    parts = {
        Protocol.ADM: [p[:5000], p[5000:10_000], p[10_000:]],
        Protocol.TORCH_FIDELITY: [p[order][i * 1005 : (i + 1) * 1005] for i in range(10)],
    }
    for protocol, chunks in parts.items():
        divergence = [(c * (np.log(c) - np.log(c.mean(axis=0)))).sum(axis=1).mean() for c in chunks]
        score = InceptionScore(len(p), protocol)
        for start in range(0, len(p), 1000):
            score.update(logits[start : start + 1000], start)
        assert score.result() == pytest.approx((np.exp(divergence).mean(), np.exp(divergence).std()), rel=1e-9)


def test_kid_is_unbiased() -> None:
    random = np.random.default_rng(0)
    same = [metrics.kernel_distance(*random.normal(size=(2, 50, 4)), subsets=1)[0] for _ in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / math.sqrt(300)
    apart, _ = metrics.kernel_distance(random.normal(size=(90, 4)), random.normal(1, 1, size=(70, 4)))
    assert apart > 10 * np.std(same)


def test_precision_and_recall_by_hand() -> None:
    line = torch.arange(10.0).unsqueeze(1)  # each point's third neighbour lies 2 away, or 3 at the ends and 2nd places
    assert metrics.precision_recall(line, line) == (1.0, 1.0)
    far = torch.cat([line[:5], line[:5] + 1000])
    precision, recall = metrics.precision_recall(far, line)
    assert precision == 0.5
    assert recall == pytest.approx(0.8)  # points 0 to 4 reach 3, 2, 2, 2... with k = 3: up to 4 + 3
    assert metrics.precision_recall(line + 1e6, line) == (0.0, 0.0)


def test_copies_are_not_authentic() -> None:
    real = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)) + 5
    real[1] = real[0]  # equal images occur: a copy of them is one all the same
    truth = metrics.Balls(real, 3)

    def authenticity(samples: torch.Tensor) -> float:
        return metrics.overlap(metrics.Balls(samples, 3, truth.centre), truth).authenticity

    assert authenticity(real) == 0
    assert authenticity(real + 1e-4) == pytest.approx(2 / 60)  # of the equal two it is not
    assert authenticity(torch.cat([real[:30], real[30:] + 100])) == 0.5
    new = torch.randn(60, 3, generator=torch.Generator().manual_seed(1)) + 5
    distance = torch.cdist(new.double(), real.double())
    apart = torch.cdist(real.double(), real.double()).sort(dim=1).values[:, 1]
    expected = float((distance.amin(dim=1) > apart[distance.argmin(dim=1)]).double().mean())
    assert 0.2 < expected < 0.9
    assert authenticity(new) == pytest.approx(expected)


def test_precision_and_recall_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    distance = torch.cdist(a.double(), b.double())
    radii_a, radii_b = (torch.cdist(x.double(), x.double()).sort(dim=1).values[:, 3] for x in (a, b))
    expected = (
        float((distance <= radii_b).any(dim=1).double().mean()),
        float((radii_a >= distance.T).any(dim=1).double().mean()),
    )
    split = torch.split
    monkeypatch.setattr(torch, "split", lambda tensor, size: split(tensor, 7))
    assert metrics.precision_recall(a, b) == expected


# --- PSNR and SSIM ------------------------------------------------------------------------------------------


def test_psnr() -> None:
    black = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    other = black.clone()
    other[0] = 255
    assert metrics.psnr(black, other).tolist() == [0.0, math.inf]
    other[1] += 1
    assert metrics.psnr(black, other)[1].item() == pytest.approx(48.1308, abs=1e-4)


def test_ssim_by_its_definition() -> None:
    x, y = pixels(1, 0, (2, 12, 13)), pixels(1, 1, (2, 12, 13))
    y = (x // 2 + y // 3).to(torch.uint8)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for channel in range(2):
        for row in range(2):
            for column in range(3):
                a, b = (t[0, channel, row : row + 11, column : column + 11].double().numpy() for t in (x, y))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                variance = (window * (a - mean_a) ** 2).sum() + (window * (b - mean_b) ** 2).sum()
                together = (window * (a - mean_a) * (b - mean_b)).sum()
                light = (2 * mean_a * mean_b + 6.5025) / (mean_a**2 + mean_b**2 + 6.5025)
                values.append(light * (2 * together + 58.5225) / (variance + 58.5225))
    assert metrics.ssim(x, y).item() == pytest.approx(np.mean(values), rel=1e-9)
    assert metrics.ssim(x, x).item() == 1.0


def test_ssim_is_scikit_images() -> None:
    """``structural_similarity(..., gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)``."""
    rows, columns = np.mgrid[:24, :20]
    a = ((rows * 11 + columns * 7) % 256).astype(np.uint8)
    b = np.clip(a.astype(int) + ((rows * columns) % 23) - 11, 0, 255).astype(np.uint8)
    found = metrics.ssim(*(torch.from_numpy(array)[None, None] for array in (a, b)))
    assert found.item() == pytest.approx(SCIKIT_IMAGE, rel=1e-6)


SCIKIT_IMAGE = 0.9692425003754687


# --- protocols ----------------------------------------------------------------------------------------------


def test_adm_cuts_fractions_off_where_torch_fidelitys_users_round() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 0.003, 1.0, 2.0])
    assert Protocol.ADM.quantise(values).tolist() == [0, 0, 127, 127, 255, 255]
    assert Protocol.TORCH_FIDELITY.quantise(values).tolist() == [0, 0, 128, 128, 255, 255]
    ready = torch.tensor([3, 7], dtype=torch.uint8)
    assert Protocol.ADM.quantise(ready) is ready


def test_images_are_let_go_as_they_are_judged() -> None:
    extractor = Projection()
    reference, alive = reference_of(pixels(60), extractor), []

    def made() -> Iterator[Batch]:
        for start in range(0, 200, 10):
            batch = Batch(pixels(10, seed=start), None, start)
            alive.append(weakref.ref(batch.images))
            assert sum(images() is not None for images in alive) <= 2
            yield batch

    evaluate(made(), reference, extractor, 200, keep=20, progress=False)
    assert len(alive) == 20


def test_protocols_judge_generated_images_apart_and_finished_ones_once() -> None:
    extractor = Projection()
    reference = reference_of(pixels(40, seed=1), extractor)
    images = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    report = evaluate(stream(images), reference, extractor, 40, progress=False)
    for protocol in Protocol:
        finished = judged(protocol.quantise(images), reference, extractor).figures[protocol.value]
        assert report.figures[protocol.value] == pytest.approx(finished)
    assert report.figures["adm"]["fid"] != report.figures["torch-fidelity"]["fid"]
    collectors = collect(stream(pixels(9)), extractor, 9, 9, progress=False)
    assert collectors[Protocol.ADM] is collectors[Protocol.TORCH_FIDELITY]


# --- counts, shapes, labels ---------------------------------------------------------------------------------


def test_sets_that_cannot_be_judged() -> None:
    extractor = Projection(classes=4)
    reference = reference_of(pixels(20), extractor)
    refused(lambda: judged(pixels(1), reference, extractor), "1 image(s)", "at least 2")
    few = stream(pixels(20))
    refused(lambda: evaluate(few, reference, extractor, 21, progress=False), "20 images came of the 21")
    refused(lambda: evaluate(few, reference, extractor, 19, progress=False), "more images than the 19")
    large = [*few, Batch(pixels(3, shape=(1, 2, 8)), None, 20)]
    refused(lambda: collect(large, extractor, 23, 9, progress=False), "1x2x8", "1x4x4", "one size")
    wrong = stream(pixels(20, shape=(1, 2, 8)))
    refused(
        lambda: evaluate(wrong, reference, extractor, 20, progress=False),
        *("1x2x8", "1x4x4", "reference them", "one size"),
    )
    labelled = stream(pixels(20), labels=torch.arange(20) % 5)
    refused(
        lambda: evaluate(labelled, reference, extractor, 20, progress=False), "label 4 is out of range", "4 classes"
    )


def test_a_reference_of_other_features() -> None:
    reference = reference_of(pixels(20), Projection())
    other = Projection()
    other.name = "inception"
    refused(lambda: judged(pixels(20), reference, other), "them", "'projection'", "--features projection")
    other = Projection()
    other.fingerprint = "1" * 64
    refused(lambda: judged(pixels(20), reference, other), "000000000000", "111111111111", "--weights")
    refused(lambda: judged(pixels(20), reference, Projection(dim=4)), "5 features", "makes 4")


def test_few_images_leave_figures_out() -> None:
    extractor = Projection()
    report = judged(pixels(3), reference_of(pixels(20), extractor), extractor)
    figures = report.figures["torch-fidelity"]
    assert figures["inception_score"] is None
    assert "precision" not in figures
    assert figures["kid"] is not None
    assert json.loads(report.to_json())["figures"]["torch-fidelity"]["inception_score"] is None


# --- the report ---------------------------------------------------------------------------------------------


def test_report(tmp_path: Path) -> None:
    extractor = Projection(classes=4)
    reference = reference_of(pixels(30), extractor)
    labels = extractor(pixels(20)).logits
    assert labels is not None
    report = evaluate(
        stream(pixels(20), labels=labels.argmax(dim=1)), reference, extractor, 20,
        provenance={"images": {"seeds": "0-19"}}, progress=False,
    )  # fmt: skip
    assert report.figures["adm"]["accuracy"] == 1.0
    report.save(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["figures"]["adm"]["fid"] == report.figures["adm"]["fid"]
    known = written["provenance"]
    assert known["features"]["sha256"] == "0" * 64
    assert known["reference"]["sha256"] == reference.sha256
    assert (known["reference"]["count"], known["reference"]["shape"]) == (30, [1, 4, 4])
    assert (known["count"], known["images"]["seeds"]) == (20, "0-19")
    lines = report.table().splitlines()
    assert lines[0].split() == ["adm", "torch-fidelity"]
    assert ["accuracy", "1", "1"] in [line.split() for line in lines]


def test_infinite_figures_are_null_in_json() -> None:
    report = Report({"reconstruction": {"psnr": math.inf}}, {})
    assert json.loads(report.to_json())["figures"] == {"reconstruction": {"psnr": None}}
    assert report.table().splitlines()[1].split() == ["psnr", "inf"]


# --- statistics on disk -------------------------------------------------------------------------------------


def test_statistics_of_our_own(tmp_path: Path) -> None:
    extractor = Projection()
    reference = reference_of(pixels(30), extractor)
    reference.save(tmp_path / "s.npz")
    read = from_file(tmp_path / "s.npz", extractor, progress=False)
    assert (read.features, read.fingerprint, read.shape, read.fit, read.count) == (
        "projection", "0" * 64, (1, 4, 4), "pad", 30
    )  # fmt: skip
    assert read.sha256 == reference.sha256
    assert read.file_sha256 == file_sha256(tmp_path / "s.npz")
    assert judged(pixels(20), read, extractor).figures == judged(pixels(20), reference, extractor).figures
    with np.load(tmp_path / "s.npz") as file:  # the keys that ADM's evaluator reads
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file.files)


def test_statistics_that_are_not_written_to_the_end(tmp_path: Path, full_disk: Any) -> None:
    reference = reference_of(pixels(30), Projection())
    with full_disk(500):
        refused(lambda: reference.save(tmp_path / "s.npz"), f"{tmp_path}/s.npz", "nothing was left")
    assert not any(tmp_path.iterdir())


def inception_like() -> Projection:
    extractor = Projection()
    extractor.name = "inception"
    return extractor


def test_statistics_of_others(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    own = reference_of(pixels(30), Projection())
    assert own.spatial is not None
    adm = {
        "mu": own.pool.mean,
        "sigma": own.pool.covariance,
        "mu_s": own.spatial.mean,
        "sigma_s": own.spatial.covariance,
    }
    np.savez(path, **{key: array.astype(np.float32) for key, array in adm.items()})
    read = from_file(path, inception_like(), progress=False)
    assert (read.features, read.fingerprint, read.kept) == ("inception", None, None)
    figures = judged(pixels(20, seed=1), read, inception_like()).figures["adm"]
    expected = judged(pixels(20, seed=1), own, Projection()).figures["adm"]
    assert figures["fid"] == pytest.approx(expected["fid"], rel=1e-5)
    assert figures["sfid"] == pytest.approx(expected["sfid"], rel=1e-5)
    assert "kid" not in figures
    refused(lambda: from_file(path, Projection(), progress=False), str(path), "--features inception")
    np.savez(path, mu=own.pool.mean, sigma=own.pool.covariance)  # torch-fidelity's and JiT's keys
    assert judged(pixels(20), from_file(path, inception_like()), inception_like()).figures["adm"]["sfid"] is None


def test_a_batch_as_reference_with_statistics_or_without(tmp_path: Path) -> None:
    path = tmp_path / "b.npz"
    images = pixels(30).permute(0, 2, 3, 1).numpy()
    np.savez(path, arr_0=images)
    own = reference_of(pixels(30), Projection())
    read = from_file(path, Projection(), progress=False)
    found, expected = (judged(pixels(20), reference, Projection()).figures["adm"] for reference in (read, own))
    assert found == pytest.approx(expected, rel=1e-6)
    # ADM's files: statistics of the whole data set beside a tenth of its images.
    np.savez(path, arr_0=images[:8], mu=own.pool.mean, sigma=own.pool.covariance)
    read = from_file(path, inception_like(), progress=False)
    assert read.sha256 != own.sha256  # no spatial statistics
    assert np.array_equal(read.pool.mean, own.pool.mean)
    assert read.kept is not None
    assert len(read.kept) == 8
    assert read.shape == (1, 4, 4)


def test_statistics_that_cannot_be_read(tmp_path: Path) -> None:
    path, extractor = tmp_path / "s.npz", inception_like()
    refused(lambda: from_file(path, extractor), str(path), "cannot be read")
    path.write_bytes(b"PK\x03\x04 torn")
    refused(lambda: from_file(path, extractor), str(path), "cannot be read")
    path.write_text("mu")
    refused(lambda: from_file(path, extractor), str(path), "cannot be read")
    np.savez(path, mu=np.array([object()]), sigma=np.eye(1))
    refused(lambda: from_file(path, extractor), str(path), "cannot be read")
    np.savez(path, mean=np.zeros(5), cov=np.eye(5))
    refused(lambda: from_file(path, extractor), str(path), "mean, cov", "mu, sigma", "arr_0")
    np.savez(path, mu=np.zeros(5), sigma=np.eye(4))
    refused(lambda: from_file(path, extractor), str(path), "(5,)", "(4, 4)")
    np.savez(path, mu=np.full(5, np.nan), sigma=np.eye(5))
    refused(lambda: from_file(path, extractor), str(path), "not finite")
    np.savez(path, mu=np.zeros(7), sigma=np.eye(7))
    refused(lambda: judged(pixels(9), from_file(path, extractor), extractor), "7 features", "makes 5")
    np.savez(path, mu=np.zeros(5), sigma=np.eye(5), pra="{")
    refused(lambda: from_file(path, extractor), str(path), "damaged")
    np.savez(path, mu=np.zeros(5), sigma=np.eye(5), pra='{"format": 2}')
    refused(lambda: from_file(path, extractor), str(path), "format 2", "newer pra")


# --- sources of images --------------------------------------------------------------------------------------


def test_spread() -> None:
    assert spread(10, 10) == list(range(10))
    assert spread(10, 3) == [0, 3, 6]


def test_images_of_a_model_are_balanced_and_their_own() -> None:
    model = random_model(PIXEL)
    requests = Numbered(7, tuple(range(5)))
    whole = list(sampled(pra.Sampler(model), requests, range(7), 7))
    assert whole[0].labels is not None
    assert whole[0].labels.tolist() == [0, 1, 2, 3, 4, 0, 1]
    expected = pra.Sampler(model).sample([3, 4], [3, 4])
    [part] = sampled(pra.Sampler(model), requests, range(3, 5), 100)
    assert part.start == 3
    assert torch.allclose(part.images, expected, atol=1e-5)
    assert torch.allclose(whole[0].images[3:5], expected, atol=1e-5)


def folder(path: Path, sizes: list[tuple[int, int]], mode: str = "L") -> Source:
    path.mkdir()
    for index, size in enumerate(sizes):
        Image.new(mode, size, index).save(path / f"{index}.png")
    return open_source(f"folder:{path}")


def test_pictures(tmp_path: Path) -> None:
    batches = list(pictures(folder(tmp_path / "grey", [(6, 4)] * 3), [0, 2], 1))
    assert [batch.start for batch in batches] == [0, 1]
    assert batches[1].images.shape == (1, 1, 4, 6)
    assert (batches[1].images == 2).all()
    [colour] = pictures(folder(tmp_path / "colour", [(6, 4)] * 2, "RGB"), [0, 1], 5)
    assert colour.images.shape == (2, 3, 4, 6)
    mixed = folder(tmp_path / "mixed", [(6, 4), (6, 4), (4, 6)])
    refused(lambda: list(pictures(mixed, range(3), 2)), "2.png", "6x4", "4x6", "one size")


@pytest.mark.parametrize("labelled", [True, False])
def test_a_batch_goes_through_a_file(tmp_path: Path, labelled: bool) -> None:
    path, images = tmp_path / "b.npz", torch.rand(20, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.arange(20) % 3 if labelled else None
    passed = [batch.images for batch in exported(stream(images, labels=labels), 20, path)]
    assert torch.equal(torch.cat(passed), images)
    assert list(tmp_path.iterdir()) == [path]
    with np.load(path) as file:
        assert set(file.files) == ({"arr_0", "arr_1"} if labelled else {"arr_0"})
        assert (file["arr_0"] == Protocol.ADM.quantise(images).permute(0, 2, 3, 1).numpy()).all()
    batch = NpzBatch(path)
    assert (batch.count, batch.size, batch.channels) == (20, (4, 5), 3)
    read = list(batch.batches(6))
    assert [b.start for b in read] == [0, 6, 12, 18]
    assert torch.equal(torch.cat([b.images for b in read]), Protocol.ADM.quantise(images))
    [part] = batch.batches(50, range(4, 9))
    assert torch.equal(part.images, Protocol.ADM.quantise(images[4:9]))
    assert (part.labels is None) if labels is None else torch.equal(part.labels, labels[4:9])  # type: ignore[arg-type]


def test_an_export_that_is_broken_off_leaves_nothing(tmp_path: Path, full_disk: Any) -> None:
    batches = exported(stream(pixels(20)), 20, tmp_path / "b.npz")
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not any(tmp_path.iterdir())
    with full_disk(200):
        refused(lambda: list(exported(stream(pixels(200)), 200, tmp_path / "b.npz")), "b.npz", "nothing was left")
    assert not any(tmp_path.iterdir())


def test_batches_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "b.npz"
    refused(lambda: NpzBatch(path), str(path), "cannot be read")
    path.write_bytes(b"nonsense")
    refused(lambda: NpzBatch(path), str(path), "cannot be read")
    np.savez(path, mu=np.zeros(3))
    refused(lambda: NpzBatch(path), str(path), "arr_0", "has mu")
    images = np.zeros((5, 6, 6, 3), np.uint8)
    np.savez(path, images.astype(np.float32))
    refused(lambda: NpzBatch(path), str(path), "float32 (5, 6, 6, 3)", "uint8 (N, height, width, channels)")
    np.savez(path, images.transpose(0, 3, 1, 2))
    refused(lambda: NpzBatch(path), str(path), "(5, 3, 6, 6)")
    np.savez(path, images, np.zeros(4, np.int64))
    refused(lambda: NpzBatch(path), str(path), "arr_1", "(4,)")
    np.savez(path, images, np.zeros(5))
    refused(lambda: NpzBatch(path), str(path), "arr_1", "float64")
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": images.shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(images[:3].tobytes() + b"!")
    refused(lambda: list(NpzBatch(path).batches(2)), str(path), "damaged", "3 of 5 images")


# --- the classifier -----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and fits that end soon."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "RECIPE", classifier.Recipe(epochs=4))
    return tmp_path / "cache" / "pra" / "classifiers"


def digits_classifier(**changes: Any) -> Classifier:
    return fit_classifier(open_source("digits"), (8, 8), 1, DataConfig(source="digits", **changes), CPU, progress=False)


def test_classifier(cache: Path) -> None:
    state = torch.get_rng_state()
    first = digits_classifier()
    assert torch.equal(torch.get_rng_state(), state)
    assert first.accuracy is not None
    assert first.accuracy > 0.85
    assert first.classes == tuple("0123456789")
    [path] = cache.iterdir()
    content = path.read_bytes()
    assert first.fingerprint == file_sha256(path)
    again = digits_classifier()  # out of the cache
    assert path.stat().st_size == len(content)
    images = pixels(5, shape=(1, 8, 8))
    assert torch.equal(first(images).pool, again(images).pool)
    alone = torch.cat([first(image.unsqueeze(0)).pool for image in images])
    assert torch.allclose(alone, first(images).pool, atol=1e-5)
    assert first(images).pool.shape == (5, first.dim)
    assert first(images).spatial is None
    path.unlink()
    assert digits_classifier().fingerprint == first.fingerprint  # the same fit, to the bit
    assert path.read_bytes() == content
    found = classifier.find_classifier(first.fingerprint, CPU)
    assert found.fingerprint == first.fingerprint
    refused(lambda: classifier.find_classifier("f" * 64, CPU), "ffffffffffff", str(cache), "--weights FILE")


def test_another_set_or_recipe_is_another_classifier(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits_classifier()
    source = open_source("digits")
    fit_classifier(source, (12, 12), 1, DataConfig(source="", fit=Fit.PAD), CPU, progress=False)
    source.labels[:] = source.labels[::-1].copy()
    fit_classifier(source, (8, 8), 1, DataConfig(source=""), CPU, progress=False)
    monkeypatch.setattr(classifier, "RECIPE", classifier.Recipe(epochs=4, seed=1))
    digits_classifier()
    assert len(list(cache.iterdir())) == 4


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(classifier, "_fit", None)  # nothing is fitted that could not be kept
    refused(digits_classifier, f"{tmp_path}/file/pra/classifiers", "Not a directory", "set XDG_CACHE_HOME")


def test_classifier_bad_input(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = digits_classifier()
    refused(lambda: fitted(pixels(2, shape=(3, 8, 8))), "3x8x8", "1x8x8", "fitted on")
    one = folder(tmp_path / "one", [(6, 4)] * 3)
    refused(lambda: fit_classifier(one, (4, 6), 1, DataConfig(source=""), CPU), one.name, "one class", "inception")
    few = open_source("digits")
    monkeypatch.setattr(type(few), "__len__", lambda self: 19)
    refused(lambda: fit_classifier(few, (8, 8), 1, DataConfig(source=""), CPU), "19 images", "at least 20")
    monkeypatch.undo()
    monkeypatch.setattr(classifier, "LARGEST", 1000)
    refused(lambda: fit_classifier(open_source("digits"), (8, 8), 1, DataConfig(source=""), CPU), "too much")
    bad = tmp_path / "bad.safetensors"
    refused(lambda: Classifier(bad, CPU), str(bad), "No such file")
    bad.write_bytes(b"nonsense")
    refused(lambda: Classifier(bad, CPU), str(bad), "no classifier of pra")
    pra.models.weights.write_tensors({"a": torch.zeros(2)}, bad)
    refused(lambda: Classifier(bad, CPU), str(bad), "no classifier of pra")


def test_the_real_recipe_reads_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fitted = digits_classifier()
    assert fitted.accuracy is not None
    assert fitted.accuracy >= 0.97
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


# --- reconstruction -----------------------------------------------------------------------------------------


def test_reconstruction() -> None:
    model = random_model(image_size=(12, 12))
    images, labels = pixels(6, shape=(3, 12, 12)), torch.arange(6) % 5
    extractor = Projection((3, 12, 12))
    figures = reconstruct(model, stream(images, 4, labels), extractor, 6, progress=False)
    copies = pra.to_uint8(model.reconstruct(images.float() / 127.5 - 1, labels))
    assert figures["psnr"] == pytest.approx(float(metrics.psnr(images, copies).mean()))
    assert figures["ssim"] == pytest.approx(float(metrics.ssim(images, copies).mean()))
    expected = judged(copies, reference_of(images, extractor), extractor).figures["adm"]["fid"]
    assert figures["reconstruction_fid"] == pytest.approx(expected, rel=1e-6)
    small = stream(pixels(6, shape=(3, 6, 8)), 4, labels)
    assert reconstruct(random_model(), small, Projection((3, 6, 8)), 6, progress=False)["ssim"] is None
    refused(lambda: reconstruct(random_model(PIXEL), small, extractor, 6), "without a codec", "--reconstruction")


# --- the command --------------------------------------------------------------------------------------------


def command(target: Path, **options: Any) -> None:
    evaluate_command(target, **({"features": "classifier", "device": "cpu"} | options))


def test_command_on_a_run(trained: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(
        trained, num=40, reconstruction=True, out=tmp_path / "a.json", export_npz=tmp_path / "b.npz",
        export_statistics=tmp_path / "s.npz", settings=("sampling.guidance=2", "sampling.steps=1"),
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
    assert known["reconstruction"] == {"source": "digits", "count": 40}
    assert "torch-fidelity" in capsys.readouterr().out
    # The batch against the statistics: the same figures, under the protocol that rounded it.
    command(tmp_path / "b.npz", reference=str(tmp_path / "s.npz"), out=tmp_path / "c.json")
    figures = json.loads((tmp_path / "c.json").read_text())["figures"]["adm"]
    expected = report["figures"]["adm"]
    assert figures.pop("sfid") is expected.pop("sfid") is None
    assert figures == pytest.approx(expected, rel=1e-6)
    refused(lambda: command(trained, out=tmp_path / "a.json"), "a.json exists already")
    # Another arithmetic, other images.
    rounded = {"num": 40, "settings": ("sampling.guidance=2", "sampling.steps=1"), "precision": "bfloat16"}
    command(trained, **rounded, out=tmp_path / "d.json")
    report = json.loads((tmp_path / "d.json").read_text())
    assert report["provenance"]["images"]["sampling"]["precision"] == "bfloat16"
    assert report["figures"]["adm"]["fid"] != expected["fid"]


def test_command_on_a_folder(cache: Path, tmp_path: Path) -> None:
    source = open_source("digits@test")
    (tmp_path / "samples").mkdir()
    for index in range(30):
        source.image(index).save(tmp_path / "samples" / f"{index:03d}.png")
    command(tmp_path / "samples", reference="digits", out=tmp_path / "a.json", num=20)
    report = json.loads((tmp_path / "a.json").read_text())
    assert (report["provenance"]["count"], report["provenance"]["images"]["of"]) == (20, 30)
    [path] = cache.iterdir()
    command(tmp_path / "samples", reference="digits", weights=path, out=tmp_path / "b.json", num=20)
    assert json.loads((tmp_path / "b.json").read_text())["figures"] == report["figures"]


def test_command_bad_input(trained: Path, cache: Path, tmp_path: Path) -> None:
    batch = tmp_path / "b.npz"
    np.savez(batch, np.zeros((5, 8, 8, 1), np.uint8))
    refused(lambda: command(tmp_path / "none"), f"no run, folder of pictures or .npz at {tmp_path}/none")
    refused(lambda: command(batch), str(batch), "--reference")
    refused(lambda: command(batch, reference="digits", num=6), str(batch), "holds 5 images", "--num 6")
    refused(lambda: command(batch, reference="digits", num=1), "--num 1", "at least 2")
    refused(lambda: command(batch, reference="digits", features="inceptoin"), "did you mean 'inception'?")
    refused(lambda: command(batch, reference="digits", batch_size=0), "--batch-size 0")
    refused(lambda: command(batch, reference="digits", reconstruction=True), "--reconstruction", "finished images")
    refused(lambda: command(batch, reference="digits", precision="float16"), "--precision: 'float16'", "'bfloat16'")
    refused(lambda: command(batch, reference="digits", precision="float32"), "--precision float32", "are finished")
    refused(lambda: command(batch, reference="digits", settings=("data.fit",)), "'data.fit'", "KEY=VALUE")
    refused(lambda: command(batch, reference="digits", settings=("data.fitt=pad",)), "'fitt' is unknown", "'fit'")
    refused(lambda: command(batch, reference=str(batch)), "not of a classifier")
    refused(lambda: command(batch, reference="digits", out=tmp_path / "x" / "a.json"), "cannot be written")
    np.savez(batch, np.zeros((5, 9, 9, 1), np.uint8))
    refused(lambda: command(batch, reference="digits"), "8x8", "smaller than the crop of 9x9")
    pixel = random_model(PIXEL)
    pra.save(pixel, tmp_path / "pixel")
    refused(lambda: command(tmp_path / "pixel", reference="digits", reconstruction=True), "without a codec")
    refused(lambda: command(tmp_path / "pixel"), "--reference")
    assert not cache.exists()

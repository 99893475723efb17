"""Figures by their definitions, on features and pixels; test_inception has torch-fidelity's own."""

import functools
import math
import operator

import numpy as np
import pytest
import torch

from pra.evaluation import metrics
from pra.evaluation.metrics import Balls, Moments, Protocol, frechet_distance, inception_score, overlap, score_sums


def precision_recall(samples, reference):
    truth = Balls(reference)
    found = overlap(Balls(samples, centre=truth.centre), truth)
    return found["precision"], found["recall"]


def covariance(dim, rank, seed):
    factor = np.random.default_rng(seed).normal(size=(dim, rank))
    return factor @ factor.T


def test_distance_of_gaussians_is_the_closed_form():
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[0]
    a, b = np.random.default_rng(1).uniform(0, 4, (2, 12))
    mean1, mean2 = np.random.default_rng(2).normal(size=(2, 12))
    expected = ((mean1 - mean2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(mean1, rotation * a @ rotation.T, mean2, rotation * b @ rotation.T)
    assert found == pytest.approx(expected, rel=1e-12)
    # They do not commute: in two dimensions tr M^(1/2) = sqrt(tr M + 2 sqrt(det M)).
    a, b = covariance(2, 2, 0), covariance(2, 2, 1)
    expected = np.trace(a) + np.trace(b) - 2 * math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    assert frechet_distance(np.zeros(2), a, np.zeros(2), b) == pytest.approx(expected, rel=1e-12)


def test_distance_of_singular_covariances():
    for rank in (1, 3, 40):
        matrix = 1e4 * covariance(40, rank, 0)
        assert frechet_distance(np.ones(40), matrix, np.ones(40), matrix) <= 1e-10 * np.trace(matrix)
    a, b = np.diag([4.0, 0.0, 9.0]), np.diag([1.0, 25.0, 0.0])
    assert frechet_distance(np.zeros(3), a, np.zeros(3), b) == pytest.approx(1 + 25 + 9, rel=1e-12)
    assert frechet_distance(np.zeros(3), np.zeros((3, 3)), np.ones(3), np.zeros((3, 3))) == 3.0
    # Nearly singular: square roots of eigenvalues of the product would be wrong in the eighth digit.
    tiny = np.diag([1.0, 1e-20])
    assert frechet_distance(np.zeros(2), tiny, np.zeros(2), np.eye(2)) == pytest.approx(1 - 2e-10, rel=1e-12)


def test_moments_are_numpys_however_the_rows_arrive():
    rows = np.random.default_rng(0).normal(1e4, 1, (101, 6))  # far from the origin: sums of squares would cancel
    for sizes in ([101], [1] * 101, [50, 51], [3, 98]):
        moments = functools.reduce(operator.add, map(Moments.of, np.split(rows, np.cumsum(sizes)[:-1])))
        assert moments.rows == 101
        mean, covariance = moments.gaussian
        np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False), rtol=0, atol=1e-10)


def test_inception_score_of_certain_and_of_blind_classifiers():
    certain = score_sums(1000.0 * torch.eye(4).repeat(100, 1), Protocol.ADM.split_of(400), 1)
    assert inception_score(certain) == pytest.approx((4, 0))
    blind = score_sums(torch.zeros(400, 4), Protocol.TORCH_FIDELITY.split_of(400), 10)
    assert inception_score(blind) == pytest.approx((1, 0))
    assert inception_score(score_sums(torch.zeros(9, 4), Protocol.TORCH_FIDELITY.split_of(9), 10)) is None


def test_inception_score_is_its_definition_in_both_protocols():
    logits = torch.randn(10_050, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits.softmax(dim=1).numpy()
    order = np.random.RandomState(2020).permutation(len(p))
    parts = {
        Protocol.ADM: [p[:5000], p[5000:10_000], p[10_000:]],
        Protocol.TORCH_FIDELITY: [p[order][i * 1005 : (i + 1) * 1005] for i in range(10)],
    }
    for protocol, chunks in parts.items():
        divergence = [(c * (np.log(c) - np.log(c.mean(axis=0)))).sum(axis=1).mean() for c in chunks]
        split = torch.from_numpy(protocol.split_of(len(p)))
        blocks = zip(logits.split(1000), split.split(1000), strict=True)
        sums = sum(score_sums(block, own.numpy(), len(chunks)) for block, own in blocks)
        assert inception_score(sums) == pytest.approx((np.exp(divergence).mean(), np.exp(divergence).std()), rel=1e-9)


def test_kid_is_unbiased():
    random = np.random.default_rng(0)
    same = [metrics.kernel_distance(*random.normal(size=(2, 50, 4)), subsets=1)[0] for _ in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / math.sqrt(300)
    apart, _ = metrics.kernel_distance(random.normal(size=(90, 4)), random.normal(1, 1, size=(70, 4)))
    assert apart > 10 * np.std(same)


def test_precision_and_recall_are_counted_by_balls(monkeypatch):
    line = torch.arange(10.0).unsqueeze(1)  # each point's third neighbour lies 2 away, or 3 at the ends and 2nd places
    assert precision_recall(line, line) == (1.0, 1.0)
    far = torch.cat([line[:5], line[:5] + 1000])
    assert precision_recall(far, line) == (0.5, pytest.approx(0.8))  # points 0 to 4 reach 3, 2, 2, 2...: up to 4 + 3
    assert precision_recall(line + 1e6, line) == (0.0, 0.0)
    a, b = (torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    distance = torch.cdist(a.double(), b.double())
    radii_a, radii_b = (torch.cdist(x.double(), x.double()).sort(dim=1).values[:, 3] for x in (a, b))
    inside = distance <= radii_b, radii_a >= distance.T
    expected = tuple(float(within.any(dim=1).double().mean()) for within in inside)
    split = torch.split
    monkeypatch.setattr(torch, "split", lambda tensor, size: split(tensor, 7))  # in blocks of rows
    assert precision_recall(a, b) == expected


def test_copies_are_not_authentic():
    real = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)) + 5
    real[1] = real[0]  # equal images occur: a copy of them is one all the same
    truth = Balls(real, 3)

    def authenticity(samples):
        return overlap(Balls(samples, 3, truth.centre), truth)["authenticity"]

    assert authenticity(real) == 0
    assert authenticity(real + 1e-4) == pytest.approx(2 / 60)  # of the equal two it is not
    assert authenticity(torch.cat([real[:30], real[30:] + 100])) == 0.5
    new = torch.randn(60, 3, generator=torch.Generator().manual_seed(1)) + 5
    distance = torch.cdist(new.double(), real.double())
    apart = torch.cdist(real.double(), real.double()).sort(dim=1).values[:, 1]
    expected = float((distance.amin(dim=1) > apart[distance.argmin(dim=1)]).double().mean())
    assert 0.2 < expected < 0.9
    assert authenticity(new) == pytest.approx(expected)


def test_psnr():
    black = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    other = black.clone()
    other[0] = 255
    assert metrics.psnr(black, other).tolist() == [0.0, math.inf]
    other[1] += 1
    assert metrics.psnr(black, other)[1].item() == pytest.approx(48.1308, abs=1e-4)


def test_ssim_is_scikit_images_averaged_over_channels():
    """``structural_similarity(..., gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)``."""
    rows, columns = np.mgrid[:24, :20]
    a = ((rows * 11 + columns * 7) % 256).astype(np.uint8)
    b = np.clip(a.astype(int) + ((rows * columns) % 23) - 11, 0, 255).astype(np.uint8)
    images, others = (torch.from_numpy(np.array(pairs)) for pairs in ([[a, a], [a, a]], [[a, b], [b, b]]))
    value = 0.9692425003754687
    assert metrics.ssim(images, others).tolist() == pytest.approx([(1 + value) / 2, value], rel=1e-6)


def test_seam_ratio_is_the_step_across_borders_over_that_inside():
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    image = 5 * rows + 20 * (rows // 2) + 2 * columns + 30 * (columns // 2)  # a slope, with jumps every 2 pixels
    images = torch.stack([image, 200 - image]).to(torch.uint8).view(2, 1, 4, 6)
    steps = metrics.neighbour_steps(images)
    assert steps.tolist() == [60, 300, 60, 16, 256, 16, 256, 16]
    border, inside = (12 * 25 + 16 * 32) / 28, (24 * 5 + 24 * 2) / 48
    assert metrics.seam_ratio(steps, (4, 6), 2) == pytest.approx(border / inside)
    assert metrics.seam_ratio(metrics.neighbour_steps(images.repeat(3, 2, 1, 1)), (4, 6), 2) == pytest.approx(
        border / inside
    )
    flat = metrics.neighbour_steps(torch.full((2, 1, 4, 6), 7, dtype=torch.uint8))
    assert [metrics.seam_ratio(*none) for none in ((steps, (4, 6), 1), (steps, (4, 6), 6), (flat, (4, 6), 2))] == [
        None
    ] * 3


def test_adm_truncates_where_torch_fidelity_rounds():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.003, 1.0, 2.0])
    assert Protocol.ADM.quantise(values).tolist() == [0, 0, 127, 127, 255, 255]
    assert Protocol.TORCH_FIDELITY.quantise(values).tolist() == [0, 0, 128, 128, 255, 255]
    ready = torch.tensor([3, 7], dtype=torch.uint8)
    assert Protocol.ADM.quantise(ready) is ready

"""Figures as pure functions and mergeable accumulators over features and pixels. Statistics are float64 throughout."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pra.utils.pixels import to_uint8

Array = npt.NDArray[np.float64]

SEED = 2020
"""torch-fidelity's ``rng_seed``: decides the order in its Inception Score and the subsets in its KID."""

KID_SUBSETS, KID_SIZE = 100, 1000
"""KID is the mean over this many random subsets of at most this many images, as in torch-fidelity."""

NEIGHBOURS = 3
"""``k`` of precision and recall."""


class Protocol(enum.Enum):
    """Two evaluators whose published figures are mixed.

    They differ in how a generated image becomes uint8 (:meth:`quantise`) and in the parts whose Inception Scores are
    averaged (:meth:`split_of`). Both resize inside Inception as TensorFlow 1 does.
    """

    ADM = "adm"
    TORCH_FIDELITY = "torch-fidelity"

    def quantise(self, images: Tensor) -> Tensor:
        """Map images in [-1, 1] to uint8: ADM's sampling scripts truncate, torch-fidelity's users (JiT) round."""
        return to_uint8(images, truncate=self is Protocol.ADM)

    def split_of(self, count: int) -> npt.NDArray[np.int64]:
        """Return each image's part of the Inception Score, ``(count,)``.

        ADM: consecutive parts of 5000. torch-fidelity: ten equal parts in shuffled order.
        """
        place = np.arange(count)
        if self is Protocol.ADM:
            return place // 5000
        bounds = np.arange(1, 11) * count // 10
        split = np.empty(count, np.int64)
        split[np.random.RandomState(SEED).permutation(count)] = np.searchsorted(bounds, place, side="right")
        return split


class Moments(NamedTuple):
    """Mean ``(dim,)`` and scatter ``(dim, dim)``, ``sum (x - mean)(x - mean)^T``, of ``rows`` rows.

    A sum of two is that of both sets of rows (Chan, Golub, LeVeque 1979).
    """

    rows: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, features: npt.ArrayLike) -> Moments:
        """Return the moments of features ``(B, dim)``, at least one."""
        values = np.asarray(features, np.float64)
        mean = values.mean(axis=0)
        centred = values - mean
        return cls(len(values), mean, centred.T @ centred)

    def __add__(self, other: Moments) -> Moments:  # type: ignore[override]
        total = self.rows + other.rows
        shift = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.rows * other.rows / total)
        return Moments(total, self.mean + shift * (other.rows / total), scatter)

    @property
    def gaussian(self) -> tuple[Array, Array]:
        """Return mean and unbiased covariance, as numpy's ``cov``; needs two rows."""
        assert self.rows >= 2, "a covariance needs two rows"
        return self.mean, self.scatter / (self.rows - 1)


def frechet_distance(mean1: Array, covariance1: Array, mean2: Array, covariance2: Array) -> float:
    """Return ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` (Dowson and Landau 1982; FID: 1706.08500).

    With ``S = A A^T`` from the eigenvectors, ``tr (S1 S2)^(1/2)`` is the sum of the singular values of ``A1^T A2``:
    real also for singular covariances, and as precise as the arithmetic.
    """
    cross = np.linalg.svd(_factor(covariance1).T @ _factor(covariance2), compute_uv=False).sum()
    difference = mean1 - mean2
    distance = difference @ difference + np.trace(covariance1) + np.trace(covariance2) - 2 * cross
    return max(0.0, float(distance))  # rounding may reach just below zero


def _factor(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(values.clip(min=0.0))  # type: ignore[no-any-return]


def score_sums(logits: Tensor, split: npt.NDArray[np.int64], parts: int) -> Array:
    """Return the sums that the Inception Score needs, of images with logits ``(B, K)``, over each of ``parts`` parts.

    ``split`` ``(B,)`` names each image's part. A row of the ``(parts, 2 + K)`` numbers holds the number of images, the
    sum of ``sum_k p log p``, and the sum of ``p``.
    """
    log_p = logits.double().log_softmax(dim=1).cpu().numpy()
    p = np.exp(log_p)
    sums: Array = np.zeros((parts, 2 + p.shape[1]))
    np.add.at(sums, split, np.column_stack([np.ones(len(p)), (p * log_p).sum(axis=1), p]))
    return sums


def inception_score(sums: Array) -> tuple[float, float] | None:
    """Return ``exp E_x KL(p(y|x) || p(y))`` (1606.03498), mean and standard deviation over the parts of ``sums``.

    None where a part is empty (fewer than ten images).
    """
    seen, entropy, marginal = sums[:, 0], sums[:, 1], sums[:, 2:]
    if not seen.all():
        return None
    marginal = marginal / seen[:, None]
    # q log q tends to 0 where no image of the part is of a class at all
    log_marginal = np.log(np.where(marginal > 0, marginal, 1.0))
    scores = np.exp(entropy / seen - (marginal * log_marginal).sum(axis=1))
    return float(scores.mean()), float(scores.std())


def kernel_distance(
    samples: npt.ArrayLike, reference: npt.ArrayLike, subsets: int = KID_SUBSETS, size: int = KID_SIZE
) -> tuple[float, float]:
    """Return KID (1801.01401) of features ``(n, D)`` and ``(m, D)``, mean and standard deviation over random subsets.

    It is the unbiased squared MMD with the kernel ``(x . y / D + 1)^3``, and may be slightly negative. Subsets of at
    most ``size`` images are drawn as torch-fidelity draws them.
    """
    first, second = np.asarray(samples, np.float64), np.asarray(reference, np.float64)
    size = min(size, len(first), len(second))
    random = np.random.RandomState(SEED)
    distances = []
    for _ in range(subsets):
        x = first[random.choice(len(first), size, replace=False)]
        y = second[random.choice(len(second), size, replace=False)]
        xx, yy, xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
        within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
        distances.append(within / (size * (size - 1)) - 2 * xy.mean())
    return float(np.mean(distances)), float(np.std(distances))


def _cubic(x: Array, y: Array) -> Array:
    base = x @ y.T / x.shape[1] + 1
    return base * base * base  # type: ignore[no-any-return]  # numpy's power is ten times slower


class Balls:
    """A ball around each feature ``(n, D)`` that reaches to its k-th nearest other: the set's support, as improved
    precision and recall see it (Kynkäänniemi et al., 1904.06991).

    ``radii`` and ``nearest``, the distance of the very next feature, are squared; computed in float64 in blocks of
    rows. ``centre`` ``(D,)`` is the origin, by default the mean: distances by products lose digits far from it. Sets
    that are compared need the same.
    """

    def __init__(self, features: Tensor, neighbours: int = NEIGHBOURS, centre: Tensor | None = None) -> None:
        self.centre = features.double().mean(dim=0) if centre is None else centre
        self.points = features.double() - self.centre
        self.norms = self.points.square().sum(dim=1)
        # The smallest distance is the point's own. A term that is equal in a row does not change the row's order.
        parts = [
            torch.addmm(self.norms, block, self.points.T, alpha=-2).topk(neighbours + 1, largest=False).values
            for block in _blocks(self.points, len(self.points))
        ]
        distances = (torch.cat(parts) + self.norms.unsqueeze(1)).clamp(min=0)
        self.nearest, self.radii = distances[:, 1], distances[:, -1]


def overlap(samples: Balls, reference: Balls) -> dict[str, float]:
    """Return "precision", "recall" and "authenticity" of two sets with one centre, each 0 to 1.

    Precision is the share of samples inside at least one of the reference's balls; recall the same the other way round.
    Authenticity is the share of samples further from their nearest real feature than that is from its own next one
    (Alaa et al., 2102.08921), which copies are not.
    """
    # |a - b|^2 <= r is |b|^2 - r - 2 ab <= -|a|^2: the smallest left side decides.
    of_samples, of_reference = samples.norms - samples.radii, reference.norms - reference.radii
    inside, authentic = [], []
    smallest = torch.full_like(reference.norms, torch.inf)
    parts = (_blocks(rows, len(reference.points)) for rows in (samples.points, samples.norms, of_samples))
    for block, norms, own in zip(*parts, strict=True):
        values = torch.addmm(of_reference, block, reference.points.T, alpha=-2)
        inside.append(values.amin(dim=1) <= -norms)
        values.add_(reference.radii)
        distance, at = values.min(dim=1)
        # Copies lie at zero but for rounding, and so does the next of two equal real images.
        authentic.append(distance + (1 - 1e-9) * norms > reference.nearest[at])
        values.sub_(reference.norms).add_(own.unsqueeze(1))
        smallest = torch.minimum(smallest, values.amin(dim=0))
    shares = {
        "precision": torch.cat(inside),
        "recall": smallest <= -reference.norms,
        "authenticity": torch.cat(authentic),
    }
    return {name: float(share.double().mean()) for name, share in shares.items()}


def _blocks(rows: Tensor, columns: int) -> Sequence[Tensor]:
    """Cut rows into blocks whose distances to so many others take at most 256 MiB."""
    return torch.split(rows, max(1, 2**25 // columns))


# --- reconstructions ----------------------------------------------------------------------------------------


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Return ``10 log10(255^2 / MSE)`` in dB of uint8 images ``(B, C, H, W)``: float64 ``(B,)``, inf if equal."""
    error = (images.double() - others.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255.0**2 / error)


SSIM_WINDOW = 11


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Return the structural similarity (Wang et al. 2004) of uint8 images ``(B, C, H, W)``: float64 ``(B,)``, -1 to 1.

    Averaged over channels; a Gaussian window of 11 pixels with sigma 1.5 inside the image, K1 = 0.01, K2 = 0.03.
    """
    batch, channels = images.shape[:2]
    x, y = (t.double().flatten(0, 1).unsqueeze(1) for t in (images, others))
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=x.device) - SSIM_WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * 1.5**2))
    weights = weights / weights.sum()

    def blur(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return similarity.mean(dim=(1, 2, 3)).view(batch, channels).mean(dim=1)


def neighbour_steps(images: Tensor) -> Array:
    """Return the sums of ``|x_k - x_{k-1}|`` over uint8 images ``(B, C, H, W)``: for each row ``k = 1 .. H - 1``, then
    for each column, ``(H - 1 + W - 1,)`` whole numbers."""
    sums = []
    for dim in (2, 3):
        along = images.movedim(dim, 0).flatten(1).short()
        sums.append((along[1:] - along[:-1]).abs().sum(dim=1, dtype=torch.int64))
    return torch.cat(sums).cpu().numpy().astype(np.float64)


def seam_ratio(steps: Array, size: tuple[int, int], patch_size: int) -> float | None:
    """Return how much larger the mean step across a patch's border is than inside patches, of images of one size.

    ``steps`` is from :func:`neighbour_steps`, ``size`` height and width. None without borders, insides or any step.
    """
    height, width = size
    pairs = np.concatenate([np.full(height - 1, width), np.full(width - 1, height)])
    places = np.concatenate([np.arange(1, height), np.arange(1, width)])
    border = places % patch_size == 0
    if border.all() or not border.any() or not steps[~border].any():
        return None
    across, inside = (steps[which].sum() / pairs[which].sum() for which in (border, ~border))
    return float(across / inside)

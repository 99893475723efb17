"""Power-function averages of any length, made after training: the post-hoc EMA of arXiv 2312.02696, section 3.2.

An average is a weighted mean of the weights over time; its profile is the weight of each time. The profile of another
length is fitted by least squares with those of the stored averages, and its coefficients combine the stored weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pra.config.training import check_length
from pra.errors import PraError
from pra.models import weights
from pra.training.averages import gamma_of
from pra.training.checkpoint import step_of
from pra.training.run import read_run
from pra.utils.files import own_folder, write_atomically

LARGEST_ERROR = 0.1
"""Largest error of a fitted profile, relative to the wanted one: a root mean square over time."""


def posthoc(path: str | Path, length: float) -> tuple[Path, int, float]:
    """Add the average of a relative length to a checkpoint, from the averages stored until then.

    Args:
        path: a checkpoint, or a run, whose newest checkpoint is taken.
        length: as in ``train.averages``.

    Returns:
        The new file, the number of stored averages, and the error of the fitted profile (:data:`LARGEST_ERROR`).

    Raises:
        PraError: not a run, a length out of range or held already, or too few stored averages for it.
    """
    check_length(length)
    checkpoint = weights.model_folder(path)
    name = weights.power_name(length)
    if name in weights.averages(checkpoint):
        raise PraError(f"{checkpoint}: {name} is there already. Use --average {name}", code="exists", name=name)
    run = weights.run_of(checkpoint)
    if run is None:
        problem = f"{checkpoint} is not a checkpoint of a run. Give a run: its checkpoints hold the averages"
        raise PraError(problem, code="mismatch", path=checkpoint)
    own_folder(checkpoint.absolute().parent)
    lengths, until = read_run(run).train.averages, step_of(checkpoint)
    if not lengths:
        problem = f"{run} keeps no power-function averages. Train with --set train.averages=[0.05,0.1]"
        raise PraError(problem, code="missing", path=run)
    read = [weights.average_file(weights.power_name(kept)) for kept in lengths]
    folders = [folder for folder in weights.whole_checkpoints(run, read) if step_of(folder) <= until]
    stored = [(folder, kept) for folder in folders for kept in lengths]  # without those made afterwards
    times = np.array([step_of(folder) / until for folder, _ in stored])
    coefficients, error = fitted(times, np.array([gamma_of(kept) for _, kept in stored]), gamma_of(length))
    if error > LARGEST_ERROR:
        problem = (
            f"{checkpoint}: its {len(stored)} stored averages miss the profile of {name} by {error:.0%}, more than "
            f"{LARGEST_ERROR:.0%}. Use a length nearer to train.averages, or train with two lengths and a smaller "
            "train.keep_every"
        )
        raise PraError(problem, code="unsupported", name=name, count=len(stored))
    sums: dict[str, Tensor] = {}
    for (folder, kept), coefficient in zip(stored, coefficients.tolist(), strict=True):
        for key, tensor in weights.read_tensors(folder / weights.average_file(weights.power_name(kept))).items():
            part = tensor.to(torch.float64).mul_(coefficient)
            sums[key] = sums[key].add_(part) if key in sums else part
    tensors = {key: tensor.to(torch.float32) for key, tensor in sums.items()}
    file = checkpoint / weights.average_file(name)
    write_atomically(file, lambda partial: weights.write_tensors(tensors, Path(partial.name)))
    weights.add_digest(file)
    return file, len(stored), error


def fitted(times: NDArray[Any], gammas: NDArray[Any], gamma: float) -> tuple[NDArray[Any], float]:
    """Fit the profile of the exponent ``gamma`` at time 1 with profiles at some ``times`` (algorithm 3).

    Return the coefficients and the error (:data:`LARGEST_ERROR`). The coefficients are scaled to a sum of 1, so that
    constant weights stay as they are.
    """
    products = profile_products(times[:, None], gammas[:, None], times, gammas)
    wanted = profile_products(times, gammas, 1.0, gamma)
    norm = float(profile_products(1.0, gamma, 1.0, gamma))
    found = np.linalg.lstsq(products, wanted)[0]
    found /= found.sum()
    square = float(found @ products @ found - 2.0 * found @ wanted) + norm
    return found, float(np.sqrt(max(0.0, square) / norm))


def profile_products(t_a: ArrayLike, gamma_a: ArrayLike, t_b: ArrayLike, gamma_b: ArrayLike) -> NDArray[Any]:
    """Return inner products over time of profiles ``(gamma + 1) tau^gamma / t^(gamma + 1)``, ``0 < tau <= t``.

    Arguments broadcast (equation 151).
    """
    t_a, gamma_a, t_b, gamma_b = map(np.asarray, (t_a, gamma_a, t_b, gamma_b))
    earlier, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    scale = (gamma_a + 1.0) * (gamma_b + 1.0) / (gamma_a + gamma_b + 1.0)
    product: NDArray[Any] = scale * (earlier / later) ** np.where(t_a > t_b, gamma_a, gamma_b) / later
    return product

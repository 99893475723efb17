"""The rollout gap: how far a model's sampling drifts from its training, by position along the raster.

Inputs and conditions of the backbone are compared as distributions: made from training images as in training, against
sampled with the same labels, without guidance. The flow loss on the model's own rollouts, tied to the training images
as in :class:`pra.config.Exact`, is compared with the loss on training inputs. `pra report` keeps the gap of a
checkpoint in the run's folder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pra.config import Exact, ObjectiveConfig, Precision, Rollout, RunConfig, SamplingConfig, to_dict
from pra.config.checks import PositiveInt
from pra.data import load_images, open_source
from pra.data.source import learned
from pra.errors import PraError
from pra.evaluation.samples import spread
from pra.method import noise
from pra.method.objectives import flow_errors
from pra.method.rollout import ar_inputs
from pra.models import weights
from pra.models.pra import PRA
from pra.sampling import Sampler
from pra.utils.files import check_fields, read_json, unreadable
from pra.utils.pixels import from_uint8
from pra.utils.provenance import environment

FILE = "rollout-gap.json"
SEED = 0
CURVES = ("inputs", "conditions", "training_loss", "rollout_loss")


@dataclass(frozen=True)
class RolloutGap:
    """One number per raster position.

    ``inputs`` ``(N - 1,)`` and ``conditions`` ``(N,)`` are :func:`inhomogeneity` between training and sampling, 0 to 1.
    ``training_loss`` and ``rollout_loss`` ``(N,)`` are the flow loss on training's inputs and on the model's own.
    ``samples`` ``(n, C, H, W)`` in [-1, 1] are in the order of the labels.
    """

    inputs: Tensor
    conditions: Tensor
    training_loss: Tensor
    rollout_loss: Tensor
    samples: Tensor


@torch.no_grad()
def rollout_gap(
    model: PRA,
    rollout: Rollout,
    images: Tensor,
    labels: Tensor,
    sampling: SamplingConfig,
    objective: ObjectiveConfig,
    seed: int = 0,
    batch_size: int = 250,
) -> RolloutGap:
    """Measure the gap of a trained model in evaluation mode.

    Args:
        model: autoregressive.
        rollout: the rollout of its training.
        images: at least 2 training images ``(n, C, H, W)`` in [-1, 1].
        labels: of the images, ``(n,)``, or rows with captions.
        sampling: solver and steps; its guidance is ignored, since training does not use guidance.
        objective: the objective of its training, which decides the noise draws of the losses.
        seed: decides all random numbers.
        batch_size: images at a time; nothing depends on it beyond rounding.
    """
    if len(images) < 2:
        raise PraError(f"{len(images)} image(s) have no distribution. Give at least 2", value=len(images))
    device = model.device
    # Undeblocked, as pixels are fed back; in float32, as all that it is compared with.
    sampler = Sampler(model, replace(sampling, guidance=1.0, deblock=False), Precision.FLOAT32)
    exact = Exact(steps=sampling.steps)
    parts: list[list[Tensor]] = []
    for start in range(0, len(images), batch_size):
        here = slice(start, start + batch_size)
        label, indices = labels[here].to(device), torch.arange(start, min(start + batch_size, len(images)))
        keys = noise.keys(seed, indices).to(device)
        patches = model.patchify(images[here].to(device))
        states = model.codec.encode(patches, model.clean_conditions(label, patches))
        read = ar_inputs(rollout, model, label, patches, states, keys)
        said = model.conditions(label, read)
        drawn = sampler.sample(label.cpu(), indices)
        own = model.patchify(drawn)[:, :-1]
        led = model.conditions(label, ar_inputs(exact, model, label, patches, states, keys))
        parts.append(
            [read, own, said, model.conditions(label, own), drawn]
            + [flow_errors(model, h, states, objective, keys).mean(dim=(1, 3)) for h in (said, led)]
        )
    read, own, said, spoken, drawn, trained, rolled = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return RolloutGap(
        inputs=inhomogeneity(read, own),
        conditions=inhomogeneity(said, spoken),
        training_loss=trained.mean(dim=0),
        rollout_loss=rolled.mean(dim=0),
        samples=drawn,
    )


def inhomogeneity(a: Tensor, b: Tensor) -> Tensor:
    """Return the energy coefficient of inhomogeneity (Szekely and Rizzo 2013, section 2.3), ``(positions,)`` float64.

    ``H = (2 E|a - b| - E|a - a'| - E|b - b'|) / (2 E|a - b|)`` of ``a`` ``(n, positions, D)`` and ``b`` ``(m,
    positions, D)``: 0 where they have one distribution, 1 where each is a point of its own. The numerator is estimated
    without bias, so that chance may take it just below 0.
    """
    result = []
    for x, y in zip(a.transpose(0, 1).double(), b.transpose(0, 1).double(), strict=True):
        across = torch.cdist(x, y).mean()
        within = [F.pdist(values).mean() for values in (x, y)]
        result.append((2 * across - within[0] - within[1]) / (2 * across).clamp(min=1e-12))
    return torch.stack(result)


# --- the gap of a run ---------------------------------------------------------------------------------------


def measure_gap(run: Path, config: RunConfig, count: int, device: torch.device) -> dict[str, Any]:
    """Measure the newest checkpoint's gap over at most ``count`` training images.

    Returns the content of ``rollout-gap.json``: the curves of :class:`RolloutGap` by name, one number per raster
    position, and their origin. Refuse a run without a checkpoint or its data.
    """
    folder = weights.model_folder(run)
    model: Any = weights.load(folder, device=device)
    source, train = learned(open_source(config.data.source), model.config.num_classes), config.train
    chosen = spread(len(source), min(count, len(source)))
    how = model.config.image_size, model.config.channels, config.data, model.condition.row
    pixels, labels = load_images(source, chosen, *how)
    gap = rollout_gap(model, train.rollout, from_uint8(pixels), labels, config.sampling, train.objective, SEED)
    return {
        "checkpoint": folder.name,
        "images": len(chosen),
        "seed": SEED,
        **{name: getattr(gap, name).tolist() for name in CURVES},
        "sampling": to_dict(replace(config.sampling, guidance=1.0)),
        "environment": environment(),
    }


def read_gap(run: Path) -> dict[str, Any] | None:
    """Return the last measurement, or None."""
    path = run / FILE
    if not path.exists():
        return None
    try:
        gap = read_json(path, checkpoint=str, images=PositiveInt, seed=int, sampling=dict, environment=dict)
        check_fields(gap, path, **dict.fromkeys(CURVES, tuple[float, ...]))
        check_fields(gap["sampling"], path, solver=str, steps=int)
        lengths = [len(gap[name]) for name in CURVES]
        if not 1 <= lengths[0] + 1 == lengths[1] == lengths[2] == lengths[3]:
            raise unreadable(path, f"has curves of {lengths} positions")
    except PraError as error:
        raise PraError(f"{error}, or remove it, and repeat `pra report {run}`", "unreadable", path=path) from None
    return gap


def known_gap(run: Path, config: RunConfig, count: int) -> dict[str, Any] | None:
    """Return the measurement of the newest checkpoint over ``count`` images (or all, if fewer), or None."""
    gap, newest = read_gap(run), weights.newest_checkpoint(run)
    if gap is None or newest is None or gap["checkpoint"] != newest.name or gap["images"] > count:
        return None
    return gap if gap["images"] == count or gap["images"] == len(open_source(config.data.source)) else None

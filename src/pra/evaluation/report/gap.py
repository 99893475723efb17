"""The rollout gap of a run, measured once per checkpoint and kept in the run's folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pra.config import RunConfig, to_dict
from pra.data import load_images, open_source
from pra.errors import PraError
from pra.evaluation.rollout_gap import rollout_gap
from pra.evaluation.samples import spread
from pra.models import weights
from pra.training.run import write_json
from pra.utils.pixels import from_uint8
from pra.utils.provenance import environment

FILE = "rollout-gap.json"
SEED = 0
CURVES = ("inputs", "conditions", "training_loss", "rollout_loss")


@dataclass(frozen=True, kw_only=True)
class MeasuredGap:
    """:class:`pra.evaluation.rollout_gap.RolloutGap` as plain numbers, one per raster position, and their origin.

    ``inputs`` begins at the second position. ``images`` training images and as many samples were compared.
    """

    checkpoint: str
    images: int
    seed: int
    inputs: list[float]
    conditions: list[float]
    training_loss: list[float]
    rollout_loss: list[float]
    sampling: dict[str, Any]
    environment: dict[str, Any]

    def save(self, run: Path) -> None:
        """Write it into the run's folder."""
        write_json(run / FILE, dataclasses.asdict(self))


def measure_gap(run: Path, config: RunConfig, count: int, device: torch.device) -> MeasuredGap:
    """Measure the newest checkpoint's gap over at most ``count`` training images.

    Refuse a run without a checkpoint or its data, and a model that is not autoregressive.
    """
    if count < 2:
        raise PraError(f"--gap-images {count}: the least is 2. Use 0 to leave the gap out", value=count)
    folder = weights.model_folder(run)
    model = weights.load(folder, device=device)
    if not model.config.autoregressive:
        problem = f"{model.config.name} makes all patches at once: there is no rollout, and no gap"
        raise PraError(f"{problem}. Use --gap-images 0", "unsupported")
    source, train = open_source(config.data.source), config.train
    chosen = spread(len(source), min(count, len(source)))
    pixels, labels = load_images(source, chosen, config.model.image_size, config.model.channels, config.data)
    gap = rollout_gap(model, train.rollout, from_uint8(pixels), labels, config.sampling, train.objective, SEED)
    return MeasuredGap(
        checkpoint=folder.name,
        images=len(chosen),
        seed=SEED,
        **{name: getattr(gap, name).tolist() for name in CURVES},
        sampling=to_dict(dataclasses.replace(config.sampling, guidance=1.0)),
        environment=environment(),
    )


def read_gap(run: Path) -> MeasuredGap | None:
    """Return what was measured last; None where nothing was."""
    path = run / FILE
    if not path.exists():
        return None
    values = weights.read_json(path)
    names = {field.name for field in dataclasses.fields(MeasuredGap)}
    if set(values) != names or not all(_is_curve(values[name]) for name in CURVES):
        raise PraError(f"{path} is damaged. Remove it, and repeat `pra report {run}`", "unreadable", path=path)
    return MeasuredGap(**values)


def known_gap(run: Path, config: RunConfig, count: int) -> MeasuredGap | None:
    """Return what was measured of the newest checkpoint over ``count`` images, or all there are; else None."""
    gap, newest = read_gap(run), weights.newest_checkpoint(run)
    if gap is None or newest is None or gap.checkpoint != newest.name or gap.images > count:
        return None
    return gap if gap.images == count or gap.images == len(open_source(config.data.source)) else None


def _is_curve(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)

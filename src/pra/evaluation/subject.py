"""What `pra eval` judges: a model that is sampled, a folder of pictures, or a batch of images."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pra.config import DataConfig, Precision, RunConfig, SamplingConfig, apply_settings
from pra.data import Source, open_source
from pra.errors import PraError
from pra.evaluation.samples import common_shape, labels_like, pictures, spread
from pra.method import noise
from pra.method.noise import Purpose
from pra.models import Model, weights
from pra.sampling import Sampler
from pra.sampling.batches import Batch, NpzBatch, how_sampled, sampled
from pra.sampling.requests import Listed, Numbered, Requests
from pra.training.run import read_run
from pra.utils.distributed import World
from pra.utils.hub import is_address
from pra.utils.provenance import file_sha256

OF_A_RUN = 50_000
"""Images sampled from a run without --num."""


@dataclass(frozen=True)
class Adjustable:
    """Settings that ``--set`` reaches: how reference images are prepared, and how a model samples."""

    data: DataConfig = DataConfig(source="")  # noqa: RUF009  frozen
    sampling: SamplingConfig = SamplingConfig()  # noqa: RUF009


@dataclass(frozen=True)
class Work:
    """Processes, device and batch size of an evaluation."""

    world: World
    device: torch.device
    batch_size: int


@dataclass(frozen=True)
class Subject:
    """``count`` images of one shape to be judged.

    ``target`` names them as the user did. Images to be sampled have a ``sampler`` and ``requests`` (labels and seeds),
    finished ones ``finished``, a function of the batch size and the indices.
    """

    target: str
    count: int
    size: tuple[int, int]
    channels: int
    settings: Adjustable
    provenance: dict[str, Any]
    finished: Callable[[int, range], Generator[Batch]] | None = None
    sampler: Sampler | None = None
    requests: Requests | None = None

    def batches(self, share: range, size: int) -> Generator[Batch]:
        """Return the images of these indices in batches of ``size``."""
        if self.finished:
            return self.finished(size, share)
        assert self.requests is not None, "images to be sampled have labels and seeds"
        return sampled(self.sampled("sampling"), self.requests, share, size)

    def sampled(self, option: str) -> Sampler:
        """Return the sampler; refuse ``option`` where the images are finished."""
        if self.sampler is None:
            raise PraError(f"{option}: these images are finished. Leave it out", "conflict", option=option)
        return self.sampler

    def sampled_with(self, sampling: SamplingConfig) -> Subject:
        """Return the same model, labels and seeds with other settings of the sampler."""
        own = self.sampled("sampling")
        sampler = Sampler(own.model, sampling, own.precision)
        return replace(self, provenance=self.provenance | {"sampling": how_sampled(sampler)}, sampler=sampler)

    def with_average(self, name: str) -> Subject:
        """Return the same labels, seeds and settings with other weights of the same model folder."""
        own, folder = self.sampled("average"), Path(self.provenance["model"])
        if weights.weights_name(folder, name) == self.provenance["weights"]:
            return self
        model, _, known = open_model(folder, name, own.model.device)
        sampler = Sampler(model, own.config, own.precision)
        return replace(self, provenance=self.provenance | known, sampler=sampler)

    def labelled_like(self, source: Source) -> Subject:
        """Return the same model sampled with labels as frequent as in a source of the same classes.

        Shuffled: sources are often in order of their classes, and the Inception Score has parts.
        """
        order = noise.permutation(noise.fold(noise.keys(0, torch.tensor(0)), Purpose.SHUFFLE), self.count)
        labels = labels_like(source, self.count)[order]
        requests = Listed(tuple(labels.tolist()), f"as frequent as in {source.name}, shuffled")
        return replace(self, provenance=self.provenance | {"labels": requests.order}, requests=requests)


def open_subject(
    target: Path | None,
    num: int | None,
    work: Work,
    precision: Precision,
    settings: tuple[str, ...],
    average: str = weights.EMA,
) -> Subject:
    """Open a target, by default the model that comes with the package; refuse settings that do not go with it."""
    target = target and target.expanduser()
    for setting in settings:
        if setting.startswith("data.flip="):
            raise PraError(f"--set {setting} has no effect: images are judged as they are. Leave it out", value=setting)
    if target is None or is_address(target) or (target / weights.CONFIG).exists():
        subject = _model(target, num or OF_A_RUN, work.device, precision, settings, average)
    else:
        subject = _finished(target, num, settings)
        used = {
            f"--precision {precision.value}": precision is not Precision.AUTO,
            f"--average {average}": average != weights.EMA,
            **{f"--set {setting}": setting.startswith("sampling.") for setting in settings},
        }
        for option in (option for option, given in used.items() if given):
            subject.sampled(option)
    if subject.count < work.world.size:
        problem = f"{work.world.size} processes cannot share {subject.count} images"
        raise PraError(f"{problem}. Start fewer", "conflict", processes=work.world.size, count=subject.count)
    return subject


def _model(
    target: Path | None,
    count: int,
    device: torch.device,
    precision: Precision,
    settings: tuple[str, ...],
    average: str,
) -> Subject:
    model, run, known = open_model(target, average, device)
    chosen = apply_settings(Adjustable(run.data if run else DataConfig(source=""), model.sampling), settings)
    classes, sampler = model.config.num_classes, Sampler(model, chosen.sampling, precision)
    known |= {"sampling": how_sampled(sampler), "labels": f"index % {classes}", "seeds": f"0-{count - 1}"}
    name = "the model that comes with pra" if target is None else str(target)
    size, channels, requests = model.config.image_size, model.config.channels, Numbered(count, tuple(range(classes)))
    return Subject(name, count, size, channels, chosen, known | {"count": count}, sampler=sampler, requests=requests)


def open_model(
    target: Path | None, average: str, device: torch.device
) -> tuple[Model, RunConfig | None, dict[str, Any]]:
    """Load a model; return its run's configuration, if any, and its part of a report's provenance."""
    folder = weights.model_folder(target)
    run, name = weights.run_of(folder), weights.weights_name(folder, average)
    known = {"model": str(folder), "weights": name, "weights_sha256": file_sha256(folder / name)}
    return weights.load(folder, average, device), read_run(run) if run else None, known


def _finished(target: Path, num: int | None, settings: tuple[str, ...]) -> Subject:
    """Open a folder of pictures or a batch in ADM's layout."""
    if not target.exists():
        raise PraError(f"no run, folder of pictures or .npz at {target}. Give one", "missing", path=target)
    settled = apply_settings(Adjustable(), settings)
    opened = open_source(f"folder:{target}") if target.is_dir() else NpzBatch(target)
    there = opened.count if isinstance(opened, NpzBatch) else len(opened)
    if there < max(num or 0, 2):
        problem = f"{target} holds {there} image(s), fewer than {f'--num {num}' if num else 2}"
        raise PraError(f"{problem}. Give more images", path=target, count=there)
    count = num or there
    known: dict[str, Any] = {"count": count, "of": there}
    if isinstance(opened, NpzBatch):
        known |= {"file": str(target.absolute()), "sha256": file_sha256(target)}
        known |= {"made": opened.plan} if opened.plan is not None else {}
        return Subject(str(target), count, opened.size, opened.channels, settled, known, opened.batches)
    shape, known = common_shape(opened), known | {"folder": str(target.absolute())}
    finished = partial(pictures, opened, spread(there, count), shape, workers=settled.data.workers)
    return Subject(str(target), count, *shape, settled, known, finished)

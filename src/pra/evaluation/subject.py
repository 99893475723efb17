"""What `pra eval` judges: a model that is sampled, a folder of pictures, or a batch of images."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import pra.models.weights
from pra.config import DataConfig, Precision, SamplingConfig, apply_settings
from pra.data import Source, open_source
from pra.errors import PraError
from pra.evaluation.samples import common_shape, labels_like, pictures, spread
from pra.method import noise
from pra.method.noise import Purpose
from pra.sampling import Sampler
from pra.sampling.batches import Batch, NpzBatch, how_sampled, sampled
from pra.sampling.requests import Listed, Numbered, Requests
from pra.training.run import read_run
from pra.utils.distributed import World
from pra.utils.hub import is_address
from pra.utils.provenance import file_sha256

OF_A_RUN = 50_000
"""Images sampled from a run where --num does not say."""

WITHOUT_EFFECT = {"data.flip": "images are judged as they are"}
"""Settings of training that an evaluation does not know."""


@dataclass(frozen=True)
class Adjustable:
    """What ``--set`` reaches: how reference images are prepared, and how a model samples."""

    data: DataConfig
    sampling: SamplingConfig


@dataclass(frozen=True)
class Work:
    """Where and in which portions it is done."""

    world: World
    device: torch.device
    batch_size: int


@dataclass(frozen=True)
class Subject:
    """What is judged: ``count`` images of one shape, and how to get some of them in batches of a given size.

    ``target`` is as it was given, in words; ``sampler`` and ``requests``, its labels and seeds, are None where the
    images are finished.
    """

    target: str
    count: int
    size: tuple[int, int]
    channels: int
    settings: Adjustable
    batches: Callable[[range, int], Generator[Batch]]
    provenance: dict[str, Any]
    sampler: Sampler | None = None
    requests: Requests | None = None

    def sampled_with(self, sampling: SamplingConfig) -> Subject:
        """The same model, labels and seeds, with other settings of the sampler.

        Raises:
            PraError: settings that the model cannot be sampled with.
        """
        assert self.sampler is not None, "finished images are as they are"
        assert self.requests is not None, "and nobody asked for them"
        sampler = Sampler(self.sampler.model, sampling, self.sampler.precision)
        known = self.provenance | {"sampling": how_sampled(sampler)}
        return replace(self, batches=_sampling(sampler, self.requests), provenance=known, sampler=sampler)

    def with_average(self, name: str) -> Subject:
        """The same labels, seeds and settings, with other weights of the same model folder.

        Raises:
            PraError: as :func:`pra.load`.
        """
        assert self.sampler is not None, "finished images have no weights"
        assert self.requests is not None, "and nobody asked for them"
        folder = Path(self.provenance["model"])
        known = self.provenance | _weights(folder, name)
        if known == self.provenance:
            return self
        model = pra.models.weights.load(folder, name, self.sampler.model.device)
        sampler = Sampler(model, self.sampler.config, self.sampler.precision)
        return replace(self, batches=_sampling(sampler, self.requests), provenance=known, sampler=sampler)

    def labelled_like(self, source: Source) -> Subject:
        """The same model, sampled with labels as frequent as in a source of the same classes.

        Shuffled, as sources are often in order of their classes and the Inception Score has parts.
        """
        assert self.sampler is not None, "finished images have their labels"
        order = noise.permutation(noise.fold(noise.keys(0, torch.tensor(0)), Purpose.SHUFFLE), self.count)
        labels = labels_like(source, self.count)[order]
        requests = Listed(tuple(labels.tolist()), f"as frequent as in {source.name}, shuffled")
        known = self.provenance | {"labels": requests.order}
        return replace(self, batches=_sampling(self.sampler, requests), provenance=known, requests=requests)


def open_subject(
    target: Path | None,
    num: int | None,
    work: Work,
    precision: Precision,
    settings: tuple[str, ...],
    average: str = pra.models.weights.EMA,
) -> Subject:
    """What a target means; without one the model that comes with the package.

    Raises:
        PraError: nothing there, no such average, too few images, or settings that do not go with it.
    """
    for setting in settings:
        key = setting.partition("=")[0]
        if key in WITHOUT_EFFECT:
            raise PraError(f"--set {setting} has no effect here: {WITHOUT_EFFECT[key]}; leave it out")
    if target is None or is_address(target) or (target / pra.models.weights.CONFIG).exists():
        subject = _model(target, num or OF_A_RUN, work.device, precision, settings, average)
    else:
        subject = _finished(target, num, settings)
        if precision is not Precision.AUTO:
            raise PraError(f"--precision {precision.value} is for sampling; these images are finished: leave it out")
        if average != pra.models.weights.EMA:
            raise PraError(f"--average {average} is for sampling; these images are finished: leave it out")
    if subject.count < work.world.size:
        raise PraError(f"{work.world.size} processes cannot share {subject.count} images; start fewer")
    return subject


def _model(
    target: Path | None,
    count: int,
    device: torch.device,
    precision: Precision,
    settings: tuple[str, ...],
    average: str,
) -> Subject:
    folder = pra.models.weights.model_folder(target)
    model = pra.models.weights.load(folder, average, device)
    chosen = apply_settings(Adjustable(_data_of(folder), model.sampling), settings)
    classes = model.config.num_classes
    sampler = Sampler(model, chosen.sampling, precision)
    provenance = {
        "model": str(folder),
        **_weights(folder, average),
        "sampling": how_sampled(sampler),
        "labels": f"index % {classes}",
        "seeds": f"0-{count - 1}",
        "count": count,
    }
    requests = Numbered(count, tuple(range(classes)))
    return Subject(
        "the model that comes with pra" if target is None else str(target), count, model.config.image_size,
        model.config.channels, chosen, _sampling(sampler, requests), provenance, sampler, requests,
    )  # fmt: skip


def _weights(folder: Path, average: str) -> dict[str, str]:
    """The file of the weights and its hash, for a report."""
    name = pra.models.weights.weights_name(folder, average)
    return {"weights": name, "weights_sha256": file_sha256(folder / name)}


def _sampling(sampler: Sampler, requests: Requests) -> Callable[[range, int], Generator[Batch]]:
    return lambda share, size: sampled(sampler, requests, share, size)


def _data_of(folder: Path) -> DataConfig:
    """The data that a checkpoint's run learnt from; without a source for a saved model."""
    run = pra.models.weights.run_of(folder)
    return DataConfig(source="") if run is None else read_run(run).data


def _finished(target: Path, num: int | None, settings: tuple[str, ...]) -> Subject:
    for setting in settings:
        if setting.startswith("sampling."):
            raise PraError(f"--set {setting} is for sampling; these images are finished: leave it out")
    if target.is_file():
        return _batch(target, num, settings)
    if not target.is_dir():
        raise PraError(f"no run, folder of pictures or .npz at {target}")
    return _folder(target, num, settings)


def _folder(target: Path, num: int | None, settings: tuple[str, ...]) -> Subject:
    source = open_source(f"folder:{target}")
    chosen = spread(len(source), _count(target, len(source), num))
    shape, settled = common_shape(source), apply_settings(_unknown(), settings)
    provenance = {"folder": str(target.absolute()), "count": len(chosen), "of": len(source)}
    return Subject(
        str(target), len(chosen), *shape, settled,
        lambda share, size: pictures(source, chosen, size, share, shape, settled.data.workers), provenance,
    )  # fmt: skip


def _batch(target: Path, num: int | None, settings: tuple[str, ...]) -> Subject:
    batch = NpzBatch(target)
    count = _count(target, batch.count, num)
    provenance = {"file": str(target.absolute()), "sha256": file_sha256(target), "count": count, "of": batch.count}
    if batch.plan is not None:
        provenance["made"] = batch.plan
    return Subject(
        str(target), count, batch.size, batch.channels, apply_settings(_unknown(), settings),
        lambda share, size: batch.batches(size, share), provenance,
    )  # fmt: skip


def _count(target: Path, there: int, num: int | None) -> int:
    if there < 2:
        raise PraError(f"{target} holds one image; at least 2 have a distribution")
    if (num or 0) > there:
        raise PraError(f"{target} holds {there} images, fewer than --num {num}")
    return num or there


def _unknown() -> Adjustable:
    return Adjustable(DataConfig(source=""), SamplingConfig())

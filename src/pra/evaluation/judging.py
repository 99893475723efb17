"""The images that `pra eval` and `pra sweep` judge, their reference, and the judgement."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pra.config import DataConfig, Precision, RunConfig, SamplingConfig, apply_settings
from pra.data import Source, open_source
from pra.data.images import CorruptImage
from pra.data.source import check_captions, in_classes, with_images
from pra.errors import PraError, nearest
from pra.evaluation.classifier import Classifier, find_classifier, fit_classifier
from pra.evaluation.evaluate import Report, check_codec, evaluate, reconstruct
from pra.evaluation.features import REGISTRY, FeatureExtractor, Opener, dinov2, inception
from pra.evaluation.reference import Reference, from_file, from_source, recorded_classifier
from pra.evaluation.samples import captions_like, common_shape, labels_like, picture_shape, pictures, prepared, spread
from pra.method import noise
from pra.method.noise import Purpose
from pra.models import Model, weights
from pra.sampling import Sampler
from pra.sampling.batches import Batch, NpzBatch, exported, how_sampled, join_exports, sampled
from pra.sampling.requests import Requests, listed, numbered
from pra.training.run import read_run
from pra.utils.distributed import World
from pra.utils.hub import is_address
from pra.utils.provenance import environment, file_sha256


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

    def open_source(self, spec: str) -> Source:
        """Open a data source on one process before the others: some sources are indexed once."""
        with self.world.first_alone():
            return open_source(spec)


@dataclass(frozen=True)
class Subject:
    """``count`` images of one shape to be judged.

    ``target`` names them as the user did. Images to be sampled have a ``sampler`` and ``requests`` (labels and seeds).
    Finished images have ``finished``, a function of the batch size and the indices. ``patch_size`` is the model's, or
    the user's for finished images.
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
    patch_size: int | None = None

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

        A model that reads captions gets those of the same images. They are shuffled, since sources are often sorted by
        class, and the Inception Score has parts.
        """
        order, captions = shuffled(self.count), None
        labels = labels_like(source, self.count)
        known = {"labels": f"as frequent as in {source.name}, shuffled"}
        model = self.sampled("captions").model
        if model.config.text is not None:
            known["captions"] = f"of images of {source.name}"
            check_captions(source, self.settings.data.on_caption)
            places, given = captions_like(source, self.count, self.settings.data.on_caption)
            labels = torch.from_numpy(source.labels[places])
            captions = model.condition.texts([given[place] for place in order.tolist()])
        requests = listed(labels[order].tolist(), known["labels"], captions)
        return replace(self, provenance=self.provenance | known, requests=requests)


def open_subject(
    target: Path | None,
    num: int | None,
    work: Work,
    precision: Precision,
    settings: tuple[str, ...],
    average: str = weights.EMA,
) -> Subject:
    """Open a target, by default the model that comes with the package; refuse settings that do not apply to it."""
    target = target and target.expanduser()
    for setting in settings:
        if setting.startswith("data.flip="):
            raise PraError(f"--set {setting} has no effect: images are judged as they are. Leave it out", value=setting)
    if target is None or is_address(target) or (target / weights.CONFIG).exists():
        count = num or 50_000
        model, run, known = open_model(target, average, work.device)
        chosen = apply_settings(Adjustable(run.data if run else DataConfig(source=""), model.sampling), settings)
        config, sampler = model.config, Sampler(model, chosen.sampling, precision)
        requests = numbered(count, range(config.num_classes))
        known |= {"sampling": how_sampled(sampler), "labels": f"index % {config.num_classes}"}
        known |= {"seeds": f"0-{count - 1}", "count": count}
        name = "the model that comes with pra" if target is None else str(target)
        shape = config.image_size, config.channels
        subject = Subject(name, count, *shape, chosen, known, None, sampler, requests, config.patch_size)
    else:
        subject = _finished(target, num, settings)
        given = [f"--precision {precision.value}"] if precision is not Precision.AUTO else []
        given += [f"--average {average}"] if average != weights.EMA else []
        for option in given + [f"--set {setting}" for setting in settings if setting.startswith("sampling.")]:
            subject.sampled(option)
    check_processes(work.world, subject.count)
    return subject


def check_processes(world: World, count: int) -> None:
    """Refuse fewer images than processes."""
    if count < world.size:
        problem = f"{world.size} processes cannot share {count} images"
        raise PraError(f"{problem}. Start fewer", "conflict", processes=world.size, count=count)


def shuffled(count: int) -> Tensor:
    """Return the order in which the images of a source are asked for, int64 ``(count,)``."""
    return noise.permutation(noise.fold(noise.keys(0, torch.tensor(0)), Purpose.SHUFFLE), count)


def open_model(
    target: Path | None, average: str, device: torch.device
) -> tuple[Model, RunConfig | None, dict[str, Any]]:
    """Load a model; return its run's configuration, if any, and its part of a report's provenance."""
    folder = weights.model_folder(target, average)
    run, name = weights.run_of(folder), weights.weights_name(folder, average)
    known = {"model": str(folder), "weights": name, "weights_sha256": file_sha256(folder / name)}
    return weights.load(folder, average, device), read_run(run) if run else None, known


def _finished(target: Path, num: int | None, settings: tuple[str, ...]) -> Subject:
    """Open a folder of pictures or a batch in ADM's layout."""
    if not target.exists():
        raise PraError(f"{target} is not a run, folder of pictures or .npz. Give one", "missing", path=target)
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


# --- the reference ------------------------------------------------------------------------------------------

LABELS = ("balanced", "reference")

Truth = Source | Path
"""Reference for images: a source, or a file of statistics or images."""


@dataclass(frozen=True)
class Judge:
    """An extractor and the reference that it has seen."""

    extractor: FeatureExtractor
    reference: Reference
    work: Work

    def report(
        self,
        subject: Subject,
        images: Path | None = None,
        what: str = "evaluate",
        watch: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> Report:
        """Judge a subject; every process gets the report.

        The images are written to the ``.npz`` ``images``, if it is given, and go through ``watch``. ``what`` is the
        bar's name.
        """
        work, world = self.work, self.work.world
        share = world.share(subject.count)
        known = {"images": subject.provenance, "environment": environment(), "processes": world.size}
        texts = subject.requests.captions if subject.requests else None
        part = images.with_name(f"{images.name}.part{world.rank}") if images and world.size > 1 else images
        try:
            with closing(subject.batches(share, work.batch_size)) as batches:
                own = texts and texts[share.start : share.stop]
                passed = exported(batches, len(share), part, captions=own) if part else batches
                judged = map(self._labelled(subject), map(watch, passed)), self.reference, self.extractor, subject.count
                report = evaluate(*judged, provenance=known, world=world, what=what, patch_size=subject.patch_size)
            if images and part != images:
                world.combine(
                    part, lambda parts: join_exports([path for path in parts if path], images, captions=texts)
                )
        finally:
            if part and part != images:
                part.unlink(missing_ok=True)
        return report

    def _labelled(self, subject: Subject) -> Callable[[Batch], Batch]:
        """Return a map from the model's labels to the extractor's, by the names of classes, if they share any."""
        known = {name: place for place, name in enumerate(self.extractor.classes or ())}
        own = subject.sampler.model.classes if subject.sampler else ()
        if not set(own) & set(known) or len(set(own)) < len(own):
            return lambda batch: batch
        places = torch.tensor([known.get(name, len(known)) for name in own])  # beyond those known, which is refused
        return lambda batch: batch if batch.labels is None else batch._replace(labels=places[batch.labels])

    def with_reconstruction(self, report: Report, subject: Subject, originals: Source) -> Report:
        """Add the codec's reconstructions of at most as many originals."""
        work, data = self.work, subject.settings.data
        chosen = spread(len(originals), min(subject.count, len(originals)))
        share = work.world.share(len(chosen))
        model = subject.sampled("--reconstruction").model
        row = model.condition.row if check_codec(model).encoder.sees_condition else None
        real = prepared(originals, chosen, subject.size, subject.channels, data, work.batch_size, share, row)
        with closing(real):
            figures = reconstruct(model, real, self.extractor, len(chosen), world=work.world)
        known = {"source": originals.name, "count": len(chosen)}
        return Report(report.figures | {"reconstruction": figures}, report.provenance | {"reconstruction": known})


def check_options(features: str, labels: str, batch_size: int, num: int | None) -> None:
    """Refuse unknown values of options, before anything is opened."""
    for option, value, known in (("--features", features, REGISTRY.names()), ("--labels", labels, LABELS)):
        if value not in known:
            raise PraError(f"{option} {value!r} is unknown{nearest(value, known)}", "unknown", value=value)
    check_at_least(1, batch_size=batch_size)
    check_at_least(2, num=num)


def check_at_least(least: int, **options: int | None) -> None:
    """Refuse a number below ``least``: ``batch_size`` is --batch-size, and None is an option that is not given."""
    for name, number in options.items():
        if number is not None and number < least:
            option = f"--{name.replace('_', '-')}"
            raise PraError(f"{option} {number}: the least is {least}. Give more", option=option, value=number)


def reference_of(reference: str | None, subject: Subject) -> str:
    """Return the reference's name, by default that of the data that the subject learnt from."""
    spec = reference or subject.settings.data.source
    if not spec:
        raise PraError(f"{subject.target} does not name its data. Give --reference SRC or STATS.npz", "missing")
    return spec


def open_truth(reference: str | None, labels: str, subject: Subject, work: Work) -> tuple[Truth, Subject]:
    """Open the reference, by default the data that a subject learnt from, and give the subject these ``labels``.

    Refuse data that do not tell how frequent the model's classes are.
    """
    spec = reference_of(reference, subject)
    truth = Path(spec).expanduser() if spec.endswith(".npz") else work.open_source(spec)
    reads = subject.sampler is not None and subject.sampler.model.config.text is not None
    if labels == "reference" or reads:
        option = "--labels reference" if labels == "reference" else "--reference"
        model, own = subject.sampled(option).model, subject.settings.data.source
        alike = work.open_source(own) if reads and own and isinstance(truth, Path) else truth
        if isinstance(alike, Path):
            problem = f"{option}: {spec} does not name classes or captions. Give a data source"
            raise PraError(problem, "missing", path=spec)
        alike = in_classes(alike, model.classes) or alike
        check_classes(alike, model, option)
        subject = subject.labelled_like(alike)
    elif subject.sampler and not isinstance(truth, Path):
        counts = np.bincount(truth.labels, minlength=len(truth.classes))
        largest = int(counts.argmax())
        if counts[largest] * len(truth.classes) > 2 * len(truth):
            part = f"{counts[largest] / len(truth):.0%} of {truth.name} are {truth.classes[largest]!r}"
            advice = "FID then compares different mixtures. Use --labels reference to sample the same mixture"
            warnings.warn(f"{part}, and every class is sampled equally often: {advice}", stacklevel=2)
    if reference and not isinstance(truth, Path) and work.world.is_first:
        with contextlib.suppress(CorruptImage):  # reported when its turn comes
            grey = picture_shape(truth.image(0))[1] == 1
            if grey != (subject.channels == 1):
                turned = (
                    f"is grey, and is converted to {subject.channels} channels"
                    if grey
                    else "has colour, and is converted to grey"
                )
                print(f"the reference {truth.name} {turned}, like the images that are judged")
    return truth, subject


def open_originals(truth: Truth, subject: Subject, work: Work) -> Source:
    """Open the real images to reconstruct: the reference, or the run's own data where the reference is a file.

    Refuse a model without a codec, and labels that mean something else to the encoder.
    """
    model = subject.sampled("--reconstruction").model
    codec, own = check_codec(model), subject.settings.data.source
    if isinstance(truth, Path) and not own:
        raise PraError("--reconstruction needs real images. Give a data source as --reference", "missing")
    source = work.open_source(own) if isinstance(truth, Path) else truth
    if codec.encoder.sees_condition:
        source = in_classes(source, model.classes) or source
        check_classes(source, model, "--reconstruction")
        if model.config.text is not None:
            check_captions(source, subject.settings.data.on_caption)
    return source


def check_classes(source: Source, model: Model, option: str) -> None:
    """Refuse a source whose labels mean something else to the model; ``option`` needs them."""
    there, own = tuple(source.classes), tuple(model.classes)
    if there == own:
        return
    how = f"{source.name} has {len(there)} classes, the model {len(own)}"
    if len(there) == len(own):
        place = next(place for place in range(len(own)) if there[place] != own[place])
        how = f"class {place} is {there[place]!r} in {source.name}, {own[place]!r} in the model"
    raise PraError(f"{option}: {how}. Give such a --reference", "mismatch", option=option)


def open_judge(truth: Truth, features: str, weights: Path | None, subject: Subject, work: Work) -> Judge:
    """Open the features of that name and the reference as they see it.

    Refuse missing or unreadable weights, a file of other features, or images that cannot be read.
    """
    world, how = work.world, (subject.size, subject.channels, subject.settings.data)
    with world.first_alone():  # downloads or fits; the other processes find it in the cache
        if features != "classifier":
            own: dict[str, Opener] = {"inception": inception, "dinov2": dinov2}
            made: object = (REGISTRY.added(features) or own[features])(weights, work.device)
            if not isinstance(made, FeatureExtractor):
                problem = f"features {features!r}: {made!r} is not an extractor"
                raise PraError(f"{problem}. Return the members of FeatureExtractor", name=features)
            extractor: FeatureExtractor = made
        elif weights is not None:
            extractor = Classifier(weights, work.device)
        elif isinstance(truth, Path):
            extractor = find_classifier(recorded_classifier(truth), work.device)
        else:
            extractor = fit_classifier(truth, *how, work.device, world.is_first)
            if subject.finished and len(with_images(truth)) < len(truth.classes) and world.is_first:
                problem = f"accuracy reads labels in {subject.target} as numbers of all classes of {truth.name}"
                warnings.warn(f"{problem}, also of those without images. Judge the model itself", stacklevel=2)
    if isinstance(truth, Path):
        return Judge(extractor, from_file(truth, extractor, world=world), work)
    return Judge(extractor, from_source(truth, *how, extractor, batch_size=work.batch_size, world=world), work)

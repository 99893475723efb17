"""What images are held against: real ones or a file of statistics, seen through features."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pra.data import Source, open_source
from pra.data.images import CorruptImage
from pra.errors import PraError, nearest
from pra.evaluation.classifier import Classifier, find_classifier, fit_classifier
from pra.evaluation.dinov2 import dinov2
from pra.evaluation.features import REGISTRY, FeatureExtractor, inception
from pra.evaluation.reference import Reference, from_file, from_source, recorded_features
from pra.evaluation.samples import picture_shape
from pra.evaluation.subject import Subject, Work
from pra.models import Model

LABELS = ("balanced", "reference")


@dataclass(frozen=True)
class Truth:
    """What the images are held against, as it was named; ``source`` is None where that is a file."""

    spec: str
    source: Source | None

    @property
    def file(self) -> Path:
        """The file of statistics or of images."""
        return Path(self.spec).expanduser()


def check_options(features: str, labels: str, batch_size: int, num: int | None) -> None:
    """Refuses options that no evaluation knows, before anything is opened.

    Raises:
        PraError: other features or labels than there are (the nearest is given), or a number that is too small.
    """
    for option, value, known in (("--features", features, REGISTRY.names()), ("--labels", labels, LABELS)):
        if value not in known:
            raise PraError(f"{option} {value!r} is unknown{nearest(value, known)}")
    if batch_size < 1:
        raise PraError(f"--batch-size {batch_size} must be at least 1")
    if num is not None and num < 2:
        raise PraError(f"--num {num}: at least 2 images have a distribution")


def open_truth(reference: str | None, labels: str, subject: Subject, work: Work) -> tuple[Truth, Subject]:
    """What a subject is held against, by default the data that it learnt from; and the subject with the ``labels``
    that were asked for, which may have to be those of the reference.

    Raises:
        PraError: no such data, or data that do not tell how frequent the model's classes are.
    """
    spec = reference or subject.settings.data.source
    if not spec:
        raise PraError(f"{subject.target} does not say which data it belongs to; give --reference SRC or STATS.npz")
    truth = Truth(spec, None if spec.endswith(".npz") else open_alone(spec, work))
    if reference and truth.source and work.world.is_first:
        _tell_of_colour(truth.source, subject.channels)
    return truth, _labelled(subject, labels, truth)


def _tell_of_colour(source: Source, channels: int) -> None:
    """A line where the reference's images, going by the first, are grey and the judged ones not, or the reverse."""
    with contextlib.suppress(CorruptImage):  # which is told, or passed over, when its turn comes
        grey = picture_shape(source.image(0))[1] == 1
        if grey != (channels == 1):
            turned = f"is grey, and gets {channels} channels" if grey else "has colour, and turns grey"
            print(f"the reference {source.name} {turned}, like the images that are judged")


def open_alone(spec: str, work: Work) -> Source:
    """A source that the first process opens before the others."""
    with work.world.first_alone():  # some sources are indexed once
        return open_source(spec)


def _labelled(subject: Subject, labels: str, truth: Truth) -> Subject:
    """A model's images with the labels that were asked for.

    Raises:
        PraError: finished images, or a reference that does not tell how frequent the model's classes are.
    """
    source, option = truth.source, "--labels reference"
    if labels == "balanced":
        if subject.sampler and source:
            _warn_of_balance(source)
        return subject
    if subject.sampler is None:
        raise PraError(f"{option} is for sampling; these images are finished: leave it out")
    if source is None:
        raise PraError(f"{option}: {truth.spec} does not say how frequent its classes are; give a data source")
    check_classes(source, subject.sampler.model, option)
    return subject.labelled_like(source)


def _warn_of_balance(source: Source) -> None:
    counts = np.bincount(source.labels, minlength=len(source.classes))
    largest = int(counts.argmax())
    if counts[largest] * len(source.classes) > 2 * len(source):
        warnings.warn(
            f"{counts[largest] / len(source):.0%} of {source.name} are {source.classes[largest]!r}, and every class "
            "is sampled equally often: FID sees another mixture; --labels reference samples classes as often as there",
            stacklevel=2,
        )


def check_classes(source: Source, model: Model, option: str) -> None:
    """Refuses labels that mean something else to the model.

    Raises:
        PraError: they do; ``option`` is what asks for them.
    """
    there, own = source.classes, model.classes
    if there == own:
        return
    differing = [place for place, names in enumerate(zip(there, own, strict=False)) if names[0] != names[1]]
    if len(there) != len(own):
        how = f"{source.name} has {len(there)} classes, the model {len(own)}"
    else:
        how = f"class {differing[0]} is {there[differing[0]]!r} in {source.name}, {own[differing[0]]!r} in the model"
    raise PraError(f"{option} needs the labels of the model's own classes: {how}; give such a --reference")


def extractor(features: str, weights: Path | None, truth: Truth, subject: Subject, work: Work) -> FeatureExtractor:
    """The features of that name: downloaded, read from ``weights``, or fitted on the reference.

    Raises:
        PraError: weights that cannot be had or read, or a reference to fit on that is a file.
    """
    with work.world.first_alone():  # downloads, or fits; the others find it in the cache
        if (opener := REGISTRY.added(features)) is not None:
            return _checked(features, opener(weights, work.device))
        if features == "inception":
            return inception(weights, work.device)
        if features == "dinov2":
            return dinov2(weights, work.device)
        if weights is not None:
            return Classifier(weights, work.device)
        return _classifier(truth, subject, work)


def _checked(name: str, made: FeatureExtractor) -> FeatureExtractor:
    if not isinstance(made, FeatureExtractor):
        raise PraError(f"features {name!r}: {made!r} is not an extractor. Return the members of FeatureExtractor")
    return made


def _classifier(truth: Truth, subject: Subject, work: Work) -> Classifier:
    if truth.source is not None:
        data = subject.settings.data
        return fit_classifier(truth.source, subject.size, subject.channels, data, work.device, work.world.is_first)
    recorded = recorded_features(truth.file)
    if recorded is None or recorded[0] != "classifier":
        raise PraError(
            f"{truth.spec} is not of a classifier, nor a data source to fit one on; use --features inception, or give "
            "the data source"
        )
    return find_classifier(recorded[1], work.device)


def measured(truth: Truth, judge: FeatureExtractor, subject: Subject, work: Work) -> Reference:
    """The reference as ``judge`` sees it: read from its file, or gathered over its images.

    Raises:
        PraError: a file of other features, or images that cannot be read.
    """
    if truth.source is None:
        return from_file(truth.file, judge, world=work.world)
    return from_source(
        truth.source, subject.size, subject.channels, subject.settings.data, judge,
        batch_size=work.batch_size, world=work.world,
    )  # fmt: skip

"""Measurements of a trained run: rows for a study's table."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pra.config import RunConfig, SamplingConfig, TimeGrid
from pra.data import load_images, open_source
from pra.errors import PraError
from pra.evaluation import evaluate, reconstruct
from pra.evaluation.classifier import Classifier, fit_classifier
from pra.evaluation.features import FeatureExtractor
from pra.evaluation.probe import Layers, Pixels, Task, Vectors, find_linear, held_out
from pra.evaluation.reference import Reference, from_file, from_source
from pra.evaluation.rollout_gap import rollout_gap
from pra.evaluation.samples import labels_like, prepared, spread
from pra.models import Model, build_model
from pra.sampling import Sampler, solvers
from pra.sampling.batches import Batch
from pra.sampling.guidance import mean_steps
from pra.sampling.learnt_grid import learn_grid
from pra.sampling.whole_image import stages
from pra.utils.pixels import from_uint8, to_uint8
from studies.settings import Scale, Setting

Row = dict[str, Any]

BATCH = 500
KEPT_FEATURES = 2_000
"""Images for KID, precision and recall."""


@dataclass(frozen=True)
class Judge:
    """A setting's features and reference, as files that worker processes read."""

    setting: Setting
    classifier: Path
    fingerprint: str
    statistics: Path

    @property
    def name(self) -> str:
        """The name of the classifier, for the column ``judge``: figures of two judges do not compare."""
        return self.fingerprint[:12]

    @staticmethod
    def prepare(setting: Setting, kept: Path, folder: Path, device: torch.device, progress: bool = True) -> Judge:
        """Fits the setting's classifier and gathers the statistics of its training images, both once.

        Args:
            setting: whose images are judged.
            kept: where classifiers stay, beside their figures: another machine would fit a different one.
            folder: for files that can be made again.
            device: where to fit and to judge.
            progress: whether to show bars.

        Raises:
            PraError: the data are not there, or the disk refuses.
        """
        source = open_source(setting.data.source)
        size = (setting.image_size, setting.image_size)
        extractor = fit_classifier(source, size, setting.channels, setting.data, device, progress, kept)
        path = folder / f"{setting.dataset}-{setting.image_size}-{extractor.fingerprint[:12]}.npz"
        if not path.exists() or from_file(path, extractor).steps is None:  # as older versions wrote it
            reference = from_source(
                source, size, setting.channels, setting.data, extractor, keep=KEPT_FEATURES, progress=progress
            )
            reference.save(path)
        return Judge(setting, extractor.path, extractor.fingerprint, path)

    def open(self, device: torch.device) -> tuple[FeatureExtractor, Reference]:
        """The features and the reference."""
        return _opened(self, device)


@functools.cache
def _opened(judge: Judge, device: torch.device) -> tuple[FeatureExtractor, Reference]:
    extractor = Classifier(judge.classifier, device)
    return extractor, from_file(judge.statistics, extractor)


@dataclass(frozen=True)
class Quality:
    """FID, KID, precision, recall and accuracy of ``images`` samples, by the classifier's features.

    With ``learnt_grid`` each model's own solver grid is learned first.
    """

    sampling: SamplingConfig
    images: int
    learnt_grid: bool = False

    @property
    def key(self) -> str:
        """The settings that decide the figures, for the column ``measured``."""
        how = self.sampling
        words = [f"guidance={how.guidance:g}", f"{how.solver.value}-{how.steps}", f"{self.images} images"]
        named = (
            "schedule",
            "temperature",
            "renormalise",
            "time_grid",
            "shift",
            "guidance_interval",
            "times",
            "raster_steps",
        )
        default = SamplingConfig()
        words += [f"{name}={getattr(how, name)}" for name in named if getattr(how, name) != getattr(default, name)]
        return " ".join([*words, *(["learnt grid"] if self.learnt_grid else [])])

    def rows(self, model: Model, config: RunConfig, judge: Judge) -> list[Row]:
        """One row."""
        begin, sampling = time.monotonic(), self.sampling
        if self.learnt_grid:
            sampling = replace(sampling, times=learn_grid(model, sampling).times)
        sampler = Sampler(model, sampling)
        # Labels as frequent as in training: emoji are mostly people, and FID would see another mixture.
        source = open_source(config.data.source)
        labels = labels_like(source, self.images)
        batches = (
            Batch(to_uint8(sampler.sample(part, range(start, start + len(part)))), part, start)
            for start, part in zip(range(0, self.images, BATCH), torch.split(labels, BATCH), strict=True)
        )
        figures = _judged(batches, self.images, judge, sampler.device)
        seconds = time.monotonic() - begin
        return [_sampling_columns(sampling, model) | figures | {"images": self.images, "sample_seconds": seconds}]


@dataclass(frozen=True)
class Reconstruction:
    """The codec alone: reconstruction FID, PSNR (dB), SSIM over ``images`` training images."""

    images: int

    @property
    def key(self) -> str:
        """See :attr:`Quality.key`."""
        return f"reconstruction {self.images} images"

    def rows(self, model: Model, config: RunConfig, judge: Judge) -> list[Row]:
        """One row."""
        extractor, _ = judge.open(model.device)
        source = open_source(config.data.source)
        chosen = spread(len(source), min(self.images, len(source)))
        size, channels = config.model.image_size, config.model.channels
        with closing(prepared(source, chosen, size, channels, config.data, BATCH)) as batches:
            figures = reconstruct(model, batches, extractor, len(chosen), progress=False)
        return [{**figures, "images": len(chosen), "judge": judge.name}]


@dataclass(frozen=True)
class Gap:
    """The rollout gap (:mod:`pra.evaluation.rollout_gap`), a row per position; its samples' FID and accuracy beside."""

    sampling: SamplingConfig
    images: int

    @property
    def key(self) -> str:
        """See :attr:`Quality.key`."""
        return f"rollout-gap {self.sampling.solver.value}-{self.sampling.steps} {self.images} images"

    def rows(self, model: Model, config: RunConfig, judge: Judge) -> list[Row]:
        """One row per position."""
        if not model.config.autoregressive:
            kind = model.config.name
            raise PraError(f"{kind} writes all patches at once, so it has neither rollout nor gap; leave it out")
        begin = time.monotonic()
        source = open_source(config.data.source)
        chosen = spread(len(source), min(self.images, len(source)))
        pixels, labels = load_images(source, chosen, config.model.image_size, config.model.channels, config.data)
        gap = rollout_gap(
            model, config.train.rollout, from_uint8(pixels), labels, self.sampling, config.train.objective
        )
        batches = [Batch(to_uint8(gap.samples), labels, 0)]
        figures = _judged(batches, len(chosen), judge, model.device)
        common = _sampling_columns(replace(self.sampling, guidance=1.0), model) | figures | {"images": len(chosen)}
        seconds = time.monotonic() - begin
        positions = range(config.model.num_groups)
        return [
            {
                **common,
                "position": position,
                # The first position has no input beyond the class.
                "input_gap": gap.inputs[position - 1].item() if position else None,
                "condition_gap": gap.conditions[position].item(),
                "training_loss": gap.training_loss[position].item(),
                "rollout_loss": gap.rollout_loss[position].item(),
                "sample_seconds": seconds,
            }
            for position in positions
        ]


@dataclass(frozen=True)
class Probe:
    """A linear probe (:mod:`pra.evaluation.probe`) of every layer, fitted on ``images`` training images by logistic
    regression, judged on as many held-out ones.

    ``of`` is ``"trained"``, ``"random"`` for the initial weights, or ``"pixels"`` for raw pixels; ``time`` is JiT's.
    """

    of: str
    images: int
    time: float | None = None

    @property
    def key(self) -> str:
        """See :attr:`Quality.key`."""
        at = "" if self.time is None else f" t={self.time:g}"
        return f"probe {self.of}{at} logistic {self.images} images"

    def rows(self, model: Model, config: RunConfig, judge: Judge) -> list[Row]:
        """One row per layer and pooling."""
        begin = time.monotonic()
        device = model.device
        source, size, channels = config.data.source, config.model.image_size, config.model.channels
        task = Task.open(config.data, source, held_out(source), self.images)
        if self.of == "random":
            model = build_model(config.model, config.train.seed).to(device).eval()
        layers = range(1, 1 + len(model.blocks))
        vectors: Vectors = Pixels() if self.of == "pixels" else Layers(model, layers, self.time)
        figures = task.figures(vectors, find_linear("logistic"), size, channels, device, progress=False)
        common = {"images": len(task.chosen), "held_out": len(task.asked), "time": self.time}
        common["sample_seconds"] = time.monotonic() - begin
        names = ("layer", "pooling", "top1", "validation")
        return [common | {name: getattr(figure, name) for name in names} for figure in figures]


@dataclass(frozen=True)
class HeldOut:
    """Quality of the held-out real images: the figures of a perfect model that does not copy."""

    @property
    def key(self) -> str:
        """See :attr:`Quality.key`."""
        return "held-out images"

    def rows(self, model: Model, config: RunConfig, judge: Judge) -> list[Row]:
        """One row."""
        source = open_source(held_out(config.data.source))
        size, channels = config.model.image_size, config.model.channels
        pixels, labels = load_images(source, range(len(source)), size, channels, config.data)
        figures = _judged([Batch(pixels, labels, 0)], len(source), judge, model.device)
        return [figures | {"images": len(source)}]


Measure = Quality | Reconstruction | Gap | Probe | HeldOut


def sweep(setting: Setting, scale: Scale, sampling: SamplingConfig) -> Iterator[Quality]:
    """Quality at each guidance of a setting at a scale: the same search for every system."""
    for guidance in (*scale.guidances, *setting.further_guidances):
        yield Quality(replace(sampling, guidance=guidance), scale.samples)


def _judged(batches: Iterable[Batch], count: int, judge: Judge, device: torch.device) -> Row:
    extractor, reference = judge.open(device)
    patch_size = judge.setting.patch_size
    report = evaluate(batches, reference, extractor, count, KEPT_FEATURES, progress=False, patch_size=patch_size)
    figures = report.figures["torch-fidelity"]
    kept = ("fid", "accuracy", "kid", "precision", "recall", "seams")
    return {name: figures.get(name) for name in kept} | {"judge": judge.name}


def _sampling_columns(sampling: SamplingConfig, model: Model) -> Row:
    each = mean_steps(sampling, model.config.num_groups) * solvers.EVALUATIONS[sampling.solver]
    return {
        "guidance": sampling.guidance,
        "solver": _solver(sampling),
        "solver_steps": sampling.steps,
        "evaluations": (int(each) if each.is_integer() else each)
        if model.config.autoregressive
        else whole_image_evaluations(sampling),
        "renormalise": sampling.renormalise,
    }


def whole_image_evaluations(sampling: SamplingConfig) -> int:
    """Count the evaluations of a model that generates all patches at once. Guidance does not count."""
    return sum(solvers.EVALUATIONS[solver] * (len(times) - 1) for solver, times in stages(sampling))


def _solver(sampling: SamplingConfig) -> str:
    """Name a solver, and its time grid where that is not the uniform one."""
    grid = [sampling.time_grid.value] if sampling.time_grid is not TimeGrid.UNIFORM else []
    grid = grid if sampling.times is None else ["learnt"]
    shift = [f"shift {sampling.shift:g}"] if sampling.shift != 1.0 else []
    return ", ".join([sampling.solver.value, *grid, *shift])

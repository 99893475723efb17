"""The time and memory of a training step, whole and in parts, measured in turn so that a drifting machine cancels out.

The step is the training loop's (:mod:`pra.training.step`), on images that lie ready on the device.
"""

from __future__ import annotations

import itertools
import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from pra.bench.device import timed
from pra.config import Clean, Rollout, RunConfig
from pra.errors import PraError
from pra.method import noise
from pra.method.objectives import Perceptual
from pra.models import build_model
from pra.training.averages import build_averages
from pra.training.step import Step
from pra.utils.compiler import compiled
from pra.utils.device import autocast

WARM_UPS = 2
"""Rounds before those that count: libraries choose their kernels, a compiler compiles."""


@dataclass(frozen=True)
class Seconds:
    """Median and range over the rounds."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Measured:
    """One step: its time, the parts of it, the memory it took, and the teacher-forced step's time.

    ``parts`` are seconds by name, differences of medians where a part does not run alone. ``memory`` is the peak in
    bytes: allocated on a CUDA device, elsewhere of this process. ``ratio`` is the step, without LPIPS, over a
    teacher-forced one of the same backbone, whose time is ``teacher_forced``; both are None for such a step itself.
    """

    step: Seconds
    parts: dict[str, float]
    memory: int
    teacher_forced: Seconds | None
    ratio: Seconds | None


class SyntheticStep(Step):
    """A training step on random images, and its parts. The batch of ``run`` is this device's."""

    def __init__(self, run: RunConfig, device: torch.device, perceptual: Perceptual | None = None) -> None:
        model = build_model(run.model, run.train.seed).to(device)
        super().__init__(model, build_averages(model, run.train), run.train, device)
        self.perceptual = perceptual
        micro, self.count = run.train.micro_batches(1)
        places = torch.arange(micro, device=device)
        self.images = torch.rand(micro, run.model.channels, *run.model.image_size, device=device) * 2 - 1
        self.labels, self.keys = places % run.model.num_classes, noise.keys(0, places)
        if run.model.codec is not None:
            clean: Any = model.clean_conditions
            self.clean = compiled(clean, "--compile", "leave --compile out") if run.train.compile else clean

    def __call__(self, with_perceptual: bool = True) -> None:
        """Do the whole step, or all but LPIPS."""
        self.learn(self.train.rollout, self.perceptual if with_perceptual else None)
        self.update(0)

    def learn(self, rollout: Rollout | None, perceptual: Perceptual | None) -> None:
        """Do the passes of every micro-batch; without a rollout, the reconstruction pass alone."""
        given = itertools.repeat((self.images, self.labels, self.keys), self.count)
        self.passes(given, self.count, rollout, perceptual)

    def clean_pass(self) -> None:
        """Compute the conditions of the encoder, of every micro-batch."""
        for _ in range(self.count):
            with torch.no_grad(), autocast(self.device, self.train.precision):
                self.clean(self.labels, self.model.patchify(self.images))

    def distances(self) -> None:
        """Compute LPIPS of every micro-batch, and its gradient."""
        assert self.perceptual is not None, "a step without LPIPS"
        for _ in range(self.count):
            other = torch.zeros_like(self.images, requires_grad=True)
            with autocast(self.device, self.train.precision):
                distance = self.perceptual(other, self.images)
            torch.autograd.backward(distance.mean())

    def pieces(self) -> dict[str, Callable[[], object]]:
        """Return what is timed, in this order: after the passes there are gradients to update with."""
        found: dict[str, Callable[[], object]] = {}
        codec = self.model.config.codec
        if codec is not None:
            if codec.encoder.sees_condition:
                found["clean pass"] = self.clean_pass
            found["codec"] = lambda: self.learn(None, None)
        if self.perceptual is not None:
            found["LPIPS"] = self.distances
        found["passes"] = lambda: self.learn(self.train.rollout, self.perceptual)
        return found


def measure_step(run: RunConfig, device: torch.device, rounds: int, perceptual: Perceptual | None) -> Measured:
    """Time all parts of a step on one device, ``rounds`` times; the batch of ``run`` is the device's.

    Raises:
        PraError: the device's memory is too small, or the compiler fails.
    """
    try:
        own = SyntheticStep(run, device, perceptual)
        memory = _memory(own)
        if own.losses.uncompiled:  # a warning is enough for training, not for figures of what is compiled
            raise own.losses.uncompiled
        other = SyntheticStep(teacher_forced(run), device) if run.model.codec is not None else None
        pieces = own.pieces()
        rows = [_round(own, pieces, other) for _ in range(WARM_UPS + rounds)][WARM_UPS:]
    except torch.OutOfMemoryError:
        micro, count = run.train.micro_batches(1)
        smaller = "--micro" if count > 1 else "--batch, or a --micro that divides it"
        problem = f"{micro} images at a time are too many for the memory of {device}. Use a smaller {smaller}"
        raise PraError(problem, code="too-large", value=micro) from None
    series = {name: [row[name] for row in rows] for name in rows[0]}
    return Measured(
        summary(series["step"]),
        _parts({name: statistics.median(values) for name, values in series.items()}),
        memory,
        summary(series["teacher-forced"]) if other else None,
        summary([row["alone"] / row["teacher-forced"] for row in rows]) if other else None,
    )


def teacher_forced(run: RunConfig) -> RunConfig:
    """Return the same backbone on clean patches, with the patch as the state.

    The recipe of that name is larger: it spends the codec's parameters on a deeper backbone.
    """
    assert run.model.autoregressive, "only an autoregressive model has such a step"
    objective = replace(run.train.objective, perceptual_weight=0.0)
    train = replace(run.train, rollout=Clean(), codec_warmup=0, objective=objective)
    return replace(run, model=replace(run.model, codec=None), train=train)


def summary(values: list[float]) -> Seconds:
    """Return median and range."""
    return Seconds(statistics.median(values), min(values), max(values))


def _round(
    own: SyntheticStep, pieces: dict[str, Callable[[], object]], other: SyntheticStep | None
) -> dict[str, float]:
    """Seconds of everything, each once."""
    device = own.device
    row = {"step": timed(own, device)}
    if other is not None:
        row["alone"] = row["step"]
        if own.perceptual is not None:
            row["alone"] = timed(lambda: own(with_perceptual=False), device)
        row["teacher-forced"] = timed(other, device)
    for name, piece in pieces.items():
        own.optimizer.zero_grad()
        row[name] = timed(piece, device)
    row["update"] = timed(lambda: own.update(0), device)
    return row


def _parts(medians: dict[str, float]) -> dict[str, float]:
    """Seconds by part. The passes run together, so the AR pass is what the other parts leave of them."""
    clean, codec, distances = (medians.get(name, 0.0) for name in ("clean pass", "codec", "LPIPS"))
    parts = {"clean pass": clean, "codec": codec - clean, "LPIPS": distances}
    parts = {name: seconds for name, seconds in parts.items() if seconds}
    rest = max(0.0, medians["passes"] - sum(parts.values()))
    return parts | {"AR pass" if parts else "passes": rest, "optimiser and average": medians["update"]}


def _memory(step: SyntheticStep) -> int:
    """Peak bytes of a step that is not the first."""
    step()
    if step.device.type != "cuda":
        step()
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    torch.cuda.reset_peak_memory_stats(step.device)
    step()
    return int(torch.cuda.max_memory_allocated(step.device))

"""The time and memory of a training step, whole and in parts, measured in turn so that a drifting machine cancels out.

The step is the training loop's: the same loss, optimiser and average, on images that lie ready on the device.
"""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pra.bench.device import timed
from pra.config import Clean, Rollout, RunConfig
from pra.errors import PraError
from pra.method import noise
from pra.method.objectives import Perceptual, losses_of
from pra.models import build_model
from pra.training.averages import build_averages
from pra.training.optimizer import build_optimizer
from pra.training.parallel import SharedLoss
from pra.utils.compiler import compiled
from pra.utils.device import autocast
from pra.utils.distributed import ALONE

WARM_UPS = 2
"""Rounds before those that count: libraries choose their kernels, a compiler compiles."""


@dataclass(frozen=True)
class Seconds:
    """Of something done several times: the median, and the range."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Measured:
    """One step: its time, the parts of it, the memory it took, and the teacher-forced step's time.

    ``parts`` are seconds by name, differences of medians where a part does not run alone. ``memory`` is in bytes:
    allocated on a CUDA device at the highest, elsewhere of this process. ``ratio`` is the step, without LPIPS, over a
    teacher-forced one of the same backbone, None where it is one itself; ``teacher_forced`` the latter's time.
    ``speedup`` is the step without the compiler over the compiled one, None where it is not compiled.
    """

    step: Seconds
    parts: dict[str, float]
    memory: int
    teacher_forced: Seconds | None
    ratio: Seconds | None
    speedup: Seconds | None


class Step:
    """A model in training on one device, and what a step of it consists of.

    Args:
        run: the configuration; its batch is this device's.
        device: where.
        perceptual: LPIPS, where the step has it.
    """

    def __init__(self, run: RunConfig, device: torch.device, perceptual: Perceptual | None = None) -> None:
        self.train, self.device, self.perceptual = run.train, device, perceptual
        self.model = build_model(run.model, run.train.seed).to(device)
        self.averages = list(build_averages(self.model, run.train).values())
        models = [average.model for average in self.averages]
        self.losses = SharedLoss(self.model, models, losses_of(self.model), run.train, ALONE, device, idle=False)
        self.optimizer = build_optimizer(self.model, run.train.optimizer)
        micro, self.count = run.train.micro_batches(1)
        self.labels = torch.arange(micro, device=device) % run.model.num_classes
        self.images = torch.rand(micro, run.model.channels, *run.model.image_size, device=device) * 2 - 1
        self.keys = noise.keys(0, torch.arange(micro, device=device))
        if self.model.config.codec is not None:
            clean = self.model.clean_conditions
            self.clean = compiled(clean, "--compile", "leave --compile out") if run.train.compile else clean

    def __call__(self) -> None:
        """The whole step."""
        self.passes(self.train.rollout, self.perceptual)
        self.update()

    def without_perceptual(self) -> None:
        """The step without LPIPS."""
        self.passes(self.train.rollout, None)
        self.update()

    def passes(self, rollout: Rollout | None, perceptual: Perceptual | None) -> None:
        """Forward and backward of every micro-batch; without a rollout, of the reconstruction pass alone."""
        for place in range(1, self.count + 1):
            with self.losses.accumulating(last=place == self.count):
                with autocast(self.device, self.train.precision):
                    objective = self.train.objective
                    losses = self.losses(self.images, self.labels, self.keys, objective, rollout, perceptual)
                torch.autograd.backward(losses.total / self.count)

    def clean_pass(self) -> None:
        """The conditions of the encoder, of every micro-batch."""
        for _ in range(self.count):
            with torch.no_grad(), autocast(self.device, self.train.precision):
                self.clean(self.labels, self.model.patchify(self.images))

    def distances(self) -> None:
        """LPIPS of every micro-batch, and its gradient."""
        assert self.perceptual is not None, "a step without LPIPS"
        for _ in range(self.count):
            other = torch.zeros_like(self.images, requires_grad=True)
            with autocast(self.device, self.train.precision):
                distance = self.perceptual(other, self.images)
            torch.autograd.backward(distance.mean())

    def update(self) -> None:
        """Clipping, the optimiser, the averages."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.optimizer.clip)
        self.optimizer.step()
        self.forget()
        for average in self.averages:
            average.update(self.model, 0)

    def forget(self) -> None:
        """Drops the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def pieces(self) -> dict[str, Callable[[], None]]:
        """What is timed, in this order: after the passes there are gradients to update by."""
        found: dict[str, Callable[[], None]] = {}
        codec = self.model.config.codec
        if codec is not None:
            if codec.encoder.sees_condition:
                found["clean pass"] = self.clean_pass
            found["codec"] = lambda: self.passes(None, None)
        if self.perceptual is not None:
            found["LPIPS"] = self.distances
        found["passes"] = lambda: self.passes(self.train.rollout, self.perceptual)
        return found


def measure_step(run: RunConfig, device: torch.device, rounds: int, perceptual: Perceptual | None) -> Measured:
    """Measures a step on one device.

    Args:
        run: the configuration; its batch is the device's.
        device: where.
        rounds: how often everything is timed.
        perceptual: LPIPS on the device, where the run has it.

    Raises:
        PraError: the device's memory is too small, or the compiler fails.
    """
    try:
        own = Step(run, device, perceptual)
        memory = _memory(own)
        if own.losses.uncompiled:  # a warning is enough for training, not for figures of what is compiled
            raise own.losses.uncompiled
        other = Step(teacher_forced(run), device) if run.model.codec is not None else None
        alike = replace(run, train=replace(run.train, compile=False))
        plain = Step(alike, device, perceptual) if run.train.compile else None
        rows = [_round(own, other, plain) for _ in range(WARM_UPS + rounds)][WARM_UPS:]
    except torch.OutOfMemoryError:
        micro, count = run.train.micro_batches(1)
        raise PraError(
            f"{micro} images at a time are too many for the memory of {device}; "
            f"take a smaller {'--micro' if count > 1 else '--batch, or a --micro that divides it'}"
        ) from None
    series = {name: [row[name] for row in rows] for name in rows[0]}
    return Measured(
        summary(series["step"]),
        _parts({name: statistics.median(values) for name, values in series.items()}),
        memory,
        summary(series["teacher-forced"]) if other else None,
        summary([row["alone"] / row["teacher-forced"] for row in rows]) if other else None,
        summary([row["plain"] / row["step"] for row in rows]) if plain else None,
    )


def teacher_forced(run: RunConfig) -> RunConfig:
    """The same backbone on clean patches, with the patch as the state. (The recipe of that name spends the codec's
    parameters on a deeper backbone.)"""
    assert run.model.autoregressive, "only an autoregressive model has such a step"
    objective = replace(run.train.objective, perceptual_weight=0.0)
    train = replace(run.train, rollout=Clean(), codec_warmup=0, objective=objective)
    return replace(run, model=replace(run.model, codec=None), train=train)


def summary(values: list[float]) -> Seconds:
    """Median and range."""
    return Seconds(statistics.median(values), min(values), max(values))


def _round(own: Step, other: Step | None, plain: Step | None) -> dict[str, float]:
    """Seconds of everything, each once."""
    device = own.device
    row = {"step": timed(own, device)}
    if plain is not None:
        row["plain"] = timed(plain, device)
    if other is not None:
        row["alone"] = row["step"]
        if own.perceptual is not None:
            row["alone"] = timed(own.without_perceptual, device)
        row["teacher-forced"] = timed(other, device)
    for name, piece in own.pieces().items():
        own.forget()
        row[name] = timed(piece, device)
    row["update"] = timed(own.update, device)
    return row


def _parts(medians: dict[str, float]) -> dict[str, float]:
    """Seconds by part. The passes run together, so that the AR pass is what the others leave of them."""
    clean, codec, distances = (medians.get(name, 0.0) for name in ("clean pass", "codec", "LPIPS"))
    parts = {"clean pass": clean, "codec": codec - clean, "LPIPS": distances}
    parts = {name: seconds for name, seconds in parts.items() if seconds}
    rest = max(0.0, medians["passes"] - sum(parts.values()))
    return parts | {"AR pass" if parts else "passes": rest, "optimiser and average": medians["update"]}


def _memory(step: Step) -> int:
    """Bytes at the highest, of a step that is not the first."""
    step()
    if step.device.type != "cuda":
        step()
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    torch.cuda.reset_peak_memory_stats(step.device)
    step()
    return int(torch.cuda.max_memory_allocated(step.device))

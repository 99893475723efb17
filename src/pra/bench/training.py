"""The time and memory of a training step, whole and in parts, measured in turn so that a drifting machine cancels out.

The step is the training loop's (:mod:`pra.training.step`), on images that lie ready on the device.
"""

from __future__ import annotations

import itertools
import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pra.bench.device import timed
from pra.config import Clean, Rollout, RunConfig
from pra.errors import PraError
from pra.method import noise
from pra.method.objectives import Perceptual
from pra.models import build_model
from pra.training.averages import build_averages
from pra.training.step import COMPILE, Step
from pra.utils.compiler import compiled
from pra.utils.device import autocast

WARM_UPS = 2
"""Rounds before those that count: libraries choose their kernels, a compiler compiles."""


Seconds = dict[str, float]
"""Over the rounds: ``median``, ``lowest`` and ``highest``."""


class SyntheticStep(Step):
    """A training step on random images. The batch of ``run`` is this device's."""

    def __init__(self, run: RunConfig, device: torch.device, perceptual: Perceptual | None = None) -> None:
        model = build_model(run.model, run.train.seed).to(device)
        super().__init__(model, build_averages(model, run.train), run.train, device)
        self.perceptual = perceptual
        micro, self.count = run.train.micro_batches(1)
        places = torch.arange(micro, device=device)
        self.images = torch.rand(micro, run.model.channels, *run.model.image_size, device=device) * 2 - 1
        self.labels, self.keys = places % run.model.num_classes, noise.keys(0, places)

    def __call__(self, with_perceptual: bool = True) -> None:
        """Do the whole step, or all but LPIPS."""
        self.learn(self.train.rollout, self.perceptual if with_perceptual else None)
        self.update(0)

    def learn(self, rollout: Rollout | None, perceptual: Perceptual | None) -> None:
        """Do the passes of every micro-batch; without a rollout, the reconstruction pass alone."""
        given = itertools.repeat((self.images, self.labels, self.keys), self.count)
        self.passes(given, self.count, rollout, perceptual)

    def works(self) -> dict[str, Callable[[], object]]:
        """Return the step, and the parts of it that run alone.

        The update comes after the passes, as it needs their gradients. The codec's pass comes last and leaves its own.
        """
        found: dict[str, Callable[[], object]] = {"step": self}
        if self.perceptual is not None:
            found["without LPIPS"] = lambda: self(with_perceptual=False)
        found["passes"] = lambda: self.learn(self.train.rollout, self.perceptual)
        found["update"] = lambda: self.update(0)
        codec, model = self.model.config.codec, self.model
        if codec is not None and codec.encoder.sees_condition:
            clean: Any = model.clean_conditions
            clean = compiled(clean, *COMPILE) if self.train.compile else clean

            def conditions() -> None:
                for _ in range(self.count):
                    with torch.no_grad(), autocast(self.device, self.train.precision):
                        clean(self.labels, model.patchify(self.images))

            found["clean pass"] = conditions
        if codec is not None:
            found["codec"] = lambda: self.learn(None, None)
        return found


def measure_step(run: RunConfig, device: torch.device, rounds: int, perceptual: Perceptual | None) -> dict[str, Any]:
    """Time all parts of a step on one device, ``rounds`` times; the batch of ``run`` is the device's.

    Returns:
        ``step``, its :data:`Seconds`; ``parts``, seconds by name, differences of medians where a part does not run
        alone; ``memory``, the peak in bytes: allocated on a CUDA device, elsewhere of this process. ``ratio`` is the
        step, without LPIPS, over a teacher-forced one of the same backbone, which takes ``teacher_forced``
        :data:`Seconds`; both are None for such a step itself.

    Raises:
        PraError: the device's memory is too small, or the compiler fails.
    """
    try:
        own = SyntheticStep(run, device, perceptual)
        memory = _memory(own)
        if own.uncompiled:  # a warning is enough for training, not for figures of what is compiled
            raise own.uncompiled
        works = own.works()
        if run.model.codec is not None:
            works["teacher-forced"] = SyntheticStep(teacher_forced(run), device)
        series: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(WARM_UPS + rounds):
            for name, work in works.items():
                series[name].append(timed(work, device))
            own.optimizer.zero_grad()
    except torch.OutOfMemoryError:
        micro, _ = run.train.micro_batches(1)
        problem = (
            f"{micro} images at a time are too many for the memory of {device}. Use a smaller --batch, or a smaller "
            "train.micro_batch_size that divides it"
        )
        raise PraError(problem, code="too-large", value=micro) from None
    counted = {name: values[WARM_UPS:] for name, values in series.items()}
    parts = _parts({name: statistics.median(values) for name, values in counted.items()})
    other, alone = counted.get("teacher-forced"), counted.get("without LPIPS", counted["step"])
    return {
        "step": summary(counted["step"]),
        "parts": parts,
        "memory": memory,
        "teacher_forced": summary(other) if other else None,
        "ratio": summary([a / b for a, b in zip(alone, other, strict=True)]) if other else None,
    }


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
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def _parts(medians: dict[str, float]) -> dict[str, float]:
    """Seconds by part. The passes run together, so the AR pass is what the other parts leave of them."""
    order = ["clean pass", "codec"]
    parts = {name: medians[name] for name in order if name in medians}
    if "clean pass" in parts:
        parts["codec"] -= parts["clean pass"]
    if "without LPIPS" in medians:
        parts["LPIPS"] = medians["step"] - medians["without LPIPS"]
    rest = max(0.0, medians["passes"] - sum(parts.values()))
    return parts | {"AR pass" if parts else "passes": rest, "optimiser and average": medians["update"]}


def _memory(step: SyntheticStep) -> int:
    """Peak bytes of a step that is not the first."""
    step()
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(step.device)
    step()
    if step.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(step.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""The cost of a training: counts before it begins, and measured time and memory of a step, whole and in parts.

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
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pra.bench.device import timed
from pra.config import Clean, Parallelism, Precision, Rollout, RunConfig
from pra.evaluation.flops import training_flops
from pra.method import noise, perceptual
from pra.method.objectives import Perceptual
from pra.models import build_model, count_parameters
from pra.training.averages import build_averages
from pra.training.step import COMPILE, Step
from pra.utils.compiler import compiled
from pra.utils.device import autocast, enough_memory

WARM_UPS = 2
"""Rounds that do not count: in these, libraries choose their kernels, and the compiler compiles."""

STATES = 5
"""Float32 numbers per parameter after a backward pass: the weight, its gradient, AdamW's two moments, the moving
average. Each of ``train.averages`` adds a number."""

Seconds = dict[str, float]
"""Seconds over the rounds: ``median``, ``lowest`` and ``highest``."""


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
        """Do the whole step, or the step without LPIPS."""
        self.learn(self.train.rollout, self.perceptual if with_perceptual else None)
        self.update(0)

    def learn(self, rollout: Rollout | None, perceptual: Perceptual | None) -> None:
        """Do the passes of every micro-batch; without a rollout, the reconstruction pass alone."""
        given = itertools.repeat((self.images, self.labels, self.keys), self.count)
        self.passes(given, self.count, rollout, perceptual)

    def works(self) -> dict[str, Callable[[], object]]:
        """Return the step, and the parts of it that run alone.

        The update comes after the passes, as it needs their gradients. The codec's pass comes last, as it leaves other
        gradients.
        """
        found: dict[str, Callable[[], object]] = {"step": self}
        if self.perceptual is not None:
            found["without LPIPS"] = lambda: self(with_perceptual=False)
        found["passes"] = lambda: self.learn(self.train.rollout, self.perceptual)
        found["update"] = lambda: self.update(0)
        model: Any = self.model
        if model.config.codec is None:
            return found
        if model.codec.sees_condition:
            clean = compiled(model.clean_conditions, *COMPILE) if self.train.compile else model.clean_conditions

            def conditions() -> None:
                for _ in range(self.count):
                    with torch.no_grad(), autocast(self.device, self.train.precision):
                        clean(self.labels, model.patchify(self.images))

            found["clean pass"] = conditions
        return found | {"codec": lambda: self.learn(None, None)}

    def memory(self) -> int:
        """Do two steps; return the peak bytes of the second: allocated on a CUDA device, elsewhere of this process."""
        self()
        if self.device.type != "cuda":
            self()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        torch.cuda.reset_peak_memory_stats(self.device)
        self()
        return int(torch.cuda.max_memory_allocated(self.device))


def measure_step(run: RunConfig, device: torch.device, rounds: int, perceptual: Perceptual | None) -> dict[str, Any]:
    """Time all parts of a step on one device, ``rounds`` times; the batch of ``run`` is the device's.

    Returns:
        ``step``: its :data:`Seconds`. ``parts``: seconds by name; a part that does not run alone is a difference of
        medians. ``memory``: bytes. ``teacher_forced``: :data:`Seconds` of a teacher-forced step of the same backbone.
        ``ratio``: the step, without LPIPS, over the teacher-forced step. The last two are None without a codec.

    Raises:
        PraError: the device's memory is too small, or the compiler fails.
    """
    fix = "use a smaller --batch, or a smaller train.micro_batch_size that divides it"
    with enough_memory(run.train.micro_batches(1)[0], device, fix):
        own = SyntheticStep(run, device, perceptual)
        memory = own.memory()
        if own.uncompiled:  # training only warns, but figures of a compiled step need a compiler
            raise own.uncompiled
        works = own.works()
        if run.model.codec is not None:
            works["teacher-forced"] = SyntheticStep(teacher_forced(run), device)
        series: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(WARM_UPS + rounds):
            for name, work in works.items():
                series[name].append(timed(work, device))
            own.optimizer.zero_grad()
    counted = {name: values[WARM_UPS:] for name, values in series.items()}
    other, alone = counted.get("teacher-forced"), counted.get("without LPIPS", counted["step"])
    return {
        "step": summary(counted["step"]),
        "parts": _parts({name: statistics.median(values) for name, values in counted.items()}),
        "memory": memory,
        "teacher_forced": summary(other) if other else None,
        "ratio": summary([a / b for a, b in zip(alone, other, strict=True)]) if other else None,
    }


def teacher_forced(run: RunConfig) -> RunConfig:
    """Return a run of the same backbone on clean patches, with the patch as the state.

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
    # The passes run together: the AR pass is the rest after the other parts.
    order = ["clean pass", "codec"]
    parts = {name: medians[name] for name in order if name in medians}
    if "clean pass" in parts:
        parts["codec"] -= parts["clean pass"]
    if "without LPIPS" in medians:
        parts["LPIPS"] = medians["step"] - medians["without LPIPS"]
    rest = max(0.0, medians["passes"] - sum(parts.values()))
    return parts | {"AR pass" if parts else "passes": rest, "optimiser and average": medians["update"]}


# --- counted ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """The counted cost of training.

    ``flops`` are those of one image, with LPIPS's ``perceptual_flops``. ``state_bytes`` hold weights, gradients,
    moments and averages. The forward pass keeps bytes for the backward pass: ``image_bytes`` for every image of a
    micro-batch, and ``fixed_bytes`` for any batch (weights in lower precision).
    """

    parameters: int
    flops: int
    perceptual_flops: int
    state_bytes: int
    fixed_bytes: int
    image_bytes: int


def needs_of(run: RunConfig) -> Needs:
    """Count the cost of training without allocating memory. The largest model takes seconds."""
    extra, parameters = perceptual_flops(run), sum(count_parameters(run.model).values())
    one, two = (saved_bytes(run, images) for images in (1, 2))
    states = (STATES + len(run.train.averages)) * parameters * torch.float32.itemsize
    return Needs(parameters, training_flops(run) + extra, extra, states, max(0, 2 * one - two), two - one)


def device_states(run: RunConfig, needs: Needs, devices: int) -> int:
    """Return the bytes of the states on each of ``devices`` devices.

    Raises:
        PraError: the batch does not divide among them.
    """
    _, parts = run.train.micro_batches(devices)
    if run.train.parallel is not Parallelism.FSDP:
        return needs.state_bytes
    # Devices exchange gradients in the last micro-batch only: until then each device keeps all gradients.
    whole = needs.parameters * torch.float32.itemsize if parts > 1 else 0
    return needs.state_bytes // devices + whole - whole // devices


def perceptual_of(run: RunConfig, device: torch.device) -> Perceptual | None:
    """Return LPIPS with random weights, which cost as much as trained ones; ``None`` if the run's step lacks LPIPS."""
    if not run.train.objective.perceptual_weight or run.model.codec is None:
        return None
    return perceptual.lpips_distance(run.model, device, pretrained=False)


def perceptual_flops(run: RunConfig) -> int:
    """Return the FLOPs of LPIPS on one image: both pictures forward, the reconstruction backward; 0 without LPIPS."""
    distance = perceptual_of(run, torch.device("meta"))
    if distance is None:
        return 0
    shape = (1, run.model.channels, *run.model.image_size)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        torch.autograd.backward(distance(torch.zeros(shape, requires_grad=True), torch.zeros(shape)).sum())
    return int(counter.get_total_flops())


def saved_bytes(run: RunConfig, images: int) -> int:
    """Return the bytes that a forward pass over ``images`` images keeps for the backward pass, without the parameters.

    Counts on fake CPU tensors without memory. A GPU's kernels keep nearly as many bytes.
    """
    train, distance = replace(run.train, compile=False), perceptual_of(run, torch.device("cpu"))
    seen: dict[int, Tensor] = {}  # keep the tensors: the number of a freed storage is used again

    def pack(tensor: Tensor) -> Tensor:
        seen.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        step = Step(build_model(run.model), {}, train, torch.device("cpu"))
        own = {parameter.untyped_storage()._cdata for parameter in step.model.parameters()}
        labels = torch.zeros(images, dtype=torch.int64)
        pixels, keys = torch.zeros(images, run.model.channels, *run.model.image_size), noise.keys(0, labels)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=train.precision is not Precision.FLOAT32),
        ):
            step.loss(pixels, labels, keys, train.objective, train.rollout, distance)
        return sum(tensor.untyped_storage().nbytes() for key, tensor in seen.items() if key not in own)

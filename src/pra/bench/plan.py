"""What a training needs, before it is begun: arithmetic and memory as counted, and from these the time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pra.config import Parallelism, Precision, RunConfig
from pra.evaluation.flops import training_flops
from pra.method import noise
from pra.method.objectives import Perceptual, losses_of
from pra.models import build_model
from pra.training.parallel import SharedLoss
from pra.utils.distributed import ALONE

H200 = 790e12
"""FLOP/s of large bfloat16 matrix products on an NVIDIA H200, as measured (docs/performance.md)."""

STATES = 5
"""Numbers of float32 that a parameter is at the end of a backward pass: the weight, its gradient, AdamW's two moments,
the moving average. Each of ``train.averages`` is one more."""


@dataclass(frozen=True)
class Needs:
    """What training takes, counted.

    ``flops`` of an image, LPIPS's ``perceptual_flops`` among them. Bytes: of weights, gradients, moments and average
    (``state_bytes``), and of what a backward pass has been left by the forward passes, ``fixed_bytes`` whatever the
    batch (weights in lower precision) and ``image_bytes`` of every image of a micro-batch.
    """

    parameters: int
    flops: int
    perceptual_flops: int
    state_bytes: int
    fixed_bytes: int
    image_bytes: int

    def memory(self, images: int, parts: int = 1) -> int:
        """Bytes that a device needs at least for so many images at a time and one of ``parts`` of the states."""
        return self.state_bytes // parts + self.fixed_bytes + images * self.image_bytes


@dataclass(frozen=True)
class Forecast:
    """How fast so many devices train at an ``mfu``: the share of their matrix rate that is counted arithmetic."""

    mfu: float
    images_per_second: float
    seconds: float


def needs_of(run: RunConfig) -> Needs:
    """Counts, without memory for what is counted. Seconds for the largest model."""
    perceptual, extra = perceptual_of(run, torch.device("cpu")), perceptual_flops(run)
    one, two = (_saved_bytes(run, images, perceptual) for images in (1, 2))
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_model(run.model).parameters())
    states = (STATES + len(run.train.averages)) * parameters * torch.float32.itemsize
    flops = training_flops(run) + extra
    return Needs(parameters, flops, extra, states, max(0, 2 * one - two), two - one)


def forecasts(run: RunConfig, needs: Needs, devices: int, rate: float, mfus: list[float]) -> list[Forecast]:
    """The time of the whole run on so many devices of ``rate`` FLOP/s, as a function of the MFU."""
    found = []
    for mfu in mfus:
        images_per_second = devices * mfu * rate / needs.flops
        seconds = run.train.steps * run.train.batch_size / images_per_second
        found.append(Forecast(mfu, images_per_second, seconds))
    return found


def device_memory(run: RunConfig, needs: Needs, devices: int) -> int:
    """Bytes that each of so many devices needs at least. What operations use on the way comes on top.

    Raises:
        PraError: the batch does not divide among them.
    """
    images, parts = run.train.micro_batches(devices)
    if run.train.parallel is not Parallelism.FSDP:
        return needs.memory(images)
    # Gradients pass between devices in the last micro-batch only: until then each device keeps all of them.
    whole = needs.parameters * torch.float32.itemsize if parts > 1 else 0
    return needs.memory(images, devices) + whole - whole // devices


def perceptual_of(run: RunConfig, device: torch.device) -> Perceptual | None:
    """LPIPS with random weights, which cost the same; ``None`` where it is not a part of the run's step.

    Raises:
        PraError: as :func:`pra.method.perceptual.lpips_distance`.
    """
    if not run.train.objective.perceptual_weight or run.model.codec is None:
        return None
    from pra.method.perceptual import lpips_distance

    return lpips_distance(run.model, device, pretrained=False)


def perceptual_flops(run: RunConfig) -> int:
    """FLOPs of LPIPS on one image: both pictures forward, the reconstruction backward; 0 without it."""
    distance = perceptual_of(run, torch.device("meta"))
    if distance is None:
        return 0
    shape = (1, run.model.channels, *run.model.image_size)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        torch.autograd.backward(distance(torch.zeros(shape, requires_grad=True), torch.zeros(shape)).sum())
    return int(counter.get_total_flops())


def _saved_bytes(run: RunConfig, images: int, perceptual: Perceptual | None) -> int:
    """Bytes that a backward pass over so many images has been left, without the parameters.

    Counted on tensors without memory that pass for the CPU's; a GPU's kernels keep nearly the same.
    """
    train = dataclasses.replace(run.train, compile=False)
    bfloat16 = train.precision is not Precision.FLOAT32
    seen: dict[int, Tensor] = {}  # the tensors too: a storage that is freed would lend its number to another

    def pack(tensor: Tensor) -> Tensor:
        seen.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(run.model)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        losses = SharedLoss(model, [], losses_of(model), train, ALONE, torch.device("cpu"), idle=False)
        labels = torch.zeros(images, dtype=torch.int64)
        pixels, keys = torch.zeros(images, run.model.channels, *run.model.image_size), noise.keys(0, labels)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
        ):
            losses(pixels, labels, keys, train.objective, train.rollout, perceptual)
        return sum(tensor.untyped_storage().nbytes() for key, tensor in seen.items() if key not in own)

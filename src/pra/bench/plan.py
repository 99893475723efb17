"""The cost of a training before it begins: counted arithmetic and memory, and the time that follows."""

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
from pra.method.objectives import Perceptual
from pra.models import build_model
from pra.training.step import Step

H200 = 790e12
"""FLOP/s of large bfloat16 matrix products on an NVIDIA H200, as measured (docs/performance.md)."""

STATES = 5
"""Float32 numbers per parameter after a backward pass: the weight, its gradient, AdamW's two moments, the moving
average. Each of ``train.averages`` is one more."""


@dataclass(frozen=True)
class Needs:
    """The counted cost of training.

    ``flops`` of an image include LPIPS's ``perceptual_flops``. Bytes: ``state_bytes`` of weights, gradients, moments
    and averages; and what the forward pass keeps for the backward pass, ``fixed_bytes`` whatever the batch (weights in
    lower precision) and ``image_bytes`` for every image of a micro-batch.
    """

    parameters: int
    flops: int
    perceptual_flops: int
    state_bytes: int
    fixed_bytes: int
    image_bytes: int

    def memory(self, images: int, parts: int = 1) -> int:
        """Return the least bytes of a device for so many images at a time and one of ``parts`` of the states."""
        return self.state_bytes // parts + self.fixed_bytes + images * self.image_bytes


def needs_of(run: RunConfig) -> Needs:
    """Count the cost of training, without allocating it. Seconds for the largest model."""
    extra = perceptual_flops(run)
    one, two = (saved_bytes(run, images) for images in (1, 2))
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_model(run.model).parameters())
    states = (STATES + len(run.train.averages)) * parameters * torch.float32.itemsize
    return Needs(parameters, training_flops(run) + extra, extra, states, max(0, 2 * one - two), two - one)


def forecast(run: RunConfig, needs: Needs, devices: int, rate: float, mfu: float) -> dict[str, float]:
    """Return speed and seconds of the whole run on so many devices of ``rate`` FLOP/s, of which it uses ``mfu``."""
    speed = devices * mfu * rate / needs.flops
    return {"mfu": mfu, "images_per_second": speed, "seconds": run.train.steps * run.train.batch_size / speed}


def device_memory(run: RunConfig, needs: Needs, devices: int) -> int:
    """Return the least bytes of each of so many devices, without temporary memory of operations.

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
    """Return LPIPS with random weights, which cost the same; ``None`` where it is not a part of the run's step."""
    if not run.train.objective.perceptual_weight or run.model.codec is None:
        return None
    from pra.method.perceptual import lpips_distance

    return lpips_distance(run.model, device, pretrained=False)


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
    """Return the bytes that a forward pass over so many images keeps for the backward pass, without the parameters.

    Counted on fake CPU tensors without memory; a GPU's kernels keep nearly the same.
    """
    train, perceptual = dataclasses.replace(run.train, compile=False), perceptual_of(run, torch.device("cpu"))
    seen: dict[int, Tensor] = {}  # keep the tensors: a freed storage's number is used again

    def pack(tensor: Tensor) -> Tensor:
        seen.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(run.model)
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        step = Step(model, {}, train, torch.device("cpu"))
        labels = torch.zeros(images, dtype=torch.int64)
        pixels, keys = torch.zeros(images, run.model.channels, *run.model.image_size), noise.keys(0, labels)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=train.precision is not Precision.FLOAT32),
        ):
            step.loss(pixels, labels, keys, train.objective, train.rollout, perceptual)
        return sum(tensor.untyped_storage().nbytes() for key, tensor in seen.items() if key not in own)

"""The training step: loss, gradients, clipping, optimizer and averages. Training, `pra bench train` and the timing of
models for your own pictures all run this step.

Several processes share the loss by DDP, or FSDP2's ``fully_shard``.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pra.config import Parallelism, Rollout, TrainConfig
from pra.errors import PraError
from pra.method.objectives import Losses, LossTerm, Perceptual, losses_of
from pra.models import BLOCKS, Model
from pra.training.averages import EMA
from pra.training.optimizer import build_optimizer, whole
from pra.utils.compiler import compiled
from pra.utils.device import autocast, in_bfloat16
from pra.utils.distributed import ALONE, World

COMPILE = "train.compile", "set train.compile=false"
"""The setting that asks for a compiler, and the way to switch it off."""

Forward = Callable[..., Any]

MicroBatch = tuple[Tensor, Tensor, Tensor]
"""Images ``(B, C, H, W)`` in [-1, 1], labels ``(B,)`` (or rows with captions) and keys ``(B,)``, on the device."""


class Step:
    """A model in training: its loss, whose gradients all processes share, its optimizer, and its averages.

    The loss calls the parts of a model in its own order, some of them twice. So DDP and FSDP wrap the loss as a whole,
    as the module ``loss``. With ``train.parallel=fsdp`` the model and its averages are sharded. The user's ``terms``
    may not compile: with them only the blocks are compiled. ``begin`` steps are done.
    """

    def __init__(
        self,
        model: Model,
        averages: Mapping[str, EMA],
        train: TrainConfig,
        device: torch.device,
        world: World = ALONE,
        terms: Mapping[str, LossTerm] | None = None,
        begin: int = 0,
    ) -> None:
        self.model, self.averages, self.train, self.device = model, averages, train, device
        self.sharded = world.size > 1 and train.parallel is Parallelism.FSDP
        self.uncompiled: PraError | None = None
        """The compiler's error, if it failed on the loss or a block; then all runs uncompiled, with a warning."""
        losses: Callable[..., Losses] = partial(losses_of(model), extra=terms) if terms else losses_of(model)
        by_block = world.size > 1 or bool(terms)
        if train.compile and not by_block:
            losses = self._compiled(losses)
        for block in _blocks(model):  # only their calls change: the names of parameters stay
            if train.compile and by_block:
                block.forward = self._compiled(block.forward)
            if train.activation_checkpointing:
                block.forward = _recomputed(block.forward)
        self.loss: Any = _Loss(model, losses)
        if self.sharded:
            models = [average.model for average in averages.values()]
            shard(self.loss, models, world, device, in_bfloat16(device, train.precision))
        elif world.size > 1:
            self.loss = _replicated(self.loss, idle=begin < train.codec_warmup)
        self.optimizer = build_optimizer(model, train.optimizer)

    def passes(
        self, batches: Iterable[MicroBatch], count: int, rollout: Rollout | None, perceptual: Perceptual | None = None
    ) -> list[dict[str, Tensor]]:
        """Accumulate gradients of ``count`` micro-batches, without a rollout those of the reconstruction pass alone.

        Return the losses of each micro-batch by name, without gradient.
        """
        measured = []
        for place, (images, labels, keys) in enumerate(batches, start=1):
            with self.accumulating(last=place == count):
                with autocast(self.device, self.train.precision):
                    losses = self.loss(images, labels, keys, self.train.objective, rollout, perceptual)
                torch.autograd.backward(losses.total / count)
            measured.append(losses.measured())
        return measured

    def update(self, step: int) -> Tensor:
        """Update weights and averages at step ``step`` (from 0); return the norm before the gradients were clipped."""
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.optimizer.clip))
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average in self.averages.values():
            average.update(self.model, step)
        return norm

    def all_learn(self) -> None:
        """End the codec's warm-up: from here on every parameter takes part in the loss."""
        if isinstance(self.loss, DistributedDataParallel):
            loss, self.loss = self.loss.module, None
            gc.collect()  # remove DDP's hooks from the parameters
            self.loss = _replicated(loss, idle=False)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Wrap a micro-batch's passes. Only the last micro-batch communicates gradients."""
        if self.sharded:
            self.loss.set_requires_gradient_sync(last)
        elif not last and isinstance(self.loss, DistributedDataParallel):
            with self.loss.no_sync():
                yield
            return
        yield

    def _compiled(self, forward: Forward) -> Forward:
        """Compile a function at its first call. If the compiler fails, warn and run all functions uncompiled."""
        fast = compiled(forward, *COMPILE)

        def call(*arguments: Any) -> Any:
            if self.uncompiled is None:
                try:
                    return fast(*arguments)
                except PraError as error:
                    self.uncompiled = error
                    warnings.warn(f"{error}; until then it runs uncompiled", stacklevel=2)
            return forward(*arguments)

        return call


class _Loss(nn.Module):
    def __init__(self, model: Model, losses: Callable[..., Losses]) -> None:
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, *arguments: Any) -> Losses:
        return self.losses(self.model, *arguments)


def _replicated(loss: nn.Module, idle: bool) -> DistributedDataParallel:
    # Buffers are constants. Looking for idle parameters costs a walk through the graph in every step.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # its new name is not in older releases
        return DistributedDataParallel(
            loss, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=idle
        )


def shard(loss: nn.Module, averages: Sequence[Model], world: World, device: torch.device, bfloat16: bool) -> None:
    """Shard a loss, and the averages of its ``model``, with FSDP2.

    Blocks are gathered one by one, in bfloat16 if they compute in it. The rest, such as embeddings and the norms of the
    residual stream, is gathered together in float32. Gradients are summed in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    # Autocast casts inputs where it should; the residual stream keeps float32.
    lower = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in _blocks(loss):
        fully_shard(block, mesh=mesh, mp_policy=lower if bfloat16 else MixedPrecisionPolicy())
    fully_shard(loss, mesh=mesh)
    for average in averages:
        fully_shard(average, mesh=mesh)  # never called; updated part by part


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, BLOCKS)]


def _recomputed(forward: Forward) -> Forward:
    """Keep the inputs only, and compute the rest again in the backward pass. Blocks draw no random numbers."""

    def call(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)

    return call

"""The loss of a step, shared by several processes: DDP, or FSDP2's ``fully_shard``; and changes to the blocks.

The loss calls the parts of a model in its own order, some of them twice. So DDP and FSDP wrap the loss as a whole: a
module whose ``forward`` it is.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pra.config import Parallelism, TrainConfig
from pra.errors import PraError
from pra.method.objectives import Losses
from pra.models import BLOCKS, Model
from pra.utils.compiler import compiled
from pra.utils.device import in_bfloat16
from pra.utils.distributed import World

COMPILE = "train.compile", "set train.compile=false"
"""The setting that asks for a compiler, and the way to do without."""

Forward = Callable[..., Any]


class SharedLoss:
    """The loss of a model whose gradients all processes share; in a world of one, just the loss.

    The model and its averages are sharded where ``train.parallel`` is ``fsdp``. With ``idle`` some parameters have no
    part in the loss, until :meth:`all_learn`. With ``opaque`` the loss calls functions that may not compile, the user's
    terms: only the blocks are compiled.
    """

    def __init__(
        self,
        model: Model,
        averages: Sequence[Model],
        losses: Callable[..., Losses],
        train: TrainConfig,
        world: World,
        device: torch.device,
        idle: bool,
        opaque: bool = False,
    ) -> None:
        several = world.size > 1
        self.sharded = several and train.parallel is Parallelism.FSDP
        self.uncompiled: PraError | None = None
        """The compiler's error, if it failed on the whole loss or a block: a warning gave it, and all run plainly."""
        if train.compile and (several or opaque):
            _change_blocks(model, self._compiled)
        elif train.compile:
            losses = self._compiled(losses)
        if train.activation_checkpointing:
            _change_blocks(model, _recomputed)
        self.module: Any = _Loss(model, losses)
        if self.sharded:
            shard(self.module, averages, world, device, in_bfloat16(device, train.precision))
        elif several:
            self.module = _replicated(self.module, idle)

    def __call__(self, *arguments: Any) -> Losses:
        """Return ``losses(model, *arguments)``."""
        return self.module(*arguments)  # type: ignore[no-any-return]

    def all_learn(self) -> None:
        """From here on every parameter has a part in the loss."""
        if isinstance(self.module, DistributedDataParallel):
            loss, self.module = self.module.module, None
            gc.collect()  # remove DDP's hooks from the parameters
            self.module = _replicated(loss, idle=False)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """The forward and backward pass of a micro-batch. Only the last one passes gradients between processes."""
        if self.sharded:
            self.module.set_requires_gradient_sync(last)
        elif not last and isinstance(self.module, DistributedDataParallel):
            with self.module.no_sync():
                yield
            return
        yield

    def _compiled(self, forward: Forward) -> Forward:
        """Compile a function at its first call; where the compiler fails, warn and run all of them plainly."""
        fast = compiled(forward, *COMPILE)

        def call(*arguments: Any) -> Any:
            if self.uncompiled is None:
                try:
                    return fast(*arguments)
                except PraError as error:
                    self.uncompiled = error
                    warnings.warn(f"{error}; until then it goes on without", stacklevel=2)
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

    Blocks are gathered one by one, in bfloat16 where they compute in it; the rest, embeddings and the norms of the
    residual stream among it, together and in float32. Gradients are summed in float32.
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


def _change_blocks(model: Model, change: Callable[[Forward], Forward]) -> None:
    """Change the calls of blocks; the names of parameters stay."""
    for block in _blocks(model):
        block.forward = change(block.forward)


def _recomputed(forward: Forward) -> Forward:
    """Keep the inputs only, and compute the rest again in the backward pass. Blocks draw no random numbers."""

    def call(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False)

    return call

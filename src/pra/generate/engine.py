"""The engine of the sampler: buffers that stay where they are, and one token's step over them.

The step is three pieces of work: :meth:`Engine.read` takes the last patch through the backbone to the next condition,
:meth:`Engine.integrate` that through all evaluations of the head to the next state, :meth:`Engine.write` that through
the decoder to the next patch. On a CUDA device each is captured as a CUDA graph and replayed
(:mod:`pra.generate.runner`); elsewhere the very same functions run as they stand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from pra import solvers
from pra.config import Precision, SamplingConfig, Solver
from pra.device import autocast, in_bfloat16
from pra.generate.decoding import chosen_head, labels_of_streams, prefill
from pra.generate.guidance import Plan, scale_at
from pra.generate.native import content_hash, library, take_native
from pra.generate.prepared import BackboneWeights, DecoderWeights, HeadWeights, NativeTokens
from pra.generate.runner import ALIGNED, runner
from pra.generate.step import Field, Place, product, transformer_step
from pra.models import PRA
from pra.models.states import StateCodec
from pra.nn.transformer import KVCache


class Execution:
    """How an engine works on a device: what runs its pieces, whose arithmetic it is, and so the caches that it needs.

    Args:
        device: that of the model.
        precision: of the matrix products; see :class:`pra.generate.Sampler`.
        compile: whether torch's compiler fuses the step.

    Attributes:
        run: runs the pieces.
        native: the compiled arithmetic, where it is used.
    """

    def __init__(self, device: torch.device, precision: Precision, compile: bool) -> None:
        self.device, self.precision = device, precision
        self.run = runner(device, compile)
        self.native = library() if device.type == "cpu" and self.run.bucket == 1 else None

    def lowered(self) -> AbstractContextManager[object]:
        """The block in which torch's modules compute in this precision."""
        # Where arithmetic is only counted, torch knows no autocast. The compiled products round for themselves.
        if self.native is not None or self.device.type == "meta":
            return nullcontext()
        return autocast(self.device, self.precision)

    def new_caches(self, model: PRA, streams: int, batch: int) -> tuple[KVCache, KVCache | None]:
        """Empty caches of the backbone, with so many streams of a batch, and of the decoder."""
        # The last view is of a whole bucket too. On a CPU a longer cache would only be a slower one.
        multiple = self.run.bucket or (ALIGNED if self.device.type == "cuda" else 1)
        with self.lowered():  # under which a cache is of the dtype of the products
            return model.backbone.new_cache(streams * batch, multiple), model.codec.new_cache(batch, multiple)

    def bound(self, cache: KVCache | None, tokens: int) -> int:
        """How much of a cache attention looks at when it holds so many tokens; without one a token sees itself."""
        if cache is None:
            return 1
        bucket = self.run.bucket or cache.keys.shape[3]
        return -(-tokens // bucket) * bucket


class Engine:
    """Generates batches of one size, one after another: :meth:`begin`, then :meth:`next` for every patch.

    Everything happens under ``torch.inference_mode``, which the caller holds.

    Args:
        model: its weights may change between two batches, in place; :meth:`renew` takes them over.
        config: checked against the model (:func:`pra.config.check_sampling`).
        batch: ``B``, images side by side.
        precision: of the matrix products; see :class:`pra.generate.Sampler`.
        compile: whether torch's compiler fuses the step.

    Attributes:
        patches: ``(B, N, P)`` in [-1, 1], those before ``position`` finished.
        position: the raster position of the next patch.
    """

    def __init__(
        self, model: PRA, config: SamplingConfig, batch: int, precision: Precision, compile: bool = False
    ) -> None:
        self.model, self.config = model, config
        size, self.device = model.config, model.device
        self.times: list[float] = solvers.grid_of(config).tolist()
        self.plan = Plan.of_head(config, size.num_patches)
        self._execution = Execution(self.device, precision, compile)
        self._run = self._execution.run
        self.backbone_cache, self.decoder_cache = self._execution.new_caches(model, self.plan.most, batch)
        dtype = self.backbone_cache.keys.dtype
        self.backbone = BackboneWeights(model.backbone, dtype)
        self.head = HeadWeights(chosen_head(model, config), self.plan.times, self.plan.span, dtype)
        self.decoder = DecoderWeights(model.codec.decoder, dtype) if isinstance(model.codec, StateCodec) else None
        self._memory, self._content = _stamps(model)
        if self._execution.native is not None:
            low = in_bfloat16(self.device, precision)
            take_native(self._execution.native, self.backbone, self.head, self.decoder, low)
        native = self.head.native if self.decoder is not None else None
        self._normalise = model.codec.normalise if native is None else native.normalise
        intervals = config.steps if config.solver is Solver.EULER_MARUYAMA else 0
        self.patches = torch.zeros(batch, size.num_patches, size.patch_dim, device=self.device)
        self.starts = torch.zeros(batch, size.num_patches, size.state_dim, device=self.device)
        self.draws = torch.zeros(batch, intervals, size.state_dim, device=self.device)
        self.state = torch.zeros(batch, size.state_dim, device=self.device)
        self.condition = torch.zeros(self.plan.most * batch, self.head.width, device=self.device)
        self.scale = torch.ones((), device=self.device)
        self.index = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.position, self._unread = 0, False

    def renew(self) -> bool:
        """Takes over what has changed in the model's weights; False where they lie elsewhere: make another engine."""
        memory, content = _stamps(self.model)
        if memory != self._memory:
            return False
        if content is None or content != self._content:
            self._content = content
            self.refresh()
        return True

    def refresh(self) -> None:
        """Takes over the model's present weights."""
        for part in (self.backbone, self.head, self.decoder):
            if part is not None:
                part.refresh()

    def begin(self, labels: Tensor, starts: Tensor, prefix: Tensor) -> None:
        """Starts a batch.

        Args:
            labels: ``(B,)``.
            starts: ``(B, N, d)``, where each state's path begins.
            prefix: ``(B, n, P)`` true patches to go on from, ``0 <= n < N``.
        """
        for cache in (self.backbone_cache, self.decoder_cache):
            if cache is not None:
                cache.length = 0
                if self._run.bucket != 1:
                    # What is masked must be finite still, fresh memory or a failed batch's: the mask is added to its
                    # score, and its value multiplied by 0.
                    cache.keys.zero_()
                    cache.values.zero_()
        if self.backbone.native is not None and not prefix.shape[1]:
            h = self._first_condition(self.backbone.native, labels)
        else:
            with self._execution.lowered():
                h = prefill(self.model, labels, prefix, self.backbone_cache, self.decoder_cache)
        self.condition.copy_(product(h.squeeze(1), self.head.condition_in))
        self.starts.copy_(starts)
        self.position, self._unread = prefix.shape[1], False
        self.patches[:, : self.position] = prefix

    def next(self, draws: Tensor | None = None) -> None:
        """Generates the next patch.

        Args:
            draws: ``(B, K, d)``, the noise of each interval, where the solver is that of an SDE.
        """
        if draws is not None:
            self.draws.copy_(draws)
        for part, work in self.pieces(self.position).items():
            if part != "backbone" or self._unread:
                work()
        self.position, self._unread = self.position + 1, True

    def pieces(self, position: int) -> dict[str, Callable[[], None]]:
        """The step to the patch at a position, piece by piece, by the names of the parts; to repeat one is harmless."""
        self.index.fill_(position)
        scale = scale_at(self.config, position, self.patches.shape[1])
        self.scale.fill_(scale if scale <= torch.finfo(self.scale.dtype).max else math.inf)
        guided = self.plan.guided(position)
        seen = self._execution.bound(self.backbone_cache, self.backbone.class_tokens + position)
        written = self._execution.bound(self.decoder_cache, position + 1)
        return {
            "backbone": lambda: self._run(self.read, seen, False),
            "head": lambda: self._run(self.integrate, 0, guided),
            "decoder": lambda: self._run(self.write, written, False),
        }

    def read(self, bound: int, guided: bool) -> None:
        """The last patch to the next condition; ``bound`` as in :class:`pra.generate.step.Place`."""
        patch = self.patches.index_select(1, self.index - 1).squeeze(1)
        x = product(patch, self.backbone.patch_in).repeat(self.plan.most, 1)
        here = self._place(self.index + (self.backbone.class_tokens - 1), bound, self.backbone_cache)
        h = transformer_step(self.backbone, x, self.backbone_cache, here)
        h = h + self.backbone.next_position.index_select(0, self.index)
        self.condition.copy_(product(h, self.head.condition_in))

    def integrate(self, bound: int, guided: bool) -> None:
        """The condition to the next state, by all evaluations of the head."""
        field = Field(self.head, self.condition, self.plan.streams(guided), self.scale)
        start = self.starts.index_select(1, self.index).squeeze(1)
        state = solvers.INTEGRATORS[self.config.solver](field, start, self.times, lambda k: self.draws[:, k])
        self.state.copy_(self._normalise(state) if self.config.renormalise else state)

    def write(self, bound: int, guided: bool) -> None:
        """The state to the next patch; ``bound`` as in :class:`pra.generate.step.Place`."""
        patch = self.state
        if self.decoder is not None:
            x, here = product(self.state, self.decoder.state_in), self._place(self.index, bound, self.decoder_cache)
            x = transformer_step(self.decoder, x, self.decoder_cache, here)
            patch = product(x, self.decoder.patch_out)
        self.patches.index_copy_(1, self.index, patch.clamp(-1.0, 1.0).unsqueeze(1))

    def _first_condition(self, native: NativeTokens, labels: Tensor) -> Tensor:
        """What :func:`pra.generate.decoding.prefill` gives of no patches."""
        labels = labels_of_streams(self.model, labels, self.plan.most)
        tokens = self.model.backbone.tokens(labels, self.patches[:, :0].repeat(self.plan.most, 1, 1))
        h = native(tokens, self.backbone_cache, 0)
        return h[:, -1:] + self.backbone.next_position[0]

    def _place(self, index: Tensor, bound: int, cache: KVCache | None) -> Place:
        if cache is None or self._run.bucket == 1:
            return Place(index, bound, None)
        # What torch adds to the scores, once for all layers: of booleans it would make just this in every one.
        mask = torch.zeros(bound, dtype=cache.keys.dtype, device=self.device)
        mask.masked_fill_(torch.arange(bound, device=self.device) > index, -math.inf)
        return Place(index, bound, mask.view(1, 1, 1, -1))


def cache_bytes(model: PRA, config: SamplingConfig, precision: Precision, compile: bool) -> int:
    """Of the backbone's and the decoder's cache of one image, in an :class:`Engine` of these arguments."""
    streams = Plan.of_head(config, model.config.num_patches).most
    caches = Execution(model.device, precision, compile).new_caches(model, streams, 1)
    return sum(cache.keys.nbytes + cache.values.nbytes for cache in caches if cache is not None)


def _stamps(model: PRA) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Where each weight lies, and a hash of each, where there is one."""
    parameters = list(model.parameters())
    return tuple(parameter.data_ptr() for parameter in parameters), content_hash(parameters)

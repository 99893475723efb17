"""Sampling as an algorithm (paper, "Sampling"; docs/method.md), by the model's own modules.

Faster steps change :attr:`Steps.run` (:mod:`pra.sampling.runner`) or override methods of :class:`Steps`
(:mod:`pra.sampling.native`). Tests compare them with the steps here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pra.config import Exact, SamplingConfig, Solver
from pra.method import flow, rollout
from pra.models import PRA
from pra.models.cache import KVCache, NewCache
from pra.models.head import Modulations
from pra.sampling import solvers
from pra.sampling.guidance import evaluations_by_steps, scale_at
from pra.utils.device import row_by_row

Draws = Callable[[int], Tensor | None]
"""Noise by raster position: ``(B, K, d)`` for ``K`` intervals, or ``None`` if the solver does not add noise."""


class Token(NamedTuple):
    """The patch at one raster ``position`` of all images of a batch. The next token may overwrite these tensors.

    ``h`` is ``(streams * B, 1, D)``, with the rows of the null condition last; ``state`` is ``(B, 1, d)``; ``patch`` is
    ``(B, 1, P)`` in [-1, 1].
    """

    position: int
    h: Tensor
    state: Tensor
    patch: Tensor


def generate(
    steps: Steps,
    labels: Tensor,
    starts: Tensor,
    prefix: Tensor,
    draws: Draws = lambda position: None,
    times: Tensor | None = None,
) -> Iterator[Token]:
    """Generate a batch of images patch by patch. The caller holds ``no_grad`` and autocast.

    Args:
        steps: the model's steps over caches, for this batch size.
        labels: as the model's condition takes them: ``(B,)``, or rows ``(B, 1 + L)``.
        starts: ``(B, n, d)``, the start of each state's path. Patches up to number ``n <= N`` are generated.
        prefix: ``(B, k, P)`` true patches to continue, ``0 <= k < n``.
        draws: the noise of an SDE.
        times: ``(K + 1, B, n)``, a grid for each state, in place of the settings' grid.
    """
    condition = steps.model.condition
    told = condition if condition.row is None else functools.partial(row_by_row, condition)  # a caption alone
    tokens = told(labels)
    if steps.streams == 2:  # guidance needs a second stream of the same patches, under the null condition
        tokens = torch.cat([tokens, told(condition.null_like(labels))])
    h = steps.begin(tokens, prefix)
    patch = None
    for i in range(prefix.shape[1], starts.shape[1]):
        steps.seek(i)
        if patch is not None:  # the patch is fed back, for the next condition
            h = steps.run(steps.read, steps.seen, patch)
        scale = steps.scale(i)  # the head's flow leads to the next state
        here = slice(i, i + 1)
        grid = None if times is None else times[:, :, here]
        state = steps.run(steps.integrate, (steps.at.steps, scale is None), h, starts[:, here], scale, draws(i), grid)
        patch = steps.run(steps.write, steps.written, state)  # decoded
        yield Token(i, h, state, patch)


class Steps:
    """The steps of :func:`generate` for a batch of ``batch`` images: the model's modules, and their caches.

    ``run(method, key, *inputs)`` does the work of one token. The shapes of the work depend on ``key``.
    """

    run: Callable[..., Tensor]

    def __init__(self, model: PRA, config: SamplingConfig, batch: int, cache: NewCache = KVCache) -> None:
        self.model, self.config, self.batch = model, config, batch
        told = model.is_told(config.solver)
        self.evaluations = evaluations_by_steps(config, model.config.num_groups, batch, model.device, told)
        self.told: Tensor | None = None
        self.at = self.evaluations[config.steps]
        self.head = model.head_for(config.solver)
        self.streams = max(each.plan.most for each in self.evaluations.values())
        self.backbone_cache = model.backbone.new_cache(self.streams * batch, cache)
        self.decoder_cache = model.codec.new_cache(batch, cache)
        self.run = run_plainly

    @property
    def caches(self) -> list[KVCache]:
        """The backbone's cache, and the decoder's where there is one."""
        return [cache for cache in (self.backbone_cache, self.decoder_cache) if cache is not None]

    def seek(self, position: int) -> None:
        """Point the caches at a raster position. There the patch before it is read, and its own patch is written.

        Sets the numbers of tokens that attention reads, ``seen`` in the backbone and ``written`` in the decoder, and
        the head's evaluations ``at``.
        """
        self.at = self.evaluations[self.config.steps_at(position, self.model.config.num_groups)]
        self.backbone_cache.seek(self.model.backbone.prefix + position - 1)
        self.seen, self.written = self.backbone_cache.bound, 1
        if self.decoder_cache is not None:
            self.decoder_cache.seek(position * self.model.config.group_size)  # one token per patch, not per group
            self.written = self.decoder_cache.bound

    def scale(self, position: int) -> Tensor | None:
        """Return the guidance scale at a raster position; ``None`` where nothing is guided.

        A head that reads the scale gets its embedding.
        """
        if self.told is not None:
            return self.told[position]
        return self.at.plan.scale(position, self.model.device)

    def begin(self, tokens: Tensor, prefix: Tensor) -> Tensor:
        """Read the condition's tokens ``(streams * B, K, D)`` and true patches ``(B, k, P)``; return ``h`` of the next
        patch, ``(streams * B, 1, D)``."""
        self.reset()
        codec = self.model.codec
        h: Tensor = self.model.backbone(tokens, prefix, self.backbone_cache)
        if prefix.shape[1]:  # the decoder reads the states of the true patches, encoded as in training
            codec.decode(codec.encode(prefix, h[: self.batch, :-1]), self.decoder_cache)
        return h[:, -1:]

    def reset(self) -> None:
        """Clear the caches, and embed the times."""
        for cache in self.caches:
            cache.clear()
        self.embed()

    def embed(self) -> None:
        """Embed the times of the head's evaluations."""
        for at in self.evaluations.values():
            span = None if at.plan.span is None else torch.full_like(at.times, at.plan.span)
            embedded = self.head.embed(at.times, span)
            # Copy in place: captured steps keep reading the same memory.
            at.embedded = embedded if at.embedded is None else at.embedded.copy_(embedded)
        if self.model.is_told(self.config.solver):
            size = self.model.config.num_groups
            scales = torch.tensor([scale_at(self.config, i, size) for i in range(size)], device=self.model.device)
            self.told = self.head.embed_scale(scales)

    def read(self, patch: Tensor) -> Tensor:
        """Map a patch ``(B, 1, P)`` to ``h`` of the next patch, ``(streams * B, 1, D)``."""
        return self.model.backbone(None, patch, self.backbone_cache)  # type: ignore[no-any-return]

    def integrate(
        self, h: Tensor, start: Tensor, scale: Tensor | None, draws: Tensor | None = None, grid: Tensor | None = None
    ) -> Tensor:
        """Integrate the head's flow from ``start`` ``(B, 1, d)`` to the state.

        Guidance replaces the velocity by ``v_u + scale (v_c - v_u)`` (2207.12598). The arguments are those of
        :func:`generate` at one position.
        """
        head, at = self.head, self.at
        # Put the streams first: the state broadcasts over them, so work without the condition is done once.
        condition = head.project(h).view(self.streams, self.batch, 1, -1)
        span = None if at.plan.span is None else torch.full_like(at.times[:1], at.plan.span)
        known = [] if grid is not None else self.modulations(condition, scale is not None, scale)
        evaluations = iter(zip(at.within, at.times, known, strict=False))

        def velocity(z: Tensor, t: Any) -> Tensor:
            inside, t, modulations = (False, t, None) if grid is not None else next(evaluations)
            if scale is None or not inside:
                return head(z, t, condition[:1], span, modulations)[0]  # type: ignore[no-any-return]
            conditional, unconditional = head(z, t, condition, span, modulations)
            return torch.addcmul(unconditional, scale, conditional - unconditional)

        integrator = solvers.INTEGRATORS[self.config.solver]
        state = integrator(
            velocity,
            start,
            at.grid if grid is None else grid,
            solvers.no_noise if draws is None else lambda interval: draws[:, interval : interval + 1],
        )
        return self.normalise(state) if self.config.renormalise else state

    def write(self, state: Tensor) -> Tensor:
        """Map a state ``(B, 1, d)`` to its patch ``(B, 1, P)``."""
        return self.model.write(state, self.decoder_cache)

    def normalise(self, state: Tensor) -> Tensor:
        """Normalise a state as the codec's encoder does."""
        return self.model.codec.normalise(state)

    def modulations(self, condition: Tensor, guided: bool, scale: Tensor | None = None) -> list[Modulations]:
        """Return the head's modulations of each evaluation, computed for a group of evaluations at a time."""
        assert self.at.embedded is not None, "begin comes first"
        made: list[Modulations] = []
        for first, end, streams in self.at.groups[guided]:
            embedded = self.at.embedded[first:end, None, None, None]
            if self.told is not None and scale is not None:
                embedded = embedded + scale
            together = self.head.modulate(embedded, condition[:streams])
            made += [list(each) for each in zip(*(outputs.unbind() for outputs in together), strict=True)]
        return made


def run_plainly(work: Callable[..., Tensor], key: object, *inputs: Tensor | None) -> Tensor:
    """Run the work of one token directly, neither compiled nor captured."""
    return work(*inputs)


def exact_rollout(model: PRA, labels: Tensor, states: Tensor, how: Exact, key: Tensor) -> Tensor:
    """Return the AR inputs ``(B, N - 1, P)`` of the exact rollout, which PRA approximates.

    The model completes each state from ``t_i``, conditioned on the patches that it wrote before. The computation is
    ``N`` times as deep.
    """
    z = states[:, :-1]
    t, eps = rollout.perturbation(z, how.t_min, how.t_max, key)
    start = flow.interpolate(eps, z, t)
    steps = Steps(model, SamplingConfig(solver=Solver.MIDPOINT, steps=how.steps), len(z))
    nothing = z.new_empty(len(z), 0, model.config.group_dim)
    times = solvers.uniform_grid(how.steps, t.squeeze(-1))
    return torch.cat([token.patch for token in generate(steps, labels, start, nothing, times=times)], dim=1)


rollout.SEQUENTIAL[Exact] = exact_rollout

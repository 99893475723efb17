"""Sampling (paper, "Sampling"; design section 2): raster order, caches, guidance, one seed per image.

JiT is sampled by the same class, from the same seeds and with the same solvers, but all patches at once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from pra import noise, solvers
from pra.config import GuidanceSchedule, Precision, SamplingConfig, Solver, check_sampling
from pra.device import autocast
from pra.errors import PraError
from pra.models import PRA, JiT, Model
from pra.noise import Purpose


class Decoding:
    """One batch of images on its way, patch by patch: the caches, and the condition of the next patch.

    With ``guided`` the backbone runs twice the batch, with the labels and with the null class. Both streams read
    the same generated pixels, so the decoder runs once.

    Args:
        model: in evaluation or training; nothing here depends on the mode.
        labels: ``(B,)``.
        guided: whether to keep the unconditional stream.
        prefix: ``(B, n, P)`` true patches to go on from, ``n < N``.
    """

    def __init__(self, model: PRA, labels: Tensor, guided: bool = False, prefix: Tensor | None = None) -> None:
        self.model = model
        self.streams = 2 if guided else 1
        batch = labels.shape[0]
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, model.config.null_class)])
        if prefix is None:
            prefix = labels.new_empty(batch, 0, model.config.patch_dim, dtype=torch.float32)
        self.backbone_cache = model.backbone.new_cache(labels.shape[0])
        self.decoder_cache = model.codec.new_cache(batch)
        conditions = model.backbone(labels, prefix.repeat(self.streams, 1, 1), self.backbone_cache)
        self.position = prefix.shape[1]
        if self.position:
            # The decoder reads the states of the true patches, encoded as in training.
            states = model.codec.encode(prefix, conditions[:batch, :-1])
            model.codec.decode(states, self.decoder_cache)
        self._set_condition(conditions[:, -1:])

    def velocity(self, scale: float) -> solvers.Velocity:
        """The head's field at the current position under guidance ``v_u + scale (v_c - v_u)`` (2207.12598)."""
        head, condition = self.model.head, self.condition
        if self.streams == 1:
            return lambda z, t: head(z, t, condition)

        return lambda z, t: _guided(head(z.repeat(2, 1, 1), t, condition), scale)

    def append(self, state: Tensor) -> Tensor:
        """Writes the patch ``(B, 1, P)`` of a state ``(B, 1, d)`` and reads it as the next input."""
        patch = self.model.write(state, self.decoder_cache)
        self.position += 1
        if self.position < self.model.config.num_patches:
            inputs = patch.repeat(self.streams, 1, 1)
            self._set_condition(self.model.backbone.step(inputs, self.backbone_cache))
        return patch

    def _set_condition(self, h: Tensor) -> None:
        # Projected once here; every evaluation of the solver shares it.
        self.condition = self.model.head.condition(h)


class Sampler:
    """Generates images from a model.

    An image is a function of (weights, label, seed, settings): the same noise exactly, and the same pixels up to
    the rounding of batched arithmetic, whatever else is in the batch.

    Args:
        model: put into evaluation mode; stays where it is (``model.to(device)`` decides the device).
        config: guidance, solver and so on; by default what the model was saved with
            (:attr:`pra.models.base.ImageModel.sampling`).
        precision: of the arithmetic; ``auto`` is bfloat16 autocast on CUDA. States are float32 always.

    Raises:
        PraError: guidance along the raster, of a model that has none.
    """

    def __init__(
        self, model: Model, config: SamplingConfig | None = None, precision: Precision = Precision.AUTO
    ) -> None:
        self.model: Model = model.eval()
        self.config = config or model.sampling
        check_sampling(model.config, self.config)
        self.precision = precision
        self.device = next(model.parameters()).device

    def sample(self, labels: Sequence[int] | Tensor, seeds: Sequence[int] | Tensor) -> Tensor:
        """One image per pair of label and seed.

        Args:
            labels: classes in ``[0, num_classes)``, or ``num_classes`` for no class.
            seeds: one integer per label.

        Returns:
            ``(B, C, H, W)`` float32 in [-1, 1].

        Raises:
            PraError: a label out of range, as many seeds as labels are not given, or the settings lead to images that
                are not finite.
        """
        *_, images = self.stream(labels, seeds)
        return images

    def complete(
        self, images: Tensor, rows: int, labels: Sequence[int] | Tensor, seeds: Sequence[int] | Tensor
    ) -> Tensor:
        """Continues images from their first ``rows`` rows of patches; those true pixels stay exact.

        Args:
            images: ``(B, C, H, W)`` in [-1, 1], of the model's size.
            rows: rows of patches to keep, ``0 <= rows <= H / p``.
            labels: as in :meth:`sample`.
            seeds: as in :meth:`sample`.

        Returns:
            ``(B, C, H, W)`` float32 in [-1, 1].

        Raises:
            PraError: a model that is not autoregressive, an image of another size or channel count, ``rows`` out of
                range, or as in :meth:`sample`.
        """
        check_completes(self.model)
        config = self.model.config
        expected = (config.channels, *config.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise PraError(
                f"images of shape {tuple(images.shape)} cannot be completed: this model needs "
                f"(B, {', '.join(map(str, expected))})"
            )
        if not images.is_floating_point():
            raise PraError(f"images of {images.dtype} cannot be completed: give floats in [-1, 1]")
        if len(images) != len(labels):
            raise PraError(f"{len(images)} images and {len(labels)} labels: give one label per image")
        if not 0 <= rows <= config.grid[0]:
            raise PraError(
                f"rows {rows} is out of range: this model's images have {config.grid[0]} rows of patches "
                f"({config.patch_size} pixels each), so keep 0 to {config.grid[0]}"
            )
        images = images.to(self.device, torch.float32, copy=True)
        *_, result = images, *self.stream(labels, seeds, keep=images[:, :, : rows * config.patch_size])
        return result

    @torch.no_grad()
    def stream(
        self, labels: Sequence[int] | Tensor, seeds: Sequence[int] | Tensor, keep: Tensor | None = None
    ) -> Iterator[Tensor]:
        """The pictures so far, ``(B, C, k * p, W)``, each time a row of patches is finished; of JiT the whole, once.

        Args:
            labels: as in :meth:`sample`.
            seeds: as in :meth:`sample`.
            keep: ``(B, C, k * p, W)`` true pixels to start from (:meth:`complete`).

        Raises:
            PraError: as :meth:`complete`.
        """
        label, key = self._requests(labels, seeds)
        if keep is not None:
            check_completes(self.model)
        if isinstance(self.model, JiT):
            parts = iter([self._at_once(self.model, label, key)])
        else:
            parts = self._row_by_row(self.model, label, key, keep)
        for pictures in parts:
            if pictures.shape[2] == self.model.config.image_size[0]:
                self._check_finite(pictures)  # once: it waits for the device
            yield pictures

    def _check_finite(self, images: Tensor) -> None:
        finite = int(images.isfinite().flatten(1).all(1).sum())
        if finite < len(images):
            settings = {"guidance": self.config.guidance, "temperature": self.config.temperature}
            changes = [f"{name} nearer to 1 (now {value:g})" for name, value in settings.items() if value != 1.0]
            changes += [f"more solver steps (now {self.config.steps})", "another checkpoint"]
            raise PraError(
                f"{len(images) - finite} of {len(images)} images are not finite numbers; try {', or '.join(changes)}"
            )

    def _at_once(self, model: JiT, label: Tensor, key: Tensor) -> Tensor:
        """Whole images ``(B, C, H, W)`` from noise.

        The last interval is Euler's, as in JiT's own sampler (Euler-Maruyama's is so anyway): from there the predicted
        image is the end, and no velocity at ``t = 1`` is asked for.
        """
        shape, temperature = (model.config.num_patches, model.config.patch_dim), self.config.temperature
        start = temperature * noise.normal(noise.fold(key, Purpose.SAMPLE_START), *shape)
        diffusion = noise.fold(key, Purpose.SAMPLE_DIFFUSION)

        def fresh_noise(interval: int) -> Tensor:
            return temperature * noise.normal(noise.fold(diffusion, interval), *shape)

        times = solvers.uniform_grid(self.config.steps, torch.zeros(1, 1, device=self.device))
        integrate, velocity = solvers.INTEGRATORS[self.config.solver], self._velocity_of_all(model, label)
        with autocast(self.device, self.precision):
            if self.config.solver is Solver.EULER_MARUYAMA:
                patches = integrate(velocity, start, times, fresh_noise)
            else:
                patches = integrate(velocity, start, times[:-1], solvers.no_noise)
                patches = solvers.euler(velocity, patches, times[-2:], solvers.no_noise)
        return model.unpatchify(patches.clamp(-1.0, 1.0))

    def _velocity_of_all(self, model: JiT, label: Tensor) -> solvers.Velocity:
        """The field of whole images under guidance."""
        if self.config.guidance == 1.0:
            return lambda x, t: model(x, t, label)
        labels = torch.cat([label, torch.full_like(label, model.config.null_class)])
        return lambda x, t: _guided(model(x.repeat(2, 1, 1), t, labels), self.config.guidance)

    def _row_by_row(self, model: PRA, label: Tensor, key: Tensor, keep: Tensor | None) -> Iterator[Tensor]:
        """:meth:`stream` of an autoregressive model."""
        config = model.config
        done = 0 if keep is None else keep.shape[2] // config.patch_size
        rows = [keep.to(self.device)] if keep is not None and done else []
        if done == config.grid[0]:
            return
        # Autocast must not be on while the caller has the picture: it would reach the caller's arithmetic.
        with autocast(self.device, self.precision):
            prefix = model.patchify(torch.cat(rows, dim=2)) if rows else None
            decoding = Decoding(model, label, self.config.guidance != 1.0, prefix)
        starts = noise.normal(noise.fold(key, Purpose.SAMPLE_START), config.num_patches, config.state_dim)
        diffusion = noise.fold(key, Purpose.SAMPLE_DIFFUSION)
        times = solvers.uniform_grid(self.config.steps, torch.zeros(1, 1, device=self.device))
        for _ in range(done, config.grid[0]):
            with autocast(self.device, self.precision):
                patches = [self._next_patch(decoding, starts, diffusion, times) for _ in range(config.grid[1])]
            rows.append(model.unpatchify(torch.cat(patches, dim=1)))
            yield torch.cat(rows, dim=2)

    def _next_patch(self, decoding: Decoding, starts: Tensor, diffusion: Tensor, times: Tensor) -> Tensor:
        """Samples the state at the current position, ``(B, 1, d)``, and writes its patch, ``(B, 1, P)``."""
        position, temperature = decoding.position, self.config.temperature
        integrate = solvers.INTEGRATORS[self.config.solver]
        fresh_noise: solvers.NoiseSource = solvers.no_noise
        if self.config.solver is Solver.EULER_MARUYAMA:
            intervals = torch.arange(self.config.steps, device=self.device)
            key = noise.fold(noise.fold(diffusion, position).unsqueeze(-1), intervals)
            draws = temperature * noise.normal(key, 1, starts.shape[2])
            fresh_noise = partial(draws.select, 1)

        start = temperature * starts[:, position : position + 1]
        state = integrate(decoding.velocity(self.guidance_at(position)), start, times, fresh_noise)
        return decoding.append(decoding.model.codec.normalise(state) if self.config.renormalise else state)

    def guidance_at(self, position: int) -> float:
        """The guidance scale at a raster position."""
        if self.config.schedule is GuidanceSchedule.CONSTANT:
            return self.config.guidance
        return 1.0 + (self.config.guidance - 1.0) * position / (self.model.config.num_patches - 1)

    def _requests(self, labels: Sequence[int] | Tensor, seeds: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        label, seed = _integers(labels, "labels"), _integers(seeds, "seeds")
        classes = self.model.config.num_classes
        if label.ndim != 1 or label.shape != seed.shape or not len(label):
            raise PraError(f"{label.numel()} labels and {seed.numel()} seeds: give one seed per label, at least one")
        wrong = label[(label < 0) | (label > classes)]
        if len(wrong):
            raise PraError(f"label {int(wrong[0])} is out of range: this model's classes are 0 to {classes - 1}")
        return label.to(self.device), noise.keys(0, seed).to(self.device)


def check_completes(model: Model) -> None:
    """Whether a model can go on from the first rows of an image.

    Raises:
        PraError: it makes all patches at once.
    """
    if isinstance(model, JiT):
        raise PraError(
            "a JiT cannot complete an image: it makes all patches at once; take an autoregressive model, or sample"
        )


def _guided(both: Tensor, scale: float) -> Tensor:
    """``v_u + scale (v_c - v_u)`` of the conditional and the unconditional field, stacked along the batch."""
    conditional, unconditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def _integers(values: Sequence[int] | Tensor, what: str) -> Tensor:
    """int64 on the CPU, nothing rounded and nothing wrapped."""
    try:
        return torch.tensor([operator.index(value) for value in values], dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise PraError(f"{what} must be whole numbers of 64 bits, got {values!r}") from None

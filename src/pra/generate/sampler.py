"""The sampler: requests in, pictures out."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pra import noise
from pra.compiler import compiled
from pra.config import Precision, SamplingConfig, Solver, check_sampling
from pra.device import autocast
from pra.errors import PraError
from pra.generate.engine import Engine, cache_bytes
from pra.generate.guidance import scale_at
from pra.generate.whole_image import sample_at_once
from pra.models import PRA, JiT, Model
from pra.noise import Purpose

CPU_CACHE = 2.0 * 2**30
"""Bytes that the caches of images side by side may take of a CPU's memory."""


class Sampler:
    """Generates images from a model.

    An image is a function of (weights, label, seed, settings): the same noise exactly, and the same pixels up to the
    rounding of batched arithmetic, whatever else is in the batch; where the compiled arithmetic is used
    (:mod:`pra.generate.native`) and nothing is completed, to the bit. A batch whose caches the device cannot hold is
    generated in parts.

    Args:
        model: put into evaluation mode; stays where it is (``model.to(device)`` decides the device).
        config: guidance, solver and so on; by default what the model was saved with
            (:attr:`pra.models.base.ImageModel.sampling`).
        precision: of the matrix products, and of the caches but where the compiled arithmetic is used; ``auto`` is
            bfloat16 on CUDA. States are float32 always.
        compile: whether torch's compiler fuses the arithmetic: a minute at the first image for faster ones after it (on
            CPUs it needs a C++ compiler).

    Raises:
        PraError: guidance along the raster, of a model that has none.
    """

    def __init__(
        self,
        model: Model,
        config: SamplingConfig | None = None,
        precision: Precision = Precision.AUTO,
        compile: bool = False,
    ) -> None:
        self.model: Model = model.eval()
        self.config = config or model.sampling
        check_sampling(model.config, self.config)
        self.precision, self.compile = precision, compile
        self.device = next(model.parameters()).device
        # An engine is out while a stream is under way: another stream makes one of its own.
        self._idle: dict[int, Engine] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without engines, which hold addresses: a copy makes its own."""
        return self.__dict__ | {"_idle": {}}

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
        return torch.cat([list(self.stream(labels[part], seeds[part]))[-1] for part in self._parts(labels, seeds)])

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
        keep, done = images[:, :, : rows * config.patch_size], []
        for part in self._parts(labels, seeds):
            *_, last = images[part], *self.stream(labels[part], seeds[part], keep=keep[part])
            done.append(last)
        return torch.cat(done)

    @torch.no_grad()
    def stream(
        self, labels: Sequence[int] | Tensor, seeds: Sequence[int] | Tensor, keep: Tensor | None = None
    ) -> Iterator[Tensor]:
        """The pictures so far, ``(B, C, k * p, W)``, each time a row of patches is finished; of JiT the whole, once.

        All images are on their way at once, however many there are.

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
            forward = (
                compiled(self.model, "compiling the sampler", "sample without compile") if self.compile else self.model
            )
            with autocast(self.device, self.precision):
                parts = iter([sample_at_once(self.model, forward, self.config, label, key)])
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

    def _row_by_row(self, model: PRA, label: Tensor, key: Tensor, keep: Tensor | None) -> Iterator[Tensor]:
        """:meth:`stream` of an autoregressive model."""
        (rows, columns), batch = model.config.grid, len(label)
        done = 0 if keep is None else keep.shape[2] // model.config.patch_size
        if done == rows:
            return
        starts = noise.normal(noise.fold(key, Purpose.SAMPLE_START), model.config.num_patches, model.config.state_dim)
        diffusion = noise.fold(key, Purpose.SAMPLE_DIFFUSION)
        prefix = starts.new_empty(batch, 0, model.config.patch_dim)
        if keep is not None and done:
            prefix = model.patchify(keep.to(self.device))
        engine = self._idle.pop(batch, None)
        # The mode must not be on while the caller has the picture: it would reach the caller's arithmetic.
        with torch.inference_mode():
            if engine is None or not engine.renew():
                engine = Engine(model, self.config, batch, self.precision, self.compile)
            engine.begin(label, self.config.temperature * starts, prefix)
        try:
            for row in range(done, rows):
                with torch.inference_mode():
                    draws = self._draws(diffusion, range(row * columns, (row + 1) * columns), starts.shape[2])
                    for column in range(columns):
                        engine.next(draws[:, column] if draws is not None else None)
                yield model.unpatchify(engine.patches[:, : (row + 1) * columns].clone())
        finally:
            self._idle = {batch: engine}

    def _draws(self, key: Tensor, positions: range, size: int) -> Tensor | None:
        """The noise at some positions, ``(B, len(positions), K, d)``, where the solver is that of an SDE."""
        if self.config.solver is not Solver.EULER_MARUYAMA:
            return None
        here = torch.arange(positions.start, positions.stop, device=self.device)
        intervals = torch.arange(self.config.steps, device=self.device)
        keys = noise.fold(noise.fold(key.unsqueeze(-1), here).unsqueeze(-1), intervals)
        return self.config.temperature * noise.normal(keys, size)

    def _parts(self, labels: Sequence[int] | Tensor, seeds: Sequence[int] | Tensor) -> list[slice]:
        """Equal parts of a batch, few enough images in each that the device holds their caches."""
        count, most = len(labels), len(labels)
        if len(labels) != len(seeds):
            return [slice(None)]  # to be refused
        if isinstance(self.model, PRA):
            most = max(1, int(_budget(self.device) / cache_bytes(self.model, self.config, self.precision)))
        size = math.ceil(count / max(1, math.ceil(count / most))) or 1
        return [slice(start, start + size) for start in range(0, max(1, count), size)]

    def guidance_at(self, position: int) -> float:
        """The guidance scale at a raster position."""
        return scale_at(self.config, position, self.model.config.num_patches)

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


def _budget(device: torch.device) -> float:
    """Bytes for the caches of images side by side: most of what is free on a GPU, which has the activations too."""
    return 0.6 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else CPU_CACHE


def _integers(values: Sequence[int] | Tensor, what: str) -> Tensor:
    """int64 on the CPU, nothing rounded and nothing wrapped."""
    try:
        return torch.tensor([operator.index(value) for value in values], dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise PraError(f"{what} must be whole numbers of 64 bits, got {values!r}") from None

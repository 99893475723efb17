"""The sampler: requests in, pictures out."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pra.config import Precision, SamplingConfig, check_sampling
from pra.config.checks import member
from pra.errors import NotFiniteError, PraError
from pra.method import noise
from pra.method.noise import Purpose
from pra.models import PRA, Model
from pra.models.condition import Labels, Texts, integers
from pra.sampling.algorithm import Draws, generate
from pra.sampling.requests import Seeds, changed_sampling
from pra.sampling.runner import Engine, cache_bytes
from pra.sampling.whole_image import sample_at_once
from pra.utils.compiler import compiled
from pra.utils.device import autocast, row_by_row

logger = logging.getLogger(__name__)

CPU_CACHE = 2.0 * 2**30
"""Most bytes of a CPU's memory for the caches of one batch."""


class Sampler:
    """Generates images from a model.

    An image is a function of (weights, label, seed, settings), whatever else is in the batch. Its noise is exactly the
    same, and its pixels are the same up to the rounding of batched arithmetic. Pixels are bitwise the same if the
    compiled arithmetic (:mod:`pra.sampling.native`) runs and no image is completed. A batch is generated in parts if
    the device cannot hold its caches; the first batch settles the size of the parts.

    Args:
        model: is put into evaluation mode, and stays on its device. Move it by ``model.to(device)``, also later.
        config: guidance, solver and so on; by default the settings saved with the model
            (:attr:`pra.models.base.ImageModel.sampling`).
        precision: of the matrix products, and of the caches unless the compiled arithmetic runs. ``auto`` is bfloat16
            on a CUDA GPU that supports it, else float32. States are always float32.
        compile: whether torch's compiler fuses the arithmetic. The first image takes a minute more, later images take
            less time. On a CPU this needs a C++ compiler.
        changes: of ``config``, by the names of :class:`pra.config.SamplingConfig`: ``Sampler(model, guidance=2.0)``.

    Raises:
        PraError: an unknown setting or precision, a value out of range, or settings that the model cannot be sampled
            with.
    """

    def __init__(
        self,
        model: Model,
        config: SamplingConfig | None = None,
        precision: Precision | str = Precision.AUTO,
        compile: bool = False,
        **changes: Any,
    ) -> None:
        self.model: Model = model.eval()
        self.config = changed_sampling(config or model.sampling, changes)
        check_sampling(model.config, self.config)
        self.precision, self.compile = member(Precision, precision, "precision"), compile
        # Engines between batches, by batch size. A stream takes its engine out, so another stream makes a new one.
        self.idle: dict[int, Engine] = {}
        self.fits: tuple[torch.device, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out engines, which hold addresses: a copy makes its own."""
        return self.__dict__ | {"idle": {}, "fits": None}

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    def sample(self, labels: Labels | None = None, seeds: Seeds = (), captions: Texts | None = None) -> Tensor:
        """Generate one image per seed, of a class, a caption or both.

        Args:
            labels: classes by number in ``[0, num_classes)`` or by name; ``num_classes`` stands for no class. A single
                class is a batch of one. Captions may replace labels.
            seeds: one integer per image.
            captions: one text per image, for models that read captions; ``""`` stands for no caption. A single text is
                a batch of one.

        Returns:
            ``(B, C, H, W)`` float32 in [-1, 1].

        Raises:
            PraError: a label is out of range, the model does not read captions, the numbers of labels, captions and
                seeds differ, or the settings give images that are not finite.
        """
        return self._finished(*self._requests(labels, seeds, captions))

    def complete(
        self,
        images: Tensor,
        rows: int,
        labels: Labels | None = None,
        seeds: Seeds = (),
        captions: Texts | None = None,
    ) -> Tensor:
        """Continue images from their first ``rows`` rows of patches. The pixels of these rows stay exact.

        Args:
            images: ``(B, C, H, W)`` in [-1, 1], of the model's size.
            rows: number of rows of patches to keep, ``0 <= rows <= H / p``; a multiple of the rows of a group.
            labels: as in :meth:`sample`, which also describes the result and more errors.
            seeds: one integer per image.
            captions: one text per image.

        Raises:
            PraError: the model is not autoregressive, the images have another size, or ``rows`` is out of range or cuts
                a group.
        """
        label, key = self._requests(labels, seeds, captions)
        config = self.model.config
        self._check_kept(images, len(label), (config.image_size[0],), str(config.image_size[0]))
        if not 0 <= rows <= config.grid[0]:
            each = f"{config.grid[0]} rows of patches ({config.patch_size} pixels each)"
            problem = f"is out of range: this model's images have {each}. Use 0 to {config.grid[0]}"
            raise PraError(f"rows {rows} {problem}", name="rows", value=rows)
        if rows % config.group[0]:
            problem = f"rows {rows} cut a group: {config.group[0]} rows are generated together"
            raise PraError(f"{problem}. Use a multiple of {config.group[0]}", name="rows", value=rows)
        images = images.to(self.device, torch.float32, copy=True)
        if rows == config.grid[0]:
            return images
        return self._finished(label, key, images[:, :, : rows * config.patch_size])

    @torch.no_grad()
    def stream(
        self,
        labels: Labels | None = None,
        seeds: Seeds = (),
        keep: Tensor | None = None,
        captions: Texts | None = None,
    ) -> Iterator[Tensor]:
        """Yield the pictures so far, ``(B, C, h, W)``, after each row of patches.

        A model with groups yields after each row of groups, and JiT once, at the end. All images are generated as one
        batch. ``keep`` holds true pixels ``(B, C, h, W)`` of whole rows to start from. Other arguments and the errors
        are those of :meth:`sample` and :meth:`complete`.
        """
        label, key = self._requests(labels, seeds, captions)
        if keep is not None:
            height, row = self.model.config.image_size[0], self.model.config.group_height
            self._check_kept(keep, len(label), range(0, height + 1, row), f"k * {row}")
        for pictures in self._pictures(label, key, keep, every_row=True):
            if pictures.shape[2] == self.model.config.image_size[0]:
                self._check_finite(pictures)  # only once: the check waits for the device
            yield pictures

    @torch.no_grad()
    def _finished(self, label: Tensor, key: Tensor, keep: Tensor | None = None) -> Tensor:
        """Generate the images of checked requests, in parts that the device holds."""
        parts = [(label[rows], key[rows], None if keep is None else keep[rows]) for rows in self._parts(len(label))]
        images = torch.cat([made for part in parts for made in self._pictures(*part)])[: len(label)]
        self._check_finite(images)
        return images

    def _pictures(
        self, label: Tensor, key: Tensor, keep: Tensor | None = None, every_row: bool = False
    ) -> Iterator[Tensor]:
        """Yield the images of checked requests; with ``every_row`` also unfinished ones, see :meth:`stream`."""
        model = self.model
        if not model.config.autoregressive:
            forward = compiled(model, "compiling the sampler", "sample without compile") if self.compile else model
            with autocast(self.device, self.precision):
                images = sample_at_once(model, forward, self.config, label, key)
            yield images
            return
        rows, columns = model.config.group_grid
        done = 0 if keep is None else keep.shape[2] // model.config.group_height
        if done == rows:
            return
        starts, draws = self._noise(key)
        prefix = starts.new_empty(len(label), 0, model.config.group_dim)
        if keep is not None:
            prefix = model.patchify(keep.to(self.device, torch.float32))
        engine = self._engine(model, len(label))
        patches = [prefix]
        try:
            # Leave the block before each yield: the block would change the caller's arithmetic.
            with engine.arithmetic():
                tokens = generate(engine.steps, label, starts, prefix, draws)
            for row in range(done, rows):
                with engine.arithmetic():
                    patches += [token.patch.clone() for token in islice(tokens, columns)]
                if every_row or row == rows - 1:
                    with engine.arithmetic():
                        pictures = self._picture(model, torch.cat(patches, dim=1), keep)
                    yield pictures
        finally:
            self.idle = {len(label): engine}

    def _picture(self, model: PRA, patches: Tensor, keep: Tensor | None) -> Tensor:
        """Return the pictures of the patches so far. The pixels to keep stay unchanged."""
        if not self.config.deblock or model.codec.deblock is None:
            return model.unpatchify(patches)
        pictures = row_by_row(model.picture, patches).clamp(-1.0, 1.0)
        if keep is not None:
            pictures[:, :, : keep.shape[2]] = keep
        return pictures

    def _engine(self, model: PRA, batch: int) -> Engine:
        engine = self.idle.pop(batch, None)
        if engine is None or not engine.renew():
            engine, self.idle = None, {}  # free the idle engine first: the device may not hold both
            engine = Engine(model, self.config, batch, self.precision, self.compile)
            logger.info("sampling by %s", engine.way)
        return engine

    def _noise(self, key: Tensor) -> tuple[Tensor, Draws]:
        config, size = self.config, self.model.config
        starts = noise.normal(noise.fold(key, Purpose.SAMPLE_START), size.num_groups, size.group_state_dim)
        diffusion = noise.fold(key, Purpose.SAMPLE_DIFFUSION).unsqueeze(-1)
        intervals = torch.arange(config.steps, device=self.device)

        def draws(position: int) -> Tensor | None:
            if not config.adds_noise:
                return None
            keys = noise.fold(noise.fold(diffusion, position), intervals)
            return config.temperature * noise.normal(keys, size.group_state_dim)

        return config.temperature * starts, draws

    def _check_finite(self, images: Tensor) -> None:
        finite = int(images.isfinite().flatten(1).all(1).sum())
        if finite < len(images):
            settings = {"guidance": self.config.guidance, "temperature": self.config.temperature}
            changes = [f"{name} nearer to 1 (now {value:g})" for name, value in settings.items() if value != 1.0]
            changes += [f"more solver steps (now {self.config.steps})", "another checkpoint"]
            problem = f"{len(images) - finite} of {len(images)} images are not finite numbers"
            raise NotFiniteError(f"{problem}. Try {', or '.join(changes)}", code="diverged")

    def _parts(self, count: int) -> list[Tensor]:
        """Return the rows of each part of ``count`` images. The device can hold the caches of a part."""
        # Settle the size once per device: our own engine changes the free memory. Parts have the same size, so one
        # engine makes all of them: the last part repeats the last image.
        size = count
        if self.model.config.autoregressive:
            if self.fits is None or self.fits[0] != self.device:
                self.idle = {}
                most = int(budget(self.device) / cache_bytes(self.model, self.config, self.precision, self.compile))
                self.fits = self.device, max(1, most)
            size = math.ceil(count / math.ceil(count / self.fits[1]))
        starts = range(0, count, size)
        return [torch.arange(first, first + size, device=self.device).clamp(max=count - 1) for first in starts]

    def _check_kept(self, kept: Tensor, count: int, heights: Sequence[int], height: str) -> None:
        check_completes(self.model)
        channels, width = self.model.config.channels, self.model.config.image_size[1]
        found = tuple(kept.shape)
        if len(found) != 4 or (found[1], found[3]) != (channels, width) or found[2] not in heights:
            problem = f"cannot be completed: this model needs (B, {channels}, {height}, {width})"
            raise PraError(f"images of shape {found} {problem}", code="mismatch", value=found)
        if not kept.is_floating_point():
            raise PraError(f"images of {kept.dtype} cannot be completed. Give floats in [-1, 1]", value=kept.dtype)
        if found[0] != count:
            raise PraError(f"{found[0]} images and {count} labels. Give one label per image", code="mismatch")

    def _requests(self, labels: Labels | None, seeds: Seeds, captions: Texts | None = None) -> tuple[Tensor, Tensor]:
        label = self.model.condition.parse(labels, self.model.classes, captions)
        seed = integers(seeds, "seeds must be whole numbers of 64 bits")
        if len(label) != len(seed) or not len(label):
            problem = f"{len(label)} labels and {len(seed)} seeds"
            raise PraError(f"{problem}. Give one seed per label, at least one", code="mismatch")
        return label.to(self.device), noise.keys(0, seed).to(self.device)


class Samplers:
    """The last two samplers of a model, with their engines, caches and captured graphs. Threads may share them."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._sampler = functools.lru_cache(maxsize=2)(functools.partial(Sampler, model))

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out the samplers: a copy makes its own."""
        return Samplers, (self.model,)

    def of(self, config: SamplingConfig, precision: Precision = Precision.AUTO) -> Sampler:
        """Return the sampler with these settings."""
        return self._sampler(config, precision)


def check_completes(model: Model) -> None:
    """Refuse a model that cannot continue an image from its first rows."""
    if not model.can_complete:
        problem = "cannot complete an image: it makes all patches at once. Use an autoregressive model, or sample"
        raise PraError(f"a {model.config.name} {problem}", code="unsupported", name=model.config.name)


def budget(device: torch.device) -> float:
    """Return the bytes for the caches of one batch: most of a GPU's free memory, as activations need some too."""
    if device.type != "cuda":
        return CPU_CACHE
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch frees this when needed
    return 0.6 * (torch.cuda.mem_get_info(device)[0] + unused)

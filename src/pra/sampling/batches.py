"""Streams of images from a sampler, and the ``.npz`` of ADM's evaluator that holds many of them."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pra.config import Precision, to_dict
from pra.sampling.requests import Requests
from pra.sampling.sampler import Sampler
from pra.utils.device import in_bfloat16
from pra.utils.files import MOST_JSON, PLAN, explained, listed, new_file, parse_json, read_arrays, unreadable
from pra.utils.pixels import to_uint8


class Batch(NamedTuple):
    """Images ``start, start + 1, ...`` of a set: ``(B, C, H, W)``, uint8 or floats in [-1, 1]; labels ``(B,)``."""

    images: Tensor
    labels: Tensor | None
    start: int


def sampled(sampler: Sampler, requests: Requests, indices: range, batch_size: int) -> Generator[Batch]:
    """Sample the images at ``indices`` of a set, in batches of ``batch_size``."""
    for block in blocks(indices, batch_size):
        labels, seeds, captions = requests.part(block)
        yield Batch(sampler.sample(labels, seeds, captions), torch.tensor(labels), block.start)


def how_sampled(sampler: Sampler) -> dict[str, Any]:
    """Return the settings of a sampler as JSON values. An image depends on these, the weights, its label and its seed.

    ``precision`` is the arithmetic of the matrix products on the sampler's device, float32 or bfloat16.
    """
    lowered = in_bfloat16(sampler.device, sampler.precision)
    settings: dict[str, Any] = to_dict(sampler.config)
    if settings["raster_steps"] is None:  # older records lack the setting
        del settings["raster_steps"]
    return settings | {"precision": (Precision.BFLOAT16 if lowered else Precision.FLOAT32).value}


def blocks(indices: range, size: int) -> Iterator[range]:
    """Cut a range into parts of ``size``; the last may be shorter."""
    for start in range(indices.start, indices.stop, size):
        yield range(start, min(start + size, indices.stop))


class NpzBatch:
    """An ``.npz`` of ADM's evaluator: images ``arr_0``, uint8 ``(N, H, W, C)``, and labels ``arr_1``, if any.

    ``size`` is height and width. ``labels`` are int64 ``(N,)``, or None. ``plan`` holds the weights, settings, labels
    and seeds of images from ``pra sample --num``, and is None for other images.
    """

    def __init__(self, path: Path) -> None:
        """Read the header and the labels, not the images. Refuse a file of another layout or without images."""
        self.path = path
        with explained(path, "cannot be read as .npz", "write it again"):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if "arr_0.npy" not in names:
                    found = listed(name.removesuffix(".npy") for name in names)
                    raise unreadable(path, f"holds no images: it lacks the array arr_0 and has {found}")
                with archive.open("arr_0.npy") as file:
                    shape, dtype = _header(file)
                    there = archive.getinfo("arr_0.npy").file_size - file.tell()
                self.plan = None
                if PLAN in names:
                    with archive.open(PLAN) as file:
                        self.plan = parse_json(file.read(MOST_JSON), f"{PLAN} in {path}")
            if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3, 4) or min(shape) < 1:
                layout = "ADM's layout is uint8 (N, height, width, channels), with N of at least 1"
                raise unreadable(path, f"has arr_0 {dtype} {shape}; {layout}")
            if there != math.prod(shape):
                held = there // math.prod(shape[1:])
                raise unreadable(path, f"is damaged: arr_0 holds {held} of {shape[0]} images. Write it again")
            self.labels = None
            if "arr_1.npy" in names:
                labels = read_arrays(path, ["arr_1"])["arr_1"]
                if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
                    problem = f"has arr_1 {labels.dtype} {labels.shape}, not one whole-numbered label per image"
                    raise unreadable(path, problem)
                if labels.min() < 0:
                    raise unreadable(path, f"has the label {labels.min()} in arr_1. Count labels from 0")
                self.labels = torch.from_numpy(labels.astype(np.int64))
        self.count, (*size, self.channels) = shape[0], shape[1:]
        self.size: tuple[int, int] = (size[0], size[1])

    def batches(self, batch_size: int, indices: range | None = None) -> Generator[Batch]:
        """Yield the images in order, or those of a range. Refuse a damaged file."""
        wanted = range(self.count) if indices is None else indices
        per_image = self.size[0] * self.size[1] * self.channels
        broken = explained(self.path, "is damaged", "write it again")
        with broken, zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            _header(file)
            file.seek(wanted.start * per_image, os.SEEK_CUR)
            for block in blocks(wanted, batch_size):
                data = file.read(len(block) * per_image)
                if len(data) < len(block) * per_image:
                    raise ValueError(f"it ends after {block.start + len(data) // per_image} of {self.count} images")
                pixels = np.frombuffer(bytearray(data), np.uint8).reshape(-1, *self.size, self.channels)
                labels = None if self.labels is None else self.labels[block.start : block.stop]
                yield Batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels, block.start)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(file)
    if by_columns and len(shape) > 1:
        raise ValueError("arr_0 is stored column by column")
    return shape, dtype


def exported(
    batches: Iterable[Batch],
    count: int,
    path: Path,
    plan: dict[str, Any] | None = None,
    captions: Sequence[str] | None = None,
) -> Iterator[Batch]:
    """Write batches to an ``.npz`` for ADM's evaluator, rounded as in ADM, and yield each batch after it is written.

    ``count`` is the total number of images. The file also holds ``plan``, which describes the images as JSON values,
    and ``captions``, an array of texts. Grey images are ``(N, H, W, 1)``, which only :class:`NpzBatch` reads. The file
    appears after the last batch, whole or not at all.
    """
    labels: list[Tensor] = []
    with new_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            for number, batch in enumerate(batches):
                pixels = to_uint8(batch.images, truncate=True).permute(0, 2, 3, 1).cpu().numpy()
                if number == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *pixels.shape[1:])}
                    np.lib.format.write_array_header_1_0(array, header)
                array.write(pixels.tobytes())
                if batch.labels is not None:
                    labels.append(batch.labels)
                yield batch
        if labels:
            with archive.open("arr_1.npy", "w") as array:
                np.lib.format.write_array(array, torch.cat(labels).cpu().numpy())
        if captions is not None:
            with archive.open("captions.npy", "w") as array:
                np.lib.format.write_array(array, np.array(captions, np.str_), allow_pickle=False)
        if plan is not None:
            archive.writestr(PLAN, json.dumps(plan, indent=2))


def join_exports(
    parts: Sequence[Path], path: Path, plan: dict[str, Any] | None = None, captions: Sequence[str] | None = None
) -> None:
    """Join the ``.npz`` files of several processes into one file, as :func:`exported` writes it."""
    batches = [NpzBatch(part) for part in parts]
    images = (batch for part in batches for batch in part.batches(256))
    for _ in exported(images, sum(batch.count for batch in batches), path, plan, captions):
        pass

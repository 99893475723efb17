"""Many images by any number of processes, resumed after a kill.

Shards of consecutive images lie in ``.OUT.partial`` beside the output, under a plan that names the images and weights.
A shard is a batch of the first call. An image is thus computed in the same batch on any number of processes, and is
bitwise the same on the same device.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pra.config.checks import PositiveInt
from pra.errors import PraError
from pra.sampling import Sampler
from pra.sampling.batches import NpzBatch, blocks, how_sampled, join_exports, sampled
from pra.sampling.requests import Requests
from pra.utils import files
from pra.utils.distributed import World
from pra.utils.locks import locked
from pra.utils.pixels import contact_sheet, sheet_size, to_uint8
from pra.utils.progress import Progress
from pra.utils.signals import Interrupted

PICTURES, SIZE = "pictures", "images_per_shard"
JOINED = "joined.json"
"""File beside the shards, written before the output appears. It holds the inode of the output, and the plan."""


@dataclass(frozen=True)
class Shards:
    """The parts of a set: ``paths`` in ``folder``, each a folder of pictures or an ``.npz``, and their ``images``."""

    folder: Path
    paths: list[Path]
    images: list[range]

    def missing(self) -> list[int]:
        """Return the numbers of the shards that do not exist yet."""
        there = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        return [number for number, path in enumerate(self.paths) if path.name not in there]

    def images_there(self) -> int:
        """Count the images in finished shards."""
        return sum(map(len, self.images)) - sum(len(self.images[number]) for number in self.missing())


def shards_of(folder: Path, count: int, size: int, ending: str) -> Shards:
    """Cut ``count`` images into shards of ``size``; the last may be smaller."""
    images = [*blocks(range(count), size)]
    return Shards(folder, [folder / f"shard-{number:06d}{ending}" for number in range(len(images))], images)


def sample_many(
    sampler: Sampler,
    requests: Requests,
    weights: dict[str, Any],
    out: Path,
    columns: int,
    batch_size: int,
    name: Callable[[int, int, str | None], str],
    world: World,
) -> tuple[int, float]:
    """Make this process's part of the missing images of a set, and join the whole set at the end.

    The output ``FILE.png`` is a grid of ``columns``. ``FILE.npz`` holds ``arr_0`` (uint8 NHWC), ``arr_1`` (labels),
    ``captions``, and the plan. Any other output is a folder of PNGs; ``name`` makes their names, without ending, from
    label, seed and caption. Memory holds one batch, or all images for a grid. ``weights`` identifies the weights, as
    JSON values.

    Returns:
        The number of images that this call made on all processes, and its seconds. The number is 0 if an earlier call
        made the output, and was killed during its clean-up.

    Raises:
        PraError: the output exists, another command writes it, an unfinished output has another request or other
            weights, a grid would be too large, or the disk is full.
        Interrupted: Ctrl-C; some of the images are kept.
    """
    plan = {"weights": weights, "sampling": how_sampled(sampler), "images": requests.plan}
    begin = time.monotonic()
    if world.run_on_first(lambda: _was_finished(out, plan)):
        return 0, time.monotonic() - begin
    files.check_output(out)
    if files.output_format(out) == ".png":
        sheet_size(len(requests), columns, *sampler.model.config.image_size)
    lock = locked(files.partial_folder(out), "filled", "choose another --out") if world.is_first else nullcontext()
    with lock:
        shards, missing = world.run_on_first(lambda: _begin(out, plan, len(requests), batch_size))
        there = shards.images_there()
        bar = Progress(total=len(requests), initial=there, unit="image", desc="sample", disable=not world.is_first)
        try:
            with bar:
                for place in world.share(len(missing)):
                    _make(shards, missing[place], sampler, requests, batch_size, name)
                    bar.update(shards.images_there() - bar.n if world.is_first else 0)  # all processes' images
                world.barrier(patient=True)
                bar.update(shards.images_there() - bar.n if world.is_first else 0)
            world.run_on_first(lambda: _finish(shards, plan, out, columns, requests.captions))
        except KeyboardInterrupt:
            if kept := shards.images_there():
                what = f"stopped with {kept} of {len(requests)} images, which lie in {shards.folder}"
                raise Interrupted(signal.SIGINT, what) from None
            raise
        finally:
            if world.is_first and len(shards.missing()) == len(shards.paths):
                shutil.rmtree(shards.folder, ignore_errors=True)  # nothing to resume
    return sum(len(shards.images[number]) for number in missing), time.monotonic() - begin


def _begin(out: Path, plan: dict[str, Any], count: int, batch_size: int) -> tuple[Shards, list[int]]:
    partial = files.partial_folder(out)
    if not any(partial.glob("shard-*")):
        (partial / files.PLAN).unlink(missing_ok=True)  # an earlier start without images
    plan = files.begin_partial(partial, plan | {SIZE: batch_size}, "sampling", free=[SIZE])
    files.check_fields(plan, partial / files.PLAN, **{SIZE: PositiveInt})
    shards = shards_of(partial, count, plan[SIZE], ".npz" if files.output_format(out) else "")
    return shards, shards.missing()


def _make(
    shards: Shards,
    number: int,
    sampler: Sampler,
    requests: Requests,
    batch_size: int,
    name: Callable[[int, int, str | None], str],
) -> None:
    indices = shards.images[number]
    pixels = torch.cat([to_uint8(b.images).cpu() for b in sampled(sampler, requests, indices, batch_size)])
    labels, seeds, captions = requests.part(indices)
    texts: Sequence[str | None] = captions or [None] * len(labels)
    names = [name(*one) for one in zip(labels, seeds, texts, strict=True)]
    files.save_images(pixels, labels, names, 1, shards.paths[number])


def _finish(shards: Shards, plan: dict[str, Any], out: Path, columns: int, captions: Sequence[str] | None) -> None:
    if missing := shards.missing():
        gone = shards.paths[missing[0]]
        fix = f"Write {out} on a disk that all machines share, and repeat the command to resume"
        raise PraError(f"{gone} is gone. {fix}", code="missing", path=gone)
    ending = files.output_format(out)
    joined = shards.folder / f"{PICTURES}{ending}"
    if ending == "":
        _join_pictures(shards, joined)
    elif ending == ".npz":
        join_exports(shards.paths, joined, plan, captions)
    else:
        read = [batch.images for path in shards.paths for batch in NpzBatch(path).batches(256)]
        files.write_atomically(joined, lambda file: contact_sheet(torch.cat(read), columns).save(file, "PNG"))
    files.check_output(out)
    try:
        (shards.folder / JOINED).write_text(json.dumps({"inode": joined.stat().st_ino, "plan": plan}))
        joined.rename(out)
    except OSError as error:
        raise files.unwritten(out, error) from None
    _remove(shards.folder)


def _join_pictures(shards: Shards, together: Path) -> None:
    """Move the pictures of all shards into one folder. A killed move resumes: shards stay."""
    try:
        together.mkdir(exist_ok=True)
        for path in shards.paths:
            for picture in path.iterdir():
                picture.rename(together / picture.name)
    except OSError as error:
        raise files.unwritten(together, error) from None


def _was_finished(out: Path, plan: dict[str, Any]) -> bool:
    """Finish the clean-up of a call that was killed after its output appeared; return whether its plan was the same."""
    partial = files.partial_folder(out)
    if not (out.exists() and (partial / JOINED).exists()):
        return False
    try:
        known = files.read_json(partial / JOINED)
    except PraError:  # half written, before the output appeared
        return False
    if known.get("inode") != out.stat().st_ino:
        return False
    with locked(partial, "filled", "choose another --out"):
        _remove(partial)
    return bool(known.get("plan") == json.loads(json.dumps(plan)))


def _remove(partial: Path) -> None:
    """Remove the folder of the shards after the output has appeared, and :data:`JOINED` last."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != JOINED:
            path.unlink(missing_ok=True)
    shutil.rmtree(partial, ignore_errors=True)

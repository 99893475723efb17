"""The commands ``pra data pack`` and ``pra data check``."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from pra.commands.options import File, Flag, Integer
from pra.config import TextConfig
from pra.config.checks import positive, within
from pra.data.pack import FORMATS, OTHER, Packing, pack
from pra.data.source import check_told_apart, open_source
from pra.data.survey import check, lines_of
from pra.errors import PraError, counted
from pra.utils.device import cores
from pra.utils.files import PLAN, check_free, write_atomically

Source = Annotated[Positional[str], arg(metavar="SRC")]


def pack_command(
    source: Source,
    folder: Annotated[Positional[Path], arg(metavar="DIR")],
    *,
    size: Integer = None,
    format: Annotated[str | None, arg(metavar="|".join(FORMATS), help_behavior_hint="")] = None,
    quality: int = Packing.quality,
    shard_images: int = Packing.shard_images,
    skip_corrupt: Flag = False,
    workers: Integer = None,
) -> None:
    """Write images as WebDataset shards, scaled down once instead of in every epoch.

    If it is stopped, the same command resumes; DIR appears when all is done.

    Args:
        source: Any data source that `pra train --data` takes.
        folder: A new folder for the shards.
        size: Scale the shorter side down to this many pixels, as the centre crop of training does; smaller images stay.
        format: Format of the images; by default their own, or png if that is not jpg, png or webp.
        quality: Quality of jpg and webp, 1 to 100. Unchanged files are copied.
        shard_images: Images in a shard.
        skip_corrupt: Leave corrupt images out instead of stopping.
        workers: Processes that read and encode; by default one per core.
    """
    packing = Packing(size=size, format=format, quality=quality, shard_images=shard_images, skip_corrupt=skip_corrupt)
    folder = folder.expanduser()
    if not (folder / PLAN).exists():  # perhaps of a call that was killed at its end
        check_free(folder, OTHER)
    processes = _processes(workers)
    done = pack(open_source(source), folder, packing, processes)
    left_out = f", {done.skipped} corrupt ones left out (index.json names them)" if done.skipped else ""
    written = f"{counted(done.shards, 'shard')}, {done.bytes / 1e9:.3f} GB"
    print(f"packed {counted(done.images, 'image')}{left_out}: {written}, in {folder}")
    print("next:", shlex.join(["pra", "train", "RECIPE", "--data", f"wds:{folder}"]))


def check_command(
    source: Source,
    *,
    size: Integer = None,
    max_length: int = TextConfig.max_length,
    out: File = None,
    workers: Integer = None,
) -> None:
    """Read every image once: corrupt ones, class counts, sizes, modes, captions. Exit with code 2 if one is corrupt.

    Args:
        source: Any data source that `pra train --data` takes.
        size: Side of the model's images in pixels: smaller images are listed.
        max_length: Bytes of a caption that the model reads (model.text.max_length): longer captions are counted.
        out: Write everything found to a JSON file.
        workers: Processes that read and decode; by default one per core.
    """
    if size is not None:
        positive(size, "--size")
    positive(max_length, "--max-length")
    if out:
        out = out.expanduser()
        check_free(out)
    processes = _processes(workers)
    opened = open_source(source)
    begin = time.monotonic()
    report = check(opened, size, processes, max_length)
    seconds = time.monotonic() - begin
    if out:  # before anything is printed, which may fail
        text = json.dumps(report, indent=1).encode()
        write_atomically(out, lambda file: file.write(text))
    print(f"{counted(len(opened), 'image')} from {source} in {seconds:.1f} s ({len(opened) / seconds:.0f} images/s)")
    print("\n".join(lines_of(report)))
    if out:
        print(f"report: {out}")
    check_told_apart(opened)
    if report["corrupt"]:
        problem = f"{len(report['corrupt'])} of {len(opened)} images from {source} are corrupt"
        raise PraError(f"{problem}. Replace them, or train with --set data.on_corrupt=skip", code="unreadable")
    if lacking := (report["captions"] or {}).get("lacking"):
        problem = f"{len(lacking)} of {len(opened)} images from {source} have no caption that can be used"
        raise PraError(f"{problem}. Correct them, or train with --set data.on_caption=skip", code="unreadable")


def _processes(workers: int | None) -> int:
    count = cores() if workers is None else workers
    within(0, 1024)(count, "--workers")
    return count

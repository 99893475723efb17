"""Images of any source as WebDataset shards, scaled down once instead of in every epoch."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image

from pra.data.images import CorruptImage
from pra.data.loader import from_workers, in_order, reading
from pra.data.prepare import convert, cover
from pra.data.source import Encoded, Source
from pra.data.wds import CLASSES, INDEX
from pra.errors import PraError
from pra.utils.files import PLAN, begin_partial, check_free, partial_folder, write_atomically
from pra.utils.locks import LOCK, locked
from pra.utils.progress import Progress
from pra.utils.provenance import file_sha256

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_KINDS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_BLOCK = 32
_ORIENTATION = 0x0112
OTHER = "choose another folder"
"""The way out where the folder is taken."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How images become shards.

    ``size`` is the shorter side in pixels that larger images are scaled down to, as ADM's centre crop scales them;
    smaller ones stay as they are. ``format`` is jpg, png or webp; None keeps the source's, and takes png where that is
    none of these. Files that need no change are copied as they are. ``quality`` (1 to 100) is of webp and of jpg, which
    has full colour resolution. Corrupt images are left out with ``skip_corrupt``, and stop the packing without.
    """

    size: int | None = None
    format: str | None = None
    quality: int = 95
    shard_images: int = 10_000
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise PraError(f"--size {self.size} must be at least 1 pixel")
        if self.format is not None and self.format not in FORMATS:
            raise PraError(f"--format {self.format!r} is none of {', '.join(FORMATS)}")
        if not 1 <= self.quality <= 100:
            raise PraError(f"--quality {self.quality} must lie in [1, 100]")
        if self.shard_images < 1:
            raise PraError(f"--shard-images {self.shard_images} must be at least 1")


class Packed(NamedTuple):
    """What was written: counts, and the size of the shards together."""

    images: int
    shards: int
    bytes: int
    skipped: int


def pack(source: Source, folder: Path, packing: Packing, workers: int) -> Packed:
    """Write the source's images, in its order, as shards into a new folder.

    Beside ``shard-000000.tar`` and so on there are ``classes.json`` (the names, in the order of the labels) and
    ``index.json``: the shards with their counts, sizes and SHA-256, how they were made, and what was left out. The
    folder appears when all is done. Until then the shards lie in ``.FOLDER.partial``; the same call goes on from the
    last whole one.

    Args:
        source: what to pack.
        folder: must not exist.
        packing: how.
        workers: processes that read and encode.

    Raises:
        PraError: the folder exists, an unfinished packing of another kind is there, an image is corrupt, or the disk is
            full; or another command packs into it.
    """
    check_free(folder, OTHER)
    partial = partial_folder(folder)
    with locked(partial, "filled", OTHER):
        return _pack(source, folder, partial, packing, workers)


def _pack(source: Source, folder: Path, partial: Path, packing: Packing, workers: int) -> Packed:
    begin_partial(partial, {"source": source.name, "images": len(source), **dataclasses.asdict(packing)}, "packing")
    for stray in partial.glob(".shard-*"):  # of a process that was killed
        stray.unlink()
    count = -(-len(source) // packing.shard_images)
    ranges = [range(n, min(n + packing.shard_images, len(source))) for n in range(0, len(source), packing.shard_images)]
    shards = {partial / f"shard-{number:06d}.tar": ranges[number] for number in range(count)}
    missing = {path: indices for path, indices in shards.items() if not _is_whole(path)}
    blocks = (block for indices in missing.values() for block in _blocks(indices))
    encoded = from_workers(_Encoder(source, packing), blocks, in_order(source, workers))
    with reading(encoded) as files, Progress(desc="packing", total=len(source), unit="image", smoothing=0.05) as bar:
        bar.update(len(source) - sum(len(indices) for indices in missing.values()))
        for path, indices in missing.items():
            _write_shard(path, itertools.islice(files, len(list(_blocks(indices)))), bar)
    return _finish(partial, folder, source, list(shards), packing)


# --- images -------------------------------------------------------------------------------------------------


class _File(NamedTuple):
    """One image to write; ``problem`` instead where it is left out."""

    number: int
    label: int
    kind: str
    data: bytes
    problem: str | None = None


class _Encoder:
    """The files of a range of images."""

    def __init__(self, source: Source, packing: Packing) -> None:
        self._source = source
        self._packing = packing

    def __call__(self, block: range) -> list[_File]:
        return [self._file(index) for index in block]

    def _file(self, index: int) -> _File:
        label = int(self._source.labels[index])
        try:
            return _File(index, label, *self._encoded(index))
        except CorruptImage as error:
            if not self._packing.skip_corrupt:
                where = self._source.where(index)
                raise PraError(
                    f"{where}: {error.problem}; replace it, or leave such images out with --skip-corrupt"
                ) from error
            return _File(index, label, "", b"", f"{self._source.where(index)}: {error.problem}")

    def _encoded(self, index: int) -> tuple[str, bytes]:
        """An image's kind and file."""
        image, size = self._source.image(index), self._packing.size
        own = _KINDS.get(image.format or "")
        kind = self._packing.format or own or "png"
        larger = size is not None and min(image.size) > size
        if isinstance(self._source, Encoded) and kind == own and not larger:
            data = self._source.encoded(index)
            if _is_upright(data):
                return kind, data
        image = convert(image, _channels(image, kind), self._source.where(index))
        file = io.BytesIO()
        options = {
            "jpg": {"quality": self._packing.quality, "subsampling": 0},
            "webp": {"quality": self._packing.quality},
        }
        (cover(image, size, size) if size and larger else image).save(file, FORMATS[kind], **options.get(kind, {}))
        return kind, file.getvalue()


def _is_upright(data: bytes) -> bool:
    """Whether the file's pixels lie as they are to be shown: who reads the shards does not turn them."""
    with Image.open(io.BytesIO(data)) as image:
        return bool(image.getexif().get(_ORIENTATION, 1) == 1)


def _channels(image: Image.Image, kind: str) -> int:
    if image.has_transparency_data and kind != "jpg":
        return 4
    return 1 if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I") else 3


# --- files --------------------------------------------------------------------------------------------------


def _blocks(indices: range) -> Iterator[range]:
    return (indices[start : start + _BLOCK] for start in range(0, len(indices), _BLOCK))


def _record(shard: Path) -> Path:
    return shard.with_suffix(".json")


def _is_whole(shard: Path) -> bool:
    """The record is written after the shard."""
    return shard.is_file() and _record(shard).is_file()


def _write_shard(path: Path, blocks: Iterable[list[_File]], bar: Progress) -> None:
    record: dict[str, Any] = {"url": path.name, "nsamples": 0, "skipped": []}

    def write(file: IO[bytes]) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for image in itertools.chain.from_iterable(blocks):
                bar.update(1)
                if image.problem is not None:
                    record["skipped"].append(image.problem)
                    continue
                _add(tar, f"{image.number:08d}.{image.kind}", image.data)
                _add(tar, f"{image.number:08d}.cls", str(image.label).encode())
                record["nsamples"] += 1

    write_atomically(path, write)
    record |= {"filesize": path.stat().st_size, "sha256": file_sha256(path)}
    write_atomically(_record(path), lambda file: file.write(json.dumps(record).encode()))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _finish(partial: Path, folder: Path, source: Source, shards: list[Path], packing: Packing) -> Packed:
    """Classes and index (in the form of WebDataset's), and the folder under its name."""
    records = [json.loads(_record(shard).read_bytes()) for shard in shards]
    skipped = [problem for record in records for problem in record.pop("skipped")]
    images = sum(record["nsamples"] for record in records)
    if not images:
        raise PraError(f"none of the {len(source)} images of {source.name!r} can be read (for example {skipped[0]})")
    index = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "shardlist": records,
        "made_from": {"source": source.name, **dataclasses.asdict(packing)},
        "skipped": skipped,
    }
    for name, content in ((CLASSES, source.classes), (INDEX, index)):
        text = json.dumps(content, indent=1).encode()
        write_atomically(partial / name, lambda file, text=text: file.write(text))
    partial.rename(folder)
    for leftover in (PLAN, *(_record(shard).name for shard in shards)):
        (folder / leftover).unlink()
    (folder / LOCK).unlink(missing_ok=True)
    return Packed(images, len(shards), sum(record["filesize"] for record in records), len(skipped))

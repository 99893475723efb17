"""Images of any source as WebDataset shards, scaled down once instead of in every epoch."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import tarfile
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from PIL import Image

from pra.config.checks import NaturalInt, Settings, within, wrong
from pra.data.captions import CorruptCaption
from pra.data.images import CorruptImage, open_image
from pra.data.loader import PIECE, blocks, from_workers, in_order, none_readable
from pra.data.prepare import convert, cover
from pra.data.source import Captioned, Encoded, Source
from pra.data.tars import CLASSES, INDEX
from pra.errors import PraError
from pra.utils.files import PLAN, begin_partial, check_free, new_file, partial_folder, read_json, write_atomically
from pra.utils.locks import LOCK, locked
from pra.utils.progress import Progress
from pra.utils.provenance import file_sha256

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_KINDS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION = 0x0112
OTHER = "choose another folder"


@dataclass(frozen=True, kw_only=True)
class Packing(Settings):
    """Settings of how images become shards.

    Images whose shorter side exceeds ``size`` pixels are scaled down to it, as by ADM's centre crop. ``format`` is jpg,
    png, webp or None: that of the source, or png. Files that need no change are copied. ``quality`` (1 to 100) is of
    webp and jpg, which has full colour resolution. A corrupt image stops the packing unless ``skip_corrupt``.
    """

    size: Annotated[int, within(1, 10**6)] | None = None
    format: str | None = None
    quality: Annotated[int, within(1, 100)] = 95
    shard_images: Annotated[int, within(1, 10**9)] = 10_000
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in (None, *FORMATS):
            raise wrong("format", self.format, f"is unknown. Use {', '.join(FORMATS)}", "unknown")


class Packed(NamedTuple):
    """Counts of a packing, and the bytes of the shards together."""

    images: int
    shards: int
    bytes: int
    skipped: int


def pack(source: Source, folder: Path, packing: Packing, workers: int) -> Packed:
    """Write a source's images, in its order, as shards into a new folder; ``workers`` processes read and encode.

    ``classes.json`` beside the shards names the classes; ``index.json`` has counts, sizes and SHA-256 of the shards,
    settings and images left out. Until all is done they lie in ``.FOLDER.partial``, where the same call resumes.

    Raises:
        PraError: the folder exists, an unfinished packing of another kind is there, an image is corrupt, the disk is
            full, or another command packs into the folder.
    """
    plan = {"source": source.name, "images": len(source), **dataclasses.asdict(packing)}
    if (folder / PLAN).exists() and read_json(folder / PLAN) == plan:
        return _tidied(folder, read_json(folder / INDEX, shardlist=list, skipped=list))  # left by a killed process
    check_free(folder, OTHER)
    partial = partial_folder(folder)
    with locked(partial, "filled", OTHER):
        begin_partial(partial, plan, "packing", free=("skip_corrupt",))  # which an error may have advised
        for stray in partial.glob(".shard-*"):  # of a process that was killed
            stray.unlink()
        parts = blocks(range(len(source)), packing.shard_images)
        shards = {partial / f"shard-{number:06d}.tar": part for number, part in enumerate(parts)}
        _write_missing(source, shards, packing, workers)
        return _finish(partial, folder, source, list(shards), packing)


def encode(source: Source, packing: Packing, block: Sequence[int]) -> list[dict[str, bytes] | str]:
    """Return the members of each image of a range, by their names; a problem instead if it is left out.

    A corrupt image that must not be left out is a PraError.
    """
    found: list[dict[str, bytes] | str] = []
    for index in block:
        where = source.where(index)
        try:
            kind, data = _encoded(source, packing, index)
            sample = {f"{index:08d}.{kind}": data, f"{index:08d}.cls": str(source.labels[index]).encode()}
            if captions := _captions(source, index):
                sample[f"{index:08d}.json"] = json.dumps({"text": captions}, ensure_ascii=False).encode()
            found.append(sample)
        except CorruptImage as error:
            if not packing.skip_corrupt:
                fix = "Replace it, or leave such images out with --skip-corrupt"
                raise PraError(f"{where}: {error.problem}. {fix}", "unreadable", where=where) from error
            found.append(f"{where}: {error.problem}")
    return found


def _captions(source: Source, index: int) -> tuple[str, ...]:
    """Return an image's captions, perhaps none: it is packed all the same, as its class may be learned."""
    try:
        return source.captions(index) if isinstance(source, Captioned) else ()
    except CorruptCaption as error:
        if error.code == "missing":
            return ()
        raise


def _encoded(source: Source, packing: Packing, index: int) -> tuple[str, bytes]:
    image, size = source.image(index), packing.size
    own = _KINDS.get(image.format or "")
    kind = packing.format or own or "png"
    larger = size is not None and min(image.size) > size
    if isinstance(source, Encoded) and kind == own and not larger:
        data = source.encoded(index)
        with open_image(io.BytesIO(data)) as file:
            if file.getexif().get(_ORIENTATION, 1) == 1:  # readers of shards do not turn pictures
                return kind, data
    image = convert(image, _channels(image, kind), source.where(index))
    if size and larger:
        image = cover(image, size, size)
    written = io.BytesIO()
    quality = {} if kind == "png" else {"quality": packing.quality}
    image.save(written, FORMATS[kind], **quality, **({"subsampling": 0} if kind == "jpg" else {}))
    return kind, written.getvalue()


def _channels(image: Image.Image, kind: str) -> int:
    if image.has_transparency_data and kind != "jpg":
        return 4
    return 1 if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I") else 3


def _record(shard: Path) -> Path:
    return shard.with_suffix(".json")  # written after the shard, lists its content


def _write_missing(source: Source, shards: dict[Path, Sequence[int]], packing: Packing, workers: int) -> None:
    missing = {path: part for path, part in shards.items() if not (path.is_file() and _record(path).is_file())}
    work_of = {path: blocks(part, PIECE) for path, part in missing.items()}
    work = functools.partial(encode, source, packing)
    stream = from_workers(work, itertools.chain.from_iterable(work_of.values()), in_order(source, workers))
    there = len(source) - sum(map(len, missing.values()))
    bar = Progress(desc="packing", total=len(source), initial=there, unit="image", smoothing=0.05)
    with closing(stream) as files, bar:
        for path, parts in work_of.items():
            _write_shard(path, itertools.chain.from_iterable(itertools.islice(files, len(parts))), bar)


def _write_shard(path: Path, images: Iterable[dict[str, bytes] | str], bar: Progress) -> None:
    record: dict[str, Any] = {"url": path.name, "nsamples": 0, "skipped": []}
    with new_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for image in images:
            bar.update(1)
            if isinstance(image, str):
                record["skipped"].append(image)
                continue
            for name, data in image.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            record["nsamples"] += 1
    record |= {"filesize": path.stat().st_size, "sha256": file_sha256(path)}
    write_atomically(_record(path), lambda file: file.write(json.dumps(record).encode()))


def _finish(partial: Path, folder: Path, source: Source, shards: list[Path], packing: Packing) -> Packed:
    """Write classes and index (in the form of WebDataset's), and give the folder its name."""
    kinds: dict[str, Any] = {"nsamples": NaturalInt, "filesize": NaturalInt, "skipped": list}
    records = [read_json(_record(shard), **kinds) for shard in shards]
    skipped = [problem for record in records for problem in record.pop("skipped")]
    if not any(record["nsamples"] for record in records):
        raise none_readable(source, len(source), skipped[0])
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
    return _tidied(folder, index)


def _tidied(folder: Path, index: dict[str, Any]) -> Packed:
    """Remove what only an unfinished folder needs; count what its index lists."""
    for leftover in (LOCK, *(_record(shard).name for shard in folder.glob("shard-*.tar")), PLAN):
        (folder / leftover).unlink(missing_ok=True)
    records = index["shardlist"]
    images, size = (sum(record[name] for record in records) for name in ("nsamples", "filesize"))
    return Packed(images, len(records), size, len(index["skipped"]))

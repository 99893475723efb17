"""WebDataset shards: tars of ``KEY.jpg`` and ``KEY.cls``, read in any order (https://github.com/webdataset/webdataset)."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from pra.data.fetch import Promise, fetch_all, fetch_small, name_of
from pra.data.images import is_image_name, numbered_classes, pack
from pra.data.tars import TarIndex, TarSource, load_index, members, open_tar
from pra.errors import PraError
from pra.utils.extras import import_failed
from pra.utils.files import write_atomically
from pra.utils.paths import cache_folder, expand
from pra.utils.progress import Progress

CLASSES, INDEX = "classes.json", "index.json"
"""Beside the shards: the classes' names, and what :mod:`pra.data.pack` wrote; neither has to be there."""
_REMEDY = "give WebDataset shards, uncompressed tars of KEY.jpg and KEY.cls"
_NO_LABEL = -1


class WebDataset(TarSource):
    """The images of WebDataset shards, in the order of the shards and of the members within.

    A sample is the members of one name up to its first dot: one image and, if the data have classes, ``cls``, a number
    in text. ``classes.json`` beside the first shard, a list, names the classes; otherwise they are numbers. Shards on
    the web are fetched into ``$XDG_CACHE_HOME/pra/shards`` first, and then like others.

    The first opening reads all headers and keeps an index (see :func:`pra.data.tars.load_index`).
    """

    def __init__(self, name: str, pattern: str) -> None:
        """Find the shards, fetch those on the web, and load the index, or build and save it.

        Args:
            name: of the source.
            pattern: a shard, several as ``train-{000..146}.tar``, ``DIR/train-*.tar`` or ``DIR``, or on the web
                (``https://...``, where there are no stars).

        Raises:
            PraError: no such shards; one that is no tar, truncated or without images; a sample with no class where
                others have one; an address that cannot be fetched.
        """
        shards = _fetched(name, pattern) if "://" in pattern else _local(name, pattern)
        classes = shards[0].with_name(CLASSES)
        beside = [classes] if classes.is_file() else []
        super().__init__(name, shards, load_index(shards, lambda: _scan(shards, _class_names(classes)), beside))


# --- patterns -----------------------------------------------------------------------------------------------


def _braces(name: str, pattern: str) -> list[str]:
    """``a-{0..2}.tar`` to three names."""
    if "{" not in pattern:
        return [pattern]
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise PraError(import_failed(f"data source {name!r}", "braceexpand", "wds", error)) from None
    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise PraError(f"data source {name!r}: the braces of {pattern!r} do not match; write {{000..146}}") from None


def _local(name: str, pattern: str) -> list[Path]:
    if expand(pattern).is_dir():
        pattern = f"{pattern}/*.tar"
    shards = [path for part in _braces(name, pattern) for path in _matches(name, part)]
    if len(set(shards)) < len(shards):
        twice = next(path for path in shards if shards.count(path) > 1)
        raise PraError(f"data source {name!r}: {twice} is in it twice; write a pattern that names it once")
    return shards


def _matches(name: str, pattern: str) -> list[Path]:
    path = expand(pattern)
    if path.is_file():
        return [path]
    if not any(star in pattern for star in "*?["):
        problem = "is not a file" if path.exists() else "does not exist"
        raise PraError(f"data source {name!r}: the shard {path} {problem}; {_REMEDY}")
    found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    shards = [file for file in found if file.suffix == ".tar" and not file.name.startswith(".")]
    if not shards:
        what = f"{len(found)} files and no .tar (the first is {found[0].name})" if found else "no file"
        raise PraError(f"data source {name!r}: {path} matches {what}; {_REMEDY}")
    return shards


# --- the web ------------------------------------------------------------------------------------------------


def _fetched(name: str, pattern: str) -> list[Path]:
    scheme = urlsplit(pattern).scheme
    if scheme not in ("http", "https"):
        raise PraError(f"data source {name!r}: {scheme}:// is not read; mount or download it, or give https://")
    if "*" in pattern:
        raise PraError(
            f"data source {name!r}: nobody can list what is on the web; write braces, {{000..146}}, for stars"
        )
    urls = _braces(name, pattern)
    names = [name_of(url) for url in urls]
    if {"", ".", ".."} & set(names) or len(set(names)) < len(names):
        raise PraError(f"data source {name!r}: the addresses must end in different file names, such as a.tar and b.tar")
    # Shards of the same names from elsewhere must not be taken for these.
    home = _beside(urls[0], "").partition("?")[0]  # what follows may be a key that changes
    folder = cache_folder() / "shards" / hashlib.sha256(home.encode()).hexdigest()[:16]
    promises = {}
    if any(not (folder / shard).exists() for shard in names):
        promises = _promises(_beside(urls[0], INDEX))
    if not (folder / names[0]).exists():
        _fetch_classes(_beside(urls[0], CLASSES), folder)
    return fetch_all(urls, folder, promises)


def _beside(url: str, name: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def _promises(url: str) -> dict[str, Promise]:
    """Sizes and check sums from ``index.json``, where there is one."""
    index = _json(url, fetch_small(url))
    shards = index.get("shardlist") if isinstance(index, dict) else None
    try:
        return {s["url"]: Promise(s.get("filesize"), s.get("sha256")) for s in shards or ()}
    except (TypeError, KeyError, AttributeError):
        raise PraError(f"{url} is no index of shards; mend or remove it") from None


def _fetch_classes(url: str, folder: Path) -> None:
    data = fetch_small(url)
    if data is not None:
        write_atomically(folder / CLASSES, lambda file: file.write(data))


def _json(where: object, data: bytes | None) -> Any:
    try:
        return None if data is None else json.loads(data)
    except ValueError as error:
        raise PraError(f"{where} is not JSON ({error}); mend or remove it") from None


# --- the index ----------------------------------------------------------------------------------------------


class _Sample(NamedTuple):
    offset: int
    size: int
    member: str
    label: int


def _class_names(path: Path) -> list[str] | None:
    classes = _json(path, path.read_bytes()) if path.is_file() else None
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise PraError(f"{path} is not a list of the classes' names; mend or remove it")
    return classes


def _scan(shards: Sequence[Path], classes: list[str] | None) -> TarIndex:
    found: list[_Sample] = []
    files: list[int] = []
    total = sum(path.stat().st_size for path in shards)
    with Progress(desc=f"indexing {len(shards)} shards", total=total, unit="B", unit_scale=True) as bar:
        for number, path in enumerate(shards):
            samples = list(_samples(path))
            found += samples
            files += [number] * len(samples)
            bar.update(path.stat().st_size)
    if not found:
        raise PraError(f"{shards[0]} holds no images, nor does any other shard; {_REMEDY}")
    offsets, sizes, names, labels = zip(*found, strict=True)
    numbers = np.array(labels, np.int64)
    if (numbers == _NO_LABEL).all():
        numbers, names_of_classes = np.zeros_like(numbers), ["image"]
    else:
        _check_labelled(found, files, shards)
        names_of_classes = classes or numbered_classes(
            numbers,
            lambda index: f"{found[index].member} in {shards[files[index]]}",
            f"name them in {CLASSES} beside the first shard, or remove the .cls members for data without classes",
        )
        if numbers.max() >= len(names_of_classes):
            worst = int(numbers.argmax())
            raise PraError(
                f"{found[worst].member} in {shards[files[worst]]} has class {numbers[worst]}, but {CLASSES} beside it "
                f"names {len(names_of_classes)}; mend or remove {CLASSES}"
            )
    places = np.array(files, np.int32), np.array(offsets), np.array(sizes)
    return TarIndex(*places, numbers, pack(names), np.array(names_of_classes))


def _check_labelled(found: list[_Sample], files: list[int], shards: Sequence[Path]) -> None:
    for sample, file in zip(found, files, strict=True):
        if sample.label == _NO_LABEL:
            key = sample.member.partition(".")[0]
            raise PraError(
                f"{sample.member} in {shards[file]} has no class ({key}.cls), while others have; add or remove it"
            )


def _samples(path: Path) -> Iterator[_Sample]:
    """The images of one shard with their classes, -1 for none."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    with path.open("rb") as file, open_tar(file, str(path), _REMEDY) as tar:
        for member in members(tar, path.stat().st_size, str(path)):
            key, kind = _parts(member.name)
            if kind == "cls":
                labels[key] = _label(tar, member, path)
            elif "." not in kind and is_image_name(f"_.{kind}"):
                if key in images:
                    both = f"{images[key].name} and {member.name}"
                    raise PraError(f"{path} has two images of one sample, {both}; leave one in it")
                images[key] = member
    for key, member in images.items():
        yield _Sample(member.offset_data, member.size, member.name, labels.get(key, _NO_LABEL))


def _parts(member: str) -> tuple[str, str]:
    """``a/b.seg.png`` to its key ``a/b`` and its kind ``seg.png``; files that are hidden have no kind."""
    path = PurePosixPath(member)
    stem, _, kind = path.name.partition(".")
    return str(path.with_name(stem)) if stem else member, kind.lower() if stem else ""


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    file = tar.extractfile(member)
    text = file.read(32).strip() if file else b""
    if not text.isdigit() or len(text) > 9:
        raise PraError(f"{member.name} in {path} holds {text!r}; a class is a whole number, 0 or more")
    return int(text)

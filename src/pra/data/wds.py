"""WebDataset shards: tars of ``KEY.jpg`` and ``KEY.cls``, read in any order (https://github.com/webdataset/webdataset)."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from pra.data.fetch import Promise, fetch_all, fetch_small, name_of
from pra.data.images import check_there, is_image_name, numbered_classes
from pra.data.tars import Found, TarIndex, TarSource, load_index, members
from pra.errors import PraError
from pra.utils.files import cache_folder, expand, write_atomically
from pra.utils.progress import Progress

CLASSES, INDEX = "classes.json", "index.json"
"""Optional files beside the shards: the classes' names, and the index that :mod:`pra.data.pack` writes."""
_FIX = "Give WebDataset shards, uncompressed tars of KEY.jpg and KEY.cls"
_NO_LABEL = -1


class WebDataset(TarSource):
    """The images of WebDataset shards, in the order of the shards and of the members within.

    A pattern is a shard, several as ``train-{000..146}.tar``, ``DIR/train-*.tar`` or ``DIR``, or on the web
    (``https://...``, without stars). A sample is the members of one name up to its first dot: one image and, if the
    data have classes, ``cls``, a number in text. ``classes.json`` beside the first shard, a list, names the classes.
    """

    def __init__(self, name: str, pattern: str) -> None:
        shards = _fetched(pattern) if "://" in pattern else _local(pattern)
        classes = shards[0].with_name(CLASSES)
        beside = [classes] if classes.is_file() else []
        super().__init__(name, shards, load_index(shards, lambda: _scan(shards, _class_names(classes)), beside))


def _braces(pattern: str) -> list[str]:
    """Expand ``a-{0..2}.tar`` to three names."""
    if "{" not in pattern:
        return [pattern]
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise PraError("its braces do not match. Write {000..146}") from None


def _local(pattern: str) -> list[Path]:
    if expand(pattern).is_dir():
        pattern = f"{pattern}/*.tar"
    shards = [path for part in _braces(pattern) for path in _matches(part)]
    if len(set(shards)) < len(shards):
        twice = next(path for path in shards if shards.count(path) > 1)
        raise PraError(f"{twice} is in it twice. Write a pattern that names it once")
    return shards


def _matches(pattern: str) -> list[Path]:
    path = expand(pattern)
    if not any(star in pattern for star in "*?["):
        check_there(path, "file", _FIX)
    if path.is_file():
        return [path]
    found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    shards = [file for file in found if file.suffix == ".tar" and not file.name.startswith(".")]
    if not shards:
        raise PraError(f"{path} matches {len(found)} files and no .tar. {_FIX}", "missing", path=path)
    return shards


def _fetched(pattern: str) -> list[Path]:
    if urlsplit(pattern).scheme not in ("http", "https"):
        raise PraError("only http:// and https:// are fetched. Mount or download the data")
    if "*" in pattern:
        raise PraError("the files on the web cannot be listed. Write braces, {000..146}, for stars")
    urls = _braces(pattern)
    names = [name_of(url) for url in urls]
    if {"", ".", ".."} & set(names) or len(set(names)) < len(names):
        raise PraError("the addresses must end in different file names. Use names such as a.tar and b.tar")
    # The address names the folder: elsewhere, shards of these names may be others. A query may hold a key.
    home = _beside(urls[0], "").partition("?")[0]
    folder = cache_folder() / "shards" / hashlib.sha256(home.encode()).hexdigest()[:16]
    promises = {}
    if any(not (folder / shard).exists() for shard in names):
        promises = _promises(_beside(urls[0], INDEX))
        classes = fetch_small(_beside(urls[0], CLASSES))
        if classes is not None:
            write_atomically(folder / CLASSES, lambda file: file.write(classes))
    return fetch_all(urls, folder, promises)


def _beside(url: str, name: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def _promises(url: str) -> dict[str, Promise]:
    index = _json(url, fetch_small(url)) or {}
    try:
        return {s["url"]: Promise(s.get("filesize"), s.get("sha256")) for s in index.get("shardlist") or ()}
    except (TypeError, KeyError, AttributeError):
        raise _malformed(url, "is not an index of shards") from None


def _json(where: object, data: bytes | None) -> Any:
    try:
        return None if data is None else json.loads(data)
    except ValueError as error:
        raise _malformed(where, f"is not JSON ({error})") from None


def _malformed(where: object, problem: str) -> PraError:
    return PraError(f"{where} {problem}. Repair or remove it", "unreadable", path=where)


def _class_names(path: Path) -> list[str]:
    classes = _json(path, path.read_bytes()) if path.is_file() else []
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise _malformed(path, "is not a list of the classes' names")
    return classes


def _scan(shards: Sequence[Path], classes: list[str]) -> TarIndex:
    found: list[Found] = []
    total = sum(path.stat().st_size for path in shards)
    with Progress(desc=f"indexing {len(shards)} shards", total=total, unit="B", unit_scale=True) as bar:
        for number, path in enumerate(shards):
            found += _samples(number, path)
            bar.update(path.stat().st_size)
    if not found:
        raise PraError(f"{shards[0]} holds no images, nor does any other shard. {_FIX}", "missing", path=shards[0])

    def where(index: int) -> str:
        return f"{found[index].member} in {shards[found[index].file]}"

    labels = np.array([sample.label for sample in found])
    if (labels == _NO_LABEL).all():
        return TarIndex.of((sample._replace(label=0) for sample in found), ["image"])
    if labels.min() == _NO_LABEL:
        first = where(int(labels.argmin()))
        raise PraError(f"{first} has no class (KEY.cls), while others have. Add or remove it", "mismatch", where=first)
    fix = f"Name the classes in {CLASSES} beside the first shard, or remove the .cls members for data without classes"
    classes = classes or numbered_classes(labels, where, fix)
    if labels.max() >= len(classes):
        problem = f"has class {labels.max()}, but {CLASSES} beside it names {len(classes)}"
        raise _malformed(where(int(labels.argmax())), problem)
    return TarIndex.of(found, classes)


def _samples(number: int, path: Path) -> Iterator[Found]:
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    with path.open("rb") as file:
        for tar, member in members(file, path.stat().st_size, str(path), _FIX):
            key, kind = _parts(member.name)
            if kind == "cls":
                labels[key] = _label(tar, member, path)
            elif "." not in kind and is_image_name(f"_.{kind}"):
                if key in images:
                    both = f"{images[key].name} and {member.name}"
                    raise PraError(f"{path}: one sample has two images, {both}. Remove one", "conflict", path=path)
                images[key] = member
    for key, member in images.items():
        yield Found(number, member.offset_data, member.size, member.name, labels.get(key, _NO_LABEL))


def _parts(member: str) -> tuple[str, str]:
    """Split ``a/b.seg.png`` into its key ``a/b`` and its kind ``seg.png``; hidden files have no kind."""
    path = PurePosixPath(member)
    stem, _, kind = path.name.partition(".")
    return str(path.with_name(stem)) if stem else member, kind.lower() if stem else ""


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    file = tar.extractfile(member)
    text = file.read(32).strip() if file else b""
    if not text.isdigit() or len(text) > 9:
        raise PraError(f"{member.name} in {path} holds {text!r}. Write a class as a number, 0 or more", value=text)
    return int(text)

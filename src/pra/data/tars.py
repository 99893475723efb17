"""Images inside tar files: found once, kept in an index, and read in any order afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from pra.config.checks import NaturalInt
from pra.data.captions import MOST_TEXT, CorruptCaption, corrupt_caption, from_json, from_lines, without_caption
from pra.data.fetch import Promise, fetch_all, fetch_small, name_of
from pra.data.images import (
    Files,
    check_there,
    corrupt,
    is_image_name,
    is_picture_name,
    most_bytes,
    numbered_classes,
    pack,
    warn_once,
)
from pra.errors import PraError, one_line
from pra.utils.files import (
    MOST_JSON,
    cache_folder,
    check_fields,
    expand,
    parse_json,
    read_arrays,
    read_json,
    read_regular,
    unreadable,
    write_atomically,
)
from pra.utils.progress import Progress

_FORMAT = 4
OPEN_FILES = 128
"""Tars open at once in each process: many systems allow 1024 files."""
LONGEST_NAME = 250
"""Characters kept of a member's name, which is only shown: each takes as much memory as the longest one."""
_IMAGENET = "Give ILSVRC2012_img_train.tar as downloaded"
CLASSES, INDEX = "classes.json", "index.json"
"""Optional files beside the shards: the classes' names, and the index that :mod:`pra.data.pack` writes."""
_SHARDS = "Give WebDataset shards, uncompressed tars of KEY.jpg and KEY.cls"
_NO_LABEL = -1
_DOTS = "WebDataset takes a sample's name up to its first dot. Write cat-1.jpg for cat.1.jpg, and cat-1.cls"
_NO_PICTURE = "the sample has no picture of a format that is read. Save it as JPEG or PNG"
_LINK = "the member is a link. Pack the files themselves (tar --dereference --hard-dereference)"
TarIndex = dict[str, Any]
_KINDS = {"files": "i", "offsets": "i", "sizes": "i", "labels": "i", "members": "S", "classes": "U"}
"""Arrays of a saved index with the kinds of their values; its bytes are fewer than the tars' and ``_LEAST``."""
_TEXTS = {"text_offsets": "i", "text_sizes": "i", "text_json": "b"}
"""Arrays of shards with captions."""
_LEAST = 2**24
_PROMISED: dict[str, Any] = {"url": str, "filesize": NaturalInt | None, "sha256": str | None}
"""Fields of a shard in ``INDEX``, with their types."""


class Found(NamedTuple):
    """One image in a tar: the tar's number, offset and size in bytes, the file's name, and its label.

    Its captions lie at ``text_offset`` in a text file or in JSON; 0 without captions.
    """

    file: int
    offset: int
    size: int
    member: str
    label: int
    text_offset: int = 0
    text_size: int = 0
    text_json: bool = False


def columns(found: Iterable[Found], classes: Sequence[str]) -> TarIndex:
    """Return the index of at least one image: columns ``(N,)``, and the classes' names in the order of their labels."""
    files, offsets, sizes, members, labels, *texts = zip(*found, strict=True)
    index = {"files": np.array(files, np.int32), "offsets": np.array(offsets), "sizes": np.array(sizes)}
    if any(texts[0]):
        index |= {name: np.array(column) for name, column in zip(_TEXTS, texts, strict=True)}
    shown = pack(name[:LONGEST_NAME] for name in members)
    return index | {"labels": np.array(labels, np.int64), "members": shown, "classes": np.array(classes)}


class TarSource(Files):
    """The images of tars, in the order of the tars and of their members. EXIF orientation is ignored."""

    turned = False

    def __init__(self, name: str, tars: Sequence[Path], index: TarIndex) -> None:
        super().__init__(name, index["classes"], index["labels"])
        self._tars, self._index = tuple(tars), index
        self._open: dict[int, FileIO] = {}

    def encoded(self, index: int) -> bytes:
        offset, size = (int(self._index[column][index]) for column in ("offsets", "sizes"))
        if size > (most := most_bytes()):
            raise corrupt(self.where(index), f"{size:,} bytes are more than {most:,}", "too-large")
        return self._read(index, offset, size)

    def _read(self, index: int, offset: int, size: int) -> bytes:
        """Return a part of the tar in which an image lies."""
        file = int(self._index["files"][index])
        try:
            opened = self._open.pop(file, None)
            if opened is None:
                if len(self._open) >= OPEN_FILES:
                    self._open.pop(next(iter(self._open))).close()
                opened = FileIO(self._tars[file])
            self._open[file] = opened  # last: the first file in the cache is the least recently used
            # Forked workers share open files and their positions: pread ignores the position.
            return os.pread(opened.fileno(), size, offset)
        except OSError as error:
            raise corrupt(self.where(index), f"cannot be read ({error.strerror})") from error

    def where(self, index: int) -> str:
        return f"{os.fsdecode(bytes(self._index['members'][index]))} in {self._tars[self._index['files'][index]]}"

    def listing(self) -> bytes:
        return bytes(self._index["members"].tobytes() + self._index["sizes"].tobytes())

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": {}}


class ImageNetTar(TarSource):
    """``ILSVRC2012_img_train.tar`` as downloaded: a tar with one inner tar of JPEG files per class.

    Images come in the order of the tar; classes are the inner tars' names (wnids), sorted.
    """

    def __init__(self, name: str, path: Path) -> None:
        check_there(path, "file", _IMAGENET)
        super().__init__(name, [path], load_index([path], lambda: _scan_classes(path)))

    def where(self, index: int) -> str:
        return f"{self.classes[self.labels[index]]}/{super().where(index)}"


def _scan_classes(path: Path) -> TarIndex:
    size = path.stat().st_size
    by_class: list[tuple[str, Found]] = []
    inner_tars: dict[str, str] = {}
    bar = Progress(desc=f"indexing {path.name}", total=size, unit="B", unit_scale=True)
    with path.open("rb") as file, bar:
        for outer, inner in members(file, size, str(path), _IMAGENET):
            if inner.isreg() and PurePosixPath(inner.name).match("[!.]*.tar"):
                wnid = PurePosixPath(inner.name).stem
                if inner_tars.setdefault(wnid, inner.name) != inner.name:
                    both = f"{inner_tars[wnid]} and {inner.name}"
                    raise PraError(f"{path} holds two classes {wnid!r}: {both}. {_IMAGENET}", "conflict", path=path)
                images = members(outer.extractfile(inner), inner.size, f"{inner.name} in {path}", _IMAGENET)
                for _, member in images:
                    name = PurePosixPath(member.name).name
                    if member.isreg() and is_image_name(name):
                        found = Found(0, inner.offset_data + member.offset_data, member.size, name, 0)
                        by_class.append((wnid, found))
            bar.update(inner.offset_data + inner.size - bar.n)
    if not by_class:
        raise PraError(f"{path} holds no class tars with images. {_IMAGENET}, or use folder:", "unreadable", path=path)
    classes = sorted({wnid for wnid, _ in by_class})
    labels = {wnid: label for label, wnid in enumerate(classes)}
    return columns((found._replace(label=labels[wnid]) for wnid, found in by_class), classes)


def load_index(tars: Sequence[Path], scan: Callable[[], TarIndex], beside: Sequence[Path] = ()) -> TarIndex:
    """Return the saved index while sizes and times of ``tars`` and ``beside`` stay, and a new one otherwise.

    It is kept beside the first tar, or in ``$XDG_CACHE_HOME/pra`` if that cannot be written.
    """
    status = [path.stat() for path in (*tars, *beside)]
    sizes = [one.st_size for one in status[: len(tars)]]
    # Taken before the scan: a tar that changes meanwhile must not match.
    stamp = [_FORMAT, *(number for s in status for number in (s.st_size, s.st_mtime_ns))]
    digest = hashlib.sha256(b"\0".join(os.fsencode(path.absolute()) for path in tars)).hexdigest()[:16]
    name, long_name = (f"{tars[0].name}{part}.index.npz" for part in ("", f".{digest}"))
    places = tars[0].with_name(name if len(tars) == 1 else long_name), cache_folder() / long_name
    for place in places:
        # A new index replaces a damaged one.
        with contextlib.suppress(Exception):
            saved = read_arrays(place, None, most=sum(sizes) + _LEAST)
            if saved["stamp"].tolist() == stamp and _is_of(saved, sizes):
                return saved
    index = scan()
    for place in places:
        try:
            write_atomically(place, lambda file: np.savez(file, **index | {"stamp": np.array(stamp)}))
            return index
        except PraError as error:
            problem = error
    warnings.warn(f"the index of {tars[0]} will be made again each time: {problem}", stacklevel=2)
    return index


def _is_of(index: TarIndex, tars: Sequence[int]) -> bool:
    """Return whether a saved index fits tars of these sizes: the file beside them may be anything."""
    kinds = _KINDS | (_TEXTS if "text_offsets" in index else {})
    if any(index[name].dtype.kind != kind or index[name].ndim != 1 for name, kind in kinds.items()):
        return False
    files, labels, classes = index["files"], index["labels"], index["classes"]
    if not len(files) or {len(index[name]) for name in kinds if name != "classes"} != {len(files)}:
        return False
    if not ((files >= 0) & (files < len(tars)) & (labels >= 0) & (labels < len(classes))).all():
        return False
    pieces = [(index[f"{part}offsets"], index[f"{part}sizes"]) for part in ("", "text_") if f"{part}offsets" in index]
    ends = np.array(tars)[files]
    return all(((start >= 0) & (size >= 0) & (size <= ends - start)).all() for start, size in pieces)


def members(
    file: IO[bytes] | None, size: int, where: str, fix: str
) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield an uncompressed tar of ``size`` bytes and each member of it.

    Refuse other files, and endings that ``tarfile`` accepts: a broken header, or a missing block of zeros.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            assert tar.fileobj is not None
            for member in tar:
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"truncated at byte {size}")
                yield tar, member
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"damaged at byte {tar.offset}")
    except tarfile.TarError as error:
        raise PraError(f"{where} is not a whole, uncompressed tar: {error}. {fix}", "unreadable", path=where) from error


class WebDataset(TarSource):
    """The images of WebDataset shards, in the order of the shards and of the members within.

    A pattern is a shard, several as ``train-{000..146}.tar``, ``DIR/train-*.tar`` or ``DIR``, or on the web
    (``https://...``, without stars). A sample is the members of one name up to its first dot: one image and, if the
    data have classes, ``cls``, a number in text. ``classes.json`` beside the first shard, a list, names the classes.
    Captions are the lines of ``txt``, else ``text`` or ``caption`` in ``json``, a string or a list.
    """

    def __init__(self, name: str, pattern: str) -> None:
        shards = _fetched(pattern) if "://" in pattern else _local(pattern)
        classes = shards[0].with_name(CLASSES)
        beside = [classes] if classes.exists() else []
        index = load_index(shards, lambda: _scan_shards(shards, _class_names(classes)), beside)
        super().__init__(name, shards, index)
        for text in [*index.get("left_out", np.empty(0)).astype(str).ravel().tolist(), *_lost(expand(pattern), shards)]:
            warn_once(f"{name}: {text}")
        offsets = index.get("text_offsets", np.zeros(1))
        if offsets.any() and self._has_caption(int(offsets.astype(bool).argmax())):
            self.captions = self._captions
            lacking = np.flatnonzero(offsets == 0)
            error = without_caption(self.where(int(lacking[0]))) if len(lacking) else None
            self.uncaptioned = len(lacking), error

    def _has_caption(self, index: int) -> bool:
        """Return whether the first member that may hold captions does: a JSON may hold other things."""
        try:
            return bool(self._captions(index))
        except CorruptCaption as error:
            return error.code != "unknown"

    def _captions(self, index: int) -> tuple[str, ...]:
        where = self.where(index)
        offset, size, in_json = (self._index[column][index] for column in _TEXTS)
        if not offset:
            raise without_caption(where)
        if size > (most := MOST_JSON if in_json else MOST_TEXT):
            raise corrupt_caption(where, f"its caption has {size:,} bytes, at most {most:,}", "too-large")
        place = f"{_parts(where.partition(' in ')[0])[0]}.{'json' if in_json else 'txt'}"
        return (from_json if in_json else from_lines)(self._read(index, int(offset), int(size)), where, place)


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
    path = expand(pattern)  # first: the name of a folder or file may hold stars and braces
    if path.is_dir():
        return _shards_of(path / "*.tar", path.glob("*.tar"))
    if path.is_file():
        return [path]
    shards = [path for part in _braces(pattern) for path in _matches(part)]
    if len(set(shards)) < len(shards):
        twice = next(path for path in shards if shards.count(path) > 1)
        raise PraError(f"{twice} is in it twice. Write a pattern that names it once")
    return shards


def _matches(pattern: str) -> list[Path]:
    path = expand(pattern)
    if not any(star in pattern for star in "*?["):
        check_there(path, "file", _SHARDS)
    if path.is_file():
        return [path]
    return _shards_of(path, Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def _shards_of(pattern: Path, matches: Iterable[Path]) -> list[Path]:
    found = sorted(matches)
    shards = [file for file in found if file.suffix == ".tar" and not file.name.startswith(".") and file.is_file()]
    if not shards:
        raise PraError(f"{pattern} matches {len(found)} files and no .tar. {_SHARDS}", "missing", path=pattern)
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


def _lost(folder: Path, shards: Sequence[Path]) -> Iterator[str]:
    """Say which shards a folder lacks, by the index that :mod:`pra.data.pack` writes."""
    # There may be none, or one of another kind.
    with contextlib.suppress(PraError, TypeError, KeyError):
        index = read_json(folder / INDEX)
        if lost := sorted({str(shard["url"]) for shard in index["shardlist"]} - {path.name for path in shards}):
            yield f"{len(lost)} shards that {INDEX} names are missing, such as {lost[0]}. Copy or pack them again"


def _beside(url: str, name: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def _promises(url: str) -> dict[str, Promise]:
    index = parse_json(fetch_small(url) or b"{}", url)
    try:
        shards = [check_fields(s, url, **_PROMISED) for s in index.get("shardlist") or ()]
        return {s["url"]: Promise(s.get("filesize"), s.get("sha256")) for s in shards}
    except (TypeError, KeyError, AttributeError):
        raise _malformed(url, "is not an index of shards") from None


def _malformed(where: object, problem: str) -> PraError:
    return unreadable(where, f"{problem}. Repair or remove it")


def _class_names(path: Path) -> list[str]:
    try:
        classes = parse_json(read_regular(path, MOST_JSON), path) if path.exists() else []
    except OSError as error:
        raise _malformed(path, f"cannot be read ({error.strerror})") from None
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise _malformed(path, "is not a list of the classes' names")
    return classes


def _scan_shards(shards: Sequence[Path], classes: list[str]) -> TarIndex:
    found: list[Found] = []
    left_out: dict[str, list[str]] = {}
    total = sum(path.stat().st_size for path in shards)
    with Progress(desc=f"indexing {len(shards)} shards", total=total, unit="B", unit_scale=True) as bar:
        for number, path in enumerate(shards):
            found += _samples(number, path, left_out)
            bar.update(path.stat().st_size)
    told = [f"{len(names)} left out, such as {names[0]}: {why}" for why, names in left_out.items()]
    if not found:
        fix = "; ".join(told) or _SHARDS
        raise PraError(f"{shards[0]} holds no images, nor does any other shard. {fix}", "missing", path=shards[0])
    index = _labelled(shards, found, classes)
    return index | {"left_out": np.array(told, np.str_)}


def _labelled(shards: Sequence[Path], found: Sequence[Found], classes: list[str]) -> TarIndex:

    def where(index: int) -> str:
        return f"{found[index].member} in {shards[found[index].file]}"

    labels = np.array([sample.label for sample in found])
    if (labels == _NO_LABEL).all():
        return columns((sample._replace(label=0) for sample in found), ["image"])
    if labels.min() == _NO_LABEL:
        first = where(int(labels.argmin()))
        raise PraError(f"{first} has no class (KEY.cls), while others have. Add or remove it", "mismatch", where=first)
    fix = f"Name the classes in {CLASSES} beside the first shard, or remove the .cls members for data without classes"
    classes = classes or numbered_classes(labels, where, fix)
    if labels.max() >= len(classes):
        problem = f"has class {labels.max()}, but {CLASSES} beside it names {len(classes)}"
        raise _malformed(where(int(labels.argmax())), problem)
    return columns(found, classes)


def _samples(number: int, path: Path, left_out: dict[str, list[str]]) -> list[Found]:
    """Return the samples of a shard, and add the members that would be samples to ``left_out``, by the reason."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    texts: dict[str, tarfile.TarInfo] = {}
    others: list[tuple[str, tarfile.TarInfo]] = []
    with path.open("rb") as file:
        for tar, member in members(file, path.stat().st_size, str(path), _SHARDS):
            key, kind = _parts(member.name)
            if kind == "cls" and member.isreg():
                labels[key] = _class_of(tar, member, path)
            elif kind in ("txt", "json") and member.isreg():
                if kind == "txt" or key not in texts:
                    texts[key] = member
            elif "." not in kind and is_image_name(f"_.{kind}") and member.isreg():
                if key in images:
                    both = f"{images[key].name} and {member.name}"
                    raise PraError(f"{path}: one sample has two images, {both}. Remove one", "conflict", path=path)
                images[key] = member
            elif kind and not member.isdir():
                others.append((key, member))
    for why, name in _left_out(images, labels, others):
        left_out.setdefault(why, []).append(f"{one_line(name, 200)} in {path}")
    return [
        Found(number, member.offset_data, member.size, member.name, labels.get(key, _NO_LABEL), *_text(texts.get(key)))
        for key, member in images.items()
    ]


def _text(member: tarfile.TarInfo | None) -> tuple[int, int, bool]:
    return (member.offset_data, member.size, member.name.lower().endswith(".json")) if member else (0, 0, False)


def _left_out(
    images: Mapping[str, tarfile.TarInfo], labels: Mapping[str, int], others: Sequence[tuple[str, tarfile.TarInfo]]
) -> Iterator[tuple[str, str]]:
    """Yield the reason and the name of each picture that is not in ``images``, nor beside one as a mask is.

    A member ``cat.1.jpg`` is not a mask if there is ``cat.1.cls``, or no ``cat.jpg``.
    """
    classed = {_stem(member.name) for _, member in others if member.name.lower().endswith(".cls")}
    named = set(images)
    for key, member in others:
        if (key in images and _stem(member.name) not in classed) or not is_picture_name(member.name):
            continue
        named.add(key)
        read = is_image_name(f"_{PurePosixPath(member.name).suffix}")
        yield (_DOTS if member.isreg() else _LINK) if read else _NO_PICTURE, member.name
    yield from ((_NO_PICTURE, f"{key}.cls") for key in labels if key not in named)


def _stem(member: str) -> str:
    return str(PurePosixPath(member).with_suffix(""))


def _parts(member: str) -> tuple[str, str]:
    """Split ``a/b.seg.png`` into its key ``a/b`` and its kind ``seg.png``; hidden files have no kind."""
    path = PurePosixPath(member)
    stem, _, kind = path.name.partition(".")
    return str(path.with_name(stem)) if stem else member, kind.lower() if stem else ""


def _class_of(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    file = tar.extractfile(member)
    text = file.read(32).strip() if file else b""
    if not text.isdigit() or len(text) > 9:
        raise PraError(f"{member.name} in {path} holds {text!r}. Write a class as a number, 0 or more", value=text)
    return int(text)

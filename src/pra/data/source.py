"""Sources of labelled images, named by one string: ``digits``, ``folder:PATH``, ..."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image
from torch import Tensor

from pra.config import OnCorrupt
from pra.data.emoji import FONT, EmojiSource
from pra.data.folder import FolderSource
from pra.data.hf import open_hf
from pra.data.idx import open_digits, open_idx
from pra.data.images import CorruptImage, Labelled, Labels, warn_once
from pra.data.tars import CLASSES, ImageNetTar, WebDataset
from pra.errors import PraError, nearest
from pra.utils.extras import import_failed
from pra.utils.files import expand
from pra.utils.registry import Registry

SPLIT: dict[str, Callable[[str, str, bool], Source]] = {
    "digits": lambda spec, _, test: open_digits(spec, test),
    "emoji": lambda spec, path, test: EmojiSource(spec, expand(path) if path else FONT, test),
    "idx": lambda spec, path, test: open_idx(spec, expand(path), test),
}
"""Kinds of sources that have a test split, which ends their names: ``@test``."""
_WHOLE: dict[str, Callable[[str, str], Source]] = {
    "folder": lambda spec, path: FolderSource(spec, expand(path)),
    "imagenet-tar": lambda spec, path: ImageNetTar(spec, expand(path)),
    "wds": WebDataset,
    "hf": open_hf,
}
_EXTRAS = {"digits": "train", "emoji": "emoji", "wds": "wds", "hf": "hf"}
_ALONE = ("digits", "digits@test", "emoji", "emoji@test")


@runtime_checkable
class Source(Protocol):
    """Labelled images in any order. Sources can be pickled to worker processes.

    ``name`` is the string it was opened with, and ``labels`` (int64) hold an index into ``classes`` per image.
    """

    name: str
    classes: tuple[str, ...]
    labels: Labels

    def __len__(self) -> int:
        """Return the number of images, at least 1."""
        ...

    def image(self, index: int) -> Image.Image:
        """Return one image, decoded, in its own size and mode; one that cannot be read is a CorruptImage error."""
        ...

    def where(self, index: int) -> str:
        """Return the image's file, or ``"image 17 of digits"``, for messages."""
        ...


@runtime_checkable
class Encoded(Protocol):
    """A source whose images are files."""

    def encoded(self, index: int) -> bytes:
        """Return the file that ``image`` decodes; one that cannot be read is a CorruptImage error."""
        ...


@runtime_checkable
class Captioned(Protocol):
    """A source whose images have captions beside their classes."""

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of an image: at least one, which may be ``""``."""
        ...


@runtime_checkable
class Streamed(Protocol):
    """A source that is read from front to back, at ``lanes`` places at once."""

    @property
    def lanes(self) -> int:
        """The number of readers that read nothing twice."""
        ...

    def arranged(self, order: Tensor, start: int) -> Tensor:
        """Return the order of an epoch that begins with sample ``start``: a random one, made to read forward."""
        ...


@runtime_checkable
class Listed(Protocol):
    """A source that tells its files apart without opening them."""

    def listing(self) -> bytes:
        """Return the names and sizes of the images' files, in their order and the same wherever the data lie."""
        ...


class Part(Labelled):
    """The images of a source at some ``indices``, as a source of the same name."""

    def __init__(self, source: Source, indices: Labels) -> None:
        super().__init__(source.name, source.classes, source.labels[indices])
        self._source, self._indices = source, indices
        if isinstance(source, Captioned):
            self.captions = functools.partial(_captions_at, source, indices)

    def image(self, index: int) -> Image.Image:
        return self._source.image(int(self._indices[index]))

    def where(self, index: int) -> str:
        return self._source.where(int(self._indices[index]))


def _captions_at(source: Captioned, indices: Labels, index: int) -> tuple[str, ...]:
    return source.captions(int(indices[index]))


class Relabelled(Part):
    """The images of a source with other ``classes``; ``places`` maps each label of the source to the new one."""

    def __init__(self, source: Source, classes: Sequence[str], places: Labels) -> None:
        super().__init__(source, np.arange(len(source)))
        self.classes, self.labels = tuple(classes), places[source.labels]
        if isinstance(source, Streamed):
            self.lanes, self.arranged = source.lanes, source.arranged


SOURCES: Registry[Callable[[str, str], Source]] = Registry("data source", "pra.sources", {*SPLIT, *_WHOLE})


def register_source(name: str, function: Callable[[str, str], Source]) -> None:
    """Register ``NAME`` and ``NAME:ARGUMENT`` as data sources in this process, for ``--data`` and everything else.

    ``function`` takes the whole name, which becomes :attr:`Source.name`, and the argument. Packages register theirs for
    every process by an entry point of the group ``pra.sources``. Refuse a name that is built in or malformed.
    """
    SOURCES.add(name, function)


def own_test_split(spec: str) -> str:
    """Return the name of a source's own test split, if it has one: ``"digits@test"`` for ``"digits"``."""
    if spec.endswith("@test") or spec.partition(":")[0] not in SPLIT:
        fix = "Name another source, or a share such as 0.05"
        raise PraError(f"data source {spec!r} has no test split. {fix}", "unsupported", name=spec)
    return f"{spec}@test"


def open_source(spec: str) -> Source:
    """Open a source by its name.

    ``digits``, ``emoji``, ``emoji:FONT.ttf``, ``idx:DIR``, ``folder:PATH``, ``imagenet-tar:PATH``, ``wds:PATTERN``
    (:class:`pra.data.tars.WebDataset`) or ``hf:NAME?key=value&...`` (:class:`pra.data.hf.Choice`). The first four may
    end in ``@test``: the test split, where the training split is the default. ``~`` stands for the home directory.
    :func:`register_source` adds kinds.

    Raises:
        PraError: an unknown kind (the nearest name is given), a missing path or package, or damaged files.
    """
    check_name(spec)
    kind, _, path = spec.removesuffix("@test").partition(":")
    try:
        if kind in SPLIT:
            return SPLIT[kind](spec, path, spec.endswith("@test"))
        kind, _, path = spec.partition(":")
        opened = (_WHOLE.get(kind) or SOURCES.registered[kind])(spec, path)
    except PraError as error:
        raise PraError(f"data source {spec!r}: {error}", error.code, **{"name": spec} | error.fields) from error
    except OSError as error:
        path, fix = error.filename or spec, "Check its permissions and the disk"
        problem = f"{path} cannot be read ({error.strerror})"
        raise PraError(f"data source {spec!r}: {problem}. {fix}", "unreadable", path=path) from error
    except ImportError as error:
        if kind not in _EXTRAS:
            raise
        text = import_failed(f"data source {spec!r}", "other packages", _EXTRAS[kind], error)
        raise PraError(text, "not-installed", name=spec) from None
    if not isinstance(opened, Source):
        raise PraError(f"data source {spec!r}: {opened!r} is not a source. Return one with the members of Source")
    return opened


def with_images(source: Source) -> list[int]:
    """Return the labels of the classes that have images, in ascending order."""
    return [int(label) for label in np.unique(source.labels)]


def learned(source: Source, count: int) -> Source:
    """Return a source in the classes that a model of ``count`` classes learns: those with images, if that many have.

    Runs of earlier versions have all classes: their ``count`` is that of ``source.classes``.
    """
    labels = with_images(source)
    if len(labels) != count or count >= len(source.classes) or labels[-1] >= len(source.classes):
        return source
    places = np.zeros(len(source.classes), np.int64)
    places[labels] = np.arange(count)
    return Relabelled(source, [source.classes[label] for label in labels], places)


def in_classes(source: Source, classes: Sequence[str]) -> Source | None:
    """Return a source in the given classes, by their names; None if it has images of others, or a name is twice."""
    if tuple(source.classes) == tuple(classes):
        return source
    known = {name: place for place, name in enumerate(classes)}
    places = np.array([known.get(name, -1) for name in source.classes], np.int64)
    told_apart = len(known) == len(classes) and len(set(source.classes)) == len(source.classes)
    if not told_apart or with_images(source)[-1] >= len(places) or places[source.labels].min() < 0:
        return None
    return Relabelled(source, classes, places)


def example_captions(source: Captioned, count: int, most: int) -> tuple[str, ...]:
    """Return at most ``most`` different captions of the first ``count`` images, evenly chosen."""
    tried, found = min(count, 16 * most), dict[str, None]()
    for place in range(tried):
        with contextlib.suppress(CorruptImage):  # reported when its turn comes
            found[source.captions(place * count // tried)[0]] = None
    kept = [caption for caption in found if caption]
    shown = min(most, len(kept))
    return tuple(kept[place * len(kept) // shown] for place in range(shown))


def check_told_apart(source: Source) -> None:
    """Refuse two classes of one name: names choose what to sample, and what a fine-tuned model keeps."""
    first: dict[str, int] = {}
    for label, name in enumerate(source.classes):
        if first.setdefault(name, label) != label:
            problem = f"classes {first[name]} and {label} of {source.name} are both called {name!r}"
            fix = f"Rename one of them, if need be in {CLASSES} of a copy that `pra data pack` makes"
            raise PraError(f"{problem}. {fix}", "conflict", name=source.name, value=name)


def check_captions(source: Source, on_caption: OnCorrupt) -> None:
    """Refuse a source without captions and, under ``OnCorrupt.ERROR``, one in which opening it found a problem.

    Under ``OnCorrupt.SKIP`` one warning counts the problems. Others are found when an image is read.
    """
    if not isinstance(source, Captioned):
        fix = "Put metadata.jsonl or NAME.txt into folders, KEY.txt into shards, or write hf:NAME?caption=COLUMN"
        raise PraError(f"{source.name} has no captions. {fix}", "missing", name=source.name)
    count, first = getattr(source, "uncaptioned", (0, None))
    if first and on_caption is OnCorrupt.ERROR:
        raise first
    if first:
        example = f"{count} are left out, such as {first.fields['where']}: {first.problem}"
        warn_once(f"{source.name}: of the images and the lines of captions {example}")


def same_place(one: str, other: str) -> bool:
    """Return whether two names of sources spell the same path, such as ``folder:photos`` and ``folder:./photos/``."""

    def parts(spec: str) -> tuple[str, str, bool]:
        kind, _, path = spec.removesuffix("@test").partition(":")
        return kind, os.path.abspath(expand(path)), spec.endswith("@test")

    return parts(one) == parts(other)


def check_name(spec: str) -> None:
    """Refuse a name of an unknown kind, or without its path; nothing is opened."""
    kind, _, path = spec.partition(":")
    if spec in _ALONE or SOURCES.added(kind):
        return
    if kind in {*SPLIT, *_WHOLE} - {"digits"}:
        if path in ("", "@test"):
            raise PraError(f"data source {spec!r} lacks its path. Write {kind}:PATH", "missing", name=spec)
    elif os.path.exists(expand(spec)):  # False for a name of any length
        fix = f"Write {shlex.quote(_fitting(spec))}"
        raise PraError(f"data source {spec!r} does not say what is there. {fix}", "unknown", name=spec)
    else:
        hint = nearest(kind, {*_ALONE, *SOURCES.names()})
        raise PraError(f"data source {spec!r} is unknown{hint}", "unknown", name=spec)


def _fitting(spec: str) -> str:
    """Return the source that a bare path most likely means, by the names of the files there."""
    path = expand(spec)
    folder = path if path.is_dir() else path.parent
    if path.suffix == ".tar" or any(path.glob("*.tar")):
        return f"wds:{spec}"
    kind = "idx" if "-ubyte" in path.name or any(path.glob("*-ubyte*")) else "folder"
    return f"{kind}:{spec if path == folder else folder}"

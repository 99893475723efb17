"""Sources of labelled images, named by one string: ``digits``, ``folder:PATH``, ..."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

from PIL import Image
from torch import Tensor

from pra.data.digits import open_digits
from pra.data.emoji import FONT, EmojiSource
from pra.data.folder import FolderSource
from pra.data.hf import open_hf
from pra.data.idx import open_idx
from pra.data.imagenet_tar import ImageNetTar
from pra.data.images import Labels
from pra.data.wds import WebDataset
from pra.errors import PraError, nearest
from pra.utils.paths import expand
from pra.utils.registry import Registry

_WITH_PATH: dict[str, Callable[[str, str], Source]] = {
    "emoji": lambda spec, path: EmojiSource(spec, *_split(path)),
    "idx": lambda spec, path: open_idx(spec, *_split(path)),
    "folder": lambda spec, path: FolderSource(spec, expand(path)),
    "imagenet-tar": lambda spec, path: ImageNetTar(spec, expand(path)),
    "wds": WebDataset,
    "hf": open_hf,
}
_ALONE = ("digits", "digits@test", "emoji", "emoji@test")
SPLIT = ("digits", "emoji", "idx")
"""Kinds of sources that have a test split."""


@runtime_checkable
class Source(Protocol):
    """Images that can be read in any order, each with a label. Sources can be pickled to worker processes.

    ``name`` is the string it was opened with, ``classes`` the classes' names, and ``labels`` one index into
    ``classes`` per image (int64). Where the images are files, they can be had as such (:class:`Encoded`).
    """

    name: str
    classes: tuple[str, ...]
    labels: Labels

    def __len__(self) -> int:
        """Number of images; at least 1."""
        ...

    def image(self, index: int) -> Image.Image:
        """One image, decoded, in whatever size and mode it has.

        Raises:
            CorruptImage: it cannot be read.
        """
        ...

    def where(self, index: int) -> str:
        """The image's file, or ``"image 17 of digits"``: for messages."""
        ...


@runtime_checkable
class Encoded(Protocol):
    """A source whose images are files: ``image`` decodes what ``encoded`` returns."""

    def encoded(self, index: int) -> bytes:
        """One image's file.

        Raises:
            CorruptImage: it cannot be read.
        """
        ...


@runtime_checkable
class Streamed(Protocol):
    """A source that is read from front to back, at ``lanes`` places at once, and not in any order."""

    @property
    def lanes(self) -> int:
        """More readers than these would read something twice."""
        ...

    def arranged(self, order: Tensor, start: int) -> Tensor:
        """The order of an epoch that begins with sample ``start``: a random one, as far as reading forward allows."""
        ...


SOURCES: Registry[Callable[[str, str], Source]] = Registry("data source", "pra.sources", {"digits", *_WITH_PATH})


def register_source(name: str, function: Callable[[str, str], Source]) -> None:
    """Make ``NAME`` and ``NAME:ARGUMENT`` names of data sources in this process, for ``--data`` and all else.

    An installed package does the same for every process by an entry point of the group ``pra.sources``.

    Args:
        name: of the kind of source.
        function: opens one; takes the whole name, which becomes :attr:`Source.name`, and the argument.

    Raises:
        PraError: the name is built in or malformed.
    """
    SOURCES.add(name, function)


def own_test_split(spec: str) -> str:
    """Return the name of a source's own test split: ``"digits@test"`` for ``"digits"``.

    Raises:
        PraError: the source has none, or is one.
    """
    if spec.endswith("@test") or spec.partition(":")[0] not in SPLIT:
        raise PraError(f"data source {spec!r} has no test split. Name another source, or a share such as 0.05")
    return f"{spec}@test"


def open_source(spec: str) -> Source:
    """Open a source by its name.

    ``digits``, ``emoji``, ``emoji:FONT.ttf``, ``idx:DIR``, ``folder:PATH``, ``imagenet-tar:PATH``, ``wds:PATTERN`` (see
    :class:`pra.data.wds.WebDataset`) or ``hf:NAME?key=value&...`` (see :class:`pra.data.hf.Choice`). The first four may
    end in ``@test``: the test split, where the training split is the default. ``~`` stands for the home directory.
    :func:`register_source` adds kinds.

    Raises:
        PraError: an unknown kind (the nearest name is given), a missing path or package, or damaged files.
    """
    try:
        return _open(spec)
    except OSError as error:
        raise PraError(
            f"data source {spec!r}: {error.filename or 'it'} cannot be read ({error.strerror}); "
            "check its permissions and the disk"
        ) from error


def check_name(spec: str) -> None:
    """Whether a name says what kind of source it means; nothing is opened.

    Raises:
        PraError: an unknown kind (the nearest name is given, or how to name what lies there), or no path behind it.
    """
    kind, _, path = spec.partition(":")
    if SOURCES.added(kind):
        return
    if kind in _WITH_PATH and spec not in _ALONE:
        if path in ("", "@test"):
            raise PraError(f"data source {spec!r} lacks its path; write {kind}:PATH")
    elif spec not in _ALONE:
        if expand(spec).exists():
            raise PraError(f"data source {spec!r} does not say what is there; write {shlex.quote(_fitting(spec))}")
        raise PraError(f"data source {spec!r} is unknown{nearest(kind, {*_ALONE, *SOURCES.names()})}")


def _fitting(spec: str) -> str:
    """The source that a bare path most likely means, by the names of the files there."""
    path = expand(spec)
    folder = path if path.is_dir() else path.parent
    if path.suffix == ".tar" or any(path.glob("*.tar")):
        return f"wds:{spec}"
    if "-ubyte" in path.name or any(path.glob("*-ubyte*")):
        return f"idx:{spec if path == folder else folder}"
    return f"folder:{spec if path == folder else folder}"


def _open(spec: str) -> Source:
    check_name(spec)
    if spec in ("digits", "digits@test"):
        return open_digits(spec, test=spec.endswith("@test"))
    if spec in ("emoji", "emoji@test"):
        return EmojiSource(spec, FONT, test=spec.endswith("@test"))
    kind, _, path = spec.partition(":")
    registered = SOURCES.added(kind)
    if registered is None:
        return _WITH_PATH[kind](spec, path)
    opened = registered(spec, path)
    if not isinstance(opened, Source):
        raise PraError(f"data source {spec!r}: {opened!r} is not a source. Return one with the members of Source")
    return opened


def _split(path: str) -> tuple[Path, bool]:
    """``DIR@test`` to the folder and whether the test split is meant."""
    return expand(path.removesuffix("@test")), path.endswith("@test")

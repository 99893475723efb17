"""Sources of labelled images, named by one string: ``digits``, ``folder:PATH``, ..."""

from __future__ import annotations

from typing import Protocol

from PIL import Image

from pra.data.digits import open_digits
from pra.data.emoji import FONT, EmojiSource
from pra.data.folder import FolderSource
from pra.data.idx import open_idx
from pra.data.imagenet_tar import ImageNetTar
from pra.data.images import Labels, expand
from pra.errors import PraError, nearest

_KINDS = ("digits", "digits@test", "emoji", "emoji@test", "idx", "folder", "imagenet-tar")


class Source(Protocol):
    """Images that can be read in any order, each with a label. Sources can be pickled to worker processes.

    ``name`` is the string it was opened with, ``classes`` the classes' names, and ``labels`` one index into
    ``classes`` per image (int64).
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


def open_source(spec: str) -> Source:
    """Open ``digits``, ``emoji``, ``emoji:FONT.ttf``, ``idx:DIR``, ``folder:PATH`` or ``imagenet-tar:PATH``.

    The first four may end in ``@test``: the test split, where the training split is the default. ``~`` stands for
    the home directory.

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


def _open(spec: str) -> Source:
    kind, _, path = spec.partition(":")
    if spec in ("digits", "digits@test"):
        return open_digits(spec, test=spec.endswith("@test"))
    if spec in ("emoji", "emoji@test"):
        return EmojiSource(spec, FONT, test=spec.endswith("@test"))
    if kind in ("emoji", "idx", "folder", "imagenet-tar"):
        if path in ("", "@test"):
            raise PraError(f"data source {spec!r} lacks its path; write {kind}:PATH")
        if kind == "emoji":
            return EmojiSource(spec, expand(path.removesuffix("@test")), test=path.endswith("@test"))
        if kind == "idx":
            return open_idx(spec, expand(path.removesuffix("@test")), test=path.endswith("@test"))
        return FolderSource(spec, expand(path)) if kind == "folder" else ImageNetTar(spec, expand(path))
    if expand(spec).exists():
        raise PraError(f"data source {spec!r} does not say what is there; write for example folder:{spec}")
    raise PraError(f"data source {spec!r} is unknown{nearest(kind, _KINDS)}")

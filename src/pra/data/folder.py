"""A folder of images, one sub-folder per class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image

from pra.data.images import corrupt, decode, is_image_name, pack, upright
from pra.errors import PraError


class FolderSource:
    """``PATH/class/**/picture.png``; classes and images in sorted order.

    Hidden files and folders are ignored. A folder that holds images itself and has none below it is
    unconditional: one class, "image".
    """

    def __init__(self, name: str, path: Path) -> None:
        """List the folder; no image is opened.

        Raises:
            PraError: no such folder, no images, an empty class, or images both beside and in class folders.
        """
        if not path.is_dir():
            problem = "is not a folder" if path.exists() else "does not exist"
            raise PraError(f"data source {name!r}: {path} {problem}; give a folder of class folders")
        files = _by_class(path)
        self.name = name
        self.classes = tuple(class_name or "image" for class_name in files)
        self.labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(f) for f in files.values()])
        self._path = path
        self._files = pack([file for class_files in files.values() for file in class_files])

    def __len__(self) -> int:
        return len(self._files)

    def encoded(self, index: int) -> bytes:
        try:
            return Path(self.where(index)).read_bytes()
        except OSError as error:
            raise corrupt(self.where(index), f"cannot be read ({error.strerror})") from error

    def image(self, index: int) -> Image.Image:
        """One image, upright, in its own size and mode.

        Raises:
            CorruptImage: the file is gone, or cannot be decoded.
        """
        return upright(decode(self.encoded(index), self.where(index)))

    def where(self, index: int) -> str:
        """The image's file."""
        return str(self._path / os.fsdecode(bytes(self._files[index])))


def _by_class(path: Path) -> dict[str, list[str]]:
    """Class name to image files, relative to ``path``; ``""`` for images that lie directly in it."""
    entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    below = {name: _images_below(path, name) for name in names}
    direct = [entry.name for entry in entries if entry.is_file() and is_image_name(entry.name)]
    filled = [name for name, files in below.items() if files]
    if direct and filled:
        raise PraError(
            f"{path} holds images directly ({direct[0]}) and in class folders ({filled[0]}); "
            "move the former into a class folder of their own"
        )
    if not direct and not filled:
        raise PraError(f"{path} holds no images; put them into one sub-folder per class, or directly into it")
    if direct:
        return {"": direct}
    if len(filled) < len(names):
        empty = next(name for name in names if not below[name])
        raise PraError(f"class folder {path / empty} holds no images; fill or remove it")
    return below


def _images_below(path: Path, class_name: str) -> list[str]:
    found = []
    for folder, folders, files in os.walk(path / class_name, onerror=_stop, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(folder).relative_to(path)
        found += [f"{relative}/{name}" for name in files if is_image_name(name)]
    return sorted(found)


def _stop(error: OSError) -> NoReturn:
    """``os.walk`` would pass over a folder that it cannot list."""
    raise error

"""A folder of images, one sub-folder per class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import numpy as np

from pra.data.images import Files, check_there, corrupt, is_image_name, pack
from pra.errors import PraError

MOST_SIZES = 10_000
"""Files whose sizes tell whether a folder has changed: a network disk takes minutes for a million."""


class FolderSource(Files):
    """``PATH/class/**/picture.png``; classes and images in sorted order, hidden files and folders ignored.

    A folder that holds images itself and has none below it is unconditional: one class, "image".
    """

    def __init__(self, name: str, path: Path) -> None:
        check_there(path, "folder", "Give a folder of class folders")
        files = _by_class(path)
        labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(f) for f in files.values()])
        super().__init__(name, files, labels)
        self._path = path
        self._files = pack([file for class_files in files.values() for file in class_files])

    def encoded(self, index: int) -> bytes:
        try:
            return Path(self.where(index)).read_bytes()
        except OSError as error:
            raise corrupt(self.where(index), f"cannot be read ({error.strerror})") from error

    def listing(self) -> bytes:
        sizes = list[int]()
        for index in np.linspace(0, len(self) - 1, min(len(self), MOST_SIZES)).astype(int).tolist():
            try:
                sizes.append(os.stat(self.where(index)).st_size)
            except OSError:
                sizes.append(-1)  # reported when the image is read
        return self._files.tobytes() + repr(sizes).encode()

    def where(self, index: int) -> str:
        return str(self._path / os.fsdecode(bytes(self._files[index])))


def _by_class(path: Path) -> dict[str, list[str]]:
    direct: list[str] = []
    below: dict[str, list[str]] = {}
    for folder, folders, names in os.walk(path, onerror=_stop, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(folder).relative_to(path)
        below = below or {name: [] for name in sorted(folders)}
        found = below[relative.parts[0]] if relative.parts else direct
        found += [f"{relative}/{name}" for name in names if is_image_name(name)]
    filled = [name for name, files in below.items() if files]
    if direct and filled:
        problem = f"it holds images directly ({min(direct)}) and in class folders ({filled[0]})"
        raise PraError(f"{path}: {problem}. Move the former into a class folder", "conflict", path=path)
    if not direct and not filled:
        fix = "Put them into it, or into a sub-folder per class"
        raise PraError(f"{path} holds no images. {fix}", "missing", path=path)
    if direct:
        return {"image": sorted(direct)}
    if len(filled) < len(below):
        empty = path / next(name for name in below if name not in filled)
        raise PraError(f"{empty}: this class folder holds no images. Fill or remove it", "missing", path=empty)
    return {name: sorted(files) for name, files in below.items()}


def _stop(error: OSError) -> NoReturn:
    raise error  # os.walk would pass over a folder that it cannot list

"""A folder of images, one sub-folder per class."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np

from pra.data.captions import METADATA, FolderCaptions, Row, read_metadata
from pra.data.images import Files, check_there, corrupt, is_image_name, most_bytes, pack, warn_once
from pra.errors import PraError
from pra.utils.files import read_regular

SYSTEM = frozenset({
    "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin", "system volume information",
    "lost+found", "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
})  # fmt: skip
"""Names, in lower case, of files that NAS boxes, Windows and macOS leave in folders: thumbnails, deleted pictures."""
SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""Names of folders that are splits: those of Hugging Face's ImageFolder, which allows digits and ``-._`` after them."""
_HEIF = {"*.heic", "*.heif", "*.hif"}
_BARE = "without an ending"
_MOST_KINDS = 8

MOST_SIZES = 10_000
"""Files whose sizes tell whether a folder has changed: a network disk takes minutes for a million."""


class FolderSource(Files):
    """``PATH/class/**/picture.png``; classes and images in sorted order, each real folder once.

    A folder that holds images itself, and not in folders below it, is unconditional: one class, "image". In a folder of
    splits (:data:`SPLITS`) the training split is read. One warning counts and names the other files, among them hidden
    files and files of the operating system.

    Captions are those of ``metadata.jsonl`` or ``metadata.csv`` in any folder, else the lines of ``NAME.txt`` beside
    ``NAME.png``. Without either, the source is not captioned.
    """

    def __init__(self, name: str, path: Path) -> None:
        check_there(path, "folder", "Give a folder of class folders")
        path = _training_split(path)
        tree = _walk(path)
        rows = _metadata(path, tree)
        files = _by_class(path, tree)
        labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(f) for f in files.values()])
        # As UTF-8 whatever the locale: the same folder has the same classes everywhere.
        classes = [os.fsencode(name).decode(errors="backslashreplace") for name in files]
        super().__init__(name, classes, labels)
        self._path = path
        paths = [file for class_files in files.values() for file in class_files]
        self._files = pack(paths)
        if rows or tree.texts:
            kept = FolderCaptions(path, paths, rows, tree.texts, self.where)
            self.captions, self.uncaptioned = kept.of, kept.uncaptioned

    def encoded(self, index: int) -> bytes:
        try:
            return read_regular(Path(self.where(index)), most_bytes())
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


@dataclass
class _Tree:
    """The pictures below a folder, as paths from there, its folders, and the files left out: kind -> count, example.

    ``metadata`` are files that may hold captions, and ``texts`` the paths of text files without their ending.
    """

    pictures: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    folders: list[str] = field(default_factory=list)
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)

    def leave_out(self, kind: str, path: str) -> None:
        count, example = self.left_out.get(kind, (0, path))
        self.left_out[kind] = count + 1, example

    def told(self) -> str:
        """Return a sentence about the files left out, the most frequent kind first, or an empty string."""
        kinds = sorted(self.left_out.items(), key=lambda kind: -kind[1][0])
        words = [f"{count:,} {kind} (such as {example})" for kind, (count, example) in kinds[:_MOST_KINDS]]
        more = f" and {len(kinds) - _MOST_KINDS} more kinds" if len(kinds) > _MOST_KINDS else ""
        others = {kind for kind in self.left_out if kind == _BARE or kind.startswith("*")}
        fixes = [f"To read {kind}, pip install pillow-heif" for kind in sorted(others & _HEIF)]
        fixes += ["Convert pictures among them to PNG or JPEG, and name them so"] if others - _HEIF else []
        return ". ".join([f"left out: {', '.join(words)}{more}", *fixes]) if words else ""


def _training_split(path: Path) -> Path:
    """Return the training split of a folder of splits, with a warning. Return any other folder unchanged."""
    with os.scandir(path) as entries:
        kinds = {entry.name: _kind(entry) for entry in entries if not _of_the_system(entry.name)}
    names = sorted(name for name, kind in kinds.items() if kind == "folder")
    splits = _are_splits(names) or all(map(_split_of, names))
    if "picture" in kinds.values() or not names or not splits:
        return path
    training = [name for name in names if _split_of(name) == "train"]
    if len(training) != 1:
        problem = f"{path} holds {len(training)} training splits ({', '.join(names)})"
        fix = f"Give the folder of one split, such as folder:{path / (training or names)[0]}"
        raise PraError(f"{problem}. {fix}", "conflict", path=path)
    others = [name for name in names if name != training[0]]
    if others:
        problem = f"{path} holds splits: {training[0]} is read, and {', '.join(others)} not"
        warn_once(f"{problem}. Give folder:{path / others[0]} to read that")
    return path / training[0]


def _split_of(name: str) -> str | None:
    return SPLITS.get(name.lower().rstrip("-._ 0123456789"))


def _are_splits(names: Iterable[str]) -> bool:
    """Return whether folders are splits, perhaps beside others: a class may be called "train", but hardly "val" too."""
    return {"train"} < {split for split in map(_split_of, names) if split}


def _metadata(path: Path, tree: _Tree) -> list[Row]:
    """Return the lines of the metadata files with captions; leave out other ones, and texts without a picture."""
    found: list[Row] = []
    for file in tree.metadata:
        if rows := read_metadata(path, file):
            found += rows
        else:
            tree.leave_out(_ending(file), file)
    stems = set(map(_stem, tree.pictures))
    for text in sorted(tree.texts - stems):
        tree.leave_out("*.txt", f"{text}.txt")
    tree.texts &= stems
    return found


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _by_class(path: Path, tree: _Tree) -> dict[str, list[str]]:
    direct: list[str] = []
    below: dict[str, list[str]] = {name: [] for name in sorted(tree.folders)}
    for file in tree.pictures:
        name, inside, _ = file.partition("/")
        (below[name] if inside else direct).append(file)
    filled = [name for name, files in below.items() if files]
    told = tree.told()
    if direct and filled:
        problem = f"it holds images directly ({min(direct)}) and in class folders ({filled[0]})"
        raise PraError(f"{path}: {problem}. Move the former into a class folder", "conflict", path=path)
    if not direct and not filled:
        fix = "Put them into it, or into a sub-folder per class"
        raise PraError(f"{path} holds no images. {told or fix}", "missing", path=path)
    if not direct and len(filled) < len(below):
        empty = path / next(name for name in below if name not in filled)
        problem = f"{empty}: this class folder holds no images. {told or 'Fill or remove it'}"
        raise PraError(problem, "missing", path=empty)
    if told:
        warn_once(f"{path}: {told}")
    return {"image": sorted(direct)} if direct else {name: sorted(files) for name, files in below.items()}


def _walk(root: Path) -> _Tree:
    """List a folder: regular files alone, links followed, and each real folder once. Real names go before links."""
    tree = _Tree()
    start = os.path.realpath(root)
    seen: set[str] = set()
    waiting = deque([("", start)])
    while waiting:
        folder, place = waiting.popleft()
        if place in seen or (folder and PurePath(start).is_relative_to(place)):
            tree.leave_out("links to folders that are read already or hold this one", folder)
            continue
        seen.add(place)
        if folder and "/" not in folder:
            tree.folders.append(folder)
        with os.scandir(root / folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        splits = [entry.name for entry in entries if _split_of(entry.name) and _kind(entry) == "folder"]
        if folder and _are_splits(splits):
            problem = f"{root / folder} holds splits ({', '.join(splits)}) in place of pictures of one class"
            fix = "Give it as folder:PATH if all lies there, or put splits above the classes: train/cats, val/cats"
            raise PraError(f"{problem}. {fix}", "conflict", path=root / folder)
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            kind = "hidden or of the system" if _of_the_system(entry.name) else _kind(entry)
            if kind == "picture":
                tree.pictures.append(path)
            elif entry.name in METADATA and kind.startswith("*"):
                tree.metadata.append(path)
            elif kind == "*.txt" and entry.name.endswith(".txt"):
                tree.texts.add(_stem(path))
            elif kind != "folder":
                tree.leave_out(kind, path)
            elif entry.is_symlink():
                waiting.append((path, os.path.realpath(root / path)))
            else:
                waiting.appendleft((path, os.path.join(place, entry.name)))
    return tree


def _of_the_system(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM


def _kind(entry: os.DirEntry[str]) -> str:
    """Return "folder", "picture", or the kind of file by which it is counted."""
    try:
        folder, regular = entry.is_dir(), entry.is_file()
    except OSError:  # a link to itself, say
        folder = regular = False
    if folder:
        return "folder"
    if not regular:
        return "pipes, devices or broken links"
    if is_image_name(entry.name):
        return "picture"
    return _ending(entry.name)


def _ending(file: str) -> str:
    ending = PurePath(file).suffix.lower()
    return f"*{ending}" if ending else _BARE

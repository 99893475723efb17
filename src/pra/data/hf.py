"""Hugging Face data sets, from the Hub or from local files: ``hf:NAME?split=validation&image=img&label=fine_label``."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from PIL import Image
from torch import Tensor

from pra.data.images import Labels, corrupt, decode, numbered_classes, upright
from pra.data.lanes import LANES, PIECES, Lanes
from pra.errors import PraError, nearest, reason_of
from pra.utils.extras import import_failed
from pra.utils.files import write_atomically
from pra.utils.paths import cache_folder, expand
from pra.utils.progress import Progress

_WITHOUT = "none"
_ROWS = 1000
"""Labels that are read at a time."""
_FILES = {".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What of a data set is taken, as its name says after ``?``.

    ``config`` and ``revision`` are the Hub's; without ``image`` and ``label`` the columns are found by their types;
    ``label=none`` is for data without classes. A ``streaming`` data set is read from front to back, at up to 16 places
    at once; ``window`` images, of all these places together, are shuffled among themselves at a time.
    """

    path: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    image: str | None = None
    label: str | None = None
    streaming: bool = False
    window: int = 1000


def open_hf(name: str, text: str) -> HFDataset | HFStream:
    """Open ``NAME?key=value&...``; keys are the fields of :class:`Choice`.

    Raises:
        PraError: the package is missing, no such data set, configuration, split or column, labels that are none, or
            the Hub cannot be reached.
    """
    choice = _choice(name, text)
    return HFStream(name, choice) if choice.streaming else HFDataset(name, choice)


class HFDataset:
    """A data set that the library has fetched whole, once, and reads from its cache in any order."""

    def __init__(self, name: str, choice: Choice) -> None:
        self.name = name
        dataset = _load(name, choice)
        self._image, label = _columns(name, choice, dataset.features)
        values = None
        if label:
            values = dataset.select_columns([label]).with_format("numpy")[:][label]
        self.labels, self.classes = _labels(name, label, values, dataset.features, len(dataset))
        self._rows = _undecoded(dataset.select_columns([self._image]), self._image)

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, index: int) -> bytes:
        try:
            value = self._rows[index][self._image]
        except Exception as error:  # the library raises whatever its files and formats do
            raise corrupt(self.where(index), f"cannot be read ({reason_of(error)})") from error
        return _bytes(value, self.where(index))

    def image(self, index: int) -> Image.Image:
        """One image, upright as the library shows it, in its own size and mode.

        Raises:
            CorruptImage: it cannot be decoded.
        """
        return upright(decode(self.encoded(index), self.where(index)))

    def where(self, index: int) -> str:
        """``"row 17 of hf:cifar10"``."""
        return f"row {index} of {self.name}"


class HFStream:
    """A data set that is read over the network each time, and never kept.

    Any image can be asked for, yet only going forward is cheap, in each of its lanes (:mod:`pra.data.lanes`):
    ``window`` images are held at once, and going back begins a piece anew. ``TrainingSet`` takes them in an order that
    suits. Labels alone are read beforehand, once, and kept in ``$XDG_CACHE_HOME/pra``.
    """

    def __init__(self, name: str, choice: Choice) -> None:
        self.name = name
        dataset = _divided(_load(name, choice))
        features = dataset.features or {}
        self._image, label = _columns(name, choice, features)
        values, starts = _streamed_labels(name, replace(choice, image=self._image), label, features)
        self.labels, self.classes = _labels(name, label, values if label else None, features, len(values))
        self._lanes = Lanes(starts, choice.window)
        self._rows = _undecoded(dataset.select_columns([self._image]), self._image)
        self._readers: dict[int, _Reader] = {}
        self._process = os.getpid()

    @property
    def lanes(self) -> int:
        """Places that can be read at once."""
        return self._lanes.count

    def arranged(self, order: Tensor, start: int) -> Tensor:
        """See :meth:`pra.data.lanes.Lanes.arranged`."""
        return self._lanes.arranged(order, start)

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, index: int) -> bytes:
        if self._process != os.getpid():  # a fork shares open files
            self._readers, self._process = {}, os.getpid()
        lane, piece, place = self._lanes.place(index)
        if lane not in self._readers:
            self._readers[lane] = _Reader(self._rows, len(self._lanes.starts) - 1, self._image, self._lanes.lane_window)
        with _explained(f"data source {self.name!r}"):
            held, start = self._readers[lane].window_of(piece, place)
        if place - start >= len(held):
            end = index - place + start + len(held)
            raise PraError(f"{self.name} ended at row {end} of {len(self)}: it changed; start again")
        return _bytes(held[place - start], self.where(index))

    def image(self, index: int) -> Image.Image:
        """One image, upright as the library shows it, in its own size and mode.

        Raises:
            CorruptImage: it cannot be decoded.
            PraError: the stream breaks off.
        """
        return upright(decode(self.encoded(index), self.where(index)))

    def where(self, index: int) -> str:
        """``"row 17 of hf:imagenet-1k?streaming=true"``."""
        return f"row {index} of {self.name}"

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_readers": {}}


class _Reader:
    """Reads pieces from front to back, and holds a window of one."""

    def __init__(self, rows: Any, pieces: int, column: str, window: int) -> None:
        self._rows, self._pieces, self._column, self._window = rows, pieces, column, window
        self._piece, self._start, self._next = -1, 0, 0
        self._batches: Iterator[dict[str, Any]] = iter(())
        self._held: list[Any] = []

    def window_of(self, piece: int, place: int) -> tuple[list[Any], int]:
        """The window that a place of a piece is in, fewer where the piece ends, and its start."""
        start = place - place % self._window
        if piece != self._piece or start != self._start:
            if piece != self._piece or self._next > start:
                rows = self._rows.shard(self._pieces, piece).skip(start)
                # Not its ``__iter__``: in a DataLoader's worker that leaves out what it takes for the others' part.
                self._batches, self._next = rows.iter(batch_size=self._window), start
            while self._next <= start:
                self._held = next(self._batches, {self._column: []})[self._column]
                self._next += self._window
            self._piece, self._start = piece, start
        return self._held, start


# --- which data set -----------------------------------------------------------------------------------------


def _choice(name: str, text: str) -> Choice:
    path, _, query = text.partition("?")
    if path.endswith("@test"):
        raise PraError(f"data source {name!r}: write hf:{path.removesuffix('@test')}?split=test")
    known = ("split", "config", "revision", "image", "label", "streaming", "window")
    given: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
    for key, value in given.items():
        if key not in known:
            raise PraError(f"data source {name!r} has no setting {key!r}{nearest(key, known)}")
        if not value:
            raise PraError(f"data source {name!r}: {key}= lacks its value")
    if "streaming" in given:
        if given["streaming"] not in ("true", "false"):
            raise PraError(f"data source {name!r}: streaming is true or false, not {given['streaming']!r}")
        given["streaming"] = given["streaming"] == "true"
    if "window" in given:
        if not given["window"].isdecimal() or not 1 <= int(given["window"]) <= 10**6:
            raise PraError(f"data source {name!r}: window is a number of images, 1 to 1000000, not {given['window']!r}")
        given["window"] = int(given["window"])
    return Choice(path=path, **given)


def _load(name: str, choice: Choice, **options: Any) -> Any:
    """The ``datasets.Dataset``, or ``IterableDataset`` where it streams."""
    try:
        import datasets
    except ImportError as error:
        raise PraError(import_failed(f"data source {name!r}", "datasets", "hf", error)) from None
    path, place = _place(choice)
    with _explained(f"data source {name!r}"):
        return datasets.load_dataset(
            path,
            choice.config,
            split=choice.split,
            revision=choice.revision,
            streaming=choice.streaming,
            **place,
            **options,
        )


def _place(choice: Choice) -> tuple[str, dict[str, Any]]:
    """How the library calls it: a name on the Hub or a folder, or the kind of a single file."""
    local = expand(choice.path)
    if not local.exists():
        if choice.path.startswith(("/", ".", "~")):
            raise PraError(f"{local} does not exist; give a folder, a .parquet file or a name on the Hub")
        return choice.path, {}
    if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
        raise PraError(f"{local} is of save_to_disk; write it with to_parquet, and name that")
    if local.is_dir():
        return str(local), {}
    if local.suffix not in _FILES:
        raise PraError(f"{local} is none of {', '.join(_FILES)}; give such a file, or a folder")
    return _FILES[local.suffix], {"data_files": str(local)}


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Whatever the library raises, in one line."""
    try:
        yield
    except PraError:
        raise
    except Exception as error:
        raise PraError(f"{what} cannot be read: {reason_of(error)}") from error


# --- columns ------------------------------------------------------------------------------------------------


def _columns(name: str, choice: Choice, features: Any) -> tuple[str, str | None]:
    """The columns of images and of labels; None for no classes."""
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    for given in (choice.image, choice.label):
        if given not in (None, _WITHOUT, *kinds):
            raise PraError(f"data source {name!r} has no column {given!r}{nearest(str(given), kinds)}")
    image = choice.image or _only(name, "image", [c for c, kind in kinds.items() if kind == "Image"], kinds)
    label = choice.label or _only(name, "label", [c for c, kind in kinds.items() if kind == "ClassLabel"], kinds)
    if kinds[image] != "Image":
        raise PraError(
            f"data source {name!r}: column {image!r} is not of images but of {kinds[image]}{nearest('', kinds)}"
        )
    return image, None if label == _WITHOUT else label


def _only(name: str, option: str, found: list[str], kinds: dict[str, str]) -> str:
    if len(found) == 1:
        return found[0]
    if option in kinds:
        return option
    ways = f"&{option}=COLUMN" + (f", or &{option}={_WITHOUT} for data without classes" if option == "label" else "")
    count = "several columns" if found else "no column"
    raise PraError(f"data source {name!r} has {count} for the {option}; name one with ?{ways[1:]}{nearest('', kinds)}")


def _labels(name: str, column: str | None, values: Any, features: Any, count: int) -> tuple[Labels, tuple[str, ...]]:
    """Label numbers and class names: the column's own names, the sorted texts in it, or its numbers."""
    if not count:
        raise PraError(f"data source {name!r} has no rows; choose another split")
    if column is None:
        return np.zeros(count, np.int64), ("image",)
    array = np.asarray(values)
    if array.dtype.kind in "UO" and all(isinstance(value, str) for value in array.tolist()):
        texts, numbers = np.unique(array.astype(str), return_inverse=True)
        return numbers.astype(np.int64), tuple(str(text) for text in texts)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise PraError(f"data source {name!r}: column {column!r} holds no classes (numbers or names, none missing)")
    numbers = array.astype(np.int64)
    if numbers.min() < 0:
        raise PraError(
            f"data source {name!r}: row {int(numbers.argmin())} has class {numbers.min()}, which stands for none; "
            f"choose another split, or write label={_WITHOUT} for data without classes"
        )
    names = getattr(features[column], "names", None) or numbered_classes(
        numbers,
        lambda row: f"data source {name!r}: row {row} of column {column!r}",
        f"choose another column with label=COLUMN, or write label={_WITHOUT} for data without classes",
    )
    return numbers, tuple(names)


def _undecoded(dataset: Any, column: str) -> Any:
    import datasets

    return dataset.cast_column(column, datasets.Image(decode=False))


def _bytes(value: Any, where: str) -> bytes:
    """The encoded file, which a row holds or names."""
    if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
        raise corrupt(where, "has no image")
    if value.get("bytes"):
        return bytes(value["bytes"])
    try:
        import fsspec

        with fsspec.open(value["path"], "rb") as file:
            return bytes(file.read())
    except OSError as error:
        raise corrupt(where, f"cannot be read ({value['path']}: {error.strerror})") from error


# --- streams ------------------------------------------------------------------------------------------------


def _divided(stream: Any) -> Any:
    """In pieces: the files, or where they are few what the library can divide them into (parquet's row groups)."""
    return stream if stream.num_shards >= LANES else stream.reshard()


def _streamed_labels(name: str, choice: Choice, label: str | None, features: Any) -> tuple[Any, Labels]:
    """The label of every row, and the first row of each piece, behind the last their number.

    Where there are no classes, something else of every row is read, to count them.
    """
    values = (column for column, feature in features.items() if type(feature).__name__ == "Value")
    column = label or next(values, str(choice.image))
    with _explained(f"data source {name!r}"):
        place = cache_folder() / f"labels-{_fingerprint(choice, column)}.npz"
        # Not there, or broken in any of the ways that zipfile and numpy stumble over: read again.
        with contextlib.suppress(Exception), np.load(place) as known:
            return known["labels"], known["starts"]
        rows = _divided(_column_alone(name, choice, column))
        read: list[Any] = []
        starts = [0]
        with Progress(desc=f"reading labels of {choice.path}", unit="row") as bar:
            for piece in range(pieces := min(rows.num_shards, PIECES)):
                for batch in rows.shard(pieces, piece).iter(batch_size=_ROWS):
                    read += batch[column] if label else [0] * len(batch[column])
                    bar.update(len(read) - bar.n)
                starts.append(len(read))
    labels, bounds = np.array(read), np.array(starts)
    if labels.dtype.kind != "O":
        with contextlib.suppress(PraError):  # where they cannot be kept they are read again
            write_atomically(place, lambda file: np.savez(file, labels=labels, starts=bounds))
    return labels, bounds


def _column_alone(name: str, choice: Choice, column: str) -> Any:
    try:
        rows = _load(name, choice, columns=[column])
    except PraError:  # a format in which a column cannot be had alone: everything is read
        rows = _load(name, choice).select_columns([column])
    return _undecoded(rows, column) if column == choice.image else rows


def _fingerprint(choice: Choice, column: str) -> str:
    """Of a column in the files as they are now: their names and the Hub's versions or times of modification."""
    import datasets

    path, options = _place(choice)
    files = datasets.load_dataset_builder(path, choice.config, revision=choice.revision, **options).config.data_files
    chosen = (files or {}).get(choice.split, ())
    versions = getattr(chosen, "origin_metadata", None)
    return hashlib.sha256(repr((choice, column, list(chosen), versions)).encode()).hexdigest()[:16]

"""Hugging Face data sets, from the Hub or from local files: ``hf:NAME?split=validation&image=img&label=fine_label``."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from torch import Tensor

from pra.config import from_dict
from pra.config.checks import Settings, within
from pra.config.values import parse_value
from pra.data.captions import checked, corrupt_caption
from pra.data.images import Files, Labels, corrupt, is_picture_name, numbered_classes, warn_once
from pra.errors import PraError, nearest, reason_of
from pra.utils.files import cache_folder, expand, read_arrays, write_atomically
from pra.utils.progress import Progress

_WITHOUT = "none"
LANES = 16
"""Largest number of lanes; one if the data set cannot be divided."""
PIECES = 1024
"""Largest number of pieces of a data set."""
UNIT = 32
"""Images of one lane that follow each other."""


@dataclass(frozen=True, kw_only=True)
class Choice(Settings):
    """The settings after ``?`` in a name.

    ``config`` and ``revision`` are the Hub's; without ``image`` and ``label`` the columns are found by their types;
    ``label=none`` is for data without classes; ``caption`` is a column of texts, or of lists of texts. A ``streaming``
    data set is read from front to back, at up to 16 places at once; ``window`` images, of all these places together,
    are shuffled among themselves at a time.
    """

    path: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    image: str | None = None
    label: str | None = None
    caption: str | None = field(default=None, repr=False)  # the repr is part of the name of kept labels
    streaming: bool = False
    window: Annotated[int, within(1, 1_000_000)] = 1000


def open_hf(name: str, text: str) -> HFDataset | HFStream:
    """Open ``NAME?key=value&...``; keys are the fields of :class:`Choice`."""
    path, _, query = text.partition("?")
    if path.endswith("@test"):
        raise PraError(f"a split is a setting. Write hf:{path.removesuffix('@test')}?split=test")
    settings = dict(parse_qsl(query, keep_blank_values=True))
    if "path" in settings:
        raise PraError("no setting 'path'. Write hf:PATH?key=value", "unknown")
    for key, value in settings.items():
        if not value:
            raise PraError(f"{key}= lacks its value. Give a value, or remove it", setting=key)
    given: dict[str, Any] = {**settings, "path": path}
    for key in {"streaming", "window"} & given.keys():
        given[key] = parse_value(given[key])
    choice = from_dict(Choice, given, "setting")
    importlib.import_module("datasets")  # later ImportErrors are of a file's format
    with _explained(name):
        opened = HFStream(name, choice) if choice.streaming else HFDataset(name, choice)
    _warn_of_left_out(name, expand(choice.path))
    return opened


def _warn_of_left_out(name: str, folder: Path) -> None:
    """Count the pictures of a local folder that the library passes over: it goes by a list of extensions."""
    try:
        from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
    except ImportError:  # not part of the library's interface
        return
    found: list[str] = []
    for place, folders, names in os.walk(folder):  # of a name on the Hub, nothing
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        pictures = (name for name in names if is_picture_name(name) and not name.startswith("."))
        found += [f"{place}/{name}" for name in pictures if Path(name).suffix.lower() not in ImageFolder.EXTENSIONS]
    if found:
        example = f"{len(found)} left out, such as {min(found)}"
        fix = "Convert them to PNG or JPEG, or use folder:"
        warn_once(f"{name}: {example}: the library does not read that extension. {fix}")


class _Rows(Files):
    """Images in one column of a data set, and perhaps captions in another."""

    def __init__(self, name: str, choice: Choice, dataset: Any, label: str | None, values: Any, count: int) -> None:
        labels, classes = _labels(label, values, dataset.features, count)
        super().__init__(name, classes, labels)
        assert choice.image is not None
        self._image, self._caption = choice.image, choice.caption
        columns = [self._image] + ([self._caption] if self._caption else [])
        decoded = replace(dataset.features[self._image], decode=False)
        self._rows = dataset.select_columns(columns).cast_column(self._image, decoded)
        if self._caption:
            self.captions = self._captions

    def encoded(self, index: int) -> bytes:
        try:
            value = self._value(index, self._image)
        except PraError:
            raise
        except Exception as error:  # the library raises any exception of its files and formats
            raise corrupt(self.where(index), f"cannot be read ({reason_of(error)})") from error
        return _bytes(value, self.where(index))

    def _captions(self, index: int) -> tuple[str, ...]:
        try:
            texts = self._value(index, str(self._caption))
        except PraError:
            raise
        except Exception as error:
            raise corrupt_caption(self.where(index), f"its caption cannot be read ({reason_of(error)})") from error
        return checked(texts, self.where(index), f"column {self._caption!r}")

    def _value(self, index: int, column: str) -> Any:
        raise NotImplementedError

    def where(self, index: int) -> str:
        return f"row {index} of {self.name}"


class HFDataset(_Rows):
    """A data set that the library has fetched whole, once, and reads from its cache in any order."""

    def __init__(self, name: str, choice: Choice) -> None:
        dataset = _load(choice)
        choice, label = _columns(choice, dataset.features)
        values = dataset.select_columns([label]).with_format("numpy")[:][label] if label else None
        super().__init__(name, choice, dataset, label, values, len(dataset))
        self._columns = {column: self._rows.select_columns([column]) for column in self._rows.features}

    def _value(self, index: int, column: str) -> Any:
        return self._columns[column][index][column]


class HFStream(_Rows):
    """A data set that is read over the network each time; only its labels are read first, and kept.

    Any image can be asked for, but only going forward in each lane (:class:`Lanes`) is cheap: going back begins
    a piece again. ``TrainingSet`` takes the images in the order of :meth:`arranged`.
    """

    def __init__(self, name: str, choice: Choice) -> None:
        dataset = _divided(_load(choice))
        choice, label = _columns(choice, dataset.features)
        values, starts = _streamed_labels(choice, label, dataset.features)
        super().__init__(name, choice, dataset, label, values, len(values))
        self._lanes = Lanes(starts, choice.window)
        self.lanes, self.arranged = self._lanes.count, self._lanes.arranged
        self._readers: dict[int, _Reader] = {}
        self._process = os.getpid()

    def _value(self, index: int, column: str) -> Any:
        if self._process != os.getpid():  # a fork shares open files
            self._readers, self._process = {}, os.getpid()
        lane, piece, place = self._lanes.place(index)
        if lane not in self._readers:
            self._readers[lane] = _Reader(self._rows, len(self._lanes.starts) - 1, self._lanes.lane_window)
        with _explained(self.name):
            held = self._readers[lane].window_of(piece, place).get(column, [])
        offset = place % self._lanes.lane_window
        if offset >= len(held):
            row = index - offset + len(held)
            raise PraError(f"{self.name} changed: it ended at row {row}. Start again", "mismatch", row=row)
        return held[offset]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_readers": {}}


@dataclass(frozen=True)
class Lanes:
    """Images in pieces, each of which can be read from its beginning; lanes are consecutive pieces.

    An epoch takes :data:`UNIT` images of every lane in turn, starting at a multiple of that. So each worker meets the
    same few lanes again if the number of workers and the number of lanes, a power of two, have common factors.
    ``starts`` is the first image of each piece, followed by the number of images; ``window`` images are held at once.
    """

    starts: Labels
    window: int

    @property
    def count(self) -> int:
        """The number of lanes."""
        return 1 << min(len(self.starts) - 1, LANES).bit_length() - 1

    @property
    def lane_window(self) -> int:
        """Images of one lane that are held at once."""
        return max(1, self.window // self.count)

    def place(self, index: int) -> tuple[int, int, int]:
        """Return the lane, the piece, and the place in the piece of an image."""
        piece = int(np.searchsorted(self.starts, index, side="right")) - 1
        return piece * self.count // (len(self.starts) - 1), piece, index - int(self.starts[piece])

    def arranged(self, order: Tensor, start: int) -> Tensor:
        """Shuffle an epoch within the windows of each lane.

        ``order`` is a random order of all images, int64 ``(N,)``, and ``start`` the epoch's first global sample index.
        """
        sizes = torch.from_numpy(np.diff(self.starts))
        pieces = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        places = torch.arange(len(order)) - torch.from_numpy(self.starts[:-1])[pieces]
        # A piece has fewer images than the data set: windows of a later piece have higher numbers.
        windows = pieces * len(order) + places // self.lane_window
        order = order[windows[order].argsort(stable=True)]
        lanes = pieces * self.count // len(sizes)  # sorting by windows has kept each lane's places
        rank = torch.arange(len(order)) - torch.searchsorted(lanes, lanes)
        rank[lanes == 0] -= -start % UNIT  # the first images, up to the next multiple
        return order[(rank.div(UNIT, rounding_mode="floor") * self.count + lanes).argsort(stable=True)]


class _Reader:
    """Reads pieces from front to back, and holds a window of one."""

    def __init__(self, rows: Any, pieces: int, window: int) -> None:
        self._rows, self._pieces, self._window = rows, pieces, window
        self._piece, self._next = -1, 0
        self._batches: Iterator[dict[str, Any]] = iter(())
        self._held: dict[str, list[Any]] = {}

    def window_of(self, piece: int, place: int) -> dict[str, list[Any]]:
        """Return the columns of the window that holds a place of a piece; it is shorter where the piece ends."""
        start = place - place % self._window
        if piece != self._piece or start < self._next - self._window:
            rows = self._rows.shard(self._pieces, piece).skip(start)
            # Not __iter__: in a DataLoader's worker that leaves out the other workers' part.
            self._batches, self._next = rows.iter(batch_size=self._window), start
        while self._next <= start:
            self._held = next(self._batches, {})
            self._next += self._window
        self._piece = piece
        return self._held


def _load(choice: Choice, **options: Any) -> Any:
    import datasets

    path, place = _place(choice)
    options |= {"split": choice.split, "revision": choice.revision, "streaming": choice.streaming}
    return datasets.load_dataset(path, choice.config, **place, **options)


def _place(choice: Choice) -> tuple[str, dict[str, Any]]:
    """Return the library's arguments: a name on the Hub or a folder, or the kind of a single file."""
    local = expand(choice.path)
    if (local / "state.json").is_file():
        fix = "Write a file with to_parquet, and name the file"
        raise PraError(f"{local}: this folder was written by save_to_disk. {fix}", "unreadable", path=local)
    if local.is_dir():
        return str(local), {}
    if local.suffix in (".parquet", ".arrow") and local.is_file():
        return local.suffix[1:], {"data_files": str(local)}
    if local.exists() or choice.path.startswith(("/", ".", "~")):
        fix = "Give a folder, a .parquet or .arrow file, or a name on the Hub"
        raise PraError(f"{local}: no data set is there. {fix}", "missing", path=local)
    return choice.path, {}


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except PraError:
        raise
    except Exception as error:  # the library raises any exception of its files and formats
        raise PraError(f"{name} cannot be read: {reason_of(error)}. Check it", "unreadable", name=name) from error


def _bytes(value: Any, where: str) -> bytes:
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


def _columns(choice: Choice, features: Any) -> tuple[Choice, str | None]:
    """Return the choice with the column of images filled in, and the column of labels; None for no classes."""
    kinds = {column: type(feature).__name__ for column, feature in (features or {}).items()}
    chosen = []
    for option, given, wanted in (("image", choice.image, "Image"), ("label", choice.label, "ClassLabel")):
        found = [column for column, kind in kinds.items() if kind == wanted]
        column = given if given is not None else found[0] if len(found) == 1 else option
        if given is None and column not in kinds:
            fix = f"Write {option}=COLUMN, or label={_WITHOUT} for data without classes{nearest('', kinds)}"
            raise PraError(f"{len(found)} columns may be the {option}. {fix}", option=option)
        if column not in (*kinds, _WITHOUT):
            raise PraError(f"no column {column!r}{nearest(column, kinds)}", "unknown", column=column)
        chosen.append(column)
    image, label = chosen
    if kinds.get(image) != "Image":
        raise PraError(f"column {image!r} holds {kinds.get(image)}, not images{nearest('', kinds)}", column=image)
    if choice.caption is not None and choice.caption not in kinds:
        raise PraError(
            f"no column {choice.caption!r}{nearest(choice.caption, kinds)}", "unknown", column=choice.caption
        )
    return replace(choice, image=image), None if label == _WITHOUT else label


def _labels(column: str | None, values: Any, features: Any, count: int) -> tuple[Labels, tuple[str, ...]]:
    """Return label numbers and class names: the column's own names, the sorted texts in it, or its numbers."""
    if not count:
        raise PraError("it has no rows. Choose another split", "missing")
    if column is None:
        return np.zeros(count, np.int64), ("image",)
    fix = f"Choose another column or split, or write label={_WITHOUT} for data without classes"
    array = np.asarray(values)
    if array.dtype.kind in "UO" and all(isinstance(value, str) for value in array.tolist()):
        texts, numbers = np.unique(array.astype(str), return_inverse=True)
        return numbers.astype(np.int64), tuple(str(text) for text in texts)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise PraError(f"column {column!r} holds no classes (numbers or names). {fix}", column=column)
    numbers = array.astype(np.int64)
    if numbers.min() < 0:
        row = int(numbers.argmin())
        raise PraError(f"row {row} has class {numbers[row]}. {fix}", row=row, value=numbers[row])
    names = getattr(features[column], "names", None)
    if names and numbers.max() >= len(names):
        row = int(numbers.argmax())
        raise PraError(f"row {row} has class {numbers[row]}, of {len(names)}. {fix}", row=row, value=numbers[row])
    return numbers, tuple(names or numbered_classes(numbers, lambda row: f"row {row}", fix))


def _divided(stream: Any) -> Any:
    """Return pieces: the files, or where they are few, parts of them such as parquet's row groups."""
    return stream if stream.num_shards >= LANES else stream.reshard()


def _streamed_labels(choice: Choice, label: str | None, features: Any) -> tuple[Any, Labels]:
    """Return the label of every row, and the first row of each piece, followed by the number of rows."""
    # Without classes, another column is read to count the rows.
    plain = (column for column, feature in features.items() if type(feature).__name__ == "Value")
    column = label or next(plain, str(choice.image))
    place = cache_folder() / f"labels-{_fingerprint(choice, column)}.npz"
    # Missing or damaged labels are read again.
    with contextlib.suppress(Exception):
        known = read_arrays(place, ("labels", "starts"), most=2**36)
        kept, bounds = known["labels"], known["starts"]
        ends = [kept.ndim, bounds.dtype.kind, bounds[0], bounds[-1]]
        if ends == [1, "i", 0, len(kept)] and (np.diff(bounds) >= 0).all():
            return kept, bounds
    try:
        rows = _load(choice, columns=[column])
    except Exception:  # the format has no way to read one column
        rows = _load(choice).select_columns([column])
    if column == choice.image:
        rows = rows.cast_column(column, replace(features[column], decode=False))
    rows = _divided(rows)
    read: list[Any] = []
    starts = [0]
    with Progress(desc=f"reading labels of {choice.path}", unit="row") as bar:
        for piece in range(pieces := min(rows.num_shards, PIECES)):
            for batch in rows.shard(pieces, piece).iter(batch_size=1000):
                read += batch[column] if label else [0] * len(batch[column])
                bar.update(len(read) - bar.n)
            starts.append(len(read))
    labels, bounds = np.array(read), np.array(starts)
    if labels.dtype.kind != "O":
        with contextlib.suppress(PraError):  # labels that cannot be kept are read again
            write_atomically(place, lambda file: np.savez(file, labels=labels, starts=bounds))
    return labels, bounds


def _fingerprint(choice: Choice, column: str) -> str:
    """Hash a column's name and its files: their names, and the Hub's versions or modification times."""
    import datasets

    path, options = _place(choice)
    files = datasets.load_dataset_builder(path, choice.config, revision=choice.revision, **options).config.data_files
    chosen = (files or {}).get(choice.split, ())
    versions = getattr(chosen, "origin_metadata", None)
    return hashlib.sha256(repr((choice, column, list(chosen), versions)).encode()).hexdigest()[:16]

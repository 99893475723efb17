"""Captions: texts of images, checked, and the metadata files in which folders keep them."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator
from os.path import splitext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pra.data.images import CorruptImage
from pra.errors import Code, PraError, one_line, reason_of
from pra.utils.files import parse_json, read_regular

METADATA = ("metadata.jsonl", "metadata.csv")
"""Files of a folder that hold ``file_name`` and ``text``: the convention of Hugging Face's ImageFolder."""
MOST_TEXT, MOST_METADATA = 2**16, 2**30
"""Bytes of the captions of one image, and of a metadata file."""
JSON_KEYS = ("text", "caption")
"""Keys of ``KEY.json`` in a shard: those of ImageFolder and of img2dataset."""


class CorruptCaption(CorruptImage):
    """An image whose captions are missing or cannot be used; ``data.on_caption`` decides what happens next."""

    setting = "on_caption"


def corrupt_caption(where: str, problem: str, code: Code = "unreadable") -> CorruptCaption:
    """Return the error for the captions of the image at ``where``."""
    fix = "Correct it, or leave such images out with --set data.on_caption=skip"
    error = CorruptCaption(f"{where}: {problem}. {fix}", code, where=where)
    error.problem = problem
    return error


def without_caption(where: str) -> CorruptCaption:
    """Return the error for an image that has no caption."""
    return corrupt_caption(where, "it has no caption", "missing")


def checked(texts: object, where: str, place: str) -> tuple[str, ...]:
    """Return the captions in ``texts``, a string or a list of strings, without the spaces around each.

    ``where`` names the image and ``place`` the captions' own, such as ``"metadata.csv, line 3"``.

    Raises:
        CorruptCaption: another type, an empty caption, a NUL, text that UTF-8 cannot hold, more than :data:`MOST_TEXT`.
    """
    given = texts if isinstance(texts, list) else ["" if texts is None else texts]
    captions = tuple(text.strip() for text in given if isinstance(text, str))
    if len(captions) < len(given):
        raise corrupt_caption(where, f"its caption ({place}) is neither a text nor a list of texts")
    if not captions or not all(captions):
        raise corrupt_caption(where, f"its caption ({place}) is empty", "missing")
    try:
        size = len("".join(captions).encode())
    except UnicodeEncodeError:
        raise corrupt_caption(where, f"its caption ({place}) is not in UTF-8") from None
    if size > MOST_TEXT:
        raise corrupt_caption(where, f"its captions ({place}) have {size:,} bytes, at most {MOST_TEXT:,}", "too-large")
    if any("\0" in caption for caption in captions):
        raise corrupt_caption(where, f"its caption ({place}) holds a NUL")
    return captions


def from_lines(data: bytes, where: str, place: str) -> tuple[str, ...]:
    """Return the captions in a text file, one a line, as kohya's scripts, OneTrainer and SimpleTuner read them.

    Blank lines are left out. Errors are those of :func:`checked`.
    """
    lines = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", "surrogateescape")
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        return checked("", where, place)
    return tuple(checked(line, where, f"{place}, line {number}")[0] for number, line in filled)


def from_json(data: bytes, where: str, place: str) -> tuple[str, ...]:
    """Return the captions in a JSON object, under the first of :data:`JSON_KEYS` that it has.

    Errors are those of :func:`checked`; other JSON is one too.
    """
    try:
        values = parse_json(data, place)
    except PraError as error:
        raise corrupt_caption(where, str(error).partition(". ")[0]) from None
    known = [values[key] for key in JSON_KEYS if key in values] if isinstance(values, dict) else []
    if not known:
        raise corrupt_caption(where, f"it has no caption ({place} lacks {' and '.join(JSON_KEYS)})", "unknown")
    return checked(known[0], where, place)


class Table:
    """The captions of many images, in two arrays: reference counts would copy a list into each forked worker."""

    def __init__(self, captions: Iterable[tuple[str, ...]]) -> None:
        parts = [json.dumps(texts).encode() if texts else b"" for texts in captions]
        self._bytes, self._ends = b"".join(parts), np.cumsum([0, *map(len, parts)])

    def __getitem__(self, index: int) -> tuple[str, ...]:
        """Return the captions of an image, perhaps none."""
        start, end = self._ends[index : index + 2]
        return tuple(json.loads(self._bytes[start:end] or b"[]"))


class Row(NamedTuple):
    """A line of a metadata file: its place in words, the picture's path from the folder, and its captions.

    A ``problem`` concerns the line itself, which then lacks a picture.
    """

    place: str
    file: str = ""
    texts: object = None
    problem: str = ""


def read_metadata(root: Path, file: str) -> list[Row]:
    """Return the lines of ``root / file`` if it holds captions, else nothing.

    Raises:
        OSError: the file cannot be read, or has more than :data:`MOST_METADATA` bytes.
    """
    # Read bytes that are not UTF-8 as surrogates, which `checked` finds: other lines stay of use.
    text = read_regular(root / file, MOST_METADATA).decode("utf-8-sig", "surrogateescape")
    lines = list(_csv(text) if file.endswith(".csv") else _json_lines(text))
    if not any(isinstance(values, dict) and {"file_name", "text"} <= values.keys() for _, values in lines):
        return []
    return [_row(file, number, values) for number, values in lines]


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, f"is not JSON: {reason_of(error)}"


def _csv(text: str) -> list[tuple[int, Any]]:
    reader, lines = csv.DictReader(io.StringIO(text, newline=""), strict=True), list[tuple[int, Any]]()
    limit = csv.field_size_limit(len(text) + 1)  # `checked` finds long texts, and the lines behind them are read
    try:
        for values in reader:
            lines.append((reader.line_num, values))
    except csv.Error as error:
        lines.append((reader.line_num + 1, f"is not CSV: {reason_of(error)}"))
    finally:
        csv.field_size_limit(limit)
    return lines


def _row(file: str, number: int, values: object) -> Row:
    place = f"{file}, line {number}"
    name = values.get("file_name") if isinstance(values, dict) else None
    if not isinstance(values, dict) or not isinstance(name, str) or not name:
        return Row(place, problem=values if isinstance(values, str) else "has no file_name")
    inside = posixpath.normpath(name)
    if posixpath.isabs(inside) or inside.split("/")[0] == "..":
        return Row(place, problem=f"names {one_line(name, 200)!r}, which lies outside of its folder")
    return Row(place, posixpath.normpath(posixpath.join(posixpath.dirname(file), inside)), values.get("text"))


class FolderCaptions:
    """The captions of a folder's pictures: those of its metadata, else the lines of ``NAME.txt`` beside ``NAME.png``.

    ``uncaptioned`` counts the problems that are known without opening a text file, and holds the first.
    """

    def __init__(
        self, root: Path, pictures: list[str], rows: list[Row], texts: set[str], where: Callable[[int], str]
    ) -> None:
        """Take ``rows``, and the ``texts`` beside pictures; these are paths from ``root``, texts without ending."""
        places, first = {file: index for index, file in enumerate(pictures)}, dict[int, Row]()
        captions, self._broken = dict[int, tuple[str, ...]](), dict[int, CorruptCaption]()
        for row in rows:
            if (index := places.get(row.file)) is None:
                continue
            try:
                if (other := first.setdefault(index, row)) is not row:
                    raise corrupt_caption(where(index), f"two captions name it, in {other.place} and {row.place}")
                captions[index] = checked(row.texts, where(index), row.place)
            except CorruptCaption as error:
                self._broken[index] = error
        self._where, self._table = where, Table(captions.get(index, ()) for index in range(len(pictures)))
        self._beside = np.array([splitext(file)[0] in texts for file in pictures])
        lines = [row for row in rows if row.problem]
        lacking = [index for index in range(len(pictures)) if index not in first and not self._beside[index]]
        problems = [corrupt_caption(str(root / row.place), row.problem) for row in lines[:1]]
        problems += [*self._broken.values(), *(without_caption(where(index)) for index in lacking[:1])]
        self.uncaptioned = len(lines) + len(self._broken) + len(lacking), next(iter(problems), None)

    def of(self, index: int) -> tuple[str, ...]:
        """Return the captions of a picture."""
        where = self._where(index)
        if broken := self._broken.get(index):
            raise corrupt_caption(where, broken.problem, broken.code)
        if captions := self._table[index]:
            return captions
        if not self._beside[index]:
            raise without_caption(where)
        file = Path(f"{splitext(where)[0]}.txt")
        try:
            data = read_regular(file, MOST_TEXT)
        except OSError as error:
            raise corrupt_caption(where, f"its caption ({file.name}) cannot be read: {reason_of(error)}") from error
        return from_lines(data, where, file.name)

"""Where the data and the first weights of a run lie now: ``config.json`` names a place, ``environment.json`` a content.

A run resumes with data or first weights from another place if they hold the same.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pra.config import RunConfig
from pra.data import Source
from pra.data.images import CorruptImage
from pra.data.source import Encoded, Streamed
from pra.errors import PraError
from pra.models import weights
from pra.utils.hub import is_address
from pra.utils.provenance import file_sha256

ENVIRONMENT = "environment.json"


def recorded(folder: Path) -> dict[str, Any]:
    """Return ``environment.json`` of a run; empty where it is missing."""
    path = folder / ENVIRONMENT
    return weights.read_json(path) if path.exists() else {}


def contents(source: Source) -> dict[str, Any]:
    """Return what identifies data wherever they lie: the number of images, their labels, and the first image.

    Labels are not enough: without classes they are all the same. The first image of a stream is not read.
    """
    labels = hashlib.sha256(source.labels.astype("<i8").tobytes()).hexdigest()
    return {"images": len(source), "labels_sha256": labels, "first_image_sha256": _first_image(source)}


def _first_image(source: Source) -> str | None:
    """The hash of its file where there is one: pixels of a JPEG depend on the decoder's version."""
    if isinstance(source, Streamed):
        return None
    try:
        first = source.encoded(0) if isinstance(source, Encoded) else source.image(0).tobytes()
    except CorruptImage:
        return None
    return hashlib.sha256(first).hexdigest()


def check_contents(folder: Path, before: RunConfig, config: RunConfig, source: Source) -> None:
    """Check that ``source``, which ``config`` names, holds the images of ``before``, the run in ``folder``."""
    known = recorded(folder).get("data")
    if before.data.source == config.data.source or not known:
        return
    found = contents(source)
    if found != known:
        other = "others" if found["images"] == known["images"] else f"{found['images']}"
        raise PraError(
            f"{folder} has been trained on {before.data.source} ({known['images']} images), and {config.data.source} "
            f"holds {other}. Use the same images, wherever they lie, or another --run-dir",
            code="mismatch",
            path=folder,
            source=config.data.source,
            known=before.data.source,
        )


def may_lie_elsewhere(setting: str, folder: Path, config: RunConfig) -> bool:
    """Return whether a difference in this setting may be another place of the same content.

    For data it is enough that the content is recorded: :func:`check_contents` compares it when they are open.
    """
    if setting == "data.source":
        return "data" in recorded(folder)
    known = recorded(folder).get("initial")
    if setting != "initial" or not known or config.initial is None or is_address(config.initial):
        return False
    try:
        start = weights.model_folder(config.initial)
        name = weights.weights_name(start, config.initial_average)
        return bool(file_sha256(start / name) == known.get("sha256"))
    except PraError:  # nothing there
        return False

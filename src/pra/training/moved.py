"""What a run that goes on may find elsewhere than it began: its data, and the weights that it began with.

``config.json`` names both by where they lie, ``environment.json`` says by what they hold. Another place is taken for
the same where it holds the same.
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
    """What ``environment.json`` says of a run; nothing where there is none.

    Raises:
        PraError: it cannot be read.
    """
    path = folder / ENVIRONMENT
    return weights.read_json(path) if path.exists() else {}


def contents(source: Source) -> dict[str, Any]:
    """What tells data from others, wherever they lie: how many images, their labels, and the first image.

    Labels alone would not do: data without classes have all the same. Of a stream no image is looked at.
    """
    labels = hashlib.sha256(source.labels.astype("<i8").tobytes()).hexdigest()
    return {"images": len(source), "labels_sha256": labels, "first_image_sha256": _first_image(source)}


def _first_image(source: Source) -> str | None:
    """Of its file where there is one: what a decoder makes of a JPEG changes with its version."""
    if isinstance(source, Streamed):
        return None
    try:
        first = source.encoded(0) if isinstance(source, Encoded) else source.image(0).tobytes()
    except CorruptImage:
        return None
    return hashlib.sha256(first).hexdigest()


def check_contents(folder: Path, before: RunConfig, config: RunConfig, source: Source) -> None:
    """Looks whether a run that has learnt from one source may go on with another.

    Args:
        folder: the run's.
        before: its configuration until now.
        config: the one that is asked for.
        source: that names, opened.

    Raises:
        PraError: they hold different images.
    """
    known = recorded(folder).get("data")
    if before.data.source == config.data.source or not known:
        return
    found = contents(source)
    if found != known:
        other = "others" if found["images"] == known["images"] else f"{found['images']}"
        raise PraError(
            f"{folder} has been trained on {before.data.source} ({known['images']} images), and {config.data.source} "
            f"holds {other}; nothing was changed: go on with the same images, wherever they lie, or choose another "
            "--run-dir"
        )


def may_lie_elsewhere(setting: str, folder: Path, config: RunConfig) -> bool:
    """Whether it is no other run for which ``config`` differs in this setting from the run in ``folder``.

    Of data that is so where it is known what the run's hold: :func:`check_contents` compares that, when they are open.
    """
    if setting == "data.source":
        return "data" in recorded(folder)
    return setting == "initial" and _same_start(folder, config.initial, config.initial_average)


def _same_start(folder: Path, initial: str | None, average: str) -> bool:
    """Whether these weights of ``initial`` are those that the run in ``folder`` began with, as far as that is known."""
    known = recorded(folder).get("initial")
    if not known or initial is None or is_address(initial):
        return False
    try:
        start = weights.model_folder(initial)
        name = weights.weights_name(start, average)
        return bool(file_sha256(start / name) == known.get("sha256"))
    except PraError:  # nothing there
        return False

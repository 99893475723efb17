"""A run's folder: configuration, environment, metrics, pictures.

config.json       the complete configuration         samples/          grids from the EMA, by step
environment.json  versions, commit, hardware, data   reconstructions/  real images and the codec's, by step
metrics.jsonl     one line per logging interval      curves.png        the metrics, drawn
tensorboard/      the same for TensorBoard           checkpoints/      see pra.training.checkpoint
report.html       all of it on a page (pra.evaluation.report)   rollout-gap.json  what `pra report` has measured
.lock             names the process that trains, as long as it does
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pra.config import RunConfig, differences, from_dict, to_dict
from pra.data import Source
from pra.data.images import CorruptImage, warn_once
from pra.data.source import (
    Captioned,
    Encoded,
    Listed,
    Streamed,
    check_captions,
    check_told_apart,
    learned,
    same_place,
    with_images,
)
from pra.errors import PraError, reason_of
from pra.models import weights
from pra.models.weights import CONFIG
from pra.utils.distributed import World
from pra.utils.files import open_regular, own_folder, parse_json, read_json, unreadable, write_atomically
from pra.utils.hub import is_address
from pra.utils.locks import LOCK, holder_of, locked
from pra.utils.provenance import environment, file_sha256

METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
FOLDERS = ("checkpoints", "samples", "reconstructions", "tensorboard", "wandb")
"""Folders that training fills."""
NEEDED = {"step", "images_per_second", "epoch"}
"""Numbers that every line of the metrics has."""
LARGEST, EXTREME = 3.4e38, 1e15
"""Metrics are float32. Steps beyond the second, and rates beyond it or its inverse, are of damaged lines."""
MOST_METRICS, LONGEST_LINE, LONGEST_NAME, MOST_DAMAGED, MOST_TERMS = 2**28, 2**16, 100, 100_000, 24
"""Bytes of ``metrics.jsonl`` and of a line, letters of a name, damaged lines, and terms of the loss that are shown."""
COMMON = (
    "step", "total", "state_std", "gradient_norm", "learning_rate", "images_per_second", "epoch", "skipped",
)  # fmt: skip
"""Names in every line of the metrics; all others are terms of the loss (:mod:`pra.method.objectives`)."""
VALIDATION = "validation_"
"""Prefix of a term's value on held-out images."""
COMPARED = 1000
"""Images whose captions tell a run that its data have changed."""
SEEN_WITHIN = 90.0
"""Seconds until all machines see a new file: network file systems cache missing files."""

# Settings that may change when a run resumes, because they change no weight.
FREE = {
    "train": (
        "steps", "compile", "micro_batch_size", "parallel", "activation_checkpointing", "log_every", "sample_every",
        "checkpoint_every", "keep_checkpoints", "keep_every", "validate_every",
    ),
    "data": ("workers", "on_small", "on_corrupt", "on_caption"),
}  # fmt: skip


@contextmanager
def claimed(folder: Path, config: RunConfig, world: World, losses: Mapping[str, float]) -> Iterator[None]:
    """Lock a run's folder while the block trains there, after all checks that need no data: opening them takes long.

    Args:
        folder: the run's.
        config: the requested configuration. The number of classes is checked with the data (:func:`check_data`).
        world: the processes that train; rank 0 holds the lock.
        losses: the weights of the user's terms of the loss.

    Raises:
        PraError: the batch does not divide; the folder holds something else, or a run of another configuration (the
            differences are named), or folders that are links; another process trains there, or a machine sees another
            folder.
    """
    config.train.micro_batches(world.size)
    check_run(folder, config, losses)  # first, as the lock would be a file in a stranger's folder
    with locked(folder, "trained", "choose another --run-dir") if world.is_first else contextlib.nullcontext():
        # Every process must see the folder that rank 0 has locked.
        holder = world.combine(holder_of(folder), lambda holders: holders[0])
        deadline = time.monotonic() + SEEN_WITHIN
        while holder_of(folder) != holder:
            if time.monotonic() > deadline:
                problem = (
                    f"process {world.rank} on {platform.node()} does not see the folder {folder} of process 0, "
                    f"{holder}. Use a --run-dir on a disk that all machines share"
                )
                raise PraError(problem, code="missing", path=folder, rank=world.rank)
            time.sleep(0.5)
        world.barrier(patient=True)  # rank 0 removes the lock if it fails: not before all have seen it
        yield


def check_run(folder: Path, config: RunConfig, losses: Mapping[str, float]) -> None:
    """Check that a run of this configuration can begin or resume in ``folder``, as :func:`claimed`; write nothing."""
    for name in FOLDERS:
        own_folder(folder / name)
    if str(folder).encode(errors="replace") != os.fsencode(folder):  # safetensors opens no other path
        problem = f"{folder} is not a path in UTF-8, and no checkpoint could be read from it. Use another --run-dir"
        raise PraError(problem, path=folder)
    if not (folder / CONFIG).exists():
        if folder.exists() and not folder.is_dir():
            raise PraError(f"{folder} is a file. Use another --run-dir", code="exists", path=folder)
        if folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
            problem = f"{folder} is not empty and is not a run folder (no {CONFIG}). Use another --run-dir"
            raise PraError(problem, code="exists", path=folder)
        return
    there, asked = _fixed(read_run(folder)), _fixed(config)
    asked["model"]["num_classes"] = there["model"]["num_classes"]
    changed, record = differences(there, asked), recorded(folder)
    other = {line.partition(":")[0] for line in changed}
    if "data" in record:
        other.discard("data.source")  # check_data compares what they hold
    if same_place(there["data"]["source"], config.data.source):
        other.discard("data.source")
    if other == {"initial"} and _same_weights(record.get("initial"), config):
        other.clear()
    if other:
        raise _another(folder, changed)
    known = record.get("losses", {})
    if known != losses:
        problem = (
            f"{folder} has been trained with losses={known}, not {losses}. Pass the same losses to pra.train, or "
            "use another --run-dir"
        )
        raise PraError(problem, code="mismatch", path=folder, losses=known)


def class_count(folder: Path, source: Source) -> int:
    """Return how many classes the run in ``folder`` learns of a source: those that have images.

    A run of an earlier version, which learned all of them, resumes with all.
    """
    every = len(source.classes)
    begun_with_all = (folder / CONFIG).exists() and read_run(folder).model.num_classes == every
    return every if begun_with_all else len(with_images(source))


def check_data(folder: Path, config: RunConfig, source: Source) -> str:
    """Check that the images of ``source`` suit the configuration, and are those of the run in ``folder``, if any.

    Return a warning: of images that have changed since, or of a new run's classes without images. It may be empty.

    Raises:
        PraError: the run learned from images elsewhere that differ, or other classes; the model has too few classes;
            a new run has two classes of one name.
    """
    begun = read_run(folder) if (folder / CONFIG).exists() else None
    if begun and begun.model.num_classes != config.model.num_classes:
        changed = differences(begun.model.num_classes, config.model.num_classes, "model.num_classes")
        problem = f"{folder} is a run of other classes than {source.name} has now ({changed[0]})"
        fix = "A label must keep its meaning: restore the classes or the setting, or use another --run-dir"
        raise PraError(f"{problem}. {fix}", code="mismatch", path=folder)
    if config.model.text is not None:
        check_captions(source, config.data.on_caption)
    if begun is None and config.initial is None:  # else the classes must go with those of another model
        check_told_apart(source)
    images = learned(source, config.model.num_classes)
    highest = int(images.labels.max())
    if highest >= config.model.num_classes:
        name = images.classes[highest] if highest < len(images.classes) else "which has no name"
        count = len(with_images(source))
        problem = f"{source.name} has label {highest} ({name}), beyond the model's. Set model.num_classes to {count}"
        raise PraError(problem, code="mismatch", value=highest)
    return _changed(folder, begun.data.source, config, source) if begun else _without_images(config, source)


def _changed(folder: Path, before: str, config: RunConfig, source: Source) -> str:
    """Return a warning if the images of a run have changed; refuse other images in another place."""
    known, now = recorded(folder).get("data") or {}, config.data.source
    found = contents(source, config.model.text is not None) if known else {}
    if before.partition(":")[0] != now.partition(":")[0]:  # packed, files have other names
        found["files_sha256"] = known.get("files_sha256")
    if all(found.get(name) == value for name, value in known.items()):
        return ""
    other = "others" if found["images"] == known.get("images") else f"{found['images']}"
    if not same_place(before, now):
        problem = (
            f"{folder} has been trained on {before} ({known.get('images')} images), and {now} "
            f"holds {other}. Use the same images, wherever they lie, or another --run-dir"
        )
        raise PraError(problem, code="mismatch", path=folder, source=now, known=before)
    held_out = ""
    if config.data.held_out_share is not None:
        held_out = " Other images are held out now: some were learned from, so validation losses no longer compare."
    return (
        f"{now} has changed since {folder} was last trained on its {known.get('images')} images: it holds {other} now. "
        f"The run continues with these, in another order, and no longer repeats from its seed.{held_out} Restore the "
        "data to continue as before, or use another --run-dir"
    )


def _without_images(config: RunConfig, source: Source) -> str:
    """Return a warning that names the classes of a new run without images."""
    labels, count = set(with_images(source)), config.model.num_classes
    empty = [name for label, name in enumerate(source.classes) if label not in labels]
    some = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
    if count == len(labels):
        return f"classes of {source.name} without images are left out: {some}" if empty else ""
    return (
        f"{count - len(labels)} of the model's {count} classes have no images in {source.name} and learn nothing. Set "
        f"model.num_classes to {len(labels)}"
    )


def _another(folder: Path, changed: list[str]) -> PraError:
    differing = "; ".join(changed)
    problem = (
        f"{folder} is a run of another configuration ({differing}); nothing was changed. Repeat its settings, or "
        "use another --run-dir"
    )
    return PraError(problem, code="mismatch", path=folder, differences=differing)


def recorded(folder: Path) -> dict[str, Any]:
    """Return ``environment.json`` of a run; empty if it is missing."""
    path = folder / ENVIRONMENT
    return read_json(path, data=dict | None, initial=dict | None, losses=dict | None) if path.exists() else {}


def contents(source: Source, captions: bool = False) -> dict[str, Any]:
    """Return what identifies data wherever they lie: the number of images, their labels, and the first image.

    With ``captions``, some captions too, except for a stream, which would have to be read.

    Labels are not enough: without classes they are all the same. The first image is hashed as its file, if it has one,
    since the pixels of a JPEG depend on the decoder's version. The first image of a stream is not read. Files are
    identified by names and sizes.
    """
    first = None
    if not isinstance(source, Streamed):
        with contextlib.suppress(CorruptImage):
            first = source.encoded(0) if isinstance(source, Encoded) else source.image(0).tobytes()
    hashes = {"labels_sha256": source.labels.astype("<i8").tobytes(), "first_image_sha256": first}
    hashes |= {"files_sha256": source.listing()} if isinstance(source, Listed) else {}
    if captions and isinstance(source, Captioned) and not isinstance(source, Streamed):
        places = range(0, len(source), max(1, len(source) // COMPARED))
        hashes["captions_sha256"] = json.dumps([_captions_at(source, place) for place in places]).encode()
    found = {name: None if data is None else hashlib.sha256(data).hexdigest() for name, data in hashes.items()}
    return {"images": len(source), **found}


def _captions_at(source: Captioned, index: int) -> tuple[str, ...]:
    try:
        return source.captions(index)
    except CorruptImage:  # reported when its turn comes
        return ()


def _same_weights(known: Mapping[str, str] | None, config: RunConfig) -> bool:
    """Return whether the first weights asked for are the recorded ones, perhaps in another place."""
    if not known or config.initial is None or is_address(config.initial):
        return False
    try:
        start = weights.model_folder(config.initial, config.initial_average)
        name = weights.weights_name(start, config.initial_average)
        return bool(file_sha256(start / name) == known.get("sha256"))
    except PraError:  # nothing there
        return False


def write_run(
    folder: Path,
    config: RunConfig,
    source: Source,
    processes: int = 1,
    initial: dict[str, Any] | None = None,
    losses: Mapping[str, float] | None = None,
) -> None:
    """Write or update ``config.json`` and ``environment.json`` of a run that is about to train.

    ``initial`` is the origin of its first weights (:func:`pra.training.initial.load_initial`); None keeps the record.
    ``losses`` are the weights of the user's terms of the loss.
    """
    if config.initial is not None and initial is None:
        initial = recorded(folder).get("initial")
    known: dict[str, Any] = {"processes": processes, "data": contents(source, config.model.text is not None)}
    known |= {"initial": initial} if initial else {}
    known |= {"losses": dict(losses)} if losses else {}
    write_json(folder / CONFIG, to_dict(config))
    write_json(folder / ENVIRONMENT, environment() | known)


def read_run(folder: Path) -> RunConfig:
    """Return the configuration of a run.

    Raises:
        PraError: the folder is missing, or is not a run.
    """
    if not (folder / CONFIG).exists():
        problem = "it has no config.json" if folder.exists() else "no such folder"
        raise PraError(f"no run at {folder}: {problem}", code="missing", path=folder)
    values = read_json(folder / CONFIG, finite=True)
    if "recipe" not in values:
        problem = f"{folder} holds a model, not a run: its {CONFIG} lacks a recipe. Give the folder of a run"
        raise PraError(problem, code="mismatch", path=folder)
    train = values.get("train")
    if isinstance(train, dict) and "shortcut_only" in train:  # the older name of train.trainable
        train["trainable"] = "shortcut" if train.pop("shortcut_only") else "all"
    return from_dict(RunConfig, values, str(folder / CONFIG))


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the lines of ``metrics.jsonl`` (:func:`metrics_lines`). Damaged ones are left out and warned about once.

    Raises:
        PraError: the file cannot be read as a whole.
    """
    rows: list[dict[str, float]] = []
    damaged = first = 0
    for number, (_, row) in enumerate(metrics_lines(folder), start=1):
        if row is None:
            damaged, first = damaged + 1, first or number
        else:
            rows.append(row)
    if damaged:
        lines = f"{damaged} damaged line(s) are left out, the first is line {first}"
        warn_once(f"{folder / METRICS}: {lines}. Repair or remove them")
    return rows


def metrics_lines(folder: Path) -> Iterator[tuple[bytes, dict[str, float] | None]]:
    """Yield the whole lines of ``metrics.jsonl`` with their numbers, ``None`` for a damaged line.

    Raises:
        PraError: the file cannot be read as a whole.
    """
    path = folder / METRICS
    if not path.exists():
        return
    try:
        with open_regular(path, MOST_METRICS) as file:
            damaged = 0
            for line in file:
                if line.endswith(b"\n"):  # a kill leaves half a line at the end
                    row = _numbers(line)
                    yield line, row
                    damaged += row is None
                    if damaged > MOST_DAMAGED:
                        raise unreadable(path, f"has more than {MOST_DAMAGED:,} damaged lines. Move it away")
    except OSError as error:
        raise unreadable(path, f"cannot be read: {reason_of(error)}. Move it away") from None


def _numbers(line: bytes) -> dict[str, float] | None:
    """Return a line's numbers; those beyond float32 or of long names are left out. None for a damaged line."""
    if not sum(map(len, NEEDED)) < len(line) <= LONGEST_LINE:
        return None
    try:
        values = parse_json(line, METRICS)
        row = {name: value for name, value in values.items() if abs(value) <= LARGEST and len(name) <= LONGEST_NAME}
    except (PraError, AttributeError, TypeError):
        return None
    if not row.keys() >= NEEDED or not 1 <= row["step"] < EXTREME:
        return None
    return row if 1 / EXTREME < row["images_per_second"] < EXTREME else None


def loss_terms(rows: Iterable[Mapping[str, float]]) -> list[str]:
    """Return the names of the terms of the loss in lines of metrics, in the order in which they first appear.

    Names beyond :data:`MOST_TERMS` are left out.
    """
    names = dict.fromkeys(name for row in rows for name in row if name not in COMMON and row[name])
    return [name for name in names if not name.startswith(VALIDATION)][:MOST_TERMS]


def points_of(rows: Iterable[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    """Return steps and values of one metric.

    A line lacks a term that its steps did not compute. Earlier versions wrote 0 there: those are left out too.
    """
    return [(row["step"], row[name]) for row in rows if name in row and (row[name] or name in COMMON)]


def training_seconds(rows: list[dict[str, float]], batch_size: int, until: int | None = None) -> float:
    """Return the seconds of a run's steps until step ``until``, over all calls, without pictures and checkpoints."""
    kept = [{"step": 0.0}, *(row for row in rows if until is None or row["step"] <= until)]
    pairs = itertools.pairwise(kept)
    # A damaged file may go back in steps.
    return sum((max(0, b["step"] - a["step"]) * batch_size / b["images_per_second"] for a, b in pairs), 0.0)


def write_json(path: Path, values: Any) -> None:
    """Write values as indented JSON, whole or not at all."""
    write_atomically(path, lambda file: file.write((json.dumps(values, indent=2) + "\n").encode()))


def _fixed(config: RunConfig) -> dict[str, Any]:
    """The settings that may not change when a run resumes."""
    values: dict[str, Any] = to_dict(config)
    for part, names in FREE.items():
        values[part] = {name: value for name, value in values[part].items() if name not in names}
    values["data"]["validation"] = config.data.held_out_share  # another held-out source changes no weight
    del values["sampling"]
    return values

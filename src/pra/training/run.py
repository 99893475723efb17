"""A run's folder: what was asked, where it ran, what it measured, what it looked like.

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
from pra.data.images import CorruptImage
from pra.data.source import Encoded, Streamed
from pra.errors import PraError
from pra.models import weights
from pra.models.weights import CONFIG, read_json
from pra.utils.distributed import World
from pra.utils.files import write_atomically
from pra.utils.hub import is_address
from pra.utils.locks import LOCK, holder_of, locked
from pra.utils.provenance import environment, file_sha256

METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
COMMON = (
    "step", "total", "state_std", "gradient_norm", "learning_rate", "images_per_second", "epoch", "skipped",
)  # fmt: skip
"""Names in every line of the metrics; all others are terms of the loss (:mod:`pra.method.objectives`)."""
VALIDATION = "validation_"
"""Prefix of a term's value on held-out images."""
SEEN_WITHIN = 90.0
"""Seconds until all machines see what one has written: network file systems cache what was missing."""

# Settings that may change when a run resumes, because they change no weight.
FREE = {
    "train": (
        "steps", "compile", "micro_batch_size", "parallel", "activation_checkpointing", "log_every", "sample_every",
        "checkpoint_every", "keep_checkpoints", "keep_every", "validate_every",
    ),
    "data": ("workers", "on_small", "on_corrupt"),
}  # fmt: skip


@contextmanager
def claimed(folder: Path, config: RunConfig, world: World, losses: Mapping[str, float]) -> Iterator[None]:
    """Lock a run's folder while the block trains there, after all checks that need no data: opening them takes long.

    Args:
        folder: the run's.
        config: what is asked for. The number of classes is checked with the data (:func:`check_data`).
        world: the processes that train; rank 0 holds the lock.
        losses: the weights of the user's terms of the loss.

    Raises:
        PraError: the batch does not divide; the folder holds something else, or a run of another configuration (the
            differences are named); another process trains there, or a machine sees another folder.
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


def check_data(folder: Path, config: RunConfig, source: Source) -> None:
    """Check that the images of ``source`` suit the configuration, and are those of the run in ``folder``, if any.

    Raises:
        PraError: the run learned from other images or classes, or the model has too few classes.
    """
    begun = read_run(folder) if (folder / CONFIG).exists() else config
    classes = differences(begun.model.num_classes, config.model.num_classes, "model.num_classes")
    if classes:
        raise _another(folder, classes)
    known, before = recorded(folder).get("data"), begun.data.source
    if known and before != config.data.source and (found := contents(source)) != known:
        other = "others" if found["images"] == known["images"] else f"{found['images']}"
        problem = (
            f"{folder} has been trained on {before} ({known['images']} images), and {config.data.source} "
            f"holds {other}. Use the same images, wherever they lie, or another --run-dir"
        )
        raise PraError(problem, code="mismatch", path=folder, source=config.data.source, known=before)
    highest = int(source.labels.max())
    if highest >= config.model.num_classes:
        name, count = source.classes[highest], len(source.classes)
        problem = f"{source.name} has label {highest} ({name}), beyond the model's. Set model.num_classes to {count}"
        raise PraError(problem, code="mismatch", value=highest)


def _another(folder: Path, changed: list[str]) -> PraError:
    differing = "; ".join(changed)
    problem = (
        f"{folder} is a run of another configuration ({differing}); nothing was changed. Repeat its settings, or "
        "use another --run-dir"
    )
    return PraError(problem, code="mismatch", path=folder, differences=differing)


def recorded(folder: Path) -> dict[str, Any]:
    """Return ``environment.json`` of a run; empty where it is missing."""
    path = folder / ENVIRONMENT
    return read_json(path) if path.exists() else {}


def contents(source: Source) -> dict[str, Any]:
    """Return what identifies data wherever they lie: the number of images, their labels, and the first image.

    Labels are not enough: without classes they are all the same. The first image is hashed as its file where there is
    one, as the pixels of a JPEG depend on the decoder's version; that of a stream is not read.
    """
    first = None
    if not isinstance(source, Streamed):
        with contextlib.suppress(CorruptImage):
            first = source.encoded(0) if isinstance(source, Encoded) else source.image(0).tobytes()
    hashes = {"labels_sha256": source.labels.astype("<i8").tobytes(), "first_image_sha256": first}
    found = {name: None if data is None else hashlib.sha256(data).hexdigest() for name, data in hashes.items()}
    return {"images": len(source), **found}


def _same_weights(known: Mapping[str, str] | None, config: RunConfig) -> bool:
    """Return whether the first weights that are asked for are those on record, perhaps in another place."""
    if not known or config.initial is None or is_address(config.initial):
        return False
    try:
        start = weights.model_folder(config.initial)
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
    known = {"processes": processes, "data": contents(source)} | ({"initial": initial} if initial else {})
    known |= {"losses": dict(losses)} if losses else {}
    write_json(folder / CONFIG, to_dict(config))
    write_json(folder / ENVIRONMENT, environment() | known)


def read_run(folder: Path) -> RunConfig:
    """Return the configuration of a run.

    Raises:
        PraError: the folder is missing, or is not a run.
    """
    if not (folder / CONFIG).exists():
        problem = "it holds no config.json" if folder.exists() else "no such folder"
        raise PraError(f"no run at {folder}: {problem}", code="missing", path=folder)
    values = read_json(folder / CONFIG)
    if "recipe" not in values:
        problem = f"{folder} holds a model, not a run: its {CONFIG} names no recipe. Give the folder of a run"
        raise PraError(problem, code="mismatch", path=folder)
    train = values.get("train")
    if isinstance(train, dict) and "shortcut_only" in train:  # the older name of train.trainable
        train["trainable"] = "shortcut" if train.pop("shortcut_only") else "all"
    return from_dict(RunConfig, values, str(folder / CONFIG))


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the lines of ``metrics.jsonl``, without an unfinished last line.

    Raises:
        PraError: a line is damaged.
    """
    path = folder / METRICS
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        if line.endswith("\n"):
            try:
                rows.append(json.loads(line))
                _ = rows[-1]["step"]
            except (ValueError, TypeError, KeyError):
                where = f"{path}, line {number}"
                problem = f"{where} is damaged. Delete the line and repeat the command"
                raise PraError(problem, code="unreadable", path=where) from None
    return rows


def loss_terms(rows: Iterable[Mapping[str, float]]) -> list[str]:
    """Return the names of the terms of the loss in lines of metrics, in the order in which they first appear."""
    names = dict.fromkeys(name for row in rows for name in row if name not in COMMON and row[name])
    return [name for name in names if not name.startswith(VALIDATION)]


def points_of(rows: Iterable[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    """Return steps and values of one metric.

    A line lacks a term that its steps did not compute. Earlier versions wrote 0 there: those are left out too.
    """
    return [(row["step"], row[name]) for row in rows if name in row and (row[name] or name in COMMON)]


def training_seconds(rows: list[dict[str, float]], batch_size: int, until: int | None = None) -> float:
    """Return the seconds of a run's steps until step ``until``, over all calls, without pictures and checkpoints."""
    kept = [{"step": 0.0}, *(row for row in rows if until is None or row["step"] <= until)]
    pairs = itertools.pairwise(kept)
    return sum(((b["step"] - a["step"]) * batch_size / b["images_per_second"] for a, b in pairs), 0.0)


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

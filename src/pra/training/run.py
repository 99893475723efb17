"""A run's folder: what was asked, where it ran, what it measured, what it looked like.

config.json       the complete configuration         samples/          grids from the EMA, by step
environment.json  versions, commit, hardware, data   reconstructions/  real images and the codec's, by step
metrics.jsonl     one line per logging interval      curves.png        the metrics, drawn
tensorboard/      the same for TensorBoard           checkpoints/      see pra.training.checkpoint
report.html       all of it on a page (pra.evaluation.report)   rollout-gap.json  what `pra report` has measured
.lock             names the process that trains, as long as it does
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pra.config import RunConfig, differences, from_dict, to_dict
from pra.data import Source
from pra.errors import PraError
from pra.models.weights import CONFIG, read_json
from pra.training.moved import ENVIRONMENT, check_contents, contents, may_lie_elsewhere, recorded
from pra.utils.distributed import World
from pra.utils.files import write_atomically
from pra.utils.locks import LOCK, holder_of
from pra.utils.provenance import environment

METRICS = "metrics.jsonl"
COMMON = (
    "step", "total", "state_std", "gradient_norm", "learning_rate", "images_per_second", "epoch", "skipped",
)  # fmt: skip
"""What every line of the metrics has; its other values are the terms of the loss (:mod:`pra.method.objectives`)."""
VALIDATION = "validation_"
"""Before the name of a term: its value on held-out images."""
SEEN_WITHIN = 90.0
"""Seconds until what one machine has written is seen by all: network file systems remember for a while what was not
there."""

# What may change between two commands on the same run: it decides how long, how visibly and on which memory it goes
# on, and what stops it, but not what is learnt.
FREE = {
    "train": (
        "steps", "compile", "micro_batch_size", "parallel", "activation_checkpointing", "log_every", "sample_every",
        "checkpoint_every", "keep_checkpoints", "keep_every", "validate_every",
    ),
    "data": ("workers", "on_small", "on_corrupt"),
}  # fmt: skip


def check_run(folder: Path, config: RunConfig, classes_known: bool = True) -> None:
    """Looks whether a run of this configuration can begin, or go on, in ``folder``; writes nothing.

    Other data than the run's, by name, pass here where it is known what the run's hold: :func:`check_data` compares
    that, when they are open.

    Args:
        folder: the run's.
        config: what is asked for.
        classes_known: False before the data were opened, which say how many classes the model has.

    Raises:
        PraError: the folder holds something else, or a run of another configuration (the differences are named).
    """
    if not (folder / CONFIG).exists():
        if folder.exists() and not folder.is_dir():
            raise PraError(f"{folder} is a file, not the folder of a run; choose another --run-dir")
        if folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
            raise PraError(f"{folder} is not empty and is no run (it holds no {CONFIG}); choose another --run-dir")
        return
    there, asked = _fixed(read_run(folder)), _fixed(config)
    if not classes_known:
        asked["model"]["num_classes"] = there["model"]["num_classes"]
    changed = differences(there, asked)
    if not all(may_lie_elsewhere(line.partition(":")[0], folder, config) for line in changed):
        raise PraError(
            f"{folder} is a run of another configuration ({'; '.join(changed)}); nothing was changed: "
            "repeat its own settings to go on, or choose another --run-dir"
        )


def check_data(folder: Path, config: RunConfig, source: Source) -> None:
    """Looks whether a run, if there is one in ``folder``, may go on with the images of ``source``.

    Raises:
        PraError: it has learnt from others.
    """
    if (folder / CONFIG).exists():
        check_contents(folder, read_run(folder), config, source)


def check_shared(folder: Path, world: World) -> None:
    """Looks whether every process sees the folder that the first one has locked: only that one writes most of it.

    Raises:
        PraError: this process sees another folder, or none.
    """
    expected = world.combine(holder_of(folder), lambda holders: holders[0])
    deadline = time.monotonic() + SEEN_WITHIN
    while holder_of(folder) != expected:
        if time.monotonic() > deadline:
            raise PraError(
                f"process {world.rank} on {platform.node()} does not see the folder {folder} of process 0, {expected}; "
                "choose a --run-dir on a disk that all machines share"
            )
        time.sleep(0.5)


def write_run(
    folder: Path,
    config: RunConfig,
    source: Source,
    processes: int = 1,
    initial: dict[str, Any] | None = None,
    losses: Mapping[str, float] | None = None,
) -> None:
    """Makes the folder of a run that is about to train, or brings ``config.json`` and ``environment.json`` up to date.

    Args:
        folder: the run's.
        config: the run's.
        source: the images that it learns from.
        processes: that train.
        initial: where its first weights come from (:func:`pra.training.initial.load_initial`); None leaves what is
            known.
        losses: weights of the user's terms of the loss, by name.

    Raises:
        PraError: the disk is full or refuses; or what is known of the first weights cannot be read.
    """
    if config.initial is not None and initial is None:
        initial = recorded(folder).get("initial")
    known = {"processes": processes, "data": contents(source)} | ({"initial": initial} if initial else {})
    known |= {"losses": dict(losses)} if losses else {}
    write_atomically(folder / CONFIG, _json_writer(to_dict(config)))
    write_atomically(folder / ENVIRONMENT, _json_writer(environment() | known))


def read_run(folder: Path) -> RunConfig:
    """The configuration of a run.

    Raises:
        PraError: no such folder, or no run in it.
    """
    if not (folder / CONFIG).exists():
        raise PraError(f"no run at {folder}: " + ("it holds no config.json" if folder.exists() else "no such folder"))
    values = read_json(folder / CONFIG)
    if "recipe" not in values:
        raise PraError(f"{folder} holds a model, not a run: its {CONFIG} names no recipe; give the folder of a run")
    return from_dict(RunConfig, _renamed(values), str(folder / CONFIG))


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run by today's names: ``train.shortcut_only`` has become ``train.trainable``."""
    train = values.get("train")
    if not isinstance(train, dict) or "shortcut_only" not in train:
        return values
    kept = {name: value for name, value in train.items() if name != "shortcut_only"}
    return values | {"train": kept | {"trainable": "shortcut" if train["shortcut_only"] else "all"}}


def check_losses(folder: Path, terms: Mapping[str, float]) -> None:
    """Check that a run resumes with the user's terms of the loss that it began with.

    Args:
        folder: the run's.
        terms: weights by name.

    Raises:
        PraError: the run has other terms or weights.
    """
    known = recorded(folder).get("losses", {}) if (folder / CONFIG).exists() else terms
    if known != terms:
        raise PraError(
            f"{folder} has been trained with losses={known}, not {dict(terms)}; nothing was changed. Pass the same "
            "losses to pra.train, or choose another --run-dir"
        )


def keep_metrics(folder: Path, step: int) -> None:
    """Drop the lines of ``metrics.jsonl`` after ``step``; makes the file.

    Raises:
        PraError: the disk is full or refuses, or a line is damaged.
    """
    kept = [row for row in read_metrics(folder) if row["step"] <= step]
    write_atomically(folder / METRICS, _lines_writer(kept))


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of ``metrics.jsonl``; an unfinished last line is left out.

    Raises:
        PraError: a line that is damaged.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.endswith("\n"):
            rows.append(_row(line, f"{path}, line {number}"))
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
    """What the steps of a run took, over all its sittings: without pictures, checkpoints and whatever lay between.

    Args:
        rows: of :func:`read_metrics`.
        batch_size: images of a step.
        until: the last step that counts; all do by default.
    """
    seconds, before = 0.0, 0
    for row in rows:
        if until is None or row["step"] <= until:
            seconds += (row["step"] - before) * batch_size / row["images_per_second"]
            before = int(row["step"])
    return seconds


def _row(line: str, where: str) -> dict[str, float]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict) or "step" not in row:
        raise PraError(f"{where} is damaged; delete the line and repeat the command")
    return row


def _fixed(config: RunConfig) -> dict[str, Any]:
    values: dict[str, Any] = to_dict(config)
    for part, names in FREE.items():
        values[part] = {name: value for name, value in values[part].items() if name not in names}
    values["data"]["validation"] = config.data.held_out_share  # another held-out source changes no weight
    del values["sampling"]  # what is recommended for sampling changes no weight
    return values


def _json_writer(values: Any) -> Any:
    return lambda file: file.write((json.dumps(values, indent=2) + "\n").encode())


def _lines_writer(rows: list[dict[str, float]]) -> Any:
    return lambda file: file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

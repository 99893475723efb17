"""Trains and measures the runs of a study, several side by side; existing results are not made again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from pra.config import DataConfig, RunConfig, to_dict
from pra.data import load_images, open_source
from pra.data.images import ArraySource
from pra.models import weights
from pra.recipes.systems import parameters
from pra.training.checkpoint import step_of
from pra.training.loop import train
from pra.training.run import FREE, read_metrics, read_run, training_seconds
from pra.utils.device import cores
from pra.utils.progress import Progress
from pra.utils.provenance import commit, device_name
from pra.utils.signals import STOPS, Interrupted, handled
from studies.measures import Judge, Measure, Row
from studies.records import Records

LOOK_EVERY = 5.0
"""Seconds between two looks at the runs' metrics."""


@dataclass(frozen=True)
class Job:
    """One run of a study, and what is measured of it.

    ``labels`` are the columns that name it in the table; ``base`` is the run whose weights it starts from.
    """

    labels: Row
    config: RunConfig
    measures: tuple[Measure, ...]
    judge: Judge
    base: RunConfig | None = None

    @property
    def run(self) -> str:
        """The hash of the settings that decide the run's weights."""
        return run_key(self.config if self.base is None else replace(self.config, initial=run_key(self.base)))


def run_key(config: RunConfig) -> str:
    """A key that is equal for configurations that train the same weights, whatever their names and logging.

    Values at their defaults are left out, so that a new setting in a later version does not change the key.
    """
    values = _essence(config)
    values.pop("recipe", None)
    if config.train.trainable == ("shortcut",):  # by its older name, under which published tables know the run
        values["train"]["shortcut_only"] = bool(values["train"].pop("trainable"))
    for part, names in FREE.items():
        for name in names:
            if name != "steps":
                values.get(part, {}).pop(name, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _essence(config: Any) -> Any:
    """Convert as ``to_dict`` does, without the fields that have their default."""
    if not dataclasses.is_dataclass(config):
        return to_dict(config)
    values = {
        field.name: _essence(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }
    kind = to_dict(config).get("type")
    return ({"type": kind} if kind else {}) | values


@dataclass(frozen=True)
class Workplace:
    """The folder of the runs, and how they are worked on: ``jobs`` processes side by side, all on ``device``."""

    runs: Path
    device: torch.device
    jobs: int
    compile: bool = False

    @property
    def threads(self) -> int:
        """Threads of each process."""
        return max(1, cores() // self.jobs)

    def folder(self, job: Job) -> Path:
        """Return the folder of a job's run."""
        return self._folder(job, job.run)

    def trained(self, job: Job) -> bool:
        """Whether a job's run exists, with all its steps."""
        return _has_steps(self.folder(job), job.config.train.steps)

    def train(self, job: Job) -> Path:
        """Trains a job's run, and before it the run it starts from, unless they exist; returns its folder."""
        folder, config = self.folder(job), job.config
        if job.base is not None:
            start = self._folder(job, run_key(job.base))
            self._train(job.base, start)
            # If runs have been moved since, trust the run's own record.
            known = read_run(folder).initial if (folder / weights.CONFIG).exists() else None
            config = replace(config, initial=known or str(start))
        self._train(config, folder)
        return folder

    def _folder(self, job: Job, key: str) -> Path:
        return self.runs / f"{job.judge.setting.name}-{key}"

    def _train(self, config: RunConfig, folder: Path) -> None:
        if _has_steps(folder, config.train.steps):
            return  # several processes may measure it at a time, one alone may have it open to train
        torch.compiler.reset()  # compiled code of another run's model is useless, and counts against a limit
        config = replace(config, train=replace(config.train, compile=self.compile))
        train(config, folder, str(self.device), in_memory(config), progress=False)


def _has_steps(folder: Path, steps: int) -> bool:
    newest = weights.newest_checkpoint(folder)
    return newest is not None and step_of(newest) >= steps


def run_jobs(jobs: Sequence[Job], records: Records, place: Workplace, progress: bool = True) -> int:
    """Does the missing work and writes each measurement's rows as soon as they are complete.

    Returns:
        The number of runs with missing work.

    Raises:
        PraError: an unsuitable configuration, data set or disk. Finished work is kept.
        Interrupted: a signal came; every run is saved.
    """
    waiting, there = [], []
    for job in jobs:
        known = {measure: records.known(job.run, measure.key, job.judge.name) for measure in job.measures}
        there += [row | job.labels for rows in known.values() for row in rows]
        missing = tuple(measure for measure, rows in known.items() if not rows)
        if missing:
            waiting.append(replace(job, measures=missing))
    if there:
        records.replace(there)
    if not waiting:
        return 0
    runs = _by_measurement(waiting)
    with _Bar([groups[0] for groups in runs], place, progress) as bar:
        for rows in _done_here(runs, place) if place.jobs == 1 else _done_side_by_side(runs, place, bar):
            records.replace(rows)
            bar.update()
    return len(runs)


def _by_measurement(jobs: list[Job]) -> list[list[list[Job]]]:
    """Group jobs by their run, and within a run by their measurement."""
    runs: dict[str, dict[str, list[Job]]] = {}
    for job in jobs:
        for measure in job.measures:
            groups = runs.setdefault(job.run, {})
            groups.setdefault(measure.key, []).append(replace(job, measures=(measure,)))
    return [list(groups.values()) for groups in runs.values()]


def _done_here(runs: list[list[list[Job]]], place: Workplace) -> Iterator[list[Row]]:
    for groups in runs:
        for group in groups:
            yield _work(group, place)


def _done_side_by_side(runs: list[list[list[Job]]], place: Workplace, bar: _Bar) -> Iterator[list[Row]]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(place.jobs, context, initializer=torch.set_num_threads, initargs=(place.threads,))
    # A run's first group trains it, which two processes must not do at once. Its other groups come before further
    # runs, so that finished runs appear in the table.
    then = {groups[0][0].run: groups[1:] for groups in runs}
    ready: deque[list[Job]] = deque()
    for first in (groups[0] for groups in runs):
        base = first[0].base
        then.get(run_key(base) if base else "", ready).append(first)  # after the run that it begins with
    pending: set[Future[list[Row] | None]] = set()
    with ending(pool):
        while ready or pending:
            while ready and len(pending) < place.jobs:
                pending.add(pool.submit(_work_or_stop, ready.popleft(), place))
            done, pending = wait(pending, timeout=LOOK_EVERY, return_when=FIRST_COMPLETED)
            bar.update()
            for future in done:
                rows = future.result()
                if rows is None:
                    raise Interrupted(signal.SIGTERM, "stopped, every run saved where it was")
                ready.extendleft(reversed(then.pop(rows[0]["run"], [])))
                yield rows


@contextlib.contextmanager
def ending(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Save the runs in progress, however the study ends."""

    def receive(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum, "stopped, every run saved where it was")

    with handled(STOPS, receive):
        try:
            yield
        except BaseException:
            with handled(STOPS, signal.SIG_IGN):
                for process in list(pool._processes.values()):
                    process.terminate()  # SIGTERM: a training run finishes its step and saves
                pool.shutdown(wait=True, cancel_futures=True)
            raise
    pool.shutdown()


_stopping = False
"""Run in a worker process when the study ends: do not begin jobs that were already handed over."""


def _work_or_stop(group: list[Job], place: Workplace) -> list[Row] | None:
    """Run :func:`_work` in a worker process; return `None` if it was interrupted."""
    global _stopping
    if _stopping:
        return None
    try:
        return _work(group, place)
    except Interrupted:
        _stopping = True
        return None


def _work(group: list[Job], place: Workplace) -> list[Row]:
    """Trains one run, if it is not trained yet, and makes one measurement: rows for every job that asks for it."""
    first = group[0]
    folder = place.train(first)
    model, threads = weights.load(folder, device=place.device), torch.get_num_threads()
    (measure,) = first.measures
    common = {
        "parameters": parameters(model.config),
        "steps": first.config.train.steps,
        "train_seconds": training_seconds(read_metrics(folder), first.config.train.batch_size),
        "run": first.run,
        "commit": commit() or "unknown",
        "hardware": device_name(place.device) + (f", {threads} thread(s)" if place.device.type == "cpu" else ""),
        "measured": measure.key,
    }
    rows = measure.rows(model, first.config, first.judge)
    return [row | common | job.labels for job in group for row in rows]


@functools.lru_cache(maxsize=1)
def _prepared(data: DataConfig, size: tuple[int, int], channels: int) -> ArraySource:
    source = open_source(data.source)
    images, labels = load_images(source, range(len(source)), size, channels, data)
    pixels = images.permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy()
    return ArraySource(source.name, pixels, labels.numpy(), source.classes)


def in_memory(config: RunConfig) -> ArraySource:
    """A run's images as it will see them, prepared once: the sets are small, and decoding would slow every step.

    Raises:
        PraError: images that cannot be read or prepared.
    """
    assert not config.data.flip, "augmentation draws from the images as they are"
    return _prepared(config.data, config.model.image_size, config.model.channels)


class _Bar:
    """Progress in steps over all runs, read from their metrics, since runs are long and few."""

    def __init__(self, groups: list[list[Job]], place: Workplace, progress: bool) -> None:
        self.folders = {place.folder(group[0]): group[0].config.train.steps for group in groups}
        self.bar = Progress(
            total=sum(self.folders.values()), unit="step", desc=f"{len(groups)} runs", disable=not progress,
            smoothing=0.05,
        )  # fmt: skip
        # Steps of an earlier sitting are not progress of this one.
        self.bar.initial = self.bar.n = self.bar.last_print_n = self._steps()
        self.bar.refresh()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self) -> None:
        """Looks again."""
        self.bar.update(self._steps() - self.bar.n)

    def _steps(self) -> int:
        return sum(min(_step(folder), total) for folder, total in self.folders.items())


def _step(folder: Path) -> int:
    rows = read_metrics(folder)
    return int(rows[-1]["step"]) if rows else 0

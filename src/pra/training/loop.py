"""The training loop."""

from __future__ import annotations

import dataclasses
import itertools
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from pra.config import OnCorrupt, RunConfig, to_dict
from pra.data import Batch, Sample, Source, TrainingSet, batches, open_source
from pra.data.held_out import split
from pra.data.source import Captioned, Streamed, check_captions, example_captions, learned
from pra.errors import PraError
from pra.method import noise, perceptual
from pra.method.objectives import TERMS, LossInputs, LossTerm, Perceptual, check_terms
from pra.models import Model, build_model, weights
from pra.training import checkpoint
from pra.training.averages import build_averages
from pra.training.callbacks import GRID_ROWS, Bar, Callback, Callbacks, Length, Metrics, Pictures, Validation
from pra.training.initial import load_initial
from pra.training.optimizer import codec_learns, set_trainable
from pra.training.run import COMMON, check_data, claimed, write_json, write_run
from pra.training.step import Step
from pra.utils.device import enough_memory
from pra.utils.distributed import World, join
from pra.utils.files import read_json
from pra.utils.pixels import from_uint8
from pra.utils.signals import Caught, Interrupted, caught_signals, ended_by_sigterm

T = TypeVar("T")

EXAMPLES = 100
"""Images at the front of a stream whose captions are shown."""

FAILED = 256
"""A callback or the data failed: above every number of a signal, so that ranks compare both at once."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """The result of :func:`train`.

    ``model`` has the EMA weights. ``steps`` counts all steps of the run, ``new_steps`` those of this call, 0 if the run
    had enough. ``seconds`` and ``skipped`` (corrupt images that all processes skipped) count for this call.
    """

    run: Path
    model: Model
    steps: int
    new_steps: int
    seconds: float
    skipped: int


def train(
    config: RunConfig,
    run_dir: str | Path,
    device: str | torch.device | None = None,
    source: Source | None = None,
    progress: bool = True,
    world: World | None = None,
    losses: Mapping[str, LossTerm | tuple[float, Callable[[LossInputs], Tensor | None]]] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Trained:
    """Train a run until it has ``config.train.steps`` steps; resume it if ``run_dir`` holds it.

    Processes that ``torchrun`` started share every batch. The weights do not depend on the number of processes, up to
    rounding, and a run may resume with another number.

    Args:
        config: from a recipe, perhaps changed with :func:`dataclasses.replace`.
        run_dir: the run's folder (:mod:`pra.training.run`).
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; by default the best there is.
        source: an open source, in place of the one that ``config.data.source`` names.
        progress: show a progress bar.
        world: the processes that share the work, if they have joined already (:func:`pra.utils.distributed.join`).
        losses: further terms of the loss by name, each as ``(weight, function)``
            (:class:`pra.method.objectives.LossTerm`). A run resumes with the terms that it began with. With
            ``train.compile`` the model's blocks are compiled one by one, and the terms are not.
        callbacks: called by the loop (:class:`pra.training.callbacks.Callback`).

    Raises:
        PraError: the configuration, data, run folder or disk is unsuitable, or another process trains there.
        Interrupted: a signal came; the state is saved.
    """
    terms = check_terms(losses, {*TERMS, *COMMON})
    with nullcontext(world) if world else join() as together:
        folder, target = Path(run_dir).expanduser(), together.device(None if device is None else str(device))
        with claimed(folder, config, together, {name: term.weight for name, term in terms.items()}):
            return Trainer(config, folder, target, together, source, terms, callbacks, progress).run()


class Trainer:
    """The state of a run in memory, or this process's part of it. One per call of :func:`train`.

    Callbacks read these attributes: ``config`` (:class:`pra.config.RunConfig`), ``folder`` (the run's), ``step``
    (steps that are done), ``new_steps`` (those of this call), ``source`` (the training images, without
    held-out ones), ``model`` (with the raw weights), ``averages`` (:class:`pra.training.averages.EMA` by name, ``ema``
    first), ``device``, and ``world`` (:class:`pra.utils.distributed.World`).
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        device: torch.device,
        world: World,
        source: Source | None = None,
        terms: Mapping[str, LossTerm] | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
        length: Length | None = None,
    ) -> None:
        self.config, self.folder, self.device, self.world, self.terms = config, folder, device, world, terms or {}
        with world.first_alone():  # some sources are indexed once
            self.whole = source or open_source(config.data.source)
            warning = check_data(folder, config, self.whole)
            images = learned(self.whole, config.model.num_classes)
            self.source, held_out = split(images, config.data, config.train.seed)
        before: list[Callback] = [] if length is None else [length]
        before += [*([] if held_out is None else [Validation(held_out)]), Pictures()]
        after = [Metrics(), *([Bar()] if progress else [])]
        self.callbacks = Callbacks(before, callbacks, after if world.is_first else [])
        # Rank 0 picks the checkpoint: on a network file system other ranks may see a stale listing.
        last = world.run_on_first(lambda: weights.newest_checkpoint(folder, average=None))
        self.model = build_model(config.model, config.train.seed if last is None else None).to(device)
        self.model.sampling = config.sampling
        set_trainable(self.model, config.train)
        if len(self.source.classes) == config.model.num_classes:
            self.model.classes = self.source.classes
        if config.model.text is not None:
            self.model.captions = tuple(map(self.model.condition.kept, _examples(self.source, held_out)))
        self.perceptual: Perceptual | None = None
        self.initial: dict[str, Any] | None = None
        with world.first_alone():  # downloaded once: LPIPS's weights, and those on the Hub
            if config.train.objective.perceptual_weight and codec_learns(self.model):
                self.perceptual = perceptual.lpips_distance(config.model, device)
            if config.initial is not None and last is None:
                self.initial = load_initial(config.initial, self.model, config.initial_average)
        self.averages = build_averages(self.model, config.train)
        self.ema = self.averages[weights.EMA]
        self.step, self.skipped = 0, 0
        if last is not None:
            _check_same_classes(last, self.model, self.source)
            self.step = checkpoint.restore_weights(last, self.model, self.averages)
        if warning and world.is_first:
            warnings.warn(warning, stacklevel=2)
        self.saved_step = self.step  # nothing is lost at step 0
        self.arithmetic = Step(self.model, self.averages, config.train, device, world, terms, self.step)
        self.optimizer = self.arithmetic.optimizer
        if last is not None:
            checkpoint.restore_optimizer(last, self.model, self.optimizer, world)
        self.saver = checkpoint.Saver(folder, config.train.keep_checkpoints, world, device, config.train.keep_every)
        self.first_step = self.step
        self.pending: list[dict[str, Tensor]] = []
        self.unlogged = checkpoint.Unlogged() if last is None else checkpoint.restore_unlogged(last)
        self.interval = time.monotonic()
        self.signals = Caught()

    @property
    def new_steps(self) -> int:
        """Steps of this call."""
        return self.step - self.first_step

    def picture(self, kind: str) -> Path:
        """Return the file of the ``samples`` or the ``reconstructions`` of the current step."""
        return self.folder / kind / f"step-{self.step:08d}.png"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wrap a block whose time does not count as training throughput. All processes enter it together."""
        self._recent()  # the device finishes its steps before the clock stops
        begin = time.monotonic()
        yield
        self.interval += time.monotonic() - begin

    def plan(self, steps: int) -> None:
        """Change how many steps the run has, in its folder too. All processes call it together."""
        self.config = dataclasses.replace(self.config, train=dataclasses.replace(self.config.train, steps=steps))
        if self.world.is_first:
            write_json(self.folder / weights.CONFIG, to_dict(self.config))

    def until_signal(self, do: Callable[[], T]) -> T | None:
        """Return ``do()``, or None as soon as a signal stops the run. Use it for long work that may stay unfinished."""
        return self.signals.until_signal(do)

    def run(self) -> Trained:
        """Train, and draw the pictures that are missing."""
        begin, train = time.monotonic(), self.config.train
        with closing(self.callbacks), ended_by_sigterm():
            if self.step < train.steps:
                self._train()
            drawn = not train.sample_every or self.picture("samples").exists()
            if self.step == self.config.train.steps and self.world.combine(not drawn, lambda missing: missing[0]):
                self.callbacks.call("on_sample", self)
            self.callbacks.call("on_end", self)
            if self.world.highest(FAILED if self.callbacks.failure else 0, patient=True):
                self._raise_failure(self.callbacks.failure)
        skipped = self.world.combine(self.skipped, sum)
        return Trained(self.folder, self.ema.whole(), self.step, self.new_steps, time.monotonic() - begin, skipped)

    def _train(self) -> None:
        with caught_signals() as self.signals, self.saver.working(), closing(self._batches()) as stream:
            while self.step < self.config.train.steps:
                step_batches = self._awaited(stream)  # the first before anything is written: data may be unreadable
                if not self.new_steps:
                    self._begin()
                if not self._take_step(step_batches):
                    continue
                self.callbacks.call("on_step", self)
                train = self.config.train  # perhaps planned again
                last = self.step == train.steps
                if self.step % train.log_every == 0 or train.validates(self.step) or last:
                    self._log()
                if self.step % train.checkpoint_every == 0 or last:
                    self._save()
                if train.sample_every and self.step % train.sample_every == 0 and not last:
                    self.callbacks.call("on_sample", self)
            self.saver.wait()
        self.signals = Caught()

    def _awaited(self, stream: Iterator[list[Batch]]) -> list[Batch]:
        """Return the batches of the next step, or save and end the run: after a signal, or a failure of any rank.

        All ranks stop here, after the same step: if one cannot read its data, the others do not hang in all-reduce.
        """
        failure, step_batches = self.callbacks.failure, None
        try:
            step_batches = self.until_signal(lambda: next(stream))
        except Exception as error:
            failure = failure or error
            if isinstance(error, PraError):
                self.world.fails_first()
        # Read once: a later signal stops after the next step. A stream may take long to reach its first image.
        code = FAILED if failure else max(self.signals.received, default=0)
        stop = self.world.highest(code, patient=self.step == self.first_step)
        if step_batches is not None and not stop:
            return step_batches
        if self.step > self.saved_step:
            self._save()
        self.saver.wait()
        if stop == FAILED:
            self._raise_failure(failure)
        where = f"stopped at step {self.step}, saved in {self.folder}" if self.step else "stopped before the first step"
        raise Interrupted(stop, where)

    def _begin(self) -> None:
        """Write configuration and environment before the first step of this call."""
        if self.world.is_first:
            losses = {name: term.weight for name, term in self.terms.items()}
            write_run(self.folder, self.config, self.whole, self.world.size, self.initial, losses)
        self.callbacks.call("on_start", self)
        self.interval = time.monotonic()

    def _save(self) -> None:
        unlogged = self._since_last_line()  # refuses values that are not finite
        self.saver.save(self.step, self.model, self.averages, self.optimizer, unlogged)
        self.saved_step = self.step
        self.callbacks.call("on_checkpoint", self)

    def _raise_failure(self, failure: Exception | None) -> NoReturn:
        if failure:
            raise failure
        raise PraError(f"another process failed at step {self.step}. See its traceback", code="lost")

    def _batches(self) -> Generator[list[Batch]]:
        """This process's micro-batches of each step that is left."""
        model, train = self.config.model, self.config.train
        micro, count = train.micro_batches(self.world.size)
        dataset = Share(
            self.source, model.image_size, model.channels, self.config.data, train.seed,
            self.model.condition.row, step=train.batch_size, start=self.world.rank * micro * count, size=micro * count,
        )  # fmt: skip
        begin = self.step * micro * count
        with closing(batches(dataset, begin, micro, pin_memory=self.device.type == "cuda")) as stream:
            while True:
                yield [next(stream) for _ in range(count)]

    def _take_step(self, step_batches: list[Batch]) -> bool:
        """Take a step, unless a signal comes before it changes anything. Return whether it was taken."""
        train = self.config.train
        if 0 < self.step == train.codec_warmup:
            self.arithmetic.all_learn()
        self.optimizer.set_rates(train.optimizer, self.step, train.steps)
        rollout = train.rollout if self.step >= train.codec_warmup else None
        fix = "set a smaller train.micro_batch_size or train.activation_checkpointing=true, and resume"
        with enough_memory(len(step_batches[0].images), self.device, fix), self.world.together():
            # All randomness comes from (seed, global sample index), so from (seed, step) and the place in it.
            moved = (
                (tensor.to(self.device, non_blocking=True) for tensor in (batch.images, batch.labels, batch.indices))
                for batch in step_batches
            )
            given = ((from_uint8(images), labels, noise.keys(train.seed, at)) for images, labels, at in moved)
            passes = partial(self.arithmetic.passes, given, len(step_batches), rollout, self.perceptual)
            # A step may take long, such as the first, which compiles. Several processes wait for each other in it.
            parts = self.until_signal(passes) if self.world.size == 1 else passes()
            if parts is None:
                self.optimizer.zero_grad()
                return False
            norm = self.arithmetic.update(self.step)
        self.skipped += sum(batch.skipped for batch in step_batches)
        self.step += 1
        means = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        self.pending.append({**means, "gradient_norm": norm})
        return True

    def _recent(self) -> dict[str, Tensor]:
        """Gather the metrics of the steps since the last log, averaged over all processes. Refuse nan and inf.

        The device is read once per interval, so that a GPU need not wait every step. Each metric is a vector on the
        CPU: its value at every step that has it. Terms come and go between steps.
        """
        if not self.pending:
            return {}
        names = dict.fromkeys(name for step in self.pending for name in step)  # alike in all processes
        columns = [torch.stack([step[name] for step in self.pending if name in step]) for name in names]
        values = self.world.mean(torch.cat(columns)).cpu()
        found = dict(zip(names, torch.split(values, [len(column) for column in columns]), strict=True))
        finite = found["total"].isfinite() & found["gradient_norm"].isfinite()
        if finite.all():
            return found
        self.saver.wait()
        batch = self.config.train.batch_size
        bad = self.step - len(finite) + int((~finite).nonzero()[0])
        problem = (
            f"the loss or its gradient is not finite at step {bad + 1} (global samples {bad * batch} to "
            f"{(bad + 1) * batch - 1}); {weights.last_good(self.folder)}. Start a run (another --run-dir) with a lower "
            "train.optimizer.lr, or in float32 (--set train.precision=float32)"
        )
        raise PraError(problem, code="diverged", step=bad + 1)

    def _since_last_line(self) -> checkpoint.Unlogged:
        """Add up the metrics since the last line of the log, step by step, so that a resume changes no digit."""
        sums = dict(self.unlogged.sums)
        for name, values in self._recent().items():
            for value in values.tolist():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = total + value, count + 1
        return checkpoint.Unlogged(sums, self.unlogged.skipped + self.world.combine(self.skipped, sum))

    def _log(self) -> None:
        known = self._since_last_line()
        train, now = self.config.train, time.monotonic()
        means = {name: total / count for name, (total, count) in known.sums.items()}
        row: dict[str, float] = {"step": self.step, **means}
        row["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        row["images_per_second"] = len(self.pending) * train.batch_size / (now - self.interval)
        row["epoch"] = self.step * train.batch_size / len(self.source)
        row["skipped"] = known.skipped
        self.unlogged = checkpoint.Unlogged(skipped=self.unlogged.skipped)  # of earlier calls
        self.pending.clear()
        self.interval = now
        self.callbacks.call("on_log", self, row)


class Share(TrainingSet):
    """One process's samples of every step, as a sequence of their own: ``size`` of ``step``, from ``start`` on."""

    def __init__(self, *arguments: Any, step: int, start: int, size: int) -> None:
        super().__init__(*arguments)
        self.step, self.start, self.share = step, start, size

    def __getitem__(self, place: int) -> Sample:
        """Sample ``place`` of the share; its ``index`` is the global one."""
        steps, here = divmod(place, self.share)
        return super().__getitem__(steps * self.step + self.start + here)


def _examples(source: Source, held_out: Source | None) -> tuple[str, ...]:
    """Return captions for pictures, from held-out images if there are any."""
    if held_out is not None:
        check_captions(held_out, OnCorrupt.SKIP)
    shown = held_out or source
    assert isinstance(shown, Captioned), "checked with the data"
    return example_captions(shown, EXAMPLES if isinstance(shown, Streamed) else len(shown), GRID_ROWS)


def _check_same_classes(last: Path, model: Model, source: Source) -> None:
    """A label must keep its meaning: class folders may have been renamed."""
    learnt = read_json(last / weights.CONFIG, classes=list)["classes"]
    if learnt != list(model.classes):
        pairs = itertools.zip_longest(learnt, model.classes)
        was, now = next((was, now) for was, now in pairs if was != now)
        problem = (
            f"the classes of {source.name} are not those that {last} learned ({now!r} where it had {was!r}). Restore "
            "them, or use another --run-dir"
        )
        raise PraError(problem, code="mismatch", path=last, value=now)

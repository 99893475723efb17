"""The training loop."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from pra.config import RunConfig
from pra.data import Batch, Sample, Source, TrainingSet, batches, open_source
from pra.data.held_out import split
from pra.data.loader import reading
from pra.errors import PraError
from pra.method import noise
from pra.method.objectives import TERMS, Losses, LossInputs, LossTerm, Perceptual, check_terms, losses_of
from pra.models import Model, build_model, weights
from pra.training import checkpoint
from pra.training.averages import build_averages
from pra.training.callbacks import Bar, Callback, Callbacks, Curves, Metrics, Pictures, StateWarning, TensorBoard
from pra.training.initial import load_initial
from pra.training.optimizer import build_optimizer, whole
from pra.training.parallel import SharedLoss
from pra.training.run import COMMON, check_data, check_losses, check_run, check_shared, write_run
from pra.training.trainable import codec_learns, set_trainable
from pra.training.validation import Validation
from pra.utils.device import autocast, enough_memory
from pra.utils.distributed import World, join
from pra.utils.locks import locked
from pra.utils.pixels import from_uint8
from pra.utils.signals import Interrupted, caught_signals

LESS_MEMORY = "set a smaller train.micro_batch_size or train.activation_checkpointing=true, and the run can go on"
FAILED = 256
"""A callback failed. Above every signal's number, which the processes compare it with."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What :func:`train` returns."""

    run: Path
    model: Model
    """The EMA weights."""
    steps: int
    """Steps that the run has in all."""
    new_steps: int
    """Steps of this call; 0 where the run had as many as asked for, or more."""
    seconds: float
    """Of this call, not of the whole run."""
    skipped: int
    """Corrupt images passed over in this call, by all processes."""


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
    """Trains, or goes on with, the run in ``run_dir`` until ``config.train.steps`` steps are done in all.

    Processes that ``torchrun`` started share every batch. What is learnt does not depend on their number, up to
    rounding, and a run may go on with another number of them.

    Args:
        config: from a recipe, perhaps changed with :func:`dataclasses.replace`.
        run_dir: the run's folder (:mod:`pra.training.run`).
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; the best there is by default.
        source: an open source, in place of the one that ``config.data.source`` names.
        progress: show a progress bar.
        world: the processes that share the work, where they have met already (:func:`pra.utils.distributed.join`).
        losses: further terms of the loss by name, each as ``(weight, function)``
            (:class:`pra.method.objectives.LossTerm`). A run resumes with the terms that it began with. With
            ``train.compile`` the model's blocks are compiled one by one, and the terms are not.
        callbacks: called by the loop (:class:`pra.training.callbacks.Callback`).

    Raises:
        PraError: a configuration, data, run folder or disk that will not do, or another process trains there.
        Interrupted: a signal came; the state is saved.
    """
    terms = check_terms(losses, {*TERMS, *COMMON})
    with nullcontext(world) if world else join() as together:
        folder, target = Path(run_dir).expanduser(), together.device(None if device is None else str(device))
        config.train.micro_batches(together.size)  # a batch that does not divide is named first
        check_run(folder, config)  # before the lock, which would be a file in a stranger's folder
        with locked(folder, "trained", "choose another --run-dir") if together.is_first else nullcontext():
            check_shared(folder, together)
            return Trainer(config, folder, target, source, progress, together, terms, callbacks).run()


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
        source: Source | None,
        progress: bool,
        world: World,
        terms: Mapping[str, LossTerm],
        callbacks: Sequence[Callback],
    ) -> None:
        self.config, self.folder, self.device, self.world = config, folder, device, world
        self.whole = source or open_source(config.data.source)
        _check_classes(self.whole, config.model.num_classes)
        check_run(folder, config)  # once more: another process may just have ended here
        check_data(folder, config, self.whole)
        self.terms = terms
        check_losses(folder, self._term_weights())
        with world.first_alone() if isinstance(config.data.validation, str) else nullcontext():  # indexed once
            self.source, held_out = split(self.whole, config.data, config.train.seed)
        before = [*([] if held_out is None else [Validation(held_out)]), Pictures()]
        after = [Metrics(), TensorBoard(), Curves(), StateWarning(), *([Bar()] if progress and world.is_first else [])]
        self.callbacks = Callbacks(before, callbacks, after)
        # What the first process finds: a network file system may show the others an older list.
        last = world.combine(weights.newest_checkpoint(folder) if world.is_first else None, lambda found: found[0])
        self.model = build_model(config.model, config.train.seed if last is None else None).to(device)
        self.model.sampling = config.sampling
        set_trainable(self.model, config.train)
        with world.first_alone():  # LPIPS's weights are downloaded once
            self.perceptual = self._perceptual()
        if len(self.source.classes) == config.model.num_classes:
            self.model.classes = self.source.classes
        self.initial: dict[str, Any] | None = None
        if config.initial is not None and last is None:
            with world.first_alone():  # what is on the Hub is downloaded once
                self.initial = load_initial(config.initial, self.model, config.initial_average)
        self.averages = build_averages(self.model, config.train)
        self.ema = self.averages[weights.EMA]
        self.step, self.skipped = 0, 0
        if last is not None:
            _check_same_classes(last, self.model, self.source)
            self.step = checkpoint.restore_weights(last, self.model, self.averages)
        idle = self.step < config.train.codec_warmup
        averages = [average.model for average in self.averages.values()]
        losses = losses_of(self.model)
        if terms:
            losses = partial(losses, extra=terms)
        self.losses = SharedLoss(self.model, averages, losses, config.train, world, device, idle, opaque=bool(terms))
        self.optimizer = build_optimizer(self.model, config.train.optimizer)
        if last is not None:
            checkpoint.restore_optimizer(last, self.model, self.optimizer, world)
        self.saver = checkpoint.Saver(folder, config.train.keep_checkpoints, world, device, config.train.keep_every)
        self.first_step = self.step
        self.pending: list[dict[str, Tensor]] = []
        self.interval = time.monotonic()

    @property
    def new_steps(self) -> int:
        """Steps of this call."""
        return self.step - self.first_step

    def picture(self, kind: str) -> Path:
        """The file of the ``samples`` or the ``reconstructions`` of the current step."""
        return self.folder / kind / f"step-{self.step:08d}.png"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time does not count as training throughput. All processes enter it together.

        Raises:
            PraError: a loss or a gradient of the steps since the last log is not finite.
        """
        self._recent()  # the device finishes its steps before the clock stops
        begin = time.monotonic()
        yield
        self.interval += time.monotonic() - begin

    def run(self) -> Trained:
        """Trains, and draws what is not drawn yet."""
        begin, train = time.monotonic(), self.config.train
        with closing(self.callbacks):
            if self.step < train.steps:
                self._train()
            drawn = not train.sample_every or self.picture("samples").exists()
            if self.step == train.steps and self.world.combine(not drawn, lambda missing: missing[0]):
                self.callbacks.call("on_sample", self)
            self.callbacks.call("on_end", self)
            if self.world.highest(FAILED if self.callbacks.failure else 0, patient=True):
                self._raise_failure()
        skipped = self.world.combine(self.skipped, sum)
        return Trained(self.folder, self.ema.whole(), self.step, self.new_steps, time.monotonic() - begin, skipped)

    def _train(self) -> None:
        """The loop."""
        train = self.config.train
        with caught_signals() as received, self.saver.working(), reading(self._batches()) as stream:
            first = next(stream)  # data that cannot be read are named before anything is written
            if self.world.is_first:
                write_run(self.folder, self.config, self.whole, self.world.size, self.initial, self._term_weights())
            self.callbacks.call("on_start", self)
            self.interval = time.monotonic()
            for step_batches in itertools.chain([first], stream):
                self._take_step(step_batches)
                self.callbacks.call("on_step", self)
                last = self.step == train.steps
                # Looked at once: a signal a moment later stops after the next step. All stop after the same.
                stop = self.world.highest(FAILED if self.callbacks.failure else max(received, default=0))
                if self.step % train.log_every == 0 or train.validates(self.step) or last:
                    self._log()
                if self.step % train.checkpoint_every == 0 or last or stop:
                    self._save()
                if stop and not last:
                    self.saver.wait()
                    self._stop(stop)
                if train.sample_every and self.step % train.sample_every == 0 and not last:
                    self.callbacks.call("on_sample", self)
            self.saver.wait()

    def _stop(self, reason: int) -> NoReturn:
        """End the run before its last step; the state is saved. ``reason`` is a signal, or :data:`FAILED`."""
        if reason == FAILED:
            self._raise_failure()
        raise Interrupted(reason, f"stopped at step {self.step}, saved in {self.folder}")

    def _raise_failure(self) -> NoReturn:
        if self.callbacks.failure:
            raise self.callbacks.failure
        raise PraError(f"a callback failed in another process at step {self.step}; see its traceback")

    def _term_weights(self) -> dict[str, float]:
        """The weights of the user's terms of the loss."""
        return {name: term.weight for name, term in self.terms.items()}

    def _batches(self) -> Generator[list[Batch]]:
        """This process's micro-batches of each step that is left."""
        model, train = self.config.model, self.config.train
        micro, count = train.micro_batches(self.world.size)
        dataset = Share(
            self.source, model.image_size, model.channels, self.config.data, train.seed,
            step=train.batch_size, start=self.world.rank * micro * count, size=micro * count,
        )  # fmt: skip
        first = self.step
        span = first * micro * count, micro, train.steps * micro * count
        with closing(batches(dataset, *span, pin_memory=self.device.type == "cuda")) as stream:
            for step in range(first, train.steps):
                parts = [next(stream) for _ in range(count)]
                # One whose data cannot be read has ended the others here, before they wait for its part. A stream may
                # take long to come to its first image.
                self.world.barrier(patient=step == first)
                yield parts

    def _take_step(self, step_batches: list[Batch]) -> None:
        train = self.config.train
        if 0 < self.step == train.codec_warmup:
            self.losses.all_learn()
        self.optimizer.set_rates(train.optimizer, self.step, train.steps)
        parts = []
        with enough_memory(len(step_batches[0].images), self.device, LESS_MEMORY), self.world.together():
            for place, batch in enumerate(step_batches, start=1):
                with self.losses.accumulating(last=place == len(step_batches)):
                    losses = self._losses(batch)
                    torch.autograd.backward(losses.total / len(step_batches))
                parts.append(losses.measured())
                self.skipped += batch.skipped
            norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.optimizer.clip))
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for average in self.averages.values():
            average.update(self.model, self.step)
        self.step += 1
        means = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        self.pending.append({**means, "gradient_norm": norm})

    def _losses(self, batch: Batch) -> Losses:
        """All randomness comes from ``(seed, global sample index)``, so from ``(seed, step)`` and the place in it."""
        train = self.config.train
        pixels = from_uint8(batch.images.to(self.device, non_blocking=True))
        labels = batch.labels.to(self.device, non_blocking=True)
        keys = noise.keys(train.seed, batch.indices.to(self.device, non_blocking=True))
        with autocast(self.device, train.precision):
            return self.losses(
                pixels,
                labels,
                keys,
                train.objective,
                train.rollout if self.step >= train.codec_warmup else None,
                self.perceptual,
            )

    def _recent(self) -> dict[str, Tensor]:
        """Gather the metrics of the steps since the last log, averaged over all processes.

        The device is read once per interval, so that a GPU need not wait every step.

        Returns:
            One vector per metric, on the CPU: its value at every step that has it. Terms come and go between steps.

        Raises:
            PraError: a loss or a gradient is not finite.
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
        raise PraError(
            f"the loss or its gradient is not finite at step {bad + 1} (global samples {bad * batch} to "
            f"{(bad + 1) * batch - 1}); {weights.last_good(self.folder)}; start a run (another --run-dir) with a lower "
            "train.optimizer.lr, or in float32 (--set train.precision=float32)"
        )

    def _log(self) -> None:
        means = {name: values.mean().item() for name, values in self._recent().items()}
        train, now = self.config.train, time.monotonic()
        row: dict[str, float] = {"step": self.step, **means}
        row["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        row["images_per_second"] = len(self.pending) * train.batch_size / (now - self.interval)
        row["epoch"] = self.step * train.batch_size / len(self.source)
        row["skipped"] = self.world.combine(self.skipped, sum)
        self.callbacks.call("on_log", self, row)
        self.pending.clear()
        self.interval = now

    def _save(self) -> None:
        self._recent()
        self.saver.save(self.step, self.model, self.averages, self.optimizer)
        self.callbacks.call("on_checkpoint", self)

    def _perceptual(self) -> Perceptual | None:
        config = self.config
        # Without a codec that learns, nothing learns from it.
        learns = config.train.objective.perceptual_weight and codec_learns(self.model)
        if not learns or config.model.codec is None:
            return None
        from pra.method.perceptual import lpips_distance

        return lpips_distance(config.model, self.device)


class Share(TrainingSet):
    """One process's samples of every step, as a sequence of their own: ``size`` of ``step``, from ``start`` on."""

    def __init__(self, *arguments: Any, step: int, start: int, size: int) -> None:
        super().__init__(*arguments)
        self.step, self.start, self.share = step, start, size

    def __getitem__(self, place: int) -> Sample:
        """Sample ``place`` of the share; its ``index`` is the global one."""
        steps, here = divmod(place, self.share)
        return super().__getitem__(steps * self.step + self.start + here)


def _check_classes(source: Source, num_classes: int) -> None:
    highest = int(source.labels.max())
    if highest >= num_classes:
        raise PraError(
            f"{source.name} has label {highest} ({source.classes[highest]}), but the model's classes are 0 to "
            f"{num_classes - 1}; set model.num_classes to {len(source.classes)}"
        )


def _check_same_classes(last: Path, model: Model, source: Source) -> None:
    """A label must go on meaning what it meant: class folders may have been renamed since."""
    learnt = weights.read_json(last / weights.CONFIG).get("classes")
    if learnt != list(model.classes):
        pairs = zip(learnt or [], model.classes, strict=False)
        changed = next(((a, b) for a, b in pairs if a != b), (learnt, list(model.classes)))
        raise PraError(
            f"the classes of {source.name} are not those that {last} learnt ({changed[1]!r} where it had "
            f"{changed[0]!r}); restore them, or start another --run-dir"
        )

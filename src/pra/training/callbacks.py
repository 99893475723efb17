"""Callbacks of the training loop: the base class, and the package's own. The loop calls them in this order: held-out
losses, pictures, the user's callbacks, metrics and curves, the progress bar.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pra.data import Source, load_images
from pra.data.source import Streamed
from pra.errors import PraError, reason_of
from pra.method import noise
from pra.method.objectives import losses_of
from pra.models import Model
from pra.models.weights import last_good
from pra.sampling import Sampler
from pra.training.plots import CURVES, draw_curves
from pra.training.run import METRICS, VALIDATION, loss_terms, metrics_lines, points_of, read_metrics
from pra.utils.device import autocast
from pra.utils.files import remedy, write_atomically
from pra.utils.pixels import MODES, contact_sheet, from_uint8
from pra.utils.progress import Progress

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from pra.training.loop import Trainer

HEALTHY_STATE_STD = 0.3
"""Smallest healthy standard deviation of a state dimension. Good runs stay above 0.40; collapsed runs reach 0."""
TERMS_SHOWN = 3
"""Terms of the loss beside the progress bar."""
GRID_ROWS, GRID_SEEDS, GRID_RECONSTRUCTIONS = 10, 8, 16
NEARLY, LATE = 0.1, 1.2
"""Smallest change of a training's steps that is worth it, and the share of its minutes from which it is late."""
HELD_OUT = 1024
"""Most held-out images that are measured, taken evenly."""
HELD_OUT_SEED = 0
"""The seed of the noise, the same for all runs, so that their curves compare."""
PATIENCE, RISE = 3, 1.02
"""Overfitting: this many validations in a row, each above the lowest one before them by this factor."""


class Callback:
    """Hooks of a training run; none of them does anything by default.

    Every process calls every hook. Write files and print only where ``trainer.world.is_first``. A hook reads the
    trainer (:class:`pra.training.loop.Trainer` lists its attributes) and does not change it. The time of
    :meth:`on_step` counts as training, unless it is spent in a block of :meth:`pra.training.loop.Trainer.paused`.
    An exception in a user's hook ends the run: the loop saves the state, then raises the exception.
    A signal ends the run after the hook. Wrap work of minutes in ``trainer.until_signal(do)``, which a signal stops.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Called before the first step of this call, unless all steps are done; ``trainer.step`` of them are."""

    def on_step(self, trainer: Trainer) -> None:
        """Called after every step."""

    def on_log(self, trainer: Trainer, row: dict[str, float]) -> None:
        """Called every ``train.log_every`` steps, and after the last step.

        ``row`` is a line of ``metrics.jsonl``: means over the steps since the last line. Values that a callback adds
        are written and drawn with the rest.
        """

    def on_checkpoint(self, trainer: Trainer) -> None:
        """Called after a checkpoint was taken. Its files appear a moment later: a thread writes them."""

    def on_sample(self, trainer: Trainer) -> None:
        """Called every ``train.sample_every`` steps and at the end, with pictures drawn: ``trainer.picture(kind)``."""

    def on_end(self, trainer: Trainer) -> None:
        """Called when the run has all its steps, also if it had them before this call."""

    def close(self) -> None:
        """Called last, however the run ends."""


class Callbacks:
    """Callbacks in their order. The first exception of a user's hook is kept, and that callback is not called again."""

    def __init__(self, before: Sequence[Callback], users: Sequence[Callback], after: Sequence[Callback]) -> None:
        for callback in users:
            if not isinstance(callback, Callback):
                raise PraError(f"callback {callback!r} is not an instance of pra.Callback", value=repr(callback))
        self._all = [*before, *users, *after]
        self._users = users
        self._failed: Callback | None = None
        self.failure: Exception | None = None

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of all callbacks."""
        for callback in self._all:
            if callback is self._failed:
                continue
            try:
                getattr(callback, hook)(*arguments)
            except Exception as error:
                if not any(callback is own for own in self._users) or self.failure:
                    raise
                self._failed, self.failure = callback, error

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for callback in reversed(self._all):
                stack.callback(callback.close)


class Metrics(Callback):
    """Writes ``metrics.jsonl``, the same for TensorBoard if it is installed, and ``curves.png`` at the end.

    Lines after the step that a run resumes from are dropped: their work was lost. It warns where the states may be
    collapsing.
    """

    path: Path
    board: SummaryWriter | None = None

    def on_start(self, trainer: Trainer) -> None:
        self.path = trainer.folder / METRICS
        lines = metrics_lines(trainer.folder)  # damaged lines stay: their owner may need them
        kept = (line for line, row in lines if row is None or row["step"] <= trainer.step)
        write_atomically(self.path, lambda file: file.writelines(kept))
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(trainer.folder / "tensorboard"), purge_step=trainer.step + 1)

    def on_log(self, trainer: Trainer, row: dict[str, float]) -> None:
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            for name, value in row.items():
                if self.board is not None and name != "step":
                    self.board.add_scalar(name, value, int(row["step"]))
        except OSError as error:
            problem = f"{self.path} cannot be written ({error.strerror}); {last_good(trainer.folder)}; {remedy(error)}"
            raise PraError(problem, code="unwritable", path=self.path) from None
        collapsed = row["state_std"] < HEALTHY_STATE_STD and trainer.config.model.codec is not None
        if collapsed and trainer.step > trainer.config.train.optimizer.warmup_steps:
            # The same words every time, so that Python shows them once.
            warnings.warn(
                f"a state dimension varies little (state_std below {HEALTHY_STATE_STD} in metrics.jsonl): "
                "the states may be collapsing",
                stacklevel=2,
            )

    def on_end(self, trainer: Trainer) -> None:
        if trainer.new_steps or not (trainer.folder / CURVES).exists():
            draw_curves(trainer.folder)

    def close(self) -> None:
        if self.board:
            with contextlib.suppress(OSError):  # everything is in metrics.jsonl too
                self.board.close()


class Bar(Callback):
    """Shows the progress bar."""

    bar: Any = None

    def on_start(self, trainer: Trainer) -> None:
        self.bar = Progress(total=trainer.config.train.steps, initial=trainer.step, unit="step", desc="train")

    def on_step(self, trainer: Trainer) -> None:
        self.bar.total = trainer.config.train.steps  # may have been planned again
        self.bar.update()

    def on_log(self, trainer: Trainer, row: dict[str, float]) -> None:
        shown = [f"{name} {row[name]:.3g}" for name in loss_terms([row])[:TERMS_SHOWN]]
        self.bar.set_postfix_str(", ".join([*shown, f"{row['images_per_second']:.0f} images/s"]))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Length(Callback):
    """Keeps a new run to a number of minutes: the speed measured before it changes on a machine with other work.

    The steps are planned again after the last one whose learning rate does not depend on their number, so that the new
    configuration gives the same training from its start. Later, a warning says that it takes longer.

    Args:
        minutes: of the run.
        steps_at: returns the steps that fit, by the seconds of a step.
    """

    def __init__(self, minutes: float, steps_at: Callable[[float], int]) -> None:
        self.minutes, self.steps_at, self.told = minutes, steps_at, False
        self._begin, self._first = 0.0, 0.0

    def on_start(self, trainer: Trainer) -> None:
        self._begin = monotonic()

    def on_step(self, trainer: Trainer) -> None:
        planned = trainer.config.train.steps
        if trainer.new_steps == 1:
            self._first = monotonic()
        elif trainer.step == trainer.config.train.optimizer.warmup_steps + 1:
            seconds = self._seconds(trainer)
            steps = trainer.world.run_on_first(lambda: max(trainer.step, self.steps_at(seconds)))
            if abs(steps / planned - 1.0) > NEARLY:
                trainer.plan(steps)
                if trainer.world.is_first:
                    now = f"a step takes {seconds:.3g} s now, unlike before training"
                    Progress.write(f"{now}: {planned:,} steps become {steps:,}, for {self.minutes:g} minutes")

    def on_log(self, trainer: Trainer, row: dict[str, float]) -> None:
        train = trainer.config.train
        if self.told or not train.optimizer.warmup_steps + 1 < trainer.step < train.steps:
            return
        seconds = self._seconds(trainer)
        needed = (self._first - self._begin + seconds * (train.steps - 1)) / 60
        if needed > LATE * self.minutes:
            self.told = True
            fix = f"Wait for it, or start another run with --steps {self.steps_at(seconds)}"
            problem = f"this training will take about {needed:.2g} minutes, not {self.minutes:g}"
            warnings.warn(f"{problem}: the machine has less time for it than at its start. {fix}", stacklevel=2)

    def _seconds(self, trainer: Trainer) -> float:
        """Seconds of a step so far, without the first one, which may compile."""
        return (monotonic() - self._first) / (trainer.new_steps - 1)


class Validation(Callback):
    """Measures the loss of the average ``ema`` on held-out images, with the same noise every time.

    Rank 0 measures for all, which is right under FSDP as well. The values stand in the line of metrics of their step as
    ``validation_flow``, ``validation_pixel``, ...; class dropout and rollouts are those of training, so that they
    compare with the training loss.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.told = False
        self._loaded: tuple[Tensor, Tensor] | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Complete the last line, where a signal has ended the measurement."""
        folder, step = trainer.folder, trainer.step

        def is_left() -> bool:
            names = {name for row in read_metrics(folder) if row["step"] == step for name in row}
            return bool(names) and not any(name.startswith(VALIDATION) for name in names)

        if not trainer.config.train.validates(step) or not trainer.world.run_on_first(is_left):
            return
        values = self._values(trainer)
        if trainer.world.is_first:
            lines = [
                json.dumps(json.loads(line) | values).encode() + b"\n" if row and row["step"] == step else line
                for line, row in metrics_lines(folder)
            ]
            write_atomically(folder / METRICS, lambda file: file.writelines(lines))

    def on_log(self, trainer: Trainer, row: dict[str, float]) -> None:
        if not trainer.config.train.validates(trainer.step):
            return
        row |= self._values(trainer)
        if not self.told and trainer.world.is_first:
            rows = [*read_metrics(trainer.folder), row]
            self.told = overfits(rows)
            if self.told:
                step, lowest = _lowest(points_of(rows, VALIDATION + "flow"))
                warnings.warn(
                    f"training overfits: {VALIDATION}flow was lowest at step {step:.0f} ({lowest:.4g}) and has risen "
                    "since, while flow falls. Stop here, or train on more images",
                    stacklevel=2,
                )

    def _values(self, trainer: Trainer) -> dict[str, float]:
        """Measure; return nothing where a signal came, except after the last step, which no resume completes."""
        with trainer.paused():
            measure = partial(self._measured, trainer, trainer.ema.parts(here=trainer.world.is_first))
            last = trainer.step == trainer.config.train.steps
            return trainer.world.run_on_first(measure if last else lambda: trainer.until_signal(measure) or {})

    @torch.no_grad()
    def _measured(self, trainer: Trainer, parts: Any) -> dict[str, float]:
        """Means over the held-out images, by name."""
        model = trainer.ema.assembled(parts)
        train = trainer.config.train
        size, _ = train.micro_batches(trainer.world.size)  # fits the memory with gradients, so without them too
        if self._loaded is None:
            count, config = min(HELD_OUT, len(self.source)), trainer.config.model
            total = count if isinstance(self.source, Streamed) else len(self.source)  # a stream's first images
            chosen = [place * total // count for place in range(count)]
            how = config.image_size, config.channels, trainer.config.data, model.condition.row
            self._loaded = load_images(self.source, chosen, *how)
        pixels, labels = self._loaded
        sums: dict[str, Tensor] = {}
        for part in torch.split(torch.arange(len(labels)), size):
            with autocast(trainer.device, train.precision):
                losses = losses_of(model)(
                    model,
                    from_uint8(pixels[part].to(trainer.device)),
                    labels[part].to(trainer.device),
                    noise.keys(HELD_OUT_SEED, part.to(trainer.device)),
                    train.objective,
                    train.rollout if trainer.step > train.codec_warmup else None,
                    trainer.perceptual,
                    **({"extra": trainer.terms} if trainer.terms else {}),
                )
            for name, value in losses.terms.items():
                sums[name] = sums.get(name, torch.zeros((), device=trainer.device)) + value.float() * len(part)
        return {VALIDATION + name: value.item() / len(labels) for name, value in sums.items()}


def overfits(rows: Sequence[Mapping[str, float]]) -> bool:
    """Return whether lines of metrics show overfitting.

    Two conditions must hold. The last :data:`PATIENCE` values of ``validation_flow`` all lie above the lowest value
    before them by the factor :data:`RISE`. The mean of ``flow`` since the last but one validation is below its mean in
    the interval that ended with that lowest value: if states become harder to predict, both curves rise.
    """
    held = points_of(rows, VALIDATION + "flow")
    if len(held) <= PATIENCE:
        return False
    step, lowest = _lowest(held[:-PATIENCE])
    if any(value <= RISE * lowest for _, value in held[-PATIENCE:]):
        return False
    steps = [0.0, *(at for at, _ in held)]

    def flow(after: float, until: float) -> float:
        values = [value for at, value in points_of(rows, "flow") if after < at <= until]
        return statistics.fmean(values) if values else math.nan  # damaged lines do not count as overfitting

    return flow(steps[-2], steps[-1]) < flow(steps[steps.index(step) - 1], step)


def _lowest(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return min(points, key=lambda point: point[1])


class Pictures(Callback):
    """Draws samples and reconstructions from the average ``ema``. Rank 0 draws for all.

    Every error of drawing becomes a warning, such as a lack of memory or a failing CUDA graph.
    """

    def on_sample(self, trainer: Trainer) -> None:
        config = trainer.config.model
        with trainer.paused():
            parts = trainer.ema.parts(here=trainer.world.is_first)  # every process takes part in the gathering
            if config.channels in MODES and trainer.world.is_first:
                kinds = {"samples": _samples, "reconstructions": _reconstructions}
                for kind, draw in kinds.items() if config.codec is not None else [("samples", _samples)]:

                    def make(kind: str = kind, draw: Any = draw) -> None:
                        sheet = contact_sheet(*draw(trainer, trainer.ema.assembled(parts)))
                        write_atomically(trainer.picture(kind), sheet.save, format="PNG")

                    try:
                        trainer.until_signal(make)
                    except Exception as error:
                        reason = reason_of(error)
                        warnings.warn(f"no {kind} are drawn at step {trainer.step}: {reason}", stacklevel=2)
            trainer.world.barrier(patient=True)  # the others wait for rank 0


def _samples(trainer: Trainer, model: Model) -> tuple[Tensor, int]:
    """Rows of seeds of up to ten classes, or of the model's captions, and the length of a row."""
    count, captions = trainer.config.model.num_classes, model.captions
    shown = len(captions) or min(GRID_ROWS, count)
    sampler = Sampler(model, trainer.config.sampling, trainer.config.train.precision)
    seeds = list(range(GRID_SEEDS)) * shown
    if captions:
        return sampler.sample(
            captions=[caption for caption in captions for _ in range(GRID_SEEDS)], seeds=seeds
        ), GRID_SEEDS
    labels = [c * count // shown for c in range(shown) for _ in range(GRID_SEEDS)]
    return sampler.sample(labels, seeds), GRID_SEEDS


def _reconstructions(trainer: Trainer, model: Model) -> tuple[Tensor, int]:
    """Real images above, the codec's below; and the length of a row."""
    source, config = trainer.source, trainer.config.model
    count = min(GRID_RECONSTRUCTIONS, len(source))
    apart = 1 if isinstance(source, Streamed) else len(source) // count  # a stream's first: the others lie far behind
    chosen = [place * apart for place in range(count)]
    how = config.image_size, config.channels, trainer.config.data, model.condition.row
    pixels, labels = load_images(source, chosen, *how)
    real = from_uint8(pixels).to(trainer.device)
    return torch.cat([real, model.reconstruct(real, labels.to(trainer.device))]), count

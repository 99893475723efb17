"""The training loop."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import signal
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pra import images, noise, weights
from pra.config import RunConfig
from pra.data import Batch, Source, TrainingSet, batches, load_images, open_source
from pra.device import autocast, pick_device
from pra.errors import PraError
from pra.generate import Sampler
from pra.models import PRA, Model, build_model
from pra.objectives import Losses, Perceptual, training_losses
from pra.train import checkpoint
from pra.train.optimizer import EMA, build_optimizer, learning_rate
from pra.train.plots import CURVES, draw_curves
from pra.train.run import Metrics, check_run, locked, write_run

HEALTHY_STATE_STD = 0.5
GRID_CLASSES, GRID_SEEDS, GRID_RECONSTRUCTIONS = 10, 8, 16


class Interrupted(Exception):  # noqa: N818  (not an error)
    """SIGTERM or Ctrl-C, after the step was finished and saved. ``what`` says what there is to go on from."""

    def __init__(self, signum: int, what: str) -> None:
        super().__init__(f"{what}; the same command goes on from there")
        self.signum = signum


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
    """Corrupt images passed over in this call."""


def train(
    config: RunConfig,
    run_dir: str | Path,
    device: str | None = None,
    source: Source | None = None,
    progress: bool = True,
) -> Trained:
    """Trains, or goes on with, the run in ``run_dir`` until ``config.train.steps`` steps are done in all.

    Args:
        config: from a recipe, perhaps changed with :func:`dataclasses.replace`.
        run_dir: the run's folder (:mod:`pra.train.run`).
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; the best there is by default.
        source: an open source, in place of the one that ``config.data.source`` names.
        progress: show a progress bar.

    Raises:
        PraError: a configuration, data, run folder or disk that will not do, or another process trains there.
        Interrupted: a signal came; the state is saved.
    """
    folder, target = Path(run_dir).expanduser(), pick_device(device)
    check_run(folder, config)  # before the lock, which would be a file in a stranger's folder
    with locked(folder):
        return Trainer(config, folder, target, source, progress).run()


class Trainer:
    """The state of a run in memory. One per call of :func:`train`."""

    def __init__(
        self, config: RunConfig, folder: Path, device: torch.device, source: Source | None, progress: bool
    ) -> None:
        self.config, self.folder, self.device, self.progress = config, folder, device, progress
        self.source = source or open_source(config.data.source)
        _check_classes(self.source, config.model.num_classes)
        check_run(folder, config)  # once more: another process may just have ended here
        self.perceptual = self._perceptual()
        self.model = build_model(config.model, config.train.seed).to(device)
        self.model.sampling = config.sampling
        if len(self.source.classes) == config.model.num_classes:
            self.model.classes = self.source.classes
        self.ema = EMA(self.model, config.train.optimizer.ema_decay)
        self.optimizer = build_optimizer(self.model, config.train.optimizer)
        self.losses = _compiled(training_losses) if config.train.compile else training_losses
        self.step, self.skipped = 0, 0
        last = weights.newest_checkpoint(folder)
        if last is not None:
            _check_same_classes(last, self.model, self.source)
            self.step = checkpoint.restore(last, self.model, self.ema, self.optimizer)
        self.pending: list[tuple[Losses, Tensor]] = []
        self.interval = time.monotonic()

    def run(self) -> Trained:
        """Trains, and draws what is not drawn yet."""
        begin, start, train = time.monotonic(), self.step, self.config.train
        if start < train.steps:
            self._train()
        if self.step == train.steps and train.sample_every and not self._picture("samples").exists():
            self._draw()
        if self.step > start or not (self.folder / CURVES).exists():
            draw_curves(self.folder)
        return Trained(
            self.folder, self.ema.model, self.step, self.step - start, time.monotonic() - begin, self.skipped
        )

    def _train(self) -> None:
        """The loop."""
        train = self.config.train
        # Closed by name: left to the garbage collector, the workers outlive an exception that somebody keeps, and then
        # the process cannot end, as they ignore its SIGTERM.
        with _signals() as received, closing(self._batches()) as stream:
            first = next(stream)  # data that cannot be read are named before anything is written
            write_run(self.folder, self.config)
            bar = tqdm(
                total=train.steps,
                initial=self.step,
                unit="step",
                disable=not self.progress,
                dynamic_ncols=True,
                desc="train",
            )
            with closing(Metrics(self.folder, self.step)) as metrics, bar:
                self.interval = time.monotonic()
                for step_batches in itertools.chain([first], stream):
                    self._take_step(step_batches)
                    bar.update()
                    last = self.step == train.steps
                    stop = received[:]  # looked at once: a signal a moment later stops after the next step
                    if self.step % train.log_every == 0 or last:
                        self._log(bar, metrics)
                    if self.step % train.checkpoint_every == 0 or last or stop:
                        self._save()
                    if stop and not last:
                        raise Interrupted(stop[0], f"stopped at step {self.step}, saved in {self.folder}")
                    if train.sample_every and self.step % train.sample_every == 0 and not last:
                        self._draw()

    def _batches(self) -> Generator[list[Batch]]:
        """The micro-batches of each step that is left."""
        model, train = self.config.model, self.config.train
        dataset = TrainingSet(self.source, model.image_size, model.channels, self.config.data, train.seed)
        micro = train.micro_batch_size or train.batch_size
        start, stop = self.step * train.batch_size, train.steps * train.batch_size
        stream = batches(dataset, start, micro, stop)
        for _ in range(self.step, train.steps):
            yield [next(stream) for _ in range(train.batch_size // micro)]

    def _take_step(self, step_batches: list[Batch]) -> None:
        train = self.config.train
        rate = learning_rate(train.optimizer, self.step, train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = []
        for batch in step_batches:
            losses = self._losses(batch)
            torch.autograd.backward(losses.total / len(step_batches))
            parts.append(Losses(*(value.detach() for value in losses)))
            self.skipped += batch.skipped
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.optimizer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model, self.step)
        self.step += 1
        self.pending.append((Losses(*(torch.stack(values).mean() for values in zip(*parts, strict=True))), norm))

    def _losses(self, batch: Batch) -> Losses:
        """All randomness comes from ``(seed, global sample index)``, so from ``(seed, step)`` and the place in it."""
        train = self.config.train
        pixels = images.from_uint8(batch.images.to(self.device, non_blocking=True))
        labels = batch.labels.to(self.device, non_blocking=True)
        keys = noise.keys(train.seed, batch.indices.to(self.device, non_blocking=True))
        with autocast(self.device, train.precision):
            return self.losses(
                self.model,
                pixels,
                labels,
                keys,
                train.objective,
                train.rollout if self.step >= train.codec_warmup else None,
                self.perceptual,
            )

    def _check_finite(self) -> None:
        """Looks at the steps since the last log: once per interval, so that a GPU need not wait every step."""
        if not self.pending:
            return
        first = self.step - len(self.pending)
        values = torch.stack([torch.stack([losses.total, norm]) for losses, norm in self.pending]).isfinite().all(1)
        if values.all():
            return
        batch = self.config.train.batch_size
        bad = first + int((~values).nonzero()[0])
        raise PraError(
            f"the loss or its gradient is not finite at step {bad + 1} (global samples {bad * batch} to "
            f"{(bad + 1) * batch - 1}); {weights.last_good(self.folder)}; start a run (another --run-dir) with a lower "
            "train.optimizer.lr, or in float32 (--set train.precision=float32)"
        )

    def _log(self, bar: tqdm[Any], metrics: Metrics) -> None:
        self._check_finite()
        train, now = self.config.train, time.monotonic()
        means = [
            torch.stack(values).mean().item() for values in zip(*(losses for losses, _ in self.pending), strict=True)
        ]
        row: dict[str, float] = {"step": self.step, **dict(zip(Losses._fields, means, strict=True))}
        row["gradient_norm"] = torch.stack([norm for _, norm in self.pending]).mean().item()
        row["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        row["images_per_second"] = len(self.pending) * train.batch_size / (now - self.interval)
        row["epoch"] = self.step * train.batch_size / len(self.source)
        row["skipped"] = self.skipped
        metrics.write(row)
        bar.set_postfix_str(
            f"flow {row['flow']:.3f}, rec {row['reconstruction']:.4f}, {row['images_per_second']:.0f} images/s"
        )
        collapsed = row["state_std"] < HEALTHY_STATE_STD and self.config.model.codec is not None
        if collapsed and self.step > train.optimizer.warmup_steps:
            # The same words every time, so that Python shows them once.
            warnings.warn(
                f"a state dimension varies little (state_std below {HEALTHY_STATE_STD} in metrics.jsonl): "
                "the states may be collapsing",
                stacklevel=2,
            )
        self.pending.clear()
        self.interval = now

    def _save(self) -> None:
        self._check_finite()
        train = self.config.train
        checkpoint.save(self.folder, self.step, self.model, self.ema, self.optimizer, train.keep_checkpoints)

    def _draw(self) -> None:
        """Sample and reconstruction grids from the EMA. Time spent here does not count as training throughput."""
        self._check_finite()
        begin, config = time.monotonic(), self.config.model
        if config.channels in images.MODES:
            shown = min(GRID_CLASSES, config.num_classes)
            classes = [c * config.num_classes // shown for c in range(shown)]
            labels = [c for c in classes for _ in range(GRID_SEEDS)]
            sampler = Sampler(self.ema.model, self.config.sampling, self.config.train.precision)
            try:
                drawn = sampler.sample(labels, list(range(GRID_SEEDS)) * shown)
            except PraError as error:  # no reason to stop learning
                warnings.warn(f"no samples are drawn at step {self.step}: {error}", stacklevel=2)
            else:
                self._write_picture("samples", drawn, GRID_SEEDS)
            if config.codec is not None:
                pairs = self._reconstructions()
                self._write_picture("reconstructions", pairs, len(pairs) // 2)
        self.interval += time.monotonic() - begin

    def _reconstructions(self) -> Tensor:
        """Real images above, the codec's below."""
        count, config = min(GRID_RECONSTRUCTIONS, len(self.source)), self.config.model
        chosen = [i * len(self.source) // count for i in range(count)]
        pixels, labels = load_images(self.source, chosen, config.image_size, config.channels, self.config.data)
        real = images.from_uint8(pixels).to(self.device)
        assert isinstance(self.ema.model, PRA), "only a codec reconstructs"
        return torch.cat([real, self.ema.model.reconstruct(real, labels.to(self.device))])

    def _write_picture(self, kind: str, pictures: Tensor, columns: int) -> None:
        sheet = images.grid(pictures, columns)
        images.write_atomically(self._picture(kind), sheet.save, format="PNG")

    def _picture(self, kind: str) -> Path:
        return self.folder / kind / f"step-{self.step:08d}.png"

    def _perceptual(self) -> Perceptual | None:
        config = self.config
        # Without a codec nothing is reconstructed.
        if not config.train.objective.perceptual_weight or config.model.codec is None:
            return None
        from pra.perceptual import lpips_distance

        return lpips_distance(config.model, self.device)


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


def _compiled(losses: Callable[..., Losses]) -> Callable[..., Losses]:
    """The same function, compiled at its first call; the compiler's pages of complaint become one line."""
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    fast = torch.compile(losses, dynamic=False)

    @functools.wraps(losses)
    def call(*arguments: Any) -> Losses:
        try:
            return fast(*arguments)
        except TorchDynamoException as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise PraError(
                f"train.compile failed ({reason.strip()[:200]}); install a C++ compiler, or set train.compile=false"
            ) from error

    return call


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C as a list that fills: finish the step first. A second Ctrl-C stops at once."""
    received: list[int] = []

    def receive(signum: int, frame: FrameType | None) -> None:
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signum)

    try:
        previous = {s: signal.signal(s, receive) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread (a notebook's worker, say): signals are not ours to handle
        previous = {}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

"""Checkpoints: folders with all that resuming needs, written whole or not at all, while training continues.

``checkpoints/step-00000500/`` is a model folder (:mod:`pra.models.weights`) with the averages; ``optimizer/``, which
the processes write together with torch's distributed checkpoint in its safetensors format; and ``state.json``, written
last: the step, the metrics since the last line of ``metrics.jsonl``, and the size and the digest of every file. The
random state and the data order need no saving: both are functions of (seed, step). A checkpoint does not depend on the
number of processes or on how they share the model.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from pra.config.checks import NaturalInt, PositiveInt
from pra.errors import PraError, reason_of
from pra.models import Model, weights
from pra.training.averages import EMA
from pra.training.optimizer import Optimizers, gathered, own_part
from pra.utils.distributed import World
from pra.utils.files import check_fields, check_regular, new_folder, read_json, unreadable

OPTIMIZER = "optimizer"
ALONE = "torch.distributed is disabled, unavailable or uninitialized"
"""torch's warning that it saves or loads for a single process, as intended."""


class Saver:
    """Writes the checkpoints of a run, one at a time, while training continues. All processes call it together.

    The newest ``keep`` stay, and those of every ``keep_every`` steps; 0 keeps no others.
    """

    def __init__(self, run: Path, keep: int, world: World, device: torch.device, keep_every: int = 0) -> None:
        self.run, self.keep, self.world, self.keep_every = run, keep, world, keep_every
        self.gpu = torch.empty(0, device=device).device if device.type == "cuda" else None
        """The device with its index: in another thread, "cuda" may mean another GPU."""
        # A group of its own: its background traffic must not mix with the training's.
        self._group = torch.distributed.new_group(backend="gloo") if world.size > 1 else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Any] | None = None

    def save(
        self,
        step: int,
        model: Model,
        averages: Mapping[str, EMA],
        optimizer: Optimizers,
        unlogged: Unlogged | None = None,
    ) -> None:
        """Copy the state after ``step`` steps and begin to write it, when the checkpoint before is written."""
        self.wait()
        here = self.world.is_first
        files = {weights.MODEL: gathered(model, here)}
        files |= {weights.average_file(name): gathered(ema.model, here) for name, ema in averages.items()}
        final = self.run / "checkpoints" / f"step-{step:08d}"
        partial = final.with_name(f".{final.name}.partial")

        def finish() -> None:
            # Rank 0's files, in the background; the manifest last, when all processes have written theirs.
            with self._last_good_named(), folder:
                if error := written.exception():
                    raise _cause(error)
                weights.write_config(model, partial)
                for name, own in files.items():
                    weights.write_tensors(own, partial / name)
                found = sorted(file for file in partial.rglob("*") if file.is_file())
                names = {file.relative_to(partial).as_posix(): file for file in found}
                sizes = {name: file.stat().st_size for name, file in names.items()}
                digests = {name: weights.content_sha256(file) for name, file in names.items()}
                state = {"step": step, "unlogged": (unlogged or Unlogged()).finite(), "sizes": sizes}
                weights.write_state(partial, state, digests)
                shutil.rmtree(final, ignore_errors=True)  # a damaged one: the run would have resumed from a whole one
            # Damaged checkpoints of later steps do not count as kept.
            for old in [path for path in weights.checkpoints(self.run) if path.name <= final.name][: -self.keep]:
                number = old.name.removeprefix("step-")  # a damaged one cannot say its step
                if not (self.keep_every and number.isdecimal() and int(number) % self.keep_every == 0):
                    shutil.rmtree(old, ignore_errors=True)

        with ExitStack() as stack:
            if here:
                for left in final.parent.glob(".*.partial"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                with self._last_good_named():
                    stack.enter_context(new_folder(final))
            self.world.barrier()  # the others write into that folder
            moments = {name: optimizer.state(parameter) for name, parameter in model.named_parameters()}
            tensors = {f"{name}/{key}": value for name, own in moments.items() for key, value in sorted(own.items())}
            written = self._pending = self._write_optimizer(tensors, partial / OPTIMIZER)
            if here:
                folder = stack.pop_all()
                self._pending = self._thread.submit(finish)

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            PraError: the disk is full or refuses. Older checkpoints are as they were.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if self.world.is_first:
            with self.world.together():
                pending.result()
        else:  # torch tells all processes of a failure in one of them: rank 0 reports it
            pending.exception()
        self.world.barrier(patient=True)  # the disk may be slow

    @contextmanager
    def working(self) -> Iterator[None]:
        """Wrap the block that trains and saves: however it ends, the checkpoint in progress is finished.

        torch warns in the thread in which it saves, but the filter is set here: filters of warnings belong to all
        threads, and two that change and restore them in turn would mix them up for good.
        """
        with warnings.catch_warnings(), self._thread:
            warnings.filterwarnings("ignore", ALONE)
            try:
                yield
            finally:
                if self._pending is not None:
                    self._pending.exception()

    def _write_optimizer(self, tensors: dict[str, Tensor], folder: Path) -> Future[Any]:
        """Begin to write ``{parameter name}/{moment}``, whatever the grouping; the tensors are copied on return."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        gpu = self.gpu

        class Writer(HuggingFaceStorageWriter):
            # torch calls this first in its thread, and looks for "kwargs" by name. It would look for its stream on the
            # first GPU: on a machine of 8 GPUs seven processes would open a context there, some hundred MB each.
            def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
                if gpu is not None:
                    torch.cuda.set_device(gpu)
                super().set_up_storage_writer(is_coordinator, *args, **kwargs)

        writer = Writer(str(folder), save_distributed=True)
        started = async_save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        assert isinstance(started, Future), "the tensors are not copied yet"
        return started

    @contextmanager
    def _last_good_named(self) -> Iterator[None]:
        """Wrap a block whose errors name the checkpoint to return to."""
        try:
            yield
        except PraError as error:
            raise PraError(f"{error}; {weights.last_good(self.run)}", code=error.code, **error.fields) from None


@dataclasses.dataclass(frozen=True)
class Unlogged:
    """Metrics of the steps since the last line of ``metrics.jsonl``: by name, a sum and the number of steps in it.

    ``skipped`` counts the corrupt images since the run began.
    """

    sums: dict[str, tuple[float, int]] = dataclasses.field(default_factory=dict)
    skipped: int = 0

    def finite(self) -> dict[str, Any]:
        """Return JSON values. JSON lacks nan, which ``state_std`` of a single patch is."""
        sums = {name: part for name, part in self.sums.items() if math.isfinite(part[0])}
        return {"sums": sums, "skipped": self.skipped}


def step_of(folder: Path) -> int:
    """Return the steps done when a checkpoint was written."""
    return int(weights.read_state(folder)["step"])


def restore_unlogged(folder: Path) -> Unlogged:
    """Return the metrics that a checkpoint keeps for the next line; empty for older checkpoints."""
    path = folder / weights.STATE
    known = read_json(path, unlogged=dict | None).get("unlogged") or {"sums": {}, "skipped": 0}
    check_fields(known, path, sums=dict, skipped=NaturalInt)
    sums = check_fields(known["sums"], path, **dict.fromkeys(known["sums"], tuple[float, PositiveInt]))
    return Unlogged({name: (total, count) for name, (total, count) in sums.items()}, known["skipped"])


def restore_weights(folder: Path, model: Model, averages: Mapping[str, EMA]) -> int:
    """Load the weights and their averages, before they are sharded; return the step to resume from."""
    weights.load_tensors(model, folder / weights.MODEL)
    for name, ema in averages.items():
        weights.load_tensors(ema.model, folder / weights.average_file(name))
    return step_of(folder)


def restore_optimizer(folder: Path, model: Model, optimizer: Optimizers, world: World) -> None:
    """Load the optimizer's state; where the weights are sharded, each process its own part."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    folder = folder / OPTIMIZER
    reader, parameters = HuggingFaceStorageReader(str(folder)), dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    owners: dict[str, tuple[str, str]] = {}
    try:
        for file in folder.iterdir():
            check_regular(file)
        # A parameter without gradients so far has no state.
        for path, saved in reader.read_metadata().state_dict_metadata.items():
            name, key = path.split("/")
            owners[path] = weights.present_name(name), key
            parameter = parameters[owners[path][0]].detach()
            assert isinstance(saved, TensorStorageMetadata), "an optimizer's state is tensors"
            # With the parameter's shape and sharding, or a counter.
            same = saved.size == parameter.shape
            tensors[path] = torch.zeros_like(parameter) if same else torch.zeros(saved.size)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ALONE)
            load(tensors, storage_reader=reader, no_dist=world.size == 1)
    except (OSError, KeyError, SafetensorError, CheckpointException) as error:
        reason = reason_of(_cause(error))
        problem = f"{folder} cannot be read ({reason}). Use another checkpoint, or restore its files"
        raise PraError(problem, code="unreadable", path=folder) from None
    for path, (name, key) in owners.items():
        if not own_part(tensors[path]).isfinite().all():  # a file without a digest: training would blame the rate
            problem = f"is damaged: {path} is not finite. Use another checkpoint, or put back its files"
            raise unreadable(folder, problem)
        # AdamW(fused) keeps its step counter on the parameter's device.
        optimizer.state(parameters[name])[key] = tensors[path].to(parameters[name].device)


def _cause(error: BaseException) -> BaseException:
    """Return the error of one process from torch's report of all."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error

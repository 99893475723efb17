"""Checkpoints: folders that hold everything to go on, written whole or not at all.

``checkpoints/step-00000500/`` is a model folder (:mod:`pra.weights`) with the moving average and the optimiser
beside, and ``state.json``, written last: the step and the size of every file. The random state and the data order
need no saving: both are functions of (seed, step).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from pra import weights
from pra.errors import PraError
from pra.models.pra import PRA
from pra.train.optimizer import EMA

OPTIMIZER = "optimizer.safetensors"


def save(run: Path, step: int, model: PRA, ema: EMA, optimizer: torch.optim.Optimizer, keep: int) -> Path:
    """Writes the checkpoint after ``step`` steps, then removes all but the newest ``keep``.

    Raises:
        PraError: the disk is full or refuses. Older checkpoints are as they were.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        weights.write_config(model, partial)
        weights.write_tensors(model.state_dict(), partial / weights.MODEL)
        weights.write_tensors(ema.model.state_dict(), partial / weights.EMA)
        weights.write_tensors(_optimizer_tensors(model, optimizer), partial / OPTIMIZER)
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        (partial / weights.STATE).write_text(json.dumps({"step": step, "sizes": sizes}, indent=2) + "\n")
        for file in partial.iterdir():
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        last = weights.newest_checkpoint(run)
        kept = f"the last good one is {last}" if last else "there is no earlier one"
        reason = getattr(error, "strerror", None) or error
        raise PraError(
            f"checkpoint {final} could not be saved ({reason}); {kept}; free some space and repeat the command"
        ) from None
    for old in weights.checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def step_of(folder: Path) -> int:
    """Steps done when a checkpoint was written."""
    return int(weights.read_json(folder / weights.STATE)["step"])


def restore(folder: Path, model: PRA, ema: EMA, optimizer: torch.optim.Optimizer) -> int:
    """Loads a checkpoint into its parts; the step to go on from."""
    model.load_state_dict(weights.read_tensors(folder / weights.MODEL))
    ema.model.load_state_dict(weights.read_tensors(folder / weights.EMA))
    _load_optimizer(model, optimizer, weights.read_tensors(folder / OPTIMIZER))
    return step_of(folder)


def _optimizer_tensors(model: PRA, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``{parameter name}/{moment}``: the optimiser's state by name, whatever the grouping."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, moments in optimizer.state.items()
        for key, value in moments.items()
    }


def _load_optimizer(model: PRA, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for path, value in tensors.items():
        name, key = path.split("/")
        parameter = parameters[name]
        # AdamW(fused) keeps its step counter on the parameter's device.
        optimizer.state[parameter][key] = value.to(parameter.device)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems do not sync folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)

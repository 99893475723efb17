"""Checkpoints: folders that hold everything to go on, written whole or not at all.

``checkpoints/step-00000500/`` is a model folder (:mod:`pra.weights`) with the moving average and the optimiser
beside, and ``state.json``, written last: the step and the size of every file. The random state and the data order
need no saving: both are functions of (seed, step).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from pra import weights
from pra.errors import PraError
from pra.images import new_folder
from pra.models import Model
from pra.train.optimizer import EMA

OPTIMIZER = "optimizer.safetensors"


def save(run: Path, step: int, model: Model, ema: EMA, optimizer: torch.optim.Optimizer, keep: int) -> Path:
    """Writes the checkpoint after ``step`` steps, then removes the ones before it but for the newest ``keep``.

    Raises:
        PraError: the disk is full or refuses. Older checkpoints are as they were.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    for left in final.parent.glob(".*.partial"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        with new_folder(final) as partial:
            weights.write_config(model, partial)
            weights.write_tensors(model.state_dict(), partial / weights.MODEL)
            weights.write_tensors(ema.model.state_dict(), partial / weights.EMA)
            weights.write_tensors(_optimizer_tensors(model, optimizer), partial / OPTIMIZER)
            sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
            (partial / weights.STATE).write_text(json.dumps({"step": step, "sizes": sizes}, indent=2) + "\n")
            shutil.rmtree(final, ignore_errors=True)  # one that is damaged: else the run would have gone on from it
    except PraError as error:
        raise PraError(f"{error}; {weights.last_good(run)}") from None
    # Damaged ones of later steps do not count as kept.
    for old in [folder for folder in weights.checkpoints(run) if folder.name <= final.name][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def step_of(folder: Path) -> int:
    """Steps done when a checkpoint was written."""
    return int(weights.read_json(folder / weights.STATE)["step"])


def restore(folder: Path, model: Model, ema: EMA, optimizer: torch.optim.Optimizer) -> int:
    """Loads a checkpoint into its parts; the step to go on from."""
    weights.load_tensors(model, folder / weights.MODEL)
    weights.load_tensors(ema.model, folder / weights.EMA)
    _load_optimizer(model, optimizer, weights.read_tensors(folder / OPTIMIZER))
    return step_of(folder)


def _optimizer_tensors(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``{parameter name}/{moment}``: the optimiser's state by name, whatever the grouping."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for parameter, moments in optimizer.state.items()
        for key, value in moments.items()
    }


def _load_optimizer(model: Model, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for path, value in tensors.items():
        name, key = path.split("/")
        parameter = parameters[name]
        # AdamW(fused) keeps its step counter on the parameter's device.
        optimizer.state[parameter][key] = value.to(parameter.device)

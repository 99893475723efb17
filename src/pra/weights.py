"""Models on disk: ``config.json`` beside safetensors. Never a pickle.

A model folder holds ``config.json`` (format, model, sampling, classes) and ``model.safetensors``; a checkpoint of a
run is such a folder too, with ``ema.safetensors`` and the optimiser beside.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pra.config import ModelConfig, SamplingConfig, from_dict, to_dict
from pra.errors import PraError
from pra.models.pra import PRA

FORMAT = 1
CONFIG, MODEL, EMA = "config.json", "model.safetensors", "ema.safetensors"
STATE = "state.json"
"""The manifest of a checkpoint, written last."""


def save(model: PRA, folder: str | Path) -> Path:
    """Writes ``config.json`` and ``model.safetensors`` into a new folder, for :func:`load`.

    Raises:
        PraError: the folder exists, or the disk refuses.
    """
    folder = Path(folder)
    if folder.exists():
        raise PraError(f"{folder} exists already; choose another folder or remove it")
    try:
        folder.mkdir(parents=True)
        write_config(model, folder)
        write_tensors(model.state_dict(), folder / MODEL)
    except (OSError, SafetensorError) as error:
        raise PraError(f"{folder} cannot be written: {error}") from None
    return folder


def load(path: str | Path, ema: bool = True, device: str | torch.device = "cpu") -> PRA:
    """A model from a run's folder (its newest checkpoint), a checkpoint, or a folder made by :func:`save`.

    Args:
        path: the folder.
        ema: take the moving average of the weights where there is one, else the raw weights.
        device: where to put the model.

    Raises:
        PraError: nothing there, no checkpoint yet, or files that are damaged or of a newer format.
    """
    folder = model_folder(Path(path).expanduser())
    model = read_config(folder)
    name = EMA if ema and (folder / EMA).exists() else MODEL
    model.load_state_dict(read_tensors(folder / name))
    return model.to(device).eval()


def model_folder(path: Path) -> Path:
    """The folder of the weights: ``path`` itself, or the newest whole checkpoint of the run it is."""
    if not path.is_dir():
        raise PraError(f"no run or model at {path}: the folder does not exist")
    if (path / MODEL).exists():
        return path
    if not (path / CONFIG).exists():
        raise PraError(f"{path} is neither a run nor a model: it holds no {CONFIG}")
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        raise PraError(f"the run {path} has no checkpoint yet; let `pra train` reach its first one")
    return checkpoint


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first, whole or not."""
    return sorted((run / "checkpoints").glob("step-*"))


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint. Damaged newer ones are passed over with a warning."""
    for folder in reversed(checkpoints(run)):
        fault = _fault(folder)
        if fault is None:
            return folder
        warnings.warn(f"checkpoint {folder} is damaged ({fault}); using the one before it", stacklevel=2)
    return None


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if anything: a missing file or a wrong size."""
    try:
        sizes = read_json(folder / STATE)["sizes"]
    except (PraError, KeyError):
        return f"no readable {STATE}"
    for name, size in sizes.items():
        actual = (folder / name).stat().st_size if (folder / name).exists() else None
        if actual != size:
            return f"{name} is missing" if actual is None else f"{name} has {actual} bytes of {size}"
    return None


def write_config(model: PRA, folder: Path) -> None:
    """``config.json`` of a model folder."""
    values = {
        "format": FORMAT,
        "model": to_dict(model.config),
        "sampling": to_dict(model.sampling),
        "classes": list(model.classes),
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def read_config(folder: Path) -> PRA:
    """A model with fresh weights, as ``config.json`` describes it."""
    values = read_json(folder / CONFIG)
    if values.get("format") != FORMAT:
        raise PraError(
            f"{folder / CONFIG} is of format {values.get('format')!r}, this version of pra reads {FORMAT}; "
            "install a newer pra"
        )
    model = PRA(from_dict(ModelConfig, values.get("model"), "model"))
    model.sampling = from_dict(SamplingConfig, values.get("sampling"), "sampling")
    model.classes = tuple(values.get("classes", model.classes))
    return model


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        PraError: the file is not there or is no JSON object.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PraError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise PraError(f"{path} holds {type(values).__name__}, not the settings of a model")
    return values


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """One safetensors file."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU.

    Raises:
        PraError: missing, truncated or otherwise no safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise PraError(f"{path} cannot be read: {error}") from None

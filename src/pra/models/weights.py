"""Models on disk: ``config.json`` beside safetensors. Never a pickle.

A checkpoint of a run is a model folder too, with averages (``ema.safetensors``, ``power-0.05.safetensors``) beside.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor

from pra.config import SamplingConfig, from_dict, model_from_dict, to_dict
from pra.errors import PraError
from pra.models import Model, build_model
from pra.utils.files import check_free, explained, file_mode, new_folder
from pra.utils.hub import download, is_address

FORMAT, READABLE = 2, (1, 2)
"""The format that is written, and those that are read. Format 1 kept the embedding of the classes elsewhere."""
MOVED = {"backbone.class_embedding.": "condition.embedding.", "class_embedding.": "condition.embedding."}
"""Prefixes of tensor names in format 1, and the prefixes that replaced them."""
CONFIG, MODEL, SUFFIX = "config.json", "model.safetensors", ".safetensors"
RAW, EMA, POWER = "raw", "ema", "power-"
"""Names of a checkpoint's weights: raw (in ``MODEL``), the exponential average, prefix of power-function averages."""
STATE = "state.json"
"""The manifest of a checkpoint, written last."""
SHIPPED = Path(__file__).parents[1] / "shipped"
"""The model that comes with the package, a folder as :func:`save` makes it."""


def save(model: Model, folder: str | Path) -> Path:
    """Write ``config.json`` and ``model.safetensors`` into a new folder, for :func:`load`.

    Raises:
        PraError: the folder exists, or the disk refuses.
    """
    folder = Path(folder).expanduser()
    check_free(folder, "choose another folder")
    with new_folder(folder) as partial:
        write_model(model, partial)
    return folder


def write_model(model: Model, folder: Path, half: bool = False) -> None:
    """Write ``config.json`` and ``model.safetensors``, the weights as they are or rounded to float16.

    Refuses a weight beyond float16, and a model whose parts were replaced: it could not be loaded.
    """
    tensors = model.state_dict()
    with torch.device("meta"):
        expected = build_model(model.config, seed=None).state_dict()
    if changed := _differing(expected, tensors):
        problem = f"{changed} in its configuration. Keep its state_dict() instead"
        raise PraError(f"this model cannot be saved: {problem}", code="unsupported")
    if half:
        tensors = {name: _halved(tensor, name) for name, tensor in tensors.items()}
    write_config(model, folder)
    write_tensors(tensors, folder / MODEL)


def load(path: str | Path | None = None, average: str = EMA, device: str | torch.device = "cpu") -> Model:
    """Load a model, ready to sample from.

    Args:
        path: a run's folder (its newest checkpoint), a checkpoint, a folder made by :func:`save`, or
            ``hub:user/model``; without one the model that comes with the package.
        average: which weights of a checkpoint: ``ema``, ``raw``, or another of its :func:`averages` by name, such as
            ``power-0.05``. A saved model holds one kind of weights, which ``ema`` means too.
        device: where to put the model.

    Returns:
        A model of float32 weights, in whatever precision they were stored.

    Raises:
        PraError: nothing there, no checkpoint yet, no such average, or files that are damaged or of a newer format; of
            the Hub, as :func:`pra.utils.hub.download`.
    """
    folder = model_folder(path)
    described = read_config(folder)
    tensors = _tensors_of(described, folder / weights_name(folder, average))
    model = build_model(described.config, seed=None)
    model.sampling, model.classes = described.sampling, described.classes
    model.load_state_dict(tensors)
    return model.to(device).eval()


def weights_name(folder: Path, average: str = EMA) -> str:
    """Return the file of a model folder that :func:`load` reads. Refuse an average that the folder does not hold."""
    held = averages(folder)
    if average == RAW or (average == EMA and EMA not in held):
        return MODEL
    if average not in held:
        others = any(name.startswith(POWER) for name in held)
        more = "; `pra average` makes other lengths" if others and average.startswith(POWER) else ""
        problem = f"no average {average!r}. Use one of {', '.join(held)}{more}"
        raise PraError(f"{folder}: {problem}", code="unknown", path=folder, name=average)
    return average_file(average)


def averages(folder: Path) -> list[str]:
    """Return the names of the weights in a model folder: its averages in alphabetical order, then ``raw``."""
    names = sorted(path.stem for path in folder.glob(f"*{SUFFIX}"))
    return [name for name in names if name == EMA or name.startswith(POWER)] + [RAW]


def average_file(name: str) -> str:
    """Return the name of the file in which a checkpoint keeps an average."""
    return f"{name}{SUFFIX}"


def power_name(length: float) -> str:
    """Return the name of the power-function average of a relative length, such as ``power-0.05``."""
    return f"{POWER}{length:g}"


def model_folder(path: str | Path | None) -> Path:
    """Return the folder of the weights that ``path`` means to :func:`load`; download a model on the Hub."""
    if path is None:
        return shipped()
    if is_address(path):
        return download(path)
    path = Path(path).expanduser()
    if not path.is_dir():
        problem = "it is a file" if path.exists() else "the folder does not exist"
        raise PraError(f"no run or model at {path}: {problem}", code="missing", path=path)
    if (path / MODEL).exists():
        return path
    if not (path / CONFIG).exists():
        raise PraError(f"{path} is neither a run nor a model: it holds no {CONFIG}", code="missing", path=path)
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        problem = "has no checkpoint yet; let `pra train` reach its first one"
        raise PraError(f"the run {path} {problem}", code="missing", path=path)
    return checkpoint


def shipped() -> Path:
    """Return the folder of the model that comes with the package."""
    if not (SHIPPED / MODEL).exists():
        fix = "Name a RUN or a model on the Hub (hub:user/model), or train one: `pra train digits`"
        raise PraError(f"this build of pra ships no model. {fix}", code="missing")
    return SHIPPED


def run_of(folder: Path) -> Path | None:
    """Return the run that a model folder is a checkpoint of, if any."""
    run = folder.absolute().parent.parent
    return run if folder.absolute().parent.name == "checkpoints" and (run / CONFIG).exists() else None


def checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first, damaged ones included."""
    folder = run / "checkpoints"
    try:
        names = os.listdir(folder)  # glob would take a closed folder for an empty one
    except FileNotFoundError:
        return []
    except OSError as error:
        problem = f"cannot be read ({error.strerror}). Make it a folder that is open to you"
        raise unreadable(folder, problem) from None
    return sorted(folder / name for name in names if name.startswith("step-"))


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest undamaged checkpoint, if any. Warn about damaged ones, and refuse a run that has no others."""
    faults: list[str] = []
    found = checkpoints(run)
    for folder in reversed(found):
        if (fault := _fault(folder)) is None:
            for damaged in faults:
                warnings.warn(f"checkpoint {damaged}; the one before it, {folder.name}, is used", stacklevel=2)
            return folder
        faults.append(f"{folder} is damaged ({fault})")
    if faults and checkpoints(run) != found:  # the run goes on, and old ones are removed
        return newest_checkpoint(run)
    if faults:
        problem = f"{'; '.join(faults)}. Put back a whole copy, or train in another --run-dir"
        raise PraError(f"no checkpoint of {run} is whole: {problem}", code="unreadable", path=run)
    return None


def last_good(run: Path) -> str:
    """Say in a message which checkpoint there is to go back to."""
    try:
        whole = whole_checkpoints(run)
    except PraError:
        return "the earlier checkpoints cannot be read"
    return f"the last good checkpoint is {whole[-1]}" if whole else "there is no earlier checkpoint"


def whole_checkpoints(run: Path) -> list[Path]:
    """Return a run's undamaged checkpoints, oldest first."""
    return [folder for folder in checkpoints(run) if _fault(folder) is None]


def _fault(folder: Path) -> str | None:
    try:
        sizes = dict(read_json(folder / STATE)["sizes"])
    except (PraError, KeyError, TypeError, ValueError):
        return f"no readable {STATE}"
    for name, size in sizes.items():
        actual = (folder / name).stat().st_size if (folder / name).exists() else None
        if actual != size:
            return f"{name} is missing" if actual is None else f"{name} has {actual} bytes of {size}"
    return None


def write_config(model: Model, folder: Path) -> None:
    """Write ``config.json`` of a model folder."""
    values = {"format": FORMAT, "model": to_dict(model.config), "sampling": to_dict(model.sampling)}
    values["classes"] = list(model.classes)
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def read_config(folder: Path) -> Model:
    """Build the model of a ``config.json`` on the meta device. Refuse a file of another format.

    A stranger's file may ask for any size: the weights' own shapes are compared before memory is taken.
    """
    path = folder / CONFIG
    values = read_json(path)
    if "format" not in values:
        raise unreadable(path, "is not of a model: it names no format. Use a model's folder")
    if values["format"] not in READABLE:
        problem = f"is of format {values['format']!r}, this version of pra reads {FORMAT}; install a newer pra"
        raise unreadable(path, problem)
    config, classes = model_from_dict(values.get("model"), "model"), values.get("classes")
    if not isinstance(classes, list) or len(classes) != config.num_classes:
        raise unreadable(path, f"does not name the {config.num_classes} classes of its model")
    with explained(path, "describes a model that cannot be built", "use another model"), torch.device("meta"):
        model = build_model(config, seed=None)
    model.sampling = from_dict(SamplingConfig, values.get("sampling"), "sampling")
    model.classes = tuple(str(name) for name in classes)
    return model


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, and refuse other content."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise unreadable(path, f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        reason = "its bytes are not text" if isinstance(error, UnicodeDecodeError) else error
        raise unreadable(path, f"is no JSON: {reason}") from None
    if not isinstance(values, dict):
        raise unreadable(path, f"holds {type(values).__name__} in place of an object")
    return values


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file. A disk that is full or refuses is an ``OSError``."""
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
        os.chmod(path, file_mode())  # safetensors makes it readable to its owner only
    except SafetensorError as error:
        # safetensors gives the system's error number only inside its text; callers need it.
        code = re.search(r"\b(?:os error|code:) (\d+)", str(error))
        raise (OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error))) from None


def present_name(name: str) -> str:
    """Return a tensor's name in this format, from its name in any readable format."""
    return next((new + name[len(old) :] for old, new in MOVED.items() if name.startswith(old)), name)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file to the CPU, by its present name. Refuse a damaged file."""
    try:
        # safetensors opens no path beyond UTF-8.
        read = load_file(path) if str(path).isprintable() else load_bytes(path.read_bytes())
        return {present_name(name): tensor for name, tensor in read.items()}
    except (OSError, SafetensorError) as error:
        problem = f"cannot be read ({error}). Use another checkpoint, or restore the file"
        raise unreadable(path, problem) from None


def load_tensors(model: Model, path: Path) -> None:
    """Load a model's weights, of any precision, from a safetensors file. Refuse a file of another model."""
    model.load_state_dict(_tensors_of(model, path))


def _tensors_of(model: Model, path: Path) -> dict[str, Tensor]:
    """Read a model's tensors from a file. Refuse a file of another model."""
    tensors, own = read_tensors(path), model.state_dict()
    if wrong := _differing(own, tensors):
        problem = f"{wrong} in the model; restore the file that was saved beside it"
        raise PraError(f"{path} is not of the model in its {CONFIG}: {problem}", code="mismatch", path=path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != own[name].is_floating_point():
            problem = f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}; restore the file"
            raise PraError(f"{path} is not of a model of pra: {problem}", code="mismatch", path=path)
    return tensors


def unreadable(path: Path, problem: str) -> PraError:
    """Return the error of a file that is damaged or of another format."""
    return PraError(f"{path} {problem}", code="unreadable", path=path)


def _halved(tensor: Tensor, name: str) -> Tensor:
    rounded = tensor.half() if tensor.is_floating_point() else tensor
    if not rounded.isfinite().all():
        problem = "has weights that float16 cannot hold (beyond 65504, or not finite). Leave --half out"
        raise PraError(f"{name} {problem}", name=name)
    return rounded


def _differing(own: dict[str, Tensor], given: dict[str, Tensor]) -> str | None:
    """Name the first tensor whose shape is not the model's own: ``"head.out.weight is 3x4, and 3x5"``."""
    shapes = [{name: "x".join(map(str, t.shape)) for name, t in tensors.items()} for tensors in (own, given)]
    for name in {**own, **given}:
        expected, found = (known.get(name, "missing") for known in shapes)
        if found != expected:
            return f"{name} is {found}, and {expected}"
    return None

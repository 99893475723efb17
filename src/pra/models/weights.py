"""Models on disk: ``config.json`` beside safetensors. Never a pickle.

A checkpoint of a run is also a model folder. It adds averages (``ema.safetensors``, ``power-0.05.safetensors``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor

from pra.config import SamplingConfig, from_dict, model_from_dict, to_dict
from pra.config.checks import within
from pra.errors import PraError, reason_of
from pra.models import Model, build_model
from pra.models.text import cut
from pra.utils.files import (
    check_free,
    check_regular,
    explained,
    file_mode,
    new_folder,
    read_json,
    unreadable,
    write_atomically,
)
from pra.utils.hub import download, is_address
from pra.utils.provenance import file_sha256

FORMAT, READABLE = 2, (1, 2)
"""The format of new files, and the readable formats. Format 1 had other names for the embedding of the classes."""
MOVED = {"backbone.class_embedding.": "condition.embedding.", "class_embedding.": "condition.embedding."}
"""Prefixes of tensor names in format 1, and the prefixes that replaced them."""
CONFIG, MODEL, SUFFIX, JSON = "config.json", "model.safetensors", ".safetensors", ".json"
RAW, EMA, POWER = "raw", "ema", "power-"
"""Names of a checkpoint's weights: raw (in ``MODEL``), exponential average, prefix of power-function averages."""
STATE = "state.json"
"""The manifest of a checkpoint, written last."""
DIGESTS = "sha256"
"""JSON key of the digests (:func:`content_sha256`) by file: in ``STATE``, or in ``CONFIG`` of a saved model."""
MOST_CAPTIONS, MOST_BYTES = 100, 4096
"""Most examples of captions in a model's file, and most bytes of each: a damaged file may hold any number."""
Step = Annotated[int, within(1, 10**12)]
"""Number of training steps, bounded: a damaged file may hold any number."""
SHIPPED = Path(__file__).parents[1] / "shipped"
"""The model that comes with the package: a folder made by :func:`save`."""


def save(model: Model, folder: str | Path) -> Path:
    """Write ``config.json`` and ``model.safetensors`` into a new folder, for :func:`load`.

    Raises:
        PraError: the folder exists, or cannot be written.
    """
    folder = Path(folder).expanduser()
    check_free(folder, "choose another folder")
    with new_folder(folder) as partial:
        write_model(model, partial)
    return folder


def write_model(model: Model, folder: Path, half: bool = False) -> None:
    """Write ``config.json`` and ``model.safetensors``; ``half`` rounds the weights to float16.

    Raises:
        PraError: a weight does not fit into float16, or parts of the model were replaced, so it could not be loaded.
    """
    tensors = model.state_dict()
    with torch.device("meta"):
        expected = build_model(model.config, seed=None).state_dict()
    if changed := _differing(expected, tensors):
        problem = f"{changed} in its configuration. Keep its state_dict() instead"
        raise PraError(f"this model cannot be saved: {problem}", code="unsupported")
    if half:
        tensors = {name: _halved(tensor, name) for name, tensor in tensors.items()}
    write_tensors(tensors, folder / MODEL)
    write_config(model, folder, {MODEL: file_sha256(folder / MODEL)})


def load(path: str | Path | None = None, average: str = EMA, device: str | torch.device = "cpu") -> Model:
    """Load a model, ready to sample from.

    Args:
        path: a run's folder (its newest checkpoint), a checkpoint, a folder made by :func:`save`, or
            ``hub:user/model``; by default the model that comes with the package.
        average: the weights of a checkpoint: ``ema``, ``raw``, or another of its :func:`averages` such as
            ``power-0.05``. A saved model holds one kind of weights; ``ema`` loads them.
        device: of the model.

    Returns:
        A model with float32 weights; half-precision files are converted.

    Raises:
        PraError: the folder, its checkpoint or the average does not exist; files are damaged (their SHA-256 has changed
            since they were saved) or of a newer format; or :func:`pra.utils.hub.download` fails.
    """
    folder = model_folder(path, average)
    try:
        described = read_config(folder)
        tensors = _tensors_of(described, folder / weights_name(folder, average))
    except PraError:
        if run_of(folder) is None or folder == Path(str(path)).expanduser() or not _fault(folder, ()):
            raise
        return load(path, average, device)  # training continues and has just removed this checkpoint
    model = build_model(described.config, seed=None)
    model.sampling, model.classes, model.captions = described.sampling, described.classes, described.captions
    model.load_state_dict(tensors)
    return model.to(device).eval()


def weights_name(folder: Path, average: str = EMA) -> str:
    """Return the file of a model folder that :func:`load` reads. Refuse an average that the folder does not hold."""
    held = averages(folder)
    if average == RAW or (average == EMA and EMA not in held and run_of(folder) is None):
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


def model_folder(path: str | Path | None, average: str = EMA) -> Path:
    """Return the folder from which :func:`load` reads ``path``; download a model on the Hub.

    The SHA-256 of its configuration and of the weights named ``average`` are checked.
    """
    if path is None:
        return _as_saved(shipped(), average)
    if is_address(path):
        return _as_saved(download(path), average, str(path))
    path = Path(path).expanduser()
    if not path.is_dir():
        problem = "it is a file" if path.exists() else "the folder does not exist"
        raise PraError(f"no run or model at {path}: {problem}", code="missing", path=path)
    if (path / MODEL).exists():
        return _as_saved(path, average)
    if not (path / CONFIG).exists():
        raise PraError(f"{path} is neither a run nor a model: it holds no {CONFIG}", code="missing", path=path)
    checkpoint = newest_checkpoint(path, average)
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
        names = os.listdir(folder)  # glob would return nothing for a folder without read permission
    except FileNotFoundError:
        return []
    except OSError as error:
        problem = f"cannot be read ({error.strerror}). Make it a folder that is open to you"
        raise unreadable(folder, problem) from None
    return sorted(folder / name for name in names if name.startswith("step-"))


def newest_checkpoint(run: Path, average: str | None = EMA) -> Path | None:
    """Return the newest undamaged checkpoint, or None if the run does not have checkpoints. Warn about damaged ones.

    Checks the sizes of all files, and the content of the configuration and of the weights named ``average``. With
    ``average=None``, as for resuming, checks the content of all files.

    Raises:
        PraError: all checkpoints are damaged.
    """
    faults: list[str] = []
    found = checkpoints(run)
    read = None if average is None else [MODEL if average == RAW else average_file(average)]
    for folder in reversed(found):
        if (fault := _fault(folder, read)) is None:
            for damaged in faults:  # stacklevel 1: Python shows it once per command, however often the run is read
                warnings.warn(f"checkpoint {damaged}; the one before it, {folder.name}, is used", stacklevel=1)
            return folder
        faults.append(f"{folder} is damaged ({fault})")
    if faults and checkpoints(run) != found:  # training continues and has just removed an old checkpoint
        return newest_checkpoint(run, average)
    if faults:
        problem = f"{'; '.join(faults)}. Put back the named files as they were, or train in another --run-dir"
        raise PraError(f"no checkpoint of {run} is whole: {problem}", code="unreadable", path=run)
    return None


def last_good(run: Path) -> str:
    """Return the part of a message that names the newest undamaged checkpoint."""
    try:
        whole = whole_checkpoints(run)
    except PraError:
        return "the earlier checkpoints cannot be read"
    return f"the last good checkpoint is {whole[-1]}" if whole else "there is no earlier checkpoint"


def whole_checkpoints(run: Path, read: Collection[str] = ()) -> list[Path]:
    """Return a run's undamaged checkpoints, oldest first. Checks all sizes, and the content of the files ``read``."""
    return [folder for folder in checkpoints(run) if _fault(folder, read) is None]


def _fault(folder: Path, read: Collection[str] | None) -> str | None:
    """Describe the damage of a checkpoint, or return None: sizes, and content of the files ``read`` (None: all)."""
    try:
        sizes = read_state(folder)["sizes"]
        for name, size in sizes.items():
            if not os.path.isfile(folder / name):  # a name may be anything
                return f"{name} is missing"
            # JSON is compared by its values: line endings and indentation may change.
            if (actual := (folder / name).stat().st_size) != size and not name.endswith(JSON):
                return f"{name} has {actual} bytes of {size}"
        changed = _changed(folder, sizes if read is None else read)
    except (PraError, OSError) as error:  # OSError: removed just now
        return str(error)
    return changed and f"the content of {changed} is not what was saved"


def _changed(folder: Path, read: Collection[str]) -> str | None:
    """Return the first changed file among the manifest, the configuration and the files ``read``, if any."""
    digests = _digests(read_json(folder / (STATE if (folder / STATE).exists() else CONFIG)))
    for name in (STATE, CONFIG, *read):
        if name in (CONFIG, *digests):  # an older checkpoint's configuration must be readable
            found = content_sha256(folder / name)
            if digests.get(name, found) != found:
                return name
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint: ``step``, and ``sizes`` in bytes by file."""
    return read_json(folder / STATE, step=Step, sizes=dict)


def write_state(folder: Path, state: dict[str, Any], digests: dict[str, str]) -> None:
    """Write the manifest of a checkpoint, with the digests of its files and of the manifest itself."""
    state = state | {DIGESTS: digests}
    state[DIGESTS] = digests | {STATE: _values_sha256(state)}
    write_atomically(folder / STATE, lambda file: file.write((json.dumps(state, indent=2) + "\n").encode()))


def add_digest(file: Path) -> None:
    """Add the digest of a new file to the manifest of its checkpoint, unless the checkpoint is older than digests."""
    state = read_json(file.parent / STATE)
    if known := _digests(state):
        write_state(file.parent, state, known | {file.name: content_sha256(file)})


def content_sha256(path: Path) -> str:
    """Return the SHA-256 of a file. JSON files are hashed by their values: another tool may reformat them."""
    return _values_sha256(read_json(path)) if path.suffix == JSON else file_sha256(path)


def _values_sha256(values: dict[str, Any]) -> str:
    """Return the digest of JSON values, without the digest of ``STATE`` that ``STATE`` itself holds."""
    if known := _digests(values):
        values = values | {DIGESTS: {name: digest for name, digest in known.items() if name != STATE}}
    plain = json.loads(json.dumps(values), parse_float=_number)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _number(text: str) -> float:
    """Return 1 for ``1.0``: some tools leave the zero out."""
    number = float(text)
    return int(number) if number.is_integer() else number


def _digests(values: dict[str, Any]) -> dict[str, Any]:
    found = values.get(DIGESTS)  # missing from older files
    return found if isinstance(found, dict) else {}


def _as_saved(folder: Path, average: str, address: str | None = None) -> Path:
    """Return a model folder. Refuse it if :func:`load` would read a file that has changed since it was saved.

    ``address`` is that of a model on the Hub, whose folder lies in the cache.
    """
    if changed := _changed(folder, [weights_name(folder, average)]):
        fix = "Put back the file as it was, or use another checkpoint"
        if not (folder / STATE).exists():
            fix = f"Put back the file; if it was changed on purpose, remove {DIGESTS} from {folder / CONFIG}"
        if address:
            fix = f"Remove {folder.parents[1]} to download {address} again"
        raise unreadable(folder / changed, f"is damaged: its content is not what was saved. {fix}")
    return folder


def write_config(model: Model, folder: Path, digests: dict[str, str] | None = None) -> None:
    """Write ``config.json`` of a model folder; ``digests`` are those of a saved model's weights."""
    values = {"format": FORMAT, "model": to_dict(model.config), "sampling": to_dict(model.sampling)}
    values["classes"] = list(model.classes)
    values |= {"captions": list(model.captions)} if model.captions else {}
    values |= {DIGESTS: digests} if digests else {}
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def read_config(folder: Path) -> Model:
    """Build the model of a ``config.json`` on the meta device. Refuse a file of another format.

    The meta device takes no memory: an unknown file may ask for any size, and its weights are compared first.
    """
    path = folder / CONFIG
    values = read_json(path, finite=True)
    if "format" not in values:
        raise unreadable(path, "is not a model's: it lacks a format. Use a model's folder")
    if values["format"] not in READABLE:
        problem = f"is of format {values['format']!r}, this version of pra reads {FORMAT}; install a newer pra"
        raise unreadable(path, problem)
    try:
        config, classes = model_from_dict(values.get("model"), "model"), values.get("classes")
        sampling = from_dict(SamplingConfig, values.get("sampling"), "sampling")
    except PraError as error:
        raise PraError(f"{path}: {error}", error.code, **error.fields) from None
    captions = values.get("captions", [])
    if not isinstance(captions, list) or len(captions) > MOST_CAPTIONS:
        raise unreadable(path, f'has "captions" that are not a list of at most {MOST_CAPTIONS} texts')
    if not isinstance(classes, list) or len(classes) != config.num_classes:
        raise unreadable(path, f"does not name the {config.num_classes} classes of its model")
    with explained(path, "describes a model that cannot be built", "use another model"), torch.device("meta"):
        model = build_model(config, seed=None)
    model.sampling = sampling
    model.classes = tuple(str(name) for name in classes)
    model.captions = tuple(cut(str(caption), MOST_BYTES) for caption in captions) if config.text else ()
    return model


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file. Raises ``OSError`` if the disk is full or not writable."""
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
        # safetensors opens UTF-8 paths only: read the bytes of others.
        check_regular(path)
        read = load_file(path) if str(path).isprintable() else load_bytes(path.read_bytes())
        return {present_name(name): tensor for name, tensor in read.items()}
    except (OSError, RuntimeError, SafetensorError) as error:  # torch maps the file
        problem = f"cannot be read ({reason_of(error)}). Use another checkpoint, or restore the file"
        raise unreadable(path, problem) from None


def load_tensors(model: Model, path: Path) -> None:
    """Load a model's weights from a safetensors file of any precision. Refuse a file of another model."""
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

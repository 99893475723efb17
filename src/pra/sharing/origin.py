"""What is known of a model that is to be shared, read from its run or its folder."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pra.config import RunConfig
from pra.evaluation.evaluate import Report
from pra.models import Model, weights
from pra.training.plots import CURVES
from pra.training.run import read_metrics, read_run, training_seconds
from pra.utils.provenance import file_sha256

CARD, SAMPLES = "README.md", "samples.png"


@dataclass(frozen=True)
class Training:
    """How a run came to the shared weights.

    ``seconds`` are those of the training steps alone, or ``None`` where none are logged.
    """

    config: RunConfig
    step: int
    seconds: float | None
    environment: dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """A model, how it was trained where that is known, and the files beside it.

    Args:
        model: the model.
        weights: the file of its weights.
        average: their name in a run.
        training: how the run came to them.
        files: pictures and a card, by the name they are shared under.
        reports: of ``pra eval``, by file name: on these very weights, or named by the model's card.
    """

    model: Model
    weights: Path
    average: str
    training: Training | None
    files: dict[str, Path]
    reports: dict[str, Report]


def read_origin(path: str | Path, average: str = weights.EMA) -> Origin:
    """Read a run, a checkpoint or a model folder.

    Reports on other weights, such as those of an earlier checkpoint, are left out with a warning. Those that a model
    folder's card names are kept: the card says what they were measured on, such as weights not yet rounded.

    Raises:
        PraError: as :func:`pra.load`, or a run's files are damaged.
    """
    folder = weights.model_folder(path)
    run = weights.run_of(folder)
    home = run or folder
    shared = (CURVES, SAMPLES) if run else (CARD, CURVES, SAMPLES)  # a README in a run's folder is its owner's notes
    files = {name: home / name for name in shared if (home / name).exists()}
    grids = sorted(run.glob("samples/step-*.png")) if run else []
    if grids:
        files[SAMPLES] = grids[-1]
    file = folder / weights.weights_name(folder, average)
    training = _training(run, folder) if run else None
    card = files[CARD].read_text(encoding="utf-8", errors="replace") if CARD in files else ""
    reports = _reports(home, file_sha256(file), card)
    return Origin(weights.load(folder, average), file, average, training, files, reports)


def _training(run: Path, checkpoint: Path) -> Training:
    config, origin = read_run(run), run / "environment.json"
    step = int(weights.read_json(checkpoint / weights.STATE)["step"])
    seconds = training_seconds(read_metrics(run), config.train.batch_size, until=step)
    return Training(config, step, seconds or None, weights.read_json(origin) if origin.exists() else {})


def _reports(home: Path, sha256: str, card: str) -> dict[str, Report]:
    """Return the reports of ``pra eval`` in a folder on the weights of that hash, or named by the card."""
    reports = {}
    for path in sorted(home.glob("*.json")):
        try:
            values = json.loads(path.read_text())
            report = Report(values["figures"], values["provenance"])
            measured = report.provenance["images"]["weights_sha256"]
        except (OSError, ValueError, LookupError, TypeError):
            continue  # not of `pra eval`, or of images from elsewhere
        if measured == sha256 or f"(./{path.name})" in card:
            reports[path.name] = report
        else:
            warnings.warn(
                f"{path} is left out: its figures are of other weights than the shared ones; measure these with "
                f"`pra eval {home} --out FILE.json`",
                stacklevel=3,
            )
    return reports

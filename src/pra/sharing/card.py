"""The model card: facts about a model from its run or folder, as text by the template ``card.md``."""

from __future__ import annotations

import json
import shlex
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined

from pra.bench.pareto import FOLDER, PARETO, PICTURE, Tier, offered
from pra.config import RunConfig, to_dict
from pra.errors import one_line
from pra.evaluation.comparable import known
from pra.evaluation.evaluate import Report
from pra.evaluation.report import duration, evaluations, named, templates
from pra.models import Model, count_parameters, weights
from pra.training.checkpoint import step_of
from pra.training.plots import CURVES
from pra.training.run import read_metrics, read_run, recorded, training_seconds
from pra.utils.files import explained, read_regular, unreadable
from pra.utils.hub import is_address, repo_id
from pra.utils.provenance import file_sha256

CARD, SAMPLES = "README.md", "samples.png"
MOST_CLASSES, MOST_SHOWN = 30, 10
"""Classes that a card names, and that its command draws."""
LONGEST = 2**20
"""Bytes of a card that is read."""


@dataclass(frozen=True)
class Origin:
    """A model, the file of its weights, their name in a run, and the record of their training, if known.

    ``files`` are pictures, a card and ``pareto.json``, by the name they are shared under; ``tiers`` are read from the
    last. ``reports`` of ``pra eval``, by file name, are
    on these very weights, or named by the card. ``seconds`` are those of the training steps, or ``None`` if not logged.
    """

    model: Model
    weights: Path
    average: str
    files: dict[str, Path]
    reports: dict[str, Report]
    tiers: list[Tier]
    run: RunConfig | None = None
    step: int = 0
    seconds: float | None = None
    environment: dict[str, Any] = field(default_factory=dict)


def read_origin(path: str | Path, average: str = weights.EMA) -> Origin:
    """Read a run, a checkpoint or a model folder, as :func:`pra.load` takes it.

    Reports on other weights, such as those of an earlier checkpoint, are left out with a warning. Reports that a model
    folder's card names are kept: the card says what they were measured on, such as weights not yet rounded.
    """
    folder = weights.model_folder(path, average)
    run = weights.run_of(folder)
    home = run or folder
    shared = (
        (CURVES, SAMPLES) if run else (CARD, CURVES, SAMPLES, PARETO, PICTURE)
    )  # a README in a run's folder is its owner's notes
    files = {name: home / name for name in shared if (home / name).is_file()}
    grids = sorted(path for path in run.glob("samples/step-*.png") if path.is_file()) if run else []
    if grids:
        files[SAMPLES] = grids[-1]
    tiers = offered(folder, run, average)
    if run and (run / FOLDER / PARETO).is_file():
        if tiers:
            files |= {name: path for name in (PARETO, PICTURE) if (path := run / FOLDER / name).is_file()}
        else:
            problem = f"{run / FOLDER / PARETO} is left out: its figures are of other weights than the shared ones"
            warnings.warn(f"{problem}; measure these with `pra bench pareto {run}`", stacklevel=2)
    file = folder / weights.weights_name(folder, average)
    card = read_card(files[CARD]) if CARD in files else ""
    reports = _reports(home, file_sha256(file), card)
    origin = Origin(weights.load(folder, average), file, average, files, reports, tiers)
    if run is None:
        return origin
    config = read_run(run)
    step = step_of(folder)
    seconds = training_seconds(read_metrics(run), config.train.batch_size, until=step)
    return replace(origin, run=config, step=step, seconds=seconds or None, environment=recorded(run))


def read_card(path: Path) -> str:
    """Return the text of a model card of at most :data:`LONGEST` bytes."""
    try:
        return read_regular(path, LONGEST).decode(errors="replace")
    except OSError as error:
        raise unreadable(path, f"cannot be read: {error.strerror}. Remove it") from None


def _reports(home: Path, sha256: str, card: str) -> dict[str, Report]:
    """Return the reports of ``pra eval`` in a folder on the weights of that hash, or named by the card."""
    reports = {}
    for path, report in evaluations(home).items():
        measured = known(report.provenance, "images", "weights_sha256")
        if measured == sha256 or f"(./{path.name})" in card:
            reports[path.name] = report
        elif measured:  # not of images from elsewhere
            problem = f"{path} is left out: its figures are of other weights than the shared ones"
            warnings.warn(f"{problem}; measure these with `pra eval {home} --out FILE.json`", stacklevel=3)
    return reports


def write_card(origin: Origin, name: str, address: str, licence: str | None, half: bool) -> str:
    """Return the card as Markdown under YAML. Unknown facts are left out.

    ``name`` is the title, ``address`` the argument of :func:`pra.load` (empty for the model that pra ships), and
    ``half`` tells that the weights are rounded to float16.
    """
    run, config = origin.run, origin.model.config
    names = named(origin.model.classes)
    more = f" and {len(names) - MOST_CLASSES} more, in config.json" if len(names) > MOST_CLASSES else ""
    environment = templates("pra.sharing", undefined=ChainableUndefined, keep_trailing_newline=True)
    environment.filters |= {
        "json": json.dumps,
        "quote": shlex.quote,
        "words": shlex.join,
        "public": _public,
        "place": lambda initial: initial if is_address(initial) else Path(initial).name,
        "duration": duration,
    }
    fix = f"repair or remove {', '.join(['environment.json', *origin.reports])} in the folder that is shared"
    with explained(origin.weights, "comes with records that a card cannot show", fix):
        return environment.get_template("card.md").render(
            origin=origin,
            front_matter=_front_matter(origin, licence),
            name=name,
            address=address,
            licence=licence,
            half=half,
            parts=count_parameters(config),
            classes=", ".join(one_line(name, 100) for name in names[:MOST_CLASSES]) + more,
            captions=[one_line(caption, 200) for caption in origin.model.captions[:1]],
            drawn="all" if config.num_classes <= MOST_SHOWN else f"0-{MOST_SHOWN - 1}",
            rollout=run and to_dict(run.train.rollout),
            average=run and _average(run, origin.average),
        )


def _front_matter(origin: Origin, licence: str | None) -> dict[str, Any]:
    """Return the Hub's fields by name; as JSON their values are YAML."""
    config, initial = origin.model.config, origin.run and origin.run.initial
    kind = ["class-conditional-image-generation"] if config.num_classes > 1 and config.text is None else []
    return {
        "license": licence,
        "library_name": "pra",
        # The Hub has no task of its own for generation by class.
        "pipeline_tag": "text-to-image" if config.text else "unconditional-image-generation",
        "base_model": repo_id(initial.partition("@")[0]) if initial and is_address(initial) else None,
        "tags": ["image-generation", "pixel-space", "flow-matching", *config.tags, *kind],
    }


def _average(config: RunConfig, name: str) -> str:
    if name == weights.RAW:
        return "those of the last step"
    if name == weights.EMA:
        return f"their exponential moving average (decay {config.train.optimizer.ema_decay:g})"
    length = name.removeprefix(weights.POWER)
    return f"their power-function average of relative length {length} (arXiv 2312.02696)"


def _public(source: str) -> str:
    """Return a data source without the folders above it, which are private."""
    kind, colon, path = source.partition(":")
    return f"{kind}:{Path(path).name}" if colon else source

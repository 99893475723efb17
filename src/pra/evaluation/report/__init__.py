"""A run's report: one self-contained page ``report.html`` from what lies in its folder, and the parts of it.

The page says how to make what is ``None`` or empty here.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import io
import json
import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, features

from pra.config import (
    AnyModelConfig,
    Clean,
    Exact,
    Fit,
    GuidanceSchedule,
    Noised,
    Parallel,
    Reconstructed,
    Rollout,
    RunConfig,
    SamplingConfig,
    TrainConfig,
    to_dict,
)
from pra.data.images import open_image
from pra.errors import PraError, one_line, reason_of
from pra.evaluation import flops
from pra.evaluation.comparable import PREFIX, known
from pra.evaluation.evaluate import Report
from pra.evaluation.rollout_gap import read_gap
from pra.evaluation.samples import spread
from pra.models import count_parameters
from pra.models.weights import newest_checkpoint, power_name
from pra.training import plots
from pra.training.callbacks import GRID_ROWS
from pra.training.plots import CURVES
from pra.training.run import LARGEST, METRICS, read_metrics, read_run, recorded, training_seconds
from pra.utils.files import check_regular, read_json, write_atomically
from pra.utils.provenance import DISTRIBUTION, package_version

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.html"
MOST_PICTURES = 12
"""Grids of one kind on a page, evenly over training: each weighs up to a few hundred kB."""

COLOURS = {1: "grey", 3: "colour", 4: "colour with transparency"}
FITS = {
    Fit.CENTER_CROP: "scaled, and cut to the middle",
    Fit.RANDOM_CROP: "scaled and cut at random",
    Fit.PAD: "padded with black",
}
STEP = re.compile(r"step-[0-9]+")


def write_report(run: Path, out: Path | None = None, gap: Any = None, no_gap: str | None = None) -> Path:
    """Write the page of a run's folder to ``out``, by default ``report.html`` there, in place of an older one.

    Nothing is measured here: ``gap`` is by default the last one measured, ``no_gap`` the reason if there is none.
    Missing parts are left out, with a line about how to make them. Refuse damaged files, and a folder without a run.
    """
    # Escape everything: names of classes, files and folders may hold any text.
    environment = templates("pra.evaluation.report", autoescape=True, undefined=StrictUndefined)
    environment.filters["duration"] = duration
    text = environment.get_template("page.html").render(_page(run, read_run(run), gap or read_gap(run), no_gap))
    path = out or run / REPORT
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))
    return path


def _page(run: Path, config: RunConfig, gap: dict[str, Any] | None, no_gap: str | None) -> dict[str, Any]:
    samples, sample_grids = pictures(run, "samples")
    reconstructions, reconstruction_grids = pictures(run, "reconstructions")
    parameters, arithmetic = costs(config)
    checkpoint = newest_checkpoint(run)
    if not config.model.autoregressive:
        gap, no_gap = None, f"{config.model.name} makes all patches at once: there is no rollout, and no gap."
    return {
        "run": str(run),
        "name": run.resolve().name,
        "config": config,
        "settings": json.dumps(to_dict(config), indent=2),
        "words": in_words(config),
        "progress": progress(run, config),
        "lines": len(read_metrics(run)),
        "checkpoint": checkpoint.name if checkpoint else None,
        "classes": named(read_json(checkpoint / "config.json", classes=list)["classes"]) if checkpoint else [],
        "captions": _captions(checkpoint) if checkpoint else [],
        "shown_classes": GRID_ROWS,
        "samples": samples,
        "sample_grids": sample_grids,
        "reconstructions": reconstructions,
        "reconstruction_grids": reconstruction_grids,
        "curves": curves(run, config),
        "gap": gap,
        "no_gap": no_gap,
        "gap_curves": gap_curves(gap, config.model.group_grid[1]) if gap else None,
        "figures": [figures_in_words(*one, checkpoint) for one in evaluations(run).items()],
        "parameters": parameters,
        "arithmetic": arithmetic,
        "origin": origin(recorded(run)),
        "version": package_version(DISTRIBUTION),
    }


def _captions(checkpoint: Path) -> list[str]:
    """Return the captions of the rows of samples, if there are any."""
    found = read_json(checkpoint / "config.json", captions=list | None).get("captions") or []
    return [one_line(str(caption), 200) for caption in found[:GRID_ROWS]]


class Picture(NamedTuple):
    """A picture as a data URI, ``width`` pixels wide; ``step`` steps of training were done, if it is a grid."""

    uri: str
    width: int
    height: int
    step: int = 0


@dataclass(frozen=True)
class Progress:
    """The progress of a run; ``seconds`` counts the training steps alone, as logged."""

    steps: int
    images: int
    epochs: float
    seconds: float
    images_per_second: float


def progress(run: Path, config: RunConfig) -> Progress | None:
    """Read the progress from the metrics; None before their first line."""
    rows = read_metrics(run)
    if not rows:
        return None
    last, batch = rows[-1], config.train.batch_size
    steps, seconds = int(last["step"]), training_seconds(rows, batch)
    return Progress(steps, steps * batch, last["epoch"], seconds, steps * batch / seconds)


def curves(run: Path, config: RunConfig) -> Picture | None:
    """Return ``curves.png``, drawn again if it is older than the metrics; None without two lines or matplotlib."""
    rows, drawn = read_metrics(run), run / CURVES
    if len(rows) < 2:
        return None
    if drawn.exists() and drawn.stat().st_mtime >= (run / METRICS).stat().st_mtime:
        return embedded(drawn)
    if importlib.util.find_spec("matplotlib") is None:
        return None
    return _embedded_figure(plots.curves({run.name: rows}, plots.panels(rows, config.train.objective)))


def gap_curves(gap: dict[str, Any], columns: int) -> Picture | None:
    """Draw inputs, conditions and loss along the raster, every position thin, the mean of each row thick; None without
    matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3), dpi=110, layout="constrained")
    with np.errstate(all="ignore"):
        ratio = np.divide(gap["rollout_loss"], gap["training_loss"])
    panels = (
        ("inputs: sampling against training", np.asarray(gap["inputs"]), 1, 0.0),
        ("conditions: sampling against training", np.asarray(gap["conditions"]), 0, 0.0),
        ("flow loss on rollouts / in training", ratio, 0, 1.0),
    )
    for axes, (title, values, first, level) in zip(figure.subplots(1, 3), panels, strict=True):
        places = np.arange(first, first + len(values))
        rows = [places // columns == row for row in np.unique(places // columns)]
        axes.plot(places, values, linewidth=1, color="#8fb8d8")
        axes.plot([places[row].mean() for row in rows], [values[row].mean() for row in rows], color=plots.COLOURS[0])
        axes.axhline(level, color="0.5", linestyle="--", linewidth=1)
        axes.set(title=title, xlabel="raster position")
        axes.grid(alpha=0.3)
    return _embedded_figure(figure)


def _embedded_figure(figure: Figure) -> Picture:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return embedded(file)


def pictures(run: Path, kind: str) -> tuple[list[Picture], int]:
    """Return grids of a kind in the order of their steps, :data:`MOST_PICTURES` at most, and how many there are."""
    # Copies such as "step-00000010 2.png" may be anything.
    files = sorted(path for path in (run / kind).glob("step-*.png") if STEP.fullmatch(path.stem))
    shown = files
    if len(files) > MOST_PICTURES:
        shown = [files[place] for place in spread(len(files) - 1, MOST_PICTURES - 1)] + files[-1:]
    return [embedded(path, int(path.stem.removeprefix("step-"))) for path in shown], len(files)


def embedded(path: Path | io.BytesIO, step: int = 0) -> Picture:
    """Read a picture. As WebP, where Pillow has it, it is a fraction of PNG's size."""
    try:
        with open_image(check_regular(path) if isinstance(path, Path) else path) as opened:
            picture = opened.convert("RGB")
    except Exception as error:  # Pillow's plugins raise anything on broken bytes
        problem = f"{path} cannot be read as a picture ({reason_of(error)})"
        raise PraError(f"{problem}. Remove it and repeat the command", "unreadable", path=path) from None
    uri = data_uri(picture, "webp" if features.check("webp") else "png", quality=90)
    return Picture(uri, picture.width, picture.height, step)


def data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    """Return a picture as it stands in a page, in one of Pillow's formats."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def evaluations(run: Path) -> dict[Path, Report]:
    """Return every report of `pra eval` in the run's folder, by name."""
    return {path: report for path in sorted(run.glob("*.json")) if (report := evaluation(path))}


def evaluation(path: Path) -> Report | None:
    """Read what `pra eval` wrote into a file; None for any other JSON."""
    values = read_json(path)
    made, origin = values.get("figures"), values.get("provenance")
    if isinstance(made, dict) and isinstance(origin, dict) and all(isinstance(v, dict) for v in made.values()):
        return Report({column: {name: _figure(v) for name, v in own.items()} for column, own in made.items()}, origin)
    return None


def _figure(value: Any) -> float | None:
    return value if isinstance(value, int | float) and abs(value) <= LARGEST else None


def judged(provenance: dict[str, Any]) -> dict[str, str]:
    """Return by name what figures were measured on, with and against; ``-`` for missing fields."""
    made, features = known(provenance, "images", "made", "weights"), known(provenance, "features")
    makers = (known(provenance, "images", kind) for kind in ("model", "file", "folder"))
    weights = known(provenance, "images", "weights") or known(made, "file")
    facts = {
        "images": known(provenance, "count"),
        "made by": next((Path(str(path)).name for path in makers if path), None),
        "weights": weights and Path(str(weights)).stem,
        "weights, SHA-256": known(provenance, "images", "weights_sha256") or known(made, "sha256"),
        "features": known(features, "name"),
        "features, SHA-256": known(features, "sha256"),
        "reference": known(provenance, "reference", "name") or known(provenance, "reference", "source"),
    }
    return {
        name: "-" if value is None else str(value)[: PREFIX if "SHA" in name else None] for name, value in facts.items()
    }


def gone_on(provenance: dict[str, Any], newest: Path | None) -> str | None:
    """Return a line if figures are of an older checkpoint than the newest, else None."""
    model = known(provenance, "images", "model")
    if newest is None or model is None or newest.name == Path(str(model)).name:
        return None
    return f"the run has since reached {newest.name}"


def figures_in_words(path: Path, report: Report, newest: Path | None) -> dict[str, Any]:
    """Return a report for the page: cells, facts, all of its provenance, and the first protocol's FID, if any."""
    made, provenance = report.figures, report.provenance
    names = list(dict.fromkeys(name for column in made.values() for name in column))
    rows = [(name, [cell(column.get(name)) for column in made.values()]) for name in names]
    fid = next((column["fid"] for column in made.values() if isinstance(column.get("fid"), int | float)), None)
    facts = judged(provenance)
    if since := gone_on(provenance, newest):
        facts["made by"] += f" ({since})"
    return {
        "file": path.name,
        "columns": list(made),
        "rows": rows,
        "facts": facts | origin(known(provenance, "environment")),
        "provenance": json.dumps(provenance, indent=2),
        "fid": None if fid is None else cell(fid),
    }


def origin(environment: Any) -> dict[str, str]:
    """Return a recorded environment by name: command, commit, platform, hardware and versions."""
    lines: dict[str, Any] = {}
    command = known(environment, "command")
    if isinstance(command, list) and command:
        program, *words = map(str, command)
        name = "python -m pra" if Path(program).name == "__main__.py" else Path(program).name
        lines["command"] = f"{name} {shlex.join(words)}"
    lines |= {name: known(environment, name) for name in ("commit", "platform")}
    for part in ("hardware", "versions"):
        values = known(environment, part)
        if isinstance(values, dict):
            lines[part] = ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
    return {name: str(value) for name, value in lines.items() if value}


def templates(package: str, **options: Any) -> Environment:
    """Return the templates that lie in a package."""
    return Environment(loader=PackageLoader(package, ""), trim_blocks=True, lstrip_blocks=True, **options)


def named(classes: Iterable[object]) -> list[str]:
    """Return the names of classes, each once; empty if they are mere numbers."""
    names = list(dict.fromkeys(map(str, classes)))
    return [] if names == [str(number) for number in range(len(names))] else names


def duration(seconds: float) -> str:
    """Return ``"2 h 05 min"``, ``"3 min 20 s"`` or ``"12 s"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, part = divmod(minutes, 60)
    if hours:
        return f"{hours} h {part:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def cell(value: Any) -> str:
    """Return a figure as text; ``-`` for None and for values that are not finite."""
    return f"{value:.5g}" if isinstance(value, int | float) and math.isfinite(value) else "-"


@functools.cache
def costs(config: RunConfig) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return parameters by part, and GFLOPs per image."""
    parts = count_parameters(config.model)
    parameters = [(name, f"{count / 1e6:.3f} M") for name, count in {**parts, "total": sum(parts.values())}.items()]
    sampling = flops.sampling_flops(config)
    arithmetic = {
        "a training image": flops.training_flops(config),
        **{f"sampling: {part}" if len(sampling) > 1 else "sampling": count for part, count in sampling.items()},
        "a sampled image": sum(sampling.values()),
    }
    return parameters, [(name, f"{count / 1e9:.4g}") for name, count in arithmetic.items()]


# --- a configuration in plain words -------------------------------------------------------------------------


def in_words(config: RunConfig) -> dict[str, str]:
    """The settings that matter most: a name and a sentence each."""
    data, train = config.data, config.train
    words = model_in_words(config.model, config.sampling)
    words["Images"] += f", from {data.source}; {FITS[data.fit]}{', mirrored at random' if data.flip else ''}"
    if config.model.autoregressive:
        words["Inputs in training"] = rollout_in_words(train.rollout)
    return words | {"Training": _training(train)}


def model_in_words(model: AnyModelConfig, sampling: SamplingConfig) -> dict[str, str]:
    """The same of a model whose run is not known."""
    (height, width), (rows, columns), side = model.image_size, model.grid, model.patch_size
    classes = "one class" if model.num_classes == 1 else f"{model.num_classes} classes"
    colours = COLOURS.get(model.channels, f"{model.channels} channels")
    patches = f"{model.num_patches} ({rows} x {columns}) of {side} x {side} pixels, {model.patch_dim} numbers each"
    words = {"Images": f"{height} x {width}, {colours}, {classes}", "Patches": patches, **model.in_words()}
    if model.text is not None:
        text = model.text
        words["Captions"] = (
            f"the first {text.max_length} {text.unit}, as {text.tokens} prefix tokens; the reader has "
            f"{text.transformer.depth} blocks of width {text.transformer.width}"
        )
    return words | {"Sampling": sampling_in_words(sampling, model.unit)}


def rollout_in_words(rollout: Rollout) -> str:
    """Describe how the inputs of the autoregressive pass are made."""
    match rollout:
        case Clean():
            return "the true patches (teacher forcing)"
        case Noised():
            return f"the true patches with noise of standard deviation {rollout.sigma:g}"
        case Reconstructed():
            return "decoded from the unperturbed states"
        case Parallel():
            return f"decoded from perturbed states, t between {rollout.t_min:g} and 1 (parallel rollout approximation)"
        case Exact():
            return f"sampled one after the other by the model itself, {rollout.steps} solver steps each"


def _training(train: TrainConfig) -> str:
    rates = train.optimizer
    lengths = "".join(f", {power_name(length)}" for length in train.averages)
    return (
        f"{train.steps:,} steps of {train.batch_size} images; AdamW, learning rate {rates.rates()} "
        f"({rates.schedule.value}, warm-up {rates.warmup_steps:,} steps); moving average {rates.ema_decay:.5g}"
        f"{lengths}; seed {train.seed}"
    )


def sampling_in_words(how: SamplingConfig, unit: str) -> str:
    """Solver, steps and guidance; a step's ``unit`` is the model's."""
    rising = ", rising linearly along the raster" if how.schedule is GuidanceSchedule.LINEAR else ""
    guidance = "no guidance" if how.guidance == 1 else f"guidance {how.guidance:g}{rising}"
    warmth = "" if how.temperature == 1 else f", temperature {how.temperature:g}"
    return f"{how.solver.value}, {how.steps_in_words} intervals per {unit}; {guidance}{warmth}"

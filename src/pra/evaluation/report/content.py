"""The contents of a run's folder, gathered for the page, which says how to make what is None or empty."""

from __future__ import annotations

import base64
import functools
import io
import itertools
import json
import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, features

from pra.config import RunConfig
from pra.errors import PraError, reason_of
from pra.evaluation import flops
from pra.evaluation.comparable import PREFIX, known
from pra.evaluation.evaluate import Report
from pra.evaluation.report.charts import Chart, chart, thinned
from pra.evaluation.samples import spread
from pra.models import count_parameters, weights
from pra.training.plots import HELD_OUT, is_logarithmic, panels
from pra.training.run import VALIDATION, points_of, read_metrics, training_seconds

MOST_PICTURES = 12
"""Grids of one kind on a page, evenly over training: each weighs up to a few hundred kB."""

STEP = re.compile(r"step-[0-9]+")


class Picture(NamedTuple):
    """A picture as a data URI, ``width`` pixels wide; ``step`` steps of training were done, if it is a grid."""

    uri: str
    width: int
    height: int
    step: int = 0


@dataclass(frozen=True)
class Progress:
    """How far a run has come; ``seconds`` are those of the training steps alone, as logged."""

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


def curves(run: Path, config: RunConfig) -> list[Chart]:
    """Return a chart per metric that has something to show."""
    rows = read_metrics(run)
    charts = []
    for name, title in panels(rows, config.train.objective).items():
        held_out = points_of(rows, VALIDATION + name)
        lines = [("line", points_of(rows, name)), ("held-out", held_out)]
        charts.append(chart(title + HELD_OUT * (len(held_out) > 1), "step", lines, log=is_logarithmic(name)))
    return [one for one in charts if one is not None]


def gap_charts(gap: dict[str, Any], columns: int) -> list[Chart]:
    """Draw inputs, conditions and loss along the raster: every position thin, the mean of each row thick."""
    ratio = [rolled / trained for rolled, trained in zip(gap["rollout_loss"], gap["training_loss"], strict=True)]
    panels: tuple[tuple[str, list[float], int, float | None], ...] = (
        ("inputs: sampling against training", gap["inputs"], 1, 0.0),
        ("conditions: sampling against training", gap["conditions"], 0, 0.0),
        ("flow loss on rollouts / in training", ratio, 0, 1.0),
    )
    charts = []
    for title, values, first, level in panels:
        points = [(float(place), value) for place, value in enumerate(values, start=first)]
        rows = [list(row) for _, row in itertools.groupby(points, key=lambda point: point[0] // columns)]
        means = [mean for row in rows for mean in thinned(row, 1)]
        charts.append(chart(title, "raster position", [("thin", points), ("line", means)], level=level))
    return [one for one in charts if one is not None]


def pictures(run: Path, kind: str) -> tuple[list[Picture], int]:
    """Return grids of a kind in the order of their steps, :data:`MOST_PICTURES` at most, and how many there are."""
    # Copies such as "step-00000010 2.png" may be anything.
    files = sorted(path for path in (run / kind).glob("step-*.png") if STEP.fullmatch(path.stem))
    shown = files
    if len(files) > MOST_PICTURES:
        shown = [files[place] for place in spread(len(files) - 1, MOST_PICTURES - 1)] + files[-1:]
    return [embedded(path, int(path.stem.removeprefix("step-"))) for path in shown], len(files)


def embedded(path: Path, step: int = 0) -> Picture:
    """Read a picture. As WebP, where Pillow has it, it is a fraction of PNG's size."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except Exception as error:  # Pillow's plugins raise anything on broken bytes
        problem = f"{path} cannot be read as a picture ({reason_of(error)})"
        raise PraError(f"{problem}. Remove it and repeat the command", "unreadable", path=path) from None
    buffer, kind = io.BytesIO(), "webp" if features.check("webp") else "png"
    picture.save(buffer, kind, quality=90)
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(uri, picture.width, picture.height, step)


def evaluations(run: Path) -> dict[Path, Report]:
    """Return every report of `pra eval` in the run's folder, by name."""
    return {path: report for path in sorted(run.glob("*.json")) if (report := evaluation(path))}


def evaluation(path: Path) -> Report | None:
    """Read what `pra eval` wrote into a file; None for any other JSON."""
    values = weights.read_json(path)
    made, origin = values.get("figures"), values.get("provenance")
    if isinstance(made, dict) and isinstance(origin, dict) and all(isinstance(v, dict) for v in made.values()):
        return Report(made, origin)
    return None


def judged(provenance: dict[str, Any]) -> dict[str, str]:
    """Return what figures were measured on, with and against, by name; ``-`` for what a report does not say."""
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
    """Say that figures are of an earlier checkpoint than the newest; None where they are not."""
    model = known(provenance, "images", "model")
    if newest is None or model is None or newest.name == Path(str(model)).name:
        return None
    return f"the run has gone on since, to {newest.name}"


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
        "facts": facts | origin(known(provenance, "environment") or {}),
        "provenance": json.dumps(provenance, indent=2),
        "fid": None if fid is None else cell(fid),
    }


def origin(environment: dict[str, Any]) -> dict[str, str]:
    """Return a recorded environment by name: command, commit, platform, hardware and versions."""
    lines: dict[str, Any] = {}
    if isinstance(environment.get("command"), list):
        lines["command"] = command_line(environment["command"])
    lines |= {"commit": environment.get("commit"), "platform": environment.get("platform")}
    for part in ("hardware", "versions"):
        values = environment.get(part)
        if isinstance(values, dict):
            lines[part] = ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
    return {name: str(value) for name, value in lines.items() if value}


def named(classes: Iterable[object]) -> list[str]:
    """Return the names of classes, each once; nothing where they are mere numbers."""
    names = list(dict.fromkeys(map(str, classes)))
    return [] if names == [str(number) for number in range(len(names))] else names


def duration(seconds: float) -> str:
    """Return ``"2 h 05 min"``, ``"3 min 20 s"`` or ``"12 s"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, part = divmod(minutes, 60)
    if hours:
        return f"{hours} h {part:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def command_line(words: list[Any]) -> str:
    """Return ``sys.argv`` as a person would type it: the program by its name."""
    first, *rest = (str(word) for word in words)
    name = "python -m pra" if Path(first).name == "__main__.py" else Path(first).name
    return " ".join([name, *(shlex.quote(word) for word in rest)])


def cell(value: Any) -> str:
    """Return a figure as it is shown; ``-`` for None and what is not finite."""
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

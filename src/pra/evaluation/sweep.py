"""A sweep of sampling settings for one model: the combinations, their figures, the best of them, and pictures."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import math
import re
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from pra.config import SamplingConfig, to_dict
from pra.config.values import parse_value
from pra.data.images import open_image
from pra.errors import NotFiniteError, PraError
from pra.evaluation.comparable import differing, known, shown
from pra.evaluation.compare import Row, Section, rendered
from pra.evaluation.evaluate import Report, describe
from pra.evaluation.judging import Judge, Subject
from pra.evaluation.metrics import Protocol
from pra.evaluation.report import cell, evaluation
from pra.models.weights import EMA
from pra.sampling.batches import Batch
from pra.sampling.requests import changed_sampling
from pra.utils.files import check_regular, write_atomically
from pra.utils.pixels import contact_sheet
from pra.utils.provenance import file_sha256
from pra.utils.signals import Interrupted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GUIDANCE = ("guidance=1,1.5,2,3,4",)
"""The default sweep: guidance matters most (docs/compare.md)."""

AVERAGE = "average"
"""The name under which the weights of a run are varied."""

LISTS = ("guidance_interval", "times", "raster_steps")
"""Settings whose single value is a list."""
LONGEST = 200
"""Letters of a point's name: file systems allow 255, with an ending and the suffix of a file being written."""


@dataclass(frozen=True)
class Point:
    """One combination: its changes by the names of :class:`pra.config.SamplingConfig`, and all settings of it."""

    changes: dict[str, Any]
    sampling: SamplingConfig

    @property
    def name(self) -> str:
        """Return ``"guidance=1.5,solver=heun"``, the name of its files too."""
        return ",".join(f"{name}={value_text(value)}" for name, value in self.changes.items())

    @property
    def average(self) -> str:
        """Return the name of the weights."""
        return str(self.changes.get(AVERAGE, EMA))

    @property
    def options(self) -> list[str]:
        """Return the changes as options of `pra sample`."""
        known = {f"--{name.replace('_', '-')}": value for name, value in self.changes.items() if value is not None}
        return [word for option, value in known.items() for word in (option, value_text(value))]

    @property
    def settings(self) -> list[str]:
        """Return the changes as options of `pra export`."""
        words = []
        for name, value in self.changes.items():
            text = json.dumps(value) if isinstance(value, list) else value_text(value)
            words += [f"--{AVERAGE}", text] if name == AVERAGE else ["--set", f"sampling.{name}={text}"]
        return words

    def beside(self, own: SamplingConfig) -> Point:
        """Return the same settings, with all that differs from a model's own among the changes."""
        before = to_dict(own)
        other = {name: value for name, value in to_dict(self.sampling).items() if value != before[name]}
        return Point(self.changes | other, self.sampling)


def points(base: SamplingConfig, over: Sequence[str]) -> list[Point]:
    """Combine the values in lines such as ``guidance=1,1.5,2``, the last line's values running fastest.

    ``average=ema,raw`` varies the weights. A list as a value is in brackets: ``guidance_interval=[0,0.8],[0,1]``.

    Refuse a line without values, a setting named twice or unknown, or a value that does not go with it.
    """
    axes: dict[str, list[str]] = {}
    for line in over:
        name, equals, text = line.removeprefix("sampling.").partition("=")
        values = [value.strip() for value in re.split(r",(?![^\[]*\])", text)]
        if not equals or "" in values:
            raise PraError(f"--over {line!r} is not KEY=VALUE,VALUE. Write it like guidance=1,1.5,2", value=line)
        if name in axes:
            raise PraError(f"--over names {name} twice. Give all its values in one --over", "conflict", name=name)
        axes[name] = values
    found: dict[str, Point] = {}
    for combination in itertools.product(*axes.values()):
        texts = dict(zip(axes, combination, strict=True))
        try:
            sampling = changed_sampling(base, {k: parse_value(text) for k, text in texts.items() if k != AVERAGE})
        except PraError as error:
            asked = " ".join(f"{name}={text}" for name, text in texts.items())
            hint = "" if axes.keys().isdisjoint(LISTS) else "; a list is one value in brackets, as in times=[0,0.4,1]"
            raise PraError(f"--over {asked}: {error}{hint}", error.code, value=asked) from None
        settled = to_dict(sampling) | {AVERAGE: texts.get(AVERAGE)}
        point = Point({name: settled[name] for name in axes}, sampling)
        if len(point.name) > LONGEST:
            problem = f"--over: the file name {point.name[:40]}... has {len(point.name)} letters of at most {LONGEST}"
            raise PraError(f"{problem}. Vary fewer settings, or give common ones with --set", "too-large")
        found.setdefault(point.name, point)  # 1 and 1.0 are one
    return list(found.values())


def value_text(value: Any) -> str:
    """Return a value as it is written, with all digits: ``1.5``, ``heun``, ``0,0.8``, ``null``."""
    if isinstance(value, list | tuple):
        return ",".join(map(value_text, value))
    if isinstance(value, str):
        return value
    return json.dumps(value).removesuffix(".0")


PROTOCOL = Protocol.TORCH_FIDELITY.value
SHOWN = ("fid", "kid", "precision", "recall", "inception_score", "accuracy")
OPEN_ENDED = ("guidance", "temperature", "shift")
"""Settings whose best value may lie beyond those that were tried; more steps cost more."""
IMAGES = {"weights": "weights_sha256", "settings": "sampling", "labels": "labels", "seeds": "seeds"}
"""Fields of a report's images that a sweep holds fixed."""

COLUMNS, ROWS = 10, 20
"""Images of a combination, and combinations, the best ones, in the picture of samples."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00")
MARKERS = "os^DXv"
"""Colours and markers of lines; more lines could not be told apart."""


class Result(NamedTuple):
    """A point and its figures."""

    point: Point
    report: Report

    def figure(self, name: str) -> float | None:
        """Return a figure by torch-fidelity's protocol; None where it is missing or not finite."""
        value = self.report.figures.get(PROTOCOL, {}).get(name)
        return value if isinstance(value, int | float) and math.isfinite(value) else None


def ranked(results: Sequence[Result]) -> list[Result]:
    """Sort results by FID, the best first; those without one come last."""
    return sorted(results, key=lambda result: math.inf if (fid := result.figure("fid")) is None else fid)


def find_best(results: Sequence[Result]) -> Result | None:
    """Return the result with the lowest FID, the first of equal ones, or None without a finite FID."""
    best = ranked(results)[0]
    return None if best.figure("fid") is None else best


def table(results: Sequence[Result]) -> str:
    """Return a line per point, a column per figure that any has, the best FID marked."""
    names = [name for name in SHOWN if any(result.figure(name) is not None for result in results)]
    best = find_best(results)
    rows = [
        Row(result.point.name, [cell(result.figure(name)) for name in names], (0,) if result is best else ())
        for result in results
    ]
    return rendered(names, [Section(f"figures, {PROTOCOL}", rows)])


def hints(results: Sequence[Result], best: Result) -> Iterator[str]:
    """Yield a line for each setting whose best value is the last of those tried."""
    for name in OPEN_ENDED:
        tried = sorted({result.point.changes[name] for result in results if name in result.point.changes})
        value = best.point.changes.get(name)
        none = name == "guidance" and value == 1.0 == tried[0]  # guidance below 1 is useless
        if len(tried) > 1 and value in (tried[0], tried[-1]) and not none:
            end = "largest" if value == tried[-1] else "smallest"
            yield f"the best {name}, {value_text(value)}, is the {end} that was tried: a better value may lie beyond it"


def read_results(folder: Path, expected: dict[str, dict[str, Any]]) -> dict[str, Report]:
    """Return an earlier sweep's reports of the ``expected`` points, by name.

    The values of ``expected`` are the provenance that each report would have now. Refuse a file that is not a report.
    Refuse reports in the folder with another checkpoint, labels, seeds, features or reference: `pra compare` reads all.
    """
    found: dict[str, Report] = {}
    for path in sorted(folder.glob("*.json")):
        report, asked = evaluation(path), path.stem in expected
        if asked and (report is None or PROTOCOL not in report.figures):
            raise PraError(f"{path} is not a report of pra eval. Use another --out, or remove it", "exists", path=path)
        if report is None:
            continue
        before, now = report.provenance, expected[path.stem] if asked else next(iter(expected.values()))
        held = IMAGES
        if not asked:  # of other settings, and perhaps of another average of the checkpoint
            held = {what: field for what, field in IMAGES.items() if what != "settings"}
            weights = Path(now["images"]["model"]) / str(known(before, "images", "weights"))
            digest = {"weights_sha256": file_sha256(weights)} if weights.is_file() else {}
            now = now | {"images": now["images"] | digest}
        pairs = {what: (known(before, "images", field), known(now, "images", field)) for what, field in held.items()}
        other = {what: pair for what, pair in pairs.items() if pair[0] != pair[1]} | differing(before, now)
        for what, (there, here) in other.items():
            problem = f"{path} differs in the {what} ({shown(there)}; now {shown(here)})"
            raise PraError(f"{problem}. Use another --out, or remove {folder}", "mismatch", path=path, what=what)
        found |= {path.stem: report} if asked else {}
    return found


def judged(tried: Sequence[Point], subject: Subject, judge: Judge, folder: Path) -> list[Result]:
    """Judge every point as `pra eval` does, into ``folder``; the reports that lie there already are read."""
    world = judge.work.world
    averages = {name: subject.with_average(name) for name in dict.fromkeys(point.average for point in tried)}
    subjects = {point.name: averages[point.average].sampled_with(point.sampling) for point in tried}
    known = describe(judge.extractor, judge.reference, subject.count)
    expected = {name: known | {"images": one.provenance} for name, one in subjects.items()}
    found = world.run_on_first(lambda: read_results(folder, expected))
    for point in (point for point in tried if point.name not in found):
        try:
            strip: list[Tensor] = []
            report = judge.report(subjects[point.name], what=point.name, watch=partial(_kept, strip))
            if world.is_first:
                picture = contact_sheet(torch.stack(strip), COLUMNS)
                write_atomically(folder / f"{point.name}.png", picture.save, format="PNG")
                report.save(folder / f"{point.name}.json")
        except (KeyboardInterrupt, SystemExit) as stop:
            signum = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0) - 128
            what = f"stopped with {len(found)} of {len(tried)} combinations judged, in {folder}"
            raise Interrupted(signum, what) from None
        except NotFiniteError as error:
            if world.size > 1:  # the other processes go on with theirs
                raise
            warnings.warn(f"{point.name} has no figures: {error}", stacklevel=2)
            report = Report({}, {})
        found[point.name] = report
    return [Result(point, found[point.name]) for point in tried]


def _kept(strip: list[Tensor], batch: Batch) -> Batch:
    """Keep the first images of all, to be drawn."""
    strip += batch.images[: COLUMNS - len(strip)]
    return batch


# --- pictures -----------------------------------------------------------------------------------------------


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write the curves and all strips below each other; return the files, none where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    drawn = {folder / "sweep.png": curves(results), folder / "samples.jpg": _samples(results, folder)}
    figures = {path: figure for path, figure in drawn.items() if figure}
    for path, figure in figures.items():
        write_atomically(path, figure.savefig, format=path.suffix[1:], dpi=110)
    return list(figures)


def _samples(results: Sequence[Result], folder: Path) -> Figure | None:
    rows = []
    for result in ranked(results)[:ROWS]:
        # A sweep that was stopped between strip and figures leaves a strip missing or damaged.
        file = folder / f"{result.point.name}.png"
        with contextlib.suppress(OSError), open_image(check_regular(file)) as strip:
            lines = [f"{name} {value_text(value)}" for name, value in result.point.changes.items()]
            rows.append(("\n".join([*lines, f"FID {cell(result.figure('fid'))}"]), strip.copy()))
    return labelled_rows(rows) if rows else None


def curves(results: Sequence[Result]) -> Figure | None:
    """Draw FID, precision and recall along the first setting with several numbers, a line per value of the others."""
    from matplotlib.figure import Figure

    axis = next((name for name in results[0].point.changes if _varies(name, results)), None)
    if axis is None:
        return None
    lines: dict[str, list[Result]] = {}
    for result in ranked(results):  # the lines of the best FIDs, if there are more than colours
        others = (f"{name} {value_text(value)}" for name, value in result.point.changes.items() if name != axis)
        lines.setdefault(", ".join(others), []).append(result)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    if len(lines) > len(COLOURS):
        figure.suptitle(f"the {len(COLOURS)} best of {len(lines)} lines", fontsize=10)
    panels = figure.subplots(1, 3)
    for axes, name in zip(panels, ("fid", "precision", "recall"), strict=True):
        for (line, found), colour, marker in zip(lines.items(), COLOURS, MARKERS, strict=False):
            known = sorted((r.point.changes[axis], r.figure(name)) for r in found if r.figure(name) is not None)
            axes.plot(*zip(*known, strict=True) if known else ([], []), marker=marker, color=colour, label=line)
        title = "FID (lower is better)" if name == "fid" else f"{name} (higher is better)"
        axes.set(xlabel="guidance scale" if axis == "guidance" else axis, title=title)
        axes.grid(alpha=0.3)
    if best := find_best(results):
        panels[0].plot(best.point.changes[axis], best.figure("fid"), "o", ms=12, mfc="none", mec="black")
    if len(lines) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def _varies(name: str, results: Sequence[Result]) -> bool:
    values = [result.point.changes[name] for result in results]
    return len(set(map(str, values))) > 1 and all(type(value) in (int, float) for value in values)


def labelled_rows(rows: Sequence[tuple[str, Image.Image]]) -> Figure:
    """Draw pictures of one size, grey or RGB, below each other with titles on the left. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.82 * len(rows)))
    grid = {"left": 0.19, "right": 1, "bottom": 0, "top": 1, "hspace": 0}
    panels = figure.subplots(len(rows), 1, squeeze=False, gridspec_kw=grid)
    for axes, (title, picture) in zip(panels.flat, rows, strict=True):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axes.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=10)
        axes.set(xticks=[], yticks=[], frame_on=False)
    return figure

"""The commands ``pra probe`` and ``pra features``: thin."""

from __future__ import annotations

import dataclasses
import math
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import Positional, arg

from pra.commands.options import Average, Device, File, Flag, Integer, Number, Settings, Text, parse_numbers
from pra.config import DataConfig, RunConfig, apply_settings, to_dict
from pra.data import open_source
from pra.errors import PraError, counted, nearest
from pra.evaluation.compare import Row, Section, rendered
from pra.evaluation.judging import check_at_least, open_model
from pra.evaluation.outputs import check_outputs
from pra.evaluation.probe import (
    LINEAR,
    POOLINGS,
    VALIDATED,
    Figure,
    Layers,
    Pixels,
    Task,
    Vectors,
    export_features,
    find_linear,
    held_out,
)
from pra.evaluation.samples import prepared, spread
from pra.models import Model, build_model, weights
from pra.training.run import write_json
from pra.utils.distributed import join
from pra.utils.provenance import environment

MODEL = "A run's folder, a checkpoint, a saved model or hub:user/model."
Run = Annotated[Positional[Path], arg(metavar="RUN", help=MODEL)]


@dataclass(frozen=True)
class Adjustable:
    """The settings that ``--set`` reaches: how images are prepared."""

    data: DataConfig


@dataclass(frozen=True)
class Reading:
    """Options of both commands: which images a model reads, and how."""

    data: Text = None
    """A source such as digits or folder:PATH; by default the run's data."""
    time: Number = None
    """JiT's flow time, 0 (noise) to 1 (the clean image)."""
    num: Integer = None
    """Largest number of images of a source, evenly spread; by default all."""
    average: Average = weights.EMA
    batch_size: int = 256
    """Images at a time; no figure or feature depends on it."""
    device: Device = None
    settings: Settings = ()
    """Setting of how images are prepared, such as data.fit=pad; may be repeated."""

    def open(self, run: Path, device: torch.device) -> tuple[Model, RunConfig | None, DataConfig, dict[str, Any]]:
        """Load a model; return it, its run, how its images are prepared, and the provenance, flow time included."""
        check_at_least(1, batch_size=self.batch_size, num=self.num)
        model, config, known = open_model(run, self.average, device)
        chosen = apply_settings(Adjustable(config.data if config else DataConfig(source="")), self.settings).data
        chosen = replace(chosen, source=self.data or chosen.source)
        if not chosen.source:
            raise PraError(f"{run} does not name its data. Give --data SRC", "missing", path=run)
        time = model.config.reading_time if self.time is None else self.time
        known |= {"prepared": to_dict(chosen), "label": "null class", "environment": environment(), "time": time}
        return model, config, chosen, known


ReadingOptions = Annotated[Reading, arg(name="")]


def probe_command(
    run: Run,
    *,
    test: Text = None,
    layers: Annotated[str, arg(metavar="all|3,6")] = "all",
    classifier: Annotated[str, arg(metavar="|".join(LINEAR))] = "sgd",
    only_run: Flag = False,
    out: File = None,
    options: ReadingOptions = Reading(),
) -> None:
    """Probe a frozen model: how well a linear classifier reads the class from each layer.

    The model reads clean images under the null class. Raw pixels and the same model with initial weights stand beside
    it. Several GPUs share the images: torchrun --nproc-per-node 8 -m pra probe RUN ...

    Args:
        test: Where to judge classifiers; by default the held-out part of the data (digits@test of digits).
        layers: Layers, counted from 1, such as 3,6 or 2-5; or all.
        classifier: sgd, with MAE's schedule, or logistic, a regression under L2 (needs scikit-learn).
        only_run: Leave out raw pixels and initial weights.
        out: Write figures and provenance as JSON.
    """
    with join() as world:
        check_outputs(report=out)
        linear = find_linear(classifier)
        target = world.device(options.device)
        model, origin, data, known = options.open(run, target)
        config, every, time = model.config, range(1, 1 + len(model.blocks)), known.pop("time")
        asked = list(every if layers == "all" else dict.fromkeys(parse_numbers(layers, "--layers")))
        task = Task.open(data, data.source, test or held_out(data.source), options.num)
        subjects: list[Vectors] = [Layers(model, asked, time, "run")]
        if not only_run:
            fresh = build_model(config, origin.train.seed if origin else 0).to(target).eval()
            subjects += [Layers(fresh, asked, time, "random"), Pixels()]
        how = (linear, config.image_size, config.channels, target, options.batch_size)
        figures = {subject.name: task.figures(subject, *how, world=world) for subject in subjects}
        if world.is_first:
            protocol = {
                "classifier": linear.name, "chosen": linear.setting, "values": linear.values, "time": time,
                "validated": f"every {VALIDATED}th of {task.train.name}",
            }  # fmt: skip
            _finish(task, figures, {"protocol": protocol, "processes": world.size, **known}, out)


def features_command(
    run: Run,
    *,
    layer: int,
    out: Path,
    pooling: Annotated[str, arg(metavar="mean|last|both")] = "mean",
    options: ReadingOptions = Reading(),
) -> None:
    """Write one layer's features of a data set as an .npz: features, labels, and where they come from.

    The model reads clean images under the null class. Only a batch is in memory at a time.

    Args:
        layer: Counted from 1.
        out: FILE.npz, with features float32 (N, D), labels int64 (N,) and pra, a JSON text.
        pooling: The mean of the tokens, the last of them, or both one after the other.
    """
    out = out.expanduser()
    check_outputs(features=out)
    with join() as world:
        if world.size > 1:
            raise PraError("pra features is for one process. Start it without torchrun", "unsupported")
        model, _, data, origin = options.open(run, world.device(options.device))
        there = POOLINGS if model.config.autoregressive else POOLINGS[:1]
        if pooling not in there:
            raise PraError(f"--pooling {pooling!r} is unknown{nearest(pooling, there)}", "unknown", value=pooling)
        chosen_layer, config, source = Layers(model, [layer], origin["time"]), model.config, open_source(data.source)
        chosen = spread(len(source), min(options.num or len(source), len(source)))
        known = {
            "source": source.name, "classes": source.classes, "count": len(chosen), "of": len(source),
            "layer": layer, "pooling": pooling, **origin,
        }  # fmt: skip
        with closing(prepared(source, chosen, config.image_size, config.channels, data, options.batch_size)) as batches:
            export_features(out, chosen_layer, pooling, batches, len(chosen), known)
    print(f"{counted(len(chosen), 'image')} of {source.name}, layer {layer}, {pooling}: {out}")


def _finish(task: Task, figures: dict[str, list[Figure]], known: dict[str, Any], out: Path | None) -> None:
    """Print the figures, and write them with what is ``known`` of them."""
    data = {"train": task.train.name, "fitted": len(task.chosen), "test": task.test.name, "judged": len(task.asked)}
    chosen = {name: max(found, key=lambda figure: figure.validation) for name, found in figures.items()}
    report = {
        "figures": {name: list(map(dataclasses.asdict, found)) for name, found in figures.items()},
        "chosen": {name: dataclasses.asdict(figure) for name, figure in chosen.items()},
        "provenance": {"data": data, **known},
    }
    if out:
        write_json(out, report)
    cells = {
        (f"layer {figure.layer}", f"{name} {figure.pooling}"): f"{100 * figure.top1:.1f}"
        for name, measured in figures.items()
        for figure in measured
        if figure.layer
    }
    columns = list(dict.fromkeys(column for _, column in cells))
    layers = dict.fromkeys(layer for layer, _ in cells)
    rows = [Row(layer, [cells[layer, column] for column in columns]) for layer in layers]
    print(rendered(columns, [Section("by layer", rows)]))
    print(
        f"top-1 in % on {len(task.asked)} images of {task.test.name}, {known['protocol']['classifier']} fitted to "
        f"{len(task.chosen)} of {task.train.name}; layer and pooling chosen on a tenth of those:"
    )
    for name, figure in chosen.items():
        error = math.sqrt(figure.top1 * (1 - figure.top1) / len(task.asked))
        where = f", layer {figure.layer}, {figure.pooling}" if figure.layer else ""
        print(f"  {name}{where}: {100 * figure.top1:.1f} ± {100 * error:.1f} (standard error)")
    if out:
        print(f"  report: {out}")

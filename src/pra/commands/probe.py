"""The commands ``pra probe`` and ``pra features``: thin."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import Positional, arg

from pra.commands.options import Average, File, Flag, Integer, Number, Settings, Text, parse_numbers
from pra.config import DataConfig, RunConfig, apply_settings, to_dict
from pra.data import open_source
from pra.data.loader import reading
from pra.errors import PraError, nearest
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
    best,
    export_features,
    find_linear,
    held_out,
)
from pra.evaluation.samples import prepared, spread
from pra.models import Model, build_model, weights
from pra.training.run import write_json
from pra.utils.distributed import join
from pra.utils.provenance import environment


@dataclass(frozen=True)
class Adjustable:
    """What ``--set`` reaches: how images are prepared."""

    data: DataConfig


def probe_command(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    data: Text = None,
    test: Text = None,
    layers: Annotated[str, arg(metavar="all|3,6")] = "all",
    classifier: Annotated[str, arg(metavar="|".join(LINEAR))] = "sgd",
    time: Number = None,
    num: Integer = None,
    only_run: Flag = False,
    average: Average = weights.EMA,
    out: File = None,
    batch_size: int = 256,
    device: Text = None,
    settings: Settings = (),
) -> None:
    """Probe a frozen model: how well a linear classifier reads the class from each layer.

    The model reads clean images under the null class. Raw pixels and the same model with initial weights stand beside
    it. Several GPUs share the images: torchrun --nproc-per-node 8 -m pra probe RUN ...

    Args:
        run: A run's folder, a checkpoint, a saved model or hub:user/model.
        data: Where to fit classifiers, such as digits or folder:PATH; by default what the run learnt from.
        test: Where to judge them; by default the held-out part of the data (digits@test of digits).
        layers: Layers, counted from 1, such as 3,6 or 2-5; or all.
        classifier: sgd, with MAE's schedule, or logistic, a regression under L2 (needs scikit-learn).
        time: JiT's flow time, 0 (noise) to 1 (the clean image).
        num: Images to take of each at most, evenly spread; by default all.
        only_run: Leave out raw pixels and initial weights.
        average: Which weights of a run: ema, raw, or another of its averages, such as power-0.05.
        out: Write figures and provenance as JSON.
        batch_size: Images at a time; no figure depends on it.
        device: cpu, cuda, cuda:1 or mps; by default the best there is.
        settings: How images are prepared, such as data.fit=pad; may be repeated.
    """
    with join() as world:
        check_outputs(report=out)
        linear = find_linear(classifier)
        check_at_least(1, batch_size=batch_size, num=num)
        target = world.device(device)
        model, origin, prepared_as, time, known = _open(run, data, settings, target, average, time)
        config, every = model.config, range(1, 1 + len(model.blocks))
        asked = list(every if layers == "all" else dict.fromkeys(parse_numbers(layers, "--layers")))
        task = Task.open(prepared_as, prepared_as.source, test or held_out(prepared_as.source), num)
        subjects: list[Vectors] = [Layers(model, asked, time, "run")]
        if not only_run:
            fresh = build_model(config, origin.train.seed if origin else 0).to(target).eval()
            subjects += [Layers(fresh, asked, time, "random"), Pixels(config.image_size, config.channels)]
        how = (linear, config.image_size, config.channels, target, batch_size)
        figures = {subject.name: task.figures(subject, *how, world=world) for subject in subjects}
        if world.is_first:
            protocol = {
                "classifier": linear.name, "chosen": linear.setting, "values": linear.values, "time": time,
                "validated": f"every {VALIDATED}th of {task.train.name}",
            }  # fmt: skip
            published = origin.targets.linear_probe if origin and origin.targets else None
            _finish(task, figures, published, {"protocol": protocol, "processes": world.size, **known}, out)


def features_command(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    layer: int,
    out: Path,
    data: Text = None,
    pooling: Annotated[str, arg(metavar="mean|last|both")] = "mean",
    time: Number = None,
    num: Integer = None,
    average: Average = weights.EMA,
    batch_size: int = 256,
    device: Text = None,
    settings: Settings = (),
) -> None:
    """Write one layer's features of a data set as an .npz: features, labels, and where they come from.

    The model reads clean images under the null class. Only a batch is in memory at a time.

    Args:
        run: A run's folder, a checkpoint, a saved model or hub:user/model.
        layer: Counted from 1.
        out: FILE.npz, with features float32 (N, D), labels int64 (N,) and pra, a JSON text.
        data: A source such as digits@test or folder:PATH; by default what the run learnt from.
        pooling: The mean of the tokens, the last of them, or both one after the other.
        time: JiT's flow time, 0 (noise) to 1 (the clean image).
        num: Images to take at most, evenly spread; by default all.
        average: Which weights of a run: ema, raw, or another of its averages, such as power-0.05.
        batch_size: Images at a time; no feature depends on it.
        device: cpu, cuda, cuda:1 or mps; by default the best there is.
        settings: How images are prepared, such as data.fit=pad; may be repeated.
    """
    out = out.expanduser()
    check_outputs(features=out)
    if pooling not in POOLINGS:
        raise PraError(f"--pooling {pooling!r} is unknown{nearest(pooling, POOLINGS)}", "unknown", value=pooling)
    check_at_least(1, batch_size=batch_size, num=num)
    with join() as world:
        if world.size > 1:
            raise PraError("pra features is for one process. Start it without torchrun", "unsupported")
        target = world.device(device)
        model, _, prepared_as, time, origin = _open(run, data, settings, target, average, time)
        chosen_layer, config = Layers(model, [layer], time), model.config
        source = open_source(prepared_as.source)
        chosen = spread(len(source), min(num or len(source), len(source)))
        known = {
            "source": source.name, "classes": source.classes, "count": len(chosen), "of": len(source),
            "layer": layer, "pooling": pooling, "time": time, **origin,
        }  # fmt: skip
        with reading(prepared(source, chosen, config.image_size, config.channels, prepared_as, batch_size)) as batches:
            export_features(out, chosen_layer, pooling, batches, len(chosen), target, known)
    print(f"{len(chosen)} images of {source.name}, layer {layer}, {pooling}: {out}")


def _open(
    target: Path, data: str | None, settings: tuple[str, ...], device: torch.device, average: str, time: float | None
) -> tuple[Model, RunConfig | None, DataConfig, float | None, dict[str, Any]]:
    """Load a model; return it, its run, how its images are prepared, its flow time, and the provenance."""
    model, run, known = open_model(target, average, device)
    chosen = apply_settings(Adjustable(run.data if run else DataConfig(source="")), settings).data
    chosen = replace(chosen, source=data or chosen.source)
    if not chosen.source:
        raise PraError(f"{target} does not name its data. Give --data SRC", "missing", path=target)
    known |= {"prepared": to_dict(chosen), "label": "null class", "environment": environment()}
    return model, run, chosen, model.config.reading_time if time is None else time, known


def _finish(
    task: Task, figures: dict[str, list[Figure]], published: float | None, known: dict[str, Any], out: Path | None
) -> None:
    data = {"train": task.train.name, "fitted": len(task.chosen), "test": task.test.name, "judged": len(task.asked)}
    report = {
        "figures": {name: [dataclasses.asdict(figure) for figure in found] for name, found in figures.items()},
        "chosen": {name: dataclasses.asdict(best(found)) for name, found in figures.items()},
        "target": published,
        "provenance": {"data": data, **known},
    }
    if out:
        write_json(out, report)
    print(table(figures))
    print(
        f"top-1 in % on {len(task.asked)} images of {task.test.name}, {known['protocol']['classifier']} fitted to "
        f"{len(task.chosen)} of {task.train.name}; layer and pooling chosen on a tenth of those:"
    )
    for name, found in figures.items():
        figure = best(found)
        error = math.sqrt(figure.top1 * (1 - figure.top1) / len(task.asked))
        where = f", layer {figure.layer}, {figure.pooling}" if figure.layer else ""
        print(f"  {name}{where}: {100 * figure.top1:.1f} ± {100 * error:.1f} (standard error)")
    if published:
        print(f"  the paper's figure on ImageNet: {100 * published:.1f}")
    if out:
        print(f"  report: {out}")


def table(figures: dict[str, list[Figure]]) -> str:
    """Return top-1 in percent of what has layers: one a line, a column per pooling of the run and of random weights."""
    cells = {
        (figure.layer, f"{name} {figure.pooling}"): f"{100 * figure.top1:.1f}"
        for name, found in figures.items()
        for figure in found
        if figure.layer
    }
    columns = list(dict.fromkeys(column for _, column in cells))
    lines = [f"{'layer':>5}" + "".join(f"{column:>13}" for column in columns)]
    for layer in dict.fromkeys(layer for layer, _ in cells):
        lines.append(f"{layer:>5}" + "".join(f"{cells.get((layer, column), ''):>13}" for column in columns))
    return "\n".join(lines)

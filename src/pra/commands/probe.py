"""The commands ``pra probe`` and ``pra features``: thin."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import Positional, arg

import pra.models.weights
from pra.commands.options import Average, File, Flag, Integer, Number, Settings, Text, parse_numbers
from pra.config import DataConfig, RunConfig, apply_settings, to_dict
from pra.data import open_source
from pra.data.loader import reading
from pra.errors import PraError, nearest
from pra.evaluation.outputs import Outputs
from pra.evaluation.probe import Figure, Task, best, held_out
from pra.evaluation.probe_export import export_features
from pra.evaluation.probe_features import Layers, Pixels, Pooling, Vectors
from pra.evaluation.probe_linear import LINEAR, VALIDATED, find_linear
from pra.evaluation.samples import prepared, spread
from pra.models import Model, build_model
from pra.training.run import read_run
from pra.utils.distributed import World, join
from pra.utils.files import check_output, write_atomically
from pra.utils.provenance import environment, file_sha256


@dataclass(frozen=True)
class Adjustable:
    """What ``--set`` reaches: how images are prepared."""

    data: DataConfig


@dataclass(frozen=True)
class Opened:
    """A model to be looked into, the name of its weights' file, the run it is of (None of a saved one), and how its
    images are prepared."""

    model: Model
    folder: Path
    weights: str
    run: RunConfig | None
    data: DataConfig

    @staticmethod
    def open(target: Path, data: str | None, settings: tuple[str, ...], device: torch.device, average: str) -> Opened:
        """Loads it.

        Raises:
            PraError: no model there, no such average, an unknown setting, or no data where it does not say which are
                its own.
        """
        folder = pra.models.weights.model_folder(target)
        where = pra.models.weights.run_of(folder)
        run = read_run(where) if where else None
        chosen = apply_settings(Adjustable(run.data if run else DataConfig(source="")), settings).data
        chosen = replace(chosen, source=data or chosen.source)
        if not chosen.source:
            raise PraError(f"{target} does not say which data it belongs to; give --data SRC")
        name = pra.models.weights.weights_name(folder, average)
        return Opened(pra.models.weights.load(folder, average, device), folder, name, run, chosen)

    @property
    def provenance(self) -> dict[str, Any]:
        """For a report."""
        return {
            "model": str(self.folder),
            "weights": self.weights,
            "weights_sha256": file_sha256(self.folder / self.weights),
            "prepared": to_dict(self.data),
            "label": "null class",
            "environment": environment(),
        }


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
    average: Average = pra.models.weights.EMA,
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
        Outputs(out).check()
        linear = find_linear(classifier)
        _at_least_1("--batch-size", batch_size)
        target = world.device(device)
        opened = Opened.open(run, data, settings, target, average)
        asked = _layers(layers, opened.model)
        time = opened.model.config.reading_time if time is None else time
        task = Task.open(opened.data, opened.data.source, test or held_out(opened.data.source), _count(num))
        config = opened.model.config
        subjects: list[Vectors] = [Layers(opened.model, asked, time, "run")]
        if not only_run:
            fresh = build_model(config, opened.run.train.seed if opened.run else 0).to(target).eval()
            subjects += [Layers(fresh, asked, time, "random"), Pixels(config.image_size, config.channels)]
        figures = {
            subject.name: task.figures(
                subject, linear, config.image_size, config.channels, target, batch_size, world=world
            )
            for subject in subjects
        }
        if world.is_first:
            known = {"classifier": linear.name, "chosen": linear.setting, "values": linear.values, "time": time}
            known |= {"validated": f"every {VALIDATED}th of {task.train.name}"}
            _finish(opened, task, figures, known, world, out)


def features_command(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    layer: int,
    out: Path,
    data: Text = None,
    pooling: Annotated[str, arg(metavar="mean|last|both")] = "mean",
    time: Number = None,
    num: Integer = None,
    average: Average = pra.models.weights.EMA,
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
    if out.suffix.lower() != ".npz":
        raise PraError(f"{out}: features are written as FILE.npz; choose such an --out")
    check_output(out)
    if pooling not in [kind.value for kind in Pooling]:
        raise PraError(f"--pooling {pooling!r} is unknown{nearest(pooling, [kind.value for kind in Pooling])}")
    _at_least_1("--batch-size", batch_size)
    with join() as world:
        if world.size > 1:
            raise PraError(f"pra features is for one process, not {world.size}; start it without torchrun")
        target = world.device(device)
        opened = Opened.open(run, data, settings, target, average)
        time = opened.model.config.reading_time if time is None else time
        chosen_layer = Layers(opened.model, _layers(str(layer), opened.model), time)
        source = open_source(opened.data.source)
        chosen = spread(len(source), min(_count(num) or len(source), len(source)))
        config = opened.model.config
        known = {
            "source": source.name, "classes": source.classes, "count": len(chosen), "of": len(source),
            "layer": layer, "pooling": pooling, "time": time, **opened.provenance,
        }  # fmt: skip
        with reading(prepared(source, chosen, config.image_size, config.channels, opened.data, batch_size)) as batches:
            export_features(out, chosen_layer, Pooling(pooling), batches, len(chosen), target, known)
    print(f"{len(chosen)} images of {source.name}, layer {layer}, {pooling}: {out}")


def _layers(text: str, model: Model) -> list[int]:
    if text == "all":
        return list(range(1, 1 + len(model.blocks)))
    return list(dict.fromkeys(parse_numbers(text, "--layers")))


def _count(num: int | None) -> int | None:
    if num is not None:
        _at_least_1("--num", num)
    return num


def _at_least_1(option: str, value: int) -> None:
    if value < 1:
        raise PraError(f"{option} {value} must be at least 1")


def _finish(
    opened: Opened,
    task: Task,
    figures: dict[str, list[Figure]],
    protocol: dict[str, Any],
    world: World,
    out: Path | None,
) -> None:
    target = opened.run.targets.linear_probe if opened.run and opened.run.targets else None
    data = {"train": task.train.name, "fitted": len(task.chosen), "test": task.test.name, "judged": len(task.asked)}
    report = {
        "figures": {name: [dataclasses.asdict(figure) for figure in found] for name, found in figures.items()},
        "chosen": {name: dataclasses.asdict(best(found)) for name, found in figures.items()},
        "target": target,
        "provenance": {"data": data, "protocol": protocol, "processes": world.size, **opened.provenance},
    }
    if out:
        text = json.dumps(report, indent=2) + "\n"
        write_atomically(out, lambda file: file.write(text.encode()))
    print(table(figures))
    print(
        f"top-1 in % on {len(task.asked)} images of {task.test.name}, {protocol['classifier']} fitted to "
        f"{len(task.chosen)} of {task.train.name}; layer and pooling chosen on a tenth of those:"
    )
    for name, found in figures.items():
        figure = best(found)
        error = math.sqrt(figure.top1 * (1 - figure.top1) / len(task.asked))
        where = f", layer {figure.layer}, {figure.pooling}" if figure.layer else ""
        print(f"  {name}{where}: {100 * figure.top1:.1f} ± {100 * error:.1f} (standard error)")
    if target:
        print(f"  the paper's figure on ImageNet: {100 * target:.1f}")
    if out:
        print(f"  report: {out}")


def table(figures: dict[str, list[Figure]]) -> str:
    """Top-1 in percent of what has layers: one a line, a column per pooling of the run and of initial weights."""
    figures = {name: [figure for figure in found if figure.layer] for name, found in figures.items()}
    columns = {
        (name, figure.pooling): f"{name} {figure.pooling}" for name, found in figures.items() for figure in found
    }
    lines = [f"{'layer':>5}" + "".join(f"{head:>13}" for head in columns.values())]
    for layer in dict.fromkeys(figure.layer for found in figures.values() for figure in found):
        cells = {
            (name, figure.pooling): f"{100 * figure.top1:.1f}"
            for name, found in figures.items()
            for figure in found
            if figure.layer == layer
        }
        lines.append(f"{layer:>5}" + "".join(f"{cells.get(key, ''):>13}" for key in columns))
    return "\n".join(lines)

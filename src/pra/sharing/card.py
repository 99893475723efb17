"""The model card: Markdown under YAML, written from what is known of a model; what is not known is not said."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pra.config import RunConfig, to_dict
from pra.evaluation.evaluate import Report
from pra.models import Model, count_parameters, weights
from pra.sharing.origin import SAMPLES, Origin, Training
from pra.training.plots import CURVES
from pra.utils.hub import is_address, repo_id

DATASETS = {"idx:/usr/share/datasets/fashion-mnist": "zalando-datasets/fashion_mnist"}
"""Sources that are certain to be a data set of the Hub."""
MOST_CLASSES, MOST_SHOWN = 30, 10
"""That are named in a card, and that its command draws."""


def write_card(origin: Origin, name: str, address: str, licence: str | None, half: bool) -> str:
    """The whole card.

    Args:
        origin: what is known.
        name: the title.
        address: what to give to :func:`pra.load`; empty of the model that pra ships.
        licence: the Hub's name of it; None where the author states none.
        half: whether the weights are rounded to float16.
    """
    parts = [
        _front_matter(origin, licence),
        [f"# {name}", "", _summary(origin.model)],
        [f"![Samples](./{SAMPLES})"] if SAMPLES in origin.files else [],
        _use(origin.model, address),
        _model(origin.model, half),
        _training(origin.training, origin.average, CURVES in origin.files) if origin.training else [],
        _figures(origin.reports, half),
        _limits(origin),
        ["## Licence", "", f"`{licence}`" if licence else "The author of these weights states none."],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _front_matter(origin: Origin, licence: str | None) -> list[str]:
    config = origin.model.config
    kind = ["class-conditional-image-generation"] if config.num_classes > 1 else []
    dataset = DATASETS.get(origin.training.config.data.source) if origin.training else None
    initial = origin.training.config.initial if origin.training else None
    values: dict[str, Any] = {
        "license": licence,
        "library_name": "pra",
        # The Hub has no task of its own for generation by class.
        "pipeline_tag": "unconditional-image-generation",
        "base_model": repo_id(initial.partition("@")[0]) if initial and is_address(initial) else None,
        "tags": ["image-generation", "pixel-space", "flow-matching", *config.tags, *kind],
        "datasets": dataset and [dataset],
    }
    # JSON is YAML.
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in values.items() if value), "---"]


def _summary(model: Model) -> str:
    config = model.config
    height, width = config.image_size
    classes = f", {config.num_classes} classes" if config.num_classes > 1 else ", without classes"
    return (
        f"{config.title} {height}x{width} pixels (height x width), {config.channels} "
        f"channel{'s' if config.channels > 1 else ''}{classes}. Made with `pra`, Parallel Rollout Approximation for "
        "Pixel-Space Autoregressive Image Generation ([arXiv 2606.27978](https://arxiv.org/abs/2606.27978))."
    )


def _use(model: Model, address: str) -> list[str]:
    labels = list(range(min(2, model.config.num_classes)))
    sampling, shown = model.sampling, f"{shlex.quote(address)} " if address else ""
    drawn = "all" if model.config.num_classes <= MOST_SHOWN else f"0-{MOST_SHOWN - 1}"
    return [
        "## Use",
        "",
        "```python",
        "import pra",
        "",
        f"model = pra.load({json.dumps(address) if address else ''})",
        f"images = pra.Sampler(model).sample(labels={labels}, seeds={labels})  # (B, C, H, W) in [-1, 1]",
        "picture = pra.to_pil(images[0])",
        "```",
        "",
        "```console",
        f"$ pra sample {shown}--labels {drawn} --seeds 0-7",
        "```",
        "",
        f"Recommended, and the default: guidance {sampling.guidance:g} ({sampling.schedule.value}), {sampling.steps} "
        f"{sampling.solver.value} steps per {model.config.unit}, temperature "
        f"{sampling.temperature:g}.",
    ]


def _model(model: Model, half: bool) -> list[str]:
    config, parts = model.config, count_parameters(model.config)
    rows, columns = config.grid
    shown = ", ".join(f"{part} {count / 1e6:.3g} M" for part, count in parts.items())
    lines = [
        "## Model",
        "",
        f"- {sum(parts.values()) / 1e6:.3g} M parameters ({shown}), stored as {'float16' if half else 'float32'}",
        f"- {rows * columns} patches of {config.patch_size}x{config.patch_size} pixels",
    ]
    if config.codec is not None:
        lines.append(f"- a state of {config.codec.state_dim} numbers per patch of {config.patch_dim}")
    names = list(dict.fromkeys(model.classes))
    if names != [str(number) for number in range(len(names))]:
        more = f" and {len(names) - MOST_CLASSES} more, in config.json" if len(names) > MOST_CLASSES else ""
        lines.append(f"- classes: {', '.join(names[:MOST_CLASSES])}{more}")
    return lines


def _training(training: Training, average: str, curves: bool) -> list[str]:
    config, origin = training.config, training.environment
    train = config.train
    lines = [
        "## Training",
        "",
        f"- recipe `{config.recipe}`{_rollout(config)}; the weights are {_average(config, average)}",
        f"- data: `{_public(config.data.source)}`, brought to size by `{config.data.fit.value}`"
        + (", flipped at random" if config.data.flip else ""),
        f"- {training.step} steps of {train.batch_size} images, learning rate {train.optimizer.rates()} "
        f"({train.optimizer.schedule.value}), seed {train.seed}",
    ]
    if config.initial:
        name = config.initial if is_address(config.initial) else Path(config.initial).name
        lines.append(f"- fine-tuned: began with the weights of `{name}`")
    hardware, versions = origin.get("hardware", {}), origin.get("versions", {})
    if training.seconds:
        lines.append(f"- {_duration(training.seconds)} in training steps (from the run's log)")
    if hardware:
        lines.append(f"- hardware, when last started: {hardware.get('device')}, {hardware.get('cpus')} CPU cores")
    if versions:
        made = [f"{name} {versions[name]}" for name in ("pra", "torch", "python") if versions.get(name)]
        commit = f", commit `{origin['commit']}`" if origin.get("commit") else ""
        lines.append(f"- made with {', '.join(made)}{commit}")
    return [*lines, "", f"![Training curves](./{CURVES})"] if curves else lines


def _average(config: RunConfig, name: str) -> str:
    if name == weights.RAW:
        return "those of the last step"
    if name == weights.EMA:
        return f"their exponential moving average (decay {config.train.optimizer.ema_decay:g})"
    length = name.removeprefix(weights.POWER)
    return f"their power-function average of relative length {length} (arXiv 2312.02696)"


def _rollout(config: RunConfig) -> str:
    inputs = f", AR inputs `{json.dumps(to_dict(config.train.rollout))}`"
    return inputs if config.model.autoregressive else ""


def _figures(reports: dict[str, Report], half: bool) -> list[str]:
    if not reports:
        return ["## Figures", "", "None: nobody has run `pra eval` on these weights."]
    lines = ["## Figures", ""]
    for name, report in reports.items():
        lines += ["```text", report.table(), "```", "", *_provenance(name, report.provenance), ""]
    if half:
        lines += ["Measured with the weights before they were rounded to float16.", ""]
    return lines[:-1]


def _provenance(name: str, known: dict[str, Any]) -> list[str]:
    images, reference, features = known["images"], known["reference"], known["features"]
    sampling, origin = images["sampling"], known.get("environment", {})
    hardware, versions = origin.get("hardware", {}), origin.get("versions", {})
    accuracy = features.get("held_out_accuracy")
    return [
        f"- {images['count']} images: labels {images['labels']}, seeds {images['seeds']}, guidance "
        f"{sampling['guidance']:g} ({sampling['schedule']}), {sampling['steps']} {sampling['solver']} steps, "
        f"temperature {sampling['temperature']:g}",
        f"- reference: `{_public(reference['name'])}`, {reference['count']} images",
        f"- features: {features['name']}, SHA-256 `{features['sha256']}`"
        + (f", accuracy {accuracy:.4g} on held-out images" if accuracy is not None else ""),
        f"- measured by pra {versions.get('pra')}, torch {versions.get('torch')} on {hardware.get('device')}"
        + (f", commit `{origin['commit']}`" if origin.get("commit") else ""),
        f"- all of it, and the hash of the weights: [{name}](./{name})",
    ]


def _limits(origin: Origin) -> list[str]:
    model = origin.model
    height, width = model.config.image_size
    lines = ["## Limits", "", f"- Images of {height}x{width} only, of what the training data show."]
    if model.can_complete:
        lines.append("- Patches are written in raster order: faint seams may show along their borders.")
    else:
        lines.append("- Makes all patches at once: cannot complete an image.")
    lines.append("- Whether it repeats training images, and how it treats who is in them, has not been examined.")
    return lines


def _public(source: str) -> str:
    """A data source without the folders above it, which are nobody's business."""
    kind, colon, path = source.partition(":")
    return f"{kind}:{Path(path).name}" if colon else source


def _duration(seconds: float) -> str:
    units: Sequence[tuple[float, str]] = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
    size, unit = next(((size, unit) for size, unit in units if seconds >= 2 * size), units[-1])
    return f"{seconds / size:.3g} {unit}"

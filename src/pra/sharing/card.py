"""The model card, written from what is known of a model: ``card.md`` is its template."""

from __future__ import annotations

import functools
import json
import shlex
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader, Template

from pra.config import RunConfig, to_dict
from pra.models import count_parameters, weights
from pra.sharing.origin import SAMPLES, Origin
from pra.training.plots import CURVES
from pra.utils.hub import is_address, repo_id

DATASETS = {"idx:/usr/share/datasets/fashion-mnist": "zalando-datasets/fashion_mnist"}
"""Sources that are certain to be a data set of the Hub."""
MOST_CLASSES, MOST_SHOWN = 30, 10
"""Classes that a card names, and that its command draws."""


def write_card(origin: Origin, name: str, address: str, licence: str | None, half: bool) -> str:
    """Return the card as Markdown under YAML. It does not mention what is not known.

    Args:
        origin: what is known.
        name: the title.
        address: what to give to :func:`pra.load`; empty for the model that pra ships.
        licence: its name on the Hub, or ``None`` where the author states none.
        half: whether the weights are rounded to float16.
    """
    model, run = origin.model, origin.training and origin.training.config
    config = model.config
    height, width = config.image_size
    return _template().render(
        origin=origin,
        front_matter=_front_matter(origin, licence),
        name=name,
        address=address,
        licence=licence,
        half=half,
        config=config,
        sampling=model.sampling,
        can_complete=model.can_complete,
        height=height,
        width=width,
        parts=count_parameters(config),
        classes=_classes(model.classes),
        first=list(range(min(2, config.num_classes))),
        drawn="all" if config.num_classes <= MOST_SHOWN else f"0-{MOST_SHOWN - 1}",
        rollout=run and to_dict(run.train.rollout),
        average=run and _average(run, origin.average),
        samples=SAMPLES,
        curves=CURVES,
    )


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("pra.sharing", ""),
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "json": json.dumps,
        "quote": shlex.quote,
        "public": _public,
        "place": lambda initial: initial if is_address(initial) else Path(initial).name,
        "duration": _duration,
        "millions": lambda count: f"{count / 1e6:.3g} M",
        "g": lambda value: f"{value:g}",
        "g4": lambda value: f"{value:.4g}",
    }
    return environment.get_template("card.md")


def _front_matter(origin: Origin, licence: str | None) -> dict[str, Any]:
    """Return the Hub's fields by name; as JSON their values are YAML."""
    config, run = origin.model.config, origin.training and origin.training.config
    initial = run.initial if run else None
    dataset = DATASETS.get(run.data.source) if run else None
    kind = ["class-conditional-image-generation"] if config.num_classes > 1 else []
    return {
        "license": licence,
        "library_name": "pra",
        # The Hub has no task of its own for generation by class.
        "pipeline_tag": "unconditional-image-generation",
        "base_model": repo_id(initial.partition("@")[0]) if initial and is_address(initial) else None,
        "tags": ["image-generation", "pixel-space", "flow-matching", *config.tags, *kind],
        "datasets": dataset and [dataset],
    }


def _classes(classes: tuple[str, ...]) -> str:
    """Return the names of the first classes, or nothing where they are mere numbers."""
    names = list(dict.fromkeys(classes))
    if names == [str(number) for number in range(len(names))]:
        return ""
    more = f" and {len(names) - MOST_CLASSES} more, in config.json" if len(names) > MOST_CLASSES else ""
    return ", ".join(names[:MOST_CLASSES]) + more


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


def _duration(seconds: float) -> str:
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
    size, unit = next(((size, unit) for size, unit in units if seconds >= 2 * size), units[-1])
    return f"{seconds / size:.3g} {unit}"

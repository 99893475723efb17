"""Recipes: functions that return the complete configuration of a run, with the paper's targets.

``recipe("fashion")`` is PRA on Fashion-MNIST. A change follows a colon: ``recipe("fashion:teacher-forced")`` is another
of the paper's systems (:mod:`pra.recipes.systems`), ``recipe("pra-s-256:plus")`` adds our training tricks
(:mod:`pra.recipes.tricks`), and ``recipe("pra-s-256:groups-4")`` generates four patches at once. Change any other
setting with :func:`dataclasses.replace`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from pra.config import RunConfig
from pra.errors import PraError, nearest
from pra.models.weights import CONFIG
from pra.recipes.presets import (
    digits,
    emoji,
    emoji_64,
    emoji_captions,
    fashion,
    fashion_64,
    pra_b_256,
    pra_l_256,
    pra_s_256,
    tiny,
)
from pra.recipes.systems import SYSTEMS
from pra.recipes.tricks import faithful, grouped, plus
from pra.training.run import read_run
from pra.utils.hub import is_address

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "tiny": tiny,
    "digits": digits,
    "fashion": fashion,
    "fashion-64": fashion_64,
    "emoji": emoji,
    "emoji-64": emoji_64,
    "emoji-captions": emoji_captions,
    "pra-s-256": pra_s_256,
    "pra-b-256": pra_b_256,
    "pra-l-256": pra_l_256,
}

CHANGES: dict[str, Callable[[RunConfig], RunConfig]] = {
    "plus": plus,
    "faithful": faithful,
    "groups-2": lambda run: grouped(run, (1, 2)),
    "groups-4": lambda run: grouped(run, (2, 2)),
    **SYSTEMS,
}


def recipe(name: str) -> RunConfig:
    """Return the configuration of ``BASE``, with changes such as ``BASE:plus``, ``BASE:faithful`` or ``BASE:SYSTEM``.

    Changes may be joined: ``BASE:plus:SYSTEM``.

    Raises:
        PraError: an unknown recipe or change; the message gives the nearest name.
    """
    base, *changes = name.split(":")
    if base not in RECIPES:
        raise PraError(f"no recipe {base!r}{nearest(base, RECIPES)}", code="unknown", name=base)
    config = RECIPES[base]()
    for change in changes:
        if change not in CHANGES:
            known = nearest(change, CHANGES)
            raise PraError(f"no system {change!r} for recipe {base!r}{known}", code="unknown", name=change)
        config = CHANGES[change](config)
    return dataclasses.replace(config, recipe=name)


def recipe_or_run(name: str) -> RunConfig:
    """Return the configuration of a run folder, else of a recipe.

    Raises:
        PraError: ``name`` is neither, or a model without a run.
    """
    if is_address(name):
        raise PraError(f"{name} is a model, not a run. Use a recipe or a run", code="mismatch", name=name)
    folder = Path(name).expanduser()
    if (folder / CONFIG).exists() or (folder.is_dir() and name not in RECIPES):
        return read_run(folder)
    try:
        return recipe(name)
    except PraError as error:
        raise PraError(f"no run at {name}, and {error}", code="unknown", name=name) from None

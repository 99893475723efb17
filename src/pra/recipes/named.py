"""A configuration by the name of a recipe or the folder of a run."""

from __future__ import annotations

from pathlib import Path

from pra.config import RunConfig
from pra.errors import PraError
from pra.models.weights import CONFIG
from pra.recipes import RECIPES, recipe
from pra.training.run import read_run
from pra.utils.hub import is_address


def recipe_or_run(name: str) -> RunConfig:
    """Return the configuration of a recipe or of a run."""
    if is_address(name):
        raise PraError(f"{name} is a model, not a run. Use a recipe or a run", code="mismatch", name=name)
    folder = Path(name).expanduser()
    if (folder / CONFIG).exists() or (folder.is_dir() and name not in RECIPES):
        return read_run(folder)
    try:
        return recipe(name)
    except PraError as error:
        raise PraError(f"no run at {name}, and {error}", code="unknown", name=name) from None

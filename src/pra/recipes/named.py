"""A configuration by the name that a person gives: a recipe's, or a run's folder."""

from __future__ import annotations

from pathlib import Path

from pra.config import RunConfig
from pra.errors import PraError
from pra.models.weights import CONFIG
from pra.recipes import RECIPES, recipe
from pra.training.run import read_run
from pra.utils.hub import is_address


def recipe_or_run(name: str) -> RunConfig:
    """The configuration of a recipe or of a run.

    Raises:
        PraError: the name means neither, or the run's folder does not hold what it should.
    """
    if is_address(name):
        raise PraError(f"{name} is a model, not a run: its card, on its page, says what it is; give a recipe or a run")
    folder = Path(name).expanduser()
    if (folder / CONFIG).exists() or (folder.is_dir() and name not in RECIPES):
        return read_run(folder)
    try:
        return recipe(name)
    except PraError as error:
        raise PraError(f"no run at {name}, and {error}") from None

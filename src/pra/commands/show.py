"""The command ``pra show``."""

from __future__ import annotations

from collections.abc import Iterator
from json import dumps
from typing import Annotated, Any

from tyro.conf import Positional, arg

from pra.commands.options import Flag
from pra.config import to_dict
from pra.evaluation.flops import sampling_flops, training_flops
from pra.models import count_parameters
from pra.recipes import RECIPES, recipe_or_run


def show_command(
    name: Annotated[Positional[str], arg(metavar="[RECIPE|RUN]", help_behavior_hint="")] = "", *, json: Flag = False
) -> None:
    """Show a recipe or a run: configuration, parameters, arithmetic. Without a name, list the recipes.

    Args:
        name: A recipe, or a run's folder.
        json: Machine-readable.
    """
    if not name:
        for base, build in RECIPES.items():
            print(f"{base:14} {(build.__doc__ or '').strip().splitlines()[0]}")
        return
    config = recipe_or_run(name)
    parameters, sampling = (
        {"total": sum(counts.values()), **counts} for counts in (count_parameters(config.model), sampling_flops(config))
    )
    training = training_flops(config)
    if json:
        flops = {"training": training, "sampling": sampling}
        print(dumps({"config": to_dict(config), "parameters": parameters, "flops_per_image": flops}, indent=2))
        return
    print(*_settings(to_dict(config)), sep="\n")
    print("parameters")
    for part, count in parameters.items():
        print(f"  {part:<24} {count / 1e6:.3f} M")
    print("GFLOPs per image")
    print(f"  {'training':<24} {training / 1e9:.4g}")
    for part, count in sampling.items():
        print(f"  {'sampling ' + part:<24} {count / 1e9:.4g}")


def _settings(values: dict[str, Any], depth: int = 0) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield "  " * depth + key
            yield from _settings(value, depth + 1)
        else:
            shown = " x ".join(map(str, value)) if isinstance(value, list) else value
            yield f"{'  ' * depth}{key:<{max(1, 26 - 2 * depth)}} {shown}"

"""The options of the commands that sample, and the classes that they name."""

from __future__ import annotations

import dataclasses
import enum
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import arg

from pra.commands.options import Average, Flag, Integer, Number, Text, parse_numbers
from pra.config import GuidanceSchedule, Precision, Solver, TimeGrid, to_dict
from pra.config.checks import member
from pra.errors import PraError, nearest
from pra.models import weights
from pra.sampling import Sampler
from pra.sampling.requests import changed_sampling


def _choices(kind: type[enum.Enum]) -> str:
    return "|".join(member.value for member in kind)


@dataclasses.dataclass(frozen=True)
class How:
    """Sampling options, the same for every command that samples."""

    guidance: Number = None
    """Guidance scale; 1 is none."""
    schedule: Annotated[str | None, arg(metavar=_choices(GuidanceSchedule), help_behavior_hint="")] = None
    """Guidance along the raster, where there is one."""
    solver: Annotated[str | None, arg(metavar=_choices(Solver), help_behavior_hint="")] = None
    """Integrator from noise to pixels or states."""
    steps: Integer = None
    """Solver intervals per patch, or per image where all patches come at once."""
    temperature: Number = None
    """Scale of the noise."""
    time_grid: Annotated[str | None, arg(metavar=_choices(TimeGrid), help_behavior_hint="")] = None
    """Where the solver's intervals lie."""
    shift: Number = None
    """Beyond 1 more of them near noise, below 1 near data."""
    guidance_interval: Annotated[str | None, arg(metavar="LOW,HIGH", help_behavior_hint="")] = None
    """Flow times between which guidance acts: 0 is noise, 1 data."""
    times: Annotated[str | None, arg(metavar="0,...,1", help_behavior_hint="")] = None
    """A grid of your own in place of --steps, --time-grid and --shift, such as `pra grid` prints."""
    precision: Annotated[str, arg(metavar=_choices(Precision), help_behavior_hint="(default: auto)")] = "auto"
    """Of the matrix products: auto is bfloat16 on GPUs that have it, float32 elsewhere."""
    compile: Flag = False
    """Let torch's compiler fuse the arithmetic: a minute at the start, then faster."""
    average: Average = weights.EMA
    """Which weights: ema, raw, or another average of the run, such as power-0.05."""
    device: Text = None
    """cpu, cuda, cuda:1 or mps; by default the best there is."""

    def sampler(self, folder: Path, device: torch.device) -> Sampler:
        """Load the model of a folder (``weights.model_folder``), and change its settings by those given."""
        model = weights.load(folder, self.average, device)
        given: dict[str, Any] = {name: getattr(self, name, None) for name in to_dict(model.sampling)}
        if self.guidance_interval is not None:
            given["guidance_interval"] = _numbers(self.guidance_interval, "--guidance-interval", 2)
        if self.times is not None:
            given["times"] = _numbers(self.times, "--times")
        config = changed_sampling(model.sampling, {name: value for name, value in given.items() if value is not None})
        return Sampler(model, config, member(Precision, self.precision, "--precision"), self.compile)

    def words(self, *without: str) -> list[str]:
        """Return the options that were given, except some, as words: ``["--guidance", "2"]``."""
        words: list[str] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in without and value not in (None, False, field.default):
                words += [f"--{field.name.replace('_', '-')}", *([] if value is True else [str(value)])]
        return words


def _numbers(text: str, option: str, count: int | None = None) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or count not in (None, len(numbers)):
        many, example = ("two numbers", "0.2,0.9") if count == 2 else ("numbers", "0,0.4,0.7,1")
        raise PraError(f"{option} {text!r} needs {many}, such as {example}", option=option, value=text)
    return numbers


SamplingOptions = Annotated[How, arg(name="")]
AS_RECOMMENDED = How()
"""As the recipe recommends."""


def parse_labels(text: str, classes: Sequence[str]) -> list[int]:
    """Parse ``"all"``, or numbers, ranges and class names in any mixture, to class numbers.

    A class of exactly that name comes before a number, with a warning where they differ. A range, even ``2-2``, is
    always of numbers.

    Raises:
        PraError: a number out of range, or a name that no class has (the nearest is given).
    """
    if text == "all":
        return list(range(len(classes)))
    labels: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        if part in classes:
            label = classes.index(part)
            labels.append(label)
            if re.fullmatch(r"\d+", part, re.ASCII) and label != int(part) < len(classes):
                # Folders named by numbers are in the order of text: 1, 10, 2.
                warnings.warn(
                    f"label {part} is taken for the class named {part!r}, which is number {label}; class number "
                    f"{int(part)} is named {classes[int(part)]!r}, and {int(part)}-{int(part)} means that",
                    stacklevel=2,
                )
        elif part.replace("-", "").isdecimal():
            labels.extend(parse_numbers(part, "label"))
        else:
            raise PraError(f"no class {part!r}{nearest(part, classes)}", code="unknown", name=part)
    wrong = [label for label in labels if label >= len(classes)]
    if wrong:
        problem = f"label {wrong[0]} is out of range: this model's classes are 0 to {len(classes) - 1}"
        raise PraError(problem, label=wrong[0])
    return labels

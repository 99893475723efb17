"""The types of command-line options, the options of the commands that sample, and lists of numbers and classes.

The help of an optional value shows its type alone, without "None" and "(default: None)".
"""

from __future__ import annotations

import dataclasses
import enum
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from tyro.conf import Positional, UseAppendAction, arg

from pra.config import GuidanceSchedule, Precision, Solver, TimeGrid, to_dict
from pra.config.checks import member
from pra.errors import PraError, nearest
from pra.models import weights
from pra.models.condition import place_of
from pra.models.weights import EMA
from pra.sampling import Sampler
from pra.sampling.requests import changed_sampling
from pra.utils.files import read_regular

MODEL = "A run's folder, a checkpoint, a saved model or hub:user/model; by default the model that comes with pra."
Model = Annotated[Positional[Path | None], arg(metavar="[RUN]", help_behavior_hint="", help=MODEL)]
Text = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Folder = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")]
File = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Output = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
Integer = Annotated[int | None, arg(constructor=int, help_behavior_hint="")]
Number = Annotated[float | None, arg(constructor=float, help_behavior_hint="")]
Flag = Annotated[bool, arg(help_behavior_hint="")]
Settings = Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="KEY=VALUE", help_behavior_hint="")]
Captions = Annotated[UseAppendAction[tuple[str, ...]], arg(name="caption", metavar="TEXT", help_behavior_hint="")]
AVERAGE = "Which weights of a run: ema, raw, or another of its averages, such as power-0.05."
Average = Annotated[str, arg(metavar="NAME", help=AVERAGE)]
DEVICE = "cpu, cuda, cuda:1 or mps; by default the best available."
Device = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="", help=DEVICE)]

MOST_TEXT = 2**26
"""Bytes of a file of captions."""
LONGEST_RANGE = 10_000_000
"""Numbers in one range of seeds or labels."""


def choices(kind: type[enum.Enum], default: str = "") -> Any:
    """Return how the help shows a value that is one of an enumeration."""
    return arg(metavar="|".join(member.value for member in kind), help_behavior_hint=default)


@dataclasses.dataclass(frozen=True)
class How:
    """Sampling options, the same for every command that samples."""

    guidance: Number = None
    """Guidance scale; 1 is off."""
    schedule: Annotated[str | None, choices(GuidanceSchedule)] = None
    """Guidance along the raster, for autoregressive models."""
    solver: Annotated[str | None, choices(Solver)] = None
    """Integrator from noise to pixels or states."""
    steps: Integer = None
    """Solver intervals per patch, or per image if all patches come at once."""
    raster_steps: Annotated[str | None, arg(metavar="N,...", help_behavior_hint="")] = None
    """Other numbers of steps along the raster: 4,2,1 takes 4 in its first third, 2 in the next, 1 in the last."""
    temperature: Number = None
    """Scale of the noise."""
    time_grid: Annotated[str | None, choices(TimeGrid)] = None
    """Places of the solver's intervals."""
    shift: Number = None
    """Shift of the intervals: above 1 towards noise, below 1 towards data."""
    guidance_interval: Annotated[str | None, arg(metavar="LOW,HIGH", help_behavior_hint="")] = None
    """Flow times between which guidance acts: 0 is noise, 1 data."""
    times: Annotated[str | None, arg(metavar="0,...,1", help_behavior_hint="")] = None
    """Your own grid in place of --steps, --time-grid and --shift, such as `pra grid` prints."""
    precision: Annotated[str, choices(Precision, "(default: auto)")] = "auto"
    """Precision of matrix products: auto is bfloat16 on GPUs that have it, float32 elsewhere."""
    compile: Flag = False
    """Let torch's compiler fuse the arithmetic: a minute at the start, then faster."""
    weights: Folder = None
    """The folder of the model's frozen text encoder, if it has moved."""
    average: Average = EMA
    device: Device = None

    def sampler(self, folder: Path, device: torch.device) -> Sampler:
        """Load the model of a folder (``weights.model_folder``), and change its settings by those given."""
        model = weights.load(folder, self.average, device)
        if self.weights is not None:
            model.condition.use(str(self.weights.expanduser()))
        given: dict[str, Any] = {name: getattr(self, name, None) for name in to_dict(model.sampling)}
        given["guidance_interval"] = _numbers(self.guidance_interval, "--guidance-interval", "0.2,0.9")
        given["times"] = _numbers(self.times, "--times", "0,0.4,0.7,1")
        given["raster_steps"] = _numbers(self.raster_steps, "--raster-steps", "4,2,1", int)
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


def _numbers(text: str | None, option: str, example: str, kind: type[float] = float) -> list[float] | None:
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError:
        problem = f"{option} {text!r} needs {'whole ' if kind is int else ''}numbers, such as {example}"
        raise PraError(problem, option=option, value=text) from None


SamplingOptions = Annotated[How, arg(name="")]
DEFAULT = How()
"""No options: sample as the recipe recommends."""


def parse_labels(text: str, classes: Sequence[str]) -> list[int]:
    """Parse ``"all"``, or numbers, ranges and class names in any mixture, to class numbers.

    A class of exactly that name comes before a number, with a warning where they differ. A range, even ``2-2``, is
    always of numbers.

    Raises:
        PraError: a number out of range, or a name that no class has, or several have.
    """
    if text == "all":
        return list(range(len(classes)))
    labels: list[int] = []
    for part in [text] if text in classes else (p.strip() for p in text.split(",")):  # a name may hold commas
        if part in classes:
            label = place_of(part, classes)
            labels.append(label)
            if re.fullmatch(r"\d+", part, re.ASCII) and label != int(part) < len(classes):
                # Folders named by numbers are in the order of text: 1, 10, 2. Data may count from 1.
                advice = f"Write {part}-{part} for class number {part}"
                warnings.warn(f"label {part} means the class of that name, number {label}. {advice}", stacklevel=2)
        elif re.fullmatch(r"\d+", part, re.ASCII) and int(part) < len(classes) and classes[int(part)].isdecimal():
            labels.append(int(part))
            problem = f"{part} is not the name of a class, and class number {part} is called {classes[int(part)]}"
            warnings.warn(f"{problem}. Write {part}-{part} for that class", stacklevel=2)
        elif part.replace("-", "").isdecimal():
            labels.extend(parse_numbers(part, "label"))
        else:
            raise PraError(f"no class {part!r}{nearest(part, classes)}", code="unknown", name=part)
    wrong = [label for label in labels if label >= len(classes)]
    if wrong:
        problem = f"label {wrong[0]} is out of range: this model's classes are 0 to {len(classes) - 1}"
        raise PraError(problem, label=wrong[0])
    return labels


def read_captions(given: Sequence[str], file: Path | None = None) -> list[str] | None:
    """Return the captions of --caption, then the lines of --captions FILE that are not blank; None without both.

    Raises:
        PraError: a file that cannot be read, is not UTF-8, or holds nothing.
    """
    if file is None:
        return list(given) or None
    try:
        lines = read_regular(file.expanduser(), MOST_TEXT).decode("utf-8-sig").split("\n")
    except OSError as error:
        problem = f"--captions {file}: {error.strerror}. Give a text file, a caption a line"
        raise PraError(problem, code="unreadable", path=file) from None
    except UnicodeDecodeError as error:
        problem = f"--captions {file}: byte {error.start} is not UTF-8. Save it as UTF-8"
        raise PraError(problem, code="unreadable", path=file) from None
    found = [*given, *(line.strip() for line in lines if line.strip())]
    if not found:
        raise PraError(f"--captions {file} is empty. Write a caption a line", code="missing", path=file)
    return found


def parse_numbers(text: str, option: str) -> list[int]:
    """``"0,4-6"`` to ``[0, 4, 5, 6]``.

    Raises:
        PraError: anything but numbers of at least 0 and ranges.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip(), re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= 2**63 or last - first >= LONGEST_RANGE:
            problem = f"{part!r} is not a number below 2**63, or a range of at most {LONGEST_RANGE}. Write 0,3 or 0-15"
            raise PraError(f"{option} {text!r}: {problem}", option=option, value=repr(text))
        numbers.extend(range(first, last + 1))
    return numbers

"""The command ``pra sample``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pra import models
from pra.commands.options import (
    DEFAULT,
    Captions,
    File,
    Flag,
    Integer,
    Model,
    Output,
    SamplingOptions,
    Text,
    parse_labels,
    parse_numbers,
    read_captions,
)
from pra.errors import PraError, counted
from pra.evaluation.samples import spread
from pra.models import weights
from pra.sampling.many import sample_many
from pra.sampling.requests import Requests, grid, numbered
from pra.utils.distributed import World, join
from pra.utils.files import first_free, output_format
from pra.utils.provenance import file_sha256

SEEDS, OUT = "0-7", Path("samples.png")
"""Defaults of --seeds and --out."""
MOST_CLASSES = 20
"""Classes in a picture without --labels."""


def sample_command(
    run: Model = None,
    *,
    labels: Text = None,
    caption: Captions = (),
    captions: File = None,
    seeds: Text = None,
    num: Integer = None,
    random_labels: Flag = False,
    label_seed: Integer = None,
    out: Output = None,
    batch_size: int = 256,
    how: SamplingOptions = DEFAULT,
) -> None:
    """Generate one image for each pair of label (or caption) and seed, or --num of them.

    Options that are not given come from the recipe. Several processes share the work and make the same images as one:
    torchrun --nproc-per-node 8 -m pra -- sample RUN --num 50000 --out FILE.npz (without -- torchrun reads --num as an
    option of its own). If it is stopped, the same command resumes; finished images lie in .OUT.partial beside the
    output.

    Args:
        labels: Classes by number or name, such as 0,3 or 2-5 or cat,dog; or all. By default all; a FILE.png without
            --num shows 20 at most. If classes are named by numbers, 2 is the class called 2, and 2-2 is class
            number 2.
        caption: A text to draw, for models that read captions; may be repeated. --labels may be given beside it, one
            for all captions or one each. By default the examples that the model carries.
        captions: A text file (UTF-8), a caption a line.
        seeds: Seeds, such as 0-15 or 1,2,3; by default 0-7. A seed means the same image in every batch.
        num: Number of images in all, with seeds 0, 1 and so on; the labels (or captions) take turns.
        random_labels: With --num: every image's label is drawn at random.
        label_seed: Decides the random labels; by default 0.
        out: FILE.png (a grid, labels down, seeds across), FILE.npz (arr_0 uint8 NHWC, arr_1 labels, and captions) or
            DIR/; by default the first of samples.png, samples-2.png, ... that is not there yet.
        batch_size: Images generated side by side; no image depends on it.
        how: How to sample; by default as the recipe recommends.
    """
    with join() as world:
        if batch_size < 1:
            raise PraError(f"--batch-size {batch_size} must be at least 1", option="--batch-size", value=batch_size)
        _check_num(num, seeds, random_labels, label_seed)
        device = world.device(how.device)
        folder, file = _weights(run, how.average, world)
        sampler = how.sampler(folder, device)
        place = out.expanduser() if out else world.run_on_first(lambda: first_free(OUT))
        most = MOST_CLASSES if num is None and output_format(place) == ".png" else None
        wanted = _wanted(sampler.model, labels, read_captions(caption, captions), most)
        requests, columns, what = _requested(wanted, seeds, num, (label_seed or 0) if random_labels else None)
        new, seconds = sample_many(sampler, requests, file, place, columns, batch_size, wanted.name, world)
    if world.is_first:
        processes = f" on {world.size} processes" if world.size > 1 else ""
        print(f"{counted(new, 'new image')}, {new / seconds:.1f} images/s{processes}")
        if wanted.note:
            print(wanted.note)
        print(f"{counted(len(requests), 'image')} ({what}): {place}")


@dataclass(frozen=True)
class Wanted:
    """Pictures to draw: labels, with a caption each where the ``model`` reads captions. ``note`` is for the user."""

    model: models.Model
    labels: list[int]
    captions: list[str] | None = None
    note: str = ""

    @cached_property
    def places(self) -> dict[tuple[int, str], int]:
        """The place of each pair of label and caption."""
        return {pair: place for place, pair in enumerate(zip(self.labels, self.captions or (), strict=True))}

    def name(self, label: int, seed: int, caption: str | None) -> str:
        """Name a picture's file, without ending."""
        condition = self.model.condition
        if self.captions is None or (not caption and label < condition.null):
            return f"{condition.file_name(label, self.model.classes)}-seed{seed:06d}"
        return f"{condition.file_name(self.places[label, caption or ''], self.captions)}-seed{seed:06d}"


def _wanted(model: models.Model, labels: str | None, captions: list[str] | None, most: int | None) -> Wanted:
    """Return the labels to draw, by default all classes, of which a picture shows ``most``."""
    classes, note = model.classes, ""
    if model.config.text is not None or captions is not None:
        return _wanted_texts(model, labels, captions)
    if labels is None and most is not None and len(classes) > most:
        note = f"{most} of {len(classes):,} classes, evenly chosen: --labels all draws every one"
        return Wanted(model, spread(len(classes), most), note=note)
    return Wanted(model, list(dict.fromkeys(parse_labels("all" if labels is None else labels, classes))))


def _wanted_texts(model: models.Model, labels: str | None, captions: list[str] | None) -> Wanted:
    """Return the captions to draw, by default the model's examples."""
    note, numbers, texts = "", None, [""]
    if captions is not None:
        texts = model.condition.texts(captions)
    elif labels is None:
        texts, note = list(model.captions), "captions are examples that the model carries: --caption TEXT draws others"
        if not texts:
            raise PraError("this model carries no examples of captions. Give --caption TEXT", code="missing")
    if labels is not None:
        numbers = parse_labels(labels, model.classes)
        numbers = numbers * len(texts) if len(numbers) == 1 else numbers
        texts = texts * len(numbers) if len(texts) == 1 else texts
    rows = model.condition.parse(numbers, model.classes, texts)
    pairs = dict.fromkeys(zip(rows[:, 0].tolist(), texts, strict=True))
    return Wanted(model, [label for label, _ in pairs], [text for _, text in pairs], note)


def _requested(wanted: Wanted, seeds: str | None, num: int | None, label_seed: int | None) -> tuple[Requests, int, str]:
    """Return the images to make, the columns of their picture, and a description."""
    chosen, kind = wanted.labels, "label" if wanted.captions is None else "caption"
    if num is None:
        numbers = tuple(dict.fromkeys(parse_numbers(SEEDS if seeds is None else seeds, "--seeds")))
        what = f"{counted(len(chosen), kind)} x {counted(len(numbers), 'seed')}"
        return grid(chosen, numbers, wanted.captions), len(numbers), what
    requests = numbered(num, chosen, label_seed, wanted.captions)
    found = len(set(zip(requests.labels, requests.captions or requests.labels, strict=True)))
    return requests, math.isqrt(num - 1) + 1, f"{requests.plan['order']}, {counted(found, kind)}"


def _check_num(num: int | None, seeds: str | None, random_labels: bool, label_seed: int | None) -> None:
    conflicts = {
        "--random-labels is for --num": num is None and random_labels,
        f"--num {num} must be at least 1": num is not None and num < 1,
        f"--num {num} has the seeds 0, 1 and so on; leave --seeds out, or --num": num is not None and seeds is not None,
        "--label-seed is for --random-labels": label_seed is not None and not random_labels,
    }
    for problem in (problem for problem, found in conflicts.items() if found):
        raise PraError(problem, code="conflict")


def _weights(run: Path | None, average: str, world: World) -> tuple[Path, dict[str, str]]:
    """Return the model's folder, and its weights' name and hash, which must be the same on all ranks."""
    with world.first_alone():  # models on the Hub are downloaded once
        folder = weights.model_folder(run, average)
    file = folder / weights.weights_name(folder, average)
    same = world.combine(file_sha256(file), lambda found: found[0] if len(set(found)) == 1 else None)
    if same is None:
        problem = f"the processes do not see the same {file.name} in {run}. Name a checkpoint that stays"
        raise PraError(problem, code="mismatch", path=run)
    return folder, {"file": file.name, "sha256": same}

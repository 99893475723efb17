"""The command ``pra sample``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pra.commands.options import (
    DEFAULT,
    Flag,
    Integer,
    Model,
    Output,
    SamplingOptions,
    Text,
    parse_labels,
    parse_numbers,
)
from pra.errors import PraError
from pra.evaluation.samples import spread
from pra.models import weights
from pra.sampling.many import sample_many
from pra.sampling.requests import Requests, grid, numbered
from pra.utils.distributed import World, join
from pra.utils.files import first_free, output_format
from pra.utils.provenance import file_sha256

SEEDS, OUT = "0-7", Path("samples.png")
"""Without --seeds and --out."""
MOST_CLASSES = 20
"""Classes in a picture without --labels."""


def sample_command(
    run: Model = None,
    *,
    labels: Text = None,
    seeds: Text = None,
    num: Integer = None,
    random_labels: Flag = False,
    label_seed: Integer = None,
    out: Output = None,
    batch_size: int = 256,
    how: SamplingOptions = DEFAULT,
) -> None:
    """Generate one image for each pair of label and seed, or --num of them.

    What is not said is taken from the recipe. Several processes share the work and make the
    same images as one: torchrun --nproc-per-node 8 -m pra -- sample RUN --num 50000 --out FILE.npz (without -- torchrun
    takes --num for an option of its own). Stopped, the same command goes on; what is finished until then lies in
    .OUT.partial beside the output.

    Args:
        labels: Classes by number or name, such as 0,3 or 2-5 or cat,dog; or all. By default all, of which a FILE.png
            without --num shows 20 at most. Where classes are named by numbers, 2 is the one of that name and 2-2 the
            one of that number.
        seeds: Seeds, such as 0-15 or 1,2,3; by default 0-7. A seed means the same image in every batch.
        num: So many images in all, with seeds 0, 1 and so on; the labels take turns.
        random_labels: With --num: every image's label is drawn at random.
        label_seed: Decides the random labels; by default 0.
        out: FILE.png (a grid, labels down, seeds across), FILE.npz (arr_0 uint8 NHWC, arr_1 labels) or DIR/; by default
            the first of samples.png, samples-2.png, ... that is not there yet.
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
        classes = sampler.model.classes
        place = out.expanduser() if out else world.run_on_first(lambda: first_free(OUT))
        some = labels is None and num is None and output_format(place) == ".png" and len(classes) > MOST_CLASSES
        text = "all" if labels is None else labels
        chosen = spread(len(classes), MOST_CLASSES) if some else list(dict.fromkeys(parse_labels(text, classes)))
        requests, columns, what = _requested(chosen, seeds, num, (label_seed or 0) if random_labels else None)

        def name(label: int, seed: int) -> str:
            return f"{sampler.model.condition.file_name(label, classes)}-seed{seed:06d}"

        new, seconds = sample_many(sampler, requests, file, place, columns, batch_size, name, world)
    if world.is_first:
        processes = f" on {world.size} processes" if world.size > 1 else ""
        print(f"{new} new images, {new / seconds:.1f} images/s{processes}")
        if some:
            print(f"{len(chosen)} of {len(classes):,} classes, evenly chosen: --labels all draws every one")
        print(f"{len(requests)} images ({what}): {place}")


def _requested(
    chosen: Sequence[int], seeds: str | None, num: int | None, label_seed: int | None
) -> tuple[Requests, int, str]:
    """Return the images to make, the columns of their picture, and in words what they are."""
    if num is None:
        numbers = tuple(dict.fromkeys(parse_numbers(SEEDS if seeds is None else seeds, "--seeds")))
        return grid(chosen, numbers), len(numbers), f"{len(chosen)} labels x {len(numbers)} seeds"
    requests = numbered(num, chosen, label_seed)
    found = len(set(requests.labels))
    return requests, math.isqrt(num - 1) + 1, f"{requests.plan['order']}, {found} label{'s' if found > 1 else ''}"


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
    with world.first_alone():  # what is on the Hub is downloaded once
        folder = weights.model_folder(run, average)
    file = folder / weights.weights_name(folder, average)
    same = world.combine(file_sha256(file), lambda found: found[0] if len(set(found)) == 1 else None)
    if same is None:
        problem = f"the processes do not see the same {file.name} in {run}. Name a checkpoint that stays"
        raise PraError(problem, code="mismatch", path=run)
    return folder, {"file": file.name, "sha256": same}

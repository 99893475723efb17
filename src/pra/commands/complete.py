"""The command ``pra complete``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from tyro.conf import Positional, arg

from pra.commands.options import DEFAULT, Captions, Output, SamplingOptions, Text, parse_labels, parse_numbers
from pra.data.images import CorruptImage, decode, most_bytes
from pra.errors import PraError, counted
from pra.models import Model, weights
from pra.sampling import check_completes
from pra.utils.device import pick_device
from pra.utils.files import check_output, file_part, first_free, output_format, read_regular, save_images
from pra.utils.pixels import MODES, from_uint8, sheet_size


def complete_command(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    image: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE", help_behavior_hint="")],
    *,
    rows: int,
    label: Text = None,
    caption: Captions = (),
    seeds: Annotated[str, arg(metavar="TEXT")] = "0-5",
    out: Output = None,
    how: SamplingOptions = DEFAULT,
) -> None:
    """Continue real images from their first rows of patches.

    A grid shows, per image, the image, the part that was kept, and one continuation per seed.

    Args:
        run: A run's folder, a checkpoint, a saved model or hub:user/model; if a picture comes first, the model that
            comes with pra.
        image: Pictures of the model's size and channels, at least one.
        rows: Rows of patches to keep; their pixels stay exact.
        label: Class by number or name (as `pra sample --labels`), one for all images or one each; by default no class.
        caption: A text, for models that read captions: one for all images, or one each by repeating it.
        seeds: One continuation per seed, such as 0-5.
        out: FILE.png (a grid; the picture alone for one image and one seed), FILE.npz or DIR/ (continuations); by
            default the first of completions.png, completions-2.png, ... that is not there yet.
        how: How to sample; by default as the recipe recommends.
    """
    model: Path | None = run
    if run.exists() and not run.is_dir():
        model, image = None, (run, *image)
    if not image:
        raise PraError("no IMAGE given. Name at least one picture to complete", code="missing")
    sampler = how.sampler(weights.model_folder(model, how.average), pick_device(how.device))
    check_completes(sampler.model)
    config = sampler.model.config
    real = torch.stack([_read_picture(path, config.channels, config.image_size) for path in image])
    asked = _asked(sampler.model, label, caption, len(image))
    numbers = list(dict.fromkeys(parse_numbers(seeds, "--seeds")))
    place = out.expanduser() if out else first_free(Path("completions.png"))
    check_output(place)
    columns, pictured = len(numbers), output_format(place) == ".png"
    if pictured:
        sheet_size(len(image) * (columns + 2), columns + 2, *config.image_size)
    repeated = real.repeat_interleave(len(numbers), dim=0)
    conditions = asked.repeat_interleave(columns, dim=0)
    continued = sampler.complete(repeated, rows, conditions, numbers * len(image)).cpu()
    # Numbered, for pictures of the same name from different folders.
    names = [
        f"{number:04d}-{file_part(path.stem)}-seed{seed:06d}" for number, path in enumerate(image) for seed in numbers
    ]
    if pictured and len(continued) > 1:
        kept = real.clone()
        kept[:, :, rows * config.patch_size :] = 0.0
        groups = continued.view(len(image), columns, *continued.shape[1:])
        continued = torch.cat([real.unsqueeze(1), kept.unsqueeze(1), groups], dim=1).flatten(0, 1)
        columns += 2
    save_images(continued, conditions.view(len(conditions), -1)[:, 0].tolist(), names, columns, place)
    times = counted(len(numbers), "time")
    print(f"{counted(len(image), 'image')} continued from {rows} of {config.grid[0]} rows, {times} each: {place}")


def _asked(model: Model, label: str | None, captions: Sequence[str], images: int) -> Tensor:
    """Return a condition per image, of one label or caption for all images or one each; without both, of no class."""
    labels = None if label is None else parse_labels(label, model.classes)
    texts = model.condition.texts(captions) if captions else None
    if labels is None and texts is None:
        labels = [model.condition.null]
    labels = labels and _each(labels, images, f"classes (--label {label})")
    return model.condition.parse(labels, model.classes, texts and _each(texts, images, "captions"))


def _each(given: list[Any], images: int, what: str) -> list[Any]:
    """Return a value per image, of one for all or one each."""
    if len(given) not in (1, images):
        raise PraError(f"{len(given)} {what} for {counted(images, 'image')}. Give one, or one each", code="mismatch")
    return given * images if len(given) == 1 else given


def _read_picture(path: Path, channels: int, size: tuple[int, int]) -> Tensor:
    try:
        picture = decode(read_regular(path, most_bytes()), str(path))
    except OSError as error:
        raise PraError(f"{path}: {error.strerror}. Give a picture as IMAGE", code="missing", path=path) from None
    except CorruptImage as error:
        raise PraError(f"{path}: {error.problem}. Give another IMAGE", code="unreadable", path=path) from None
    if picture.mode in ("1", "P"):
        picture = picture.convert("L" if picture.mode == "1" else "RGB")
    found = f"{picture.width}x{picture.height} {picture.mode}"
    wanted = f"{size[1]}x{size[0]} {MODES.get(channels, f'{channels} channels')}"
    if found != wanted:
        problem = f"{path} is {found}; this model completes pictures of {wanted}. Resize or convert it first"
        raise PraError(problem, code="mismatch", path=path)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return from_uint8(pixels.view(*size, channels).permute(2, 0, 1))

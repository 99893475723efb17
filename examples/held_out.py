"""Writes images of a source as PNG files of a run's size, for example for `pra complete`. Never overwrites.

python examples/held_out.py digits@test runs/demo held-out 0 1 2
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pra import PraError
from pra.data import load_images, open_source
from pra.training.run import read_run
from pra.utils.files import write_atomically
from pra.utils.pixels import to_pil


def main(spec: str, run: Path, folder: Path, indices: list[int]) -> None:
    config = read_run(run)
    source = open_source(spec)
    indices = list(dict.fromkeys(indices))
    for index in indices:
        if not 0 <= index < len(source):
            raise PraError(f"no image {index} in {source.name}: its images are 0 to {len(source) - 1}")
    pixels, labels = load_images(source, indices, config.model.image_size, config.model.channels, config.data)
    names = [f"{index:05d}-{source.classes[label]}.png" for index, label in zip(indices, labels.tolist(), strict=True)]
    for path in (folder / name for name in names):
        if os.path.lexists(path):
            raise PraError(f"{path} exists already; choose another folder or remove it")
    for picture, name in zip(pixels, names, strict=True):
        write_atomically(folder / name, to_pil(picture).save, format="PNG")
        print(folder / name)


def parse(words: list[str]) -> tuple[str, Path, Path, list[int]]:
    if len(words) < 4 or not all(word.isdecimal() for word in words[3:]):
        raise PraError("give a SOURCE, a RUN, a FOLDER to write to and the numbers of images, such as 0 1 2")
    return words[0], Path(words[1]), Path(words[2]), [int(word) for word in words[3:]]


if __name__ == "__main__":
    try:
        main(*parse(sys.argv[1:]))
    except PraError as error:
        print(f"held_out: error: {error}", file=sys.stderr)
        sys.exit(2)

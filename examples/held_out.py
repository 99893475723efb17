"""Writes images of a source as PNG files of a run's size, for example for `pra complete`.

python examples/held_out.py digits@test runs/demo held-out 0 1 2
"""

from __future__ import annotations

import sys
from pathlib import Path

from pra import images
from pra.data import load_images, open_source
from pra.train.run import read_run


def main(spec: str, run: Path, folder: Path, indices: list[int]) -> None:
    config = read_run(run)
    source = open_source(spec)
    pixels, labels = load_images(source, indices, config.model.image_size, config.model.channels, config.data)
    for picture, label, index in zip(pixels, labels.tolist(), indices, strict=True):
        path = folder / f"{index:05d}-{source.classes[label]}.png"
        images.write_atomically(path, images.to_pil(picture).save, format="PNG")
        print(path)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), [int(index) for index in sys.argv[4:]])

"""Trains the digits recipe, samples it, and has an independent classifier judge the samples: `make demo`.

python examples/demo.py runs/demo
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor

import pra
from pra.data import load_images, open_source
from pra.utils.files import write_atomically
from pra.utils.pixels import contact_sheet, from_uint8

SEEDS = 8
JUDGED_PER_CLASS = 100
ACCURACY_WANTED = 0.95


def main(folder: Path) -> int:
    config = pra.recipe("digits")
    trained = pra.train(config, folder)
    model = trained.model

    sampler = pra.Sampler(model)
    labels = [digit for digit in range(10) for _ in range(JUDGED_PER_CLASS)]
    samples = sampler.sample(labels, list(range(JUDGED_PER_CLASS)) * 10)

    train, test = open_source("digits"), open_source("digits@test")
    real = real_images(train, config), real_images(test, config)
    judge = SVC(gamma=0.02).fit(flat(real[0]), train.labels)
    accuracy = judge.score(flat(samples), labels)
    ceiling = judge.score(flat(real[1]), test.labels)
    distance = nearest(samples, real[0]) / nearest(real[1], real[0])

    shown = samples.unflatten(0, (10, JUDGED_PER_CLASS))[:, :SEEDS].flatten(0, 1)
    originals = real[1][:16].to(sampler.device)
    rebuilt = model.reconstruct(originals, torch.as_tensor(test.labels[:16], device=sampler.device))
    for name, pictures, columns in (
        ("samples.png", shown, SEEDS),
        ("reconstructions.png", torch.cat([originals, rebuilt]), 16),
    ):
        sheet = contact_sheet(pictures, columns)
        write_atomically(folder / name, sheet.save, format="PNG")

    print(f"trained to step {trained.steps} in {trained.seconds:.0f} s (of this call) on {sampler.device}")
    print(
        f"accuracy of an SVM, fitted on the real digits, on {len(labels)} samples: {accuracy:.3f} "
        f"(on real held-out digits {ceiling:.3f}; wanted >= {ACCURACY_WANTED})"
    )
    print(f"distance to the nearest training image, samples over held-out real ones: {distance:.2f} (copies: near 0)")
    print(
        f"look at {folder}/samples.png (a digit a row), {folder}/reconstructions.png (real digits above, the codec's "
        f"below), {folder}/curves.png; checkpoints are in {folder}/checkpoints"
    )
    print(f"in a browser: {browse(folder)}")
    return 0 if accuracy >= ACCURACY_WANTED else 1


def browse(folder: Path) -> str:
    """The commands that start the web demo."""
    python = os.path.relpath(sys.executable)
    install = (
        "" if importlib.util.find_spec("gradio") else f"{python} -m pip install -e '.[demo]' -c constraints.txt && "
    )
    return f"{install}{python} -m pra demo {folder}"


def real_images(source: pra.data.Source, config: pra.config.RunConfig) -> Tensor:
    pixels, _ = load_images(source, range(len(source)), config.model.image_size, config.model.channels, config.data)
    return from_uint8(pixels)


def flat(pictures: Tensor) -> np.ndarray:
    return pictures.flatten(1).cpu().numpy()


def nearest(pictures: Tensor, references: Tensor) -> float:
    """Mean Euclidean distance to the nearest reference."""
    return torch.cdist(pictures.flatten(1).cpu(), references.flatten(1)).amin(dim=1).mean().item()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

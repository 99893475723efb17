"""Training images per second that one core prepares from each kind of source, and the cores that feed a GPU.

    python benchmarks/loaders.py --images-per-second 500 2000   # what the GPUs train

Makes JPEGs of ImageNet's size (500x375, about 110 KB) in a temporary folder: as a folder, an ImageNet tar, WebDataset
shards, a Hugging Face data set (where `datasets` is installed), and shards that `pra data pack --size 256` makes of
them. Each is measured with the recipe's own preparation and with random crops: reading, decoding, cropping, flipping,
in this process alone (data.workers=0), in CPU seconds, so that what else the machine does counts little. The sources
take turns. The files are in the page cache: the disk is not measured.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from pra import recipe
from pra.config import DataConfig, Fit
from pra.data import Source, TrainingSet, batches, open_source
from pra.data.pack import Packing, pack
from pra.utils.files import write_atomically
from pra.utils.provenance import environment

BATCH = 32
CLASSES = 8


def main(
    images: int = 256,
    images_per_second: tuple[float, ...] = (500.0, 1000.0, 2000.0, 4000.0),
    repeats: int = 5,
    recipe_name: str = "pra-s-256",
    out: Path | None = None,
) -> None:
    """Measures and prints.

    Args:
        images: Files to make.
        images_per_second: Training rates of GPUs, to print the cores that feed them.
        repeats: Measurements of each, after one warm-up; the median counts.
        recipe_name: A recipe, for its preparation and size.
        out: File for the figures, as JSON.
    """
    torch.set_num_threads(1)
    run = recipe(recipe_name)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = make_sources(Path(folder), images)
        size = sum(file.stat().st_size for file in Path(folder, "folder").rglob("*.jpg")) / images
        print(f"{images} JPEGs of 500x375, {size / 1000:.0f} KB each; images/s of one core, median (range)")
        wanted = "".join(f"{f'{rate:g}/s':>8}" for rate in images_per_second)
        print(f"{'source':28} {'recipe':>18} {'random crop':>18}   cores for {wanted}")
        ways = {"recipe": run.data, "random crop": replace(run.data, fit=Fit.RANDOM_CROP)}
        rates = measure(
            sources, {name: replace(way, workers=0) for name, way in ways.items()}, run.model.image_size, repeats
        )
        for name in sources:
            found = {way: rates[name, way] for way in ways}
            medians = {way: statistics.median(values) for way, values in found.items()}
            shown = [f"{medians[way]:.0f} ({min(values):.0f} to {max(values):.0f})" for way, values in found.items()]
            cores = {f"{rate:g}": math.ceil(rate / medians["recipe"]) for rate in images_per_second}
            results[name] = {"images_per_core_second": found, "medians": medians, "cores_for_images_per_second": cores}
            print(f"{name:28} {shown[0]:>18} {shown[1]:>18}   {'':10}{''.join(f'{n:>8}' for n in cores.values())}")
    if out is not None:
        figures = {"sources": results, "images": images, "kilobytes": size / 1000, **environment()}
        text = json.dumps(figures, indent=2) + "\n"
        write_atomically(out, lambda file: file.write(text.encode()))


def measure(
    sources: dict[str, Source], ways: dict[str, DataConfig], size: tuple[int, int], repeats: int
) -> dict[tuple[str, str], list[float]]:
    """Images per CPU second, by source and way of preparation."""
    rates: dict[tuple[str, str], list[float]] = {}
    for repeat in range(repeats + 1):
        for name, source in sources.items():
            for way, config in ways.items():
                begin = time.process_time()
                for _ in batches(TrainingSet(source, size, 3, config, seed=0), 0, BATCH, stop=len(source)):
                    pass
                if repeat:
                    rates.setdefault((name, way), []).append(len(source) / (time.process_time() - begin))
    return rates


def make_sources(folder: Path, count: int) -> dict[str, Source]:
    files = [jpeg(number) for number in range(count)]
    for number, data in enumerate(files):
        path = folder / "folder" / f"n{number % CLASSES:02d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_imagenet(folder / "train.tar", files)
    plain = open_source(f"folder:{folder / 'folder'}")
    pack(plain, folder / "shards", Packing(shard_images=100), workers=1)
    pack(plain, folder / "shards-256", Packing(shard_images=100, size=256), workers=1)
    sources = {
        "folder": plain,
        "imagenet-tar": open_source(f"imagenet-tar:{folder / 'train.tar'}"),
        "wds": open_source(f"wds:{folder / 'shards'}"),
        "wds, packed with --size 256": open_source(f"wds:{folder / 'shards-256'}"),
    }
    if importlib.util.find_spec("datasets") is None:
        print("datasets is not installed (pip install 'pra-pixels[hf]'): hf is not measured")
        return sources
    with hugging_face(folder, files) as parquet:
        sources["hf"] = open_source(f"hf:{parquet}")
        sources["hf, streaming"] = open_source(f"hf:{parquet}?streaming=true&window=100")
    return sources


def jpeg(seed: int) -> bytes:
    """Smooth colours with noise of the strength that makes about 110 KB at quality 95."""
    random = np.random.default_rng(seed)
    smooth = Image.fromarray(random.integers(0, 256, (24, 32, 3), np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(smooth) + random.normal(0, 9, (375, 500, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def write_imagenet(path: Path, files: list[bytes]) -> None:
    with tarfile.open(path, "w") as outer:
        for label in range(CLASSES):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for number in range(label, len(files), CLASSES):
                    add(tar, f"n{label:02d}_{number}.JPEG", files[number])
            add(outer, f"n{label:02d}.tar", inner.getvalue())


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@contextmanager
def hugging_face(folder: Path, files: list[bytes]) -> Iterator[Path]:
    """A parquet file of them; what the library makes of it stays in the temporary folder."""
    import datasets

    kinds = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"n{label:02d}" for label in range(CLASSES)])}
    )
    rows = {
        "image": [{"bytes": data, "path": None} for data in files],
        "label": [number % CLASSES for number in range(len(files))],
    }
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(str(folder / "train.parquet"))
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    yield folder / "train.parquet"
    datasets.config.HF_DATASETS_CACHE = before


if __name__ == "__main__":
    tyro.cli(main)

"""Features as a file, for other tools to learn from."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from pra.evaluation.probe_features import Layers, Pooling, select
from pra.sampling.batches import Batch
from pra.utils.files import write_atomically
from pra.utils.pixels import from_uint8
from pra.utils.progress import Progress


def export_features(
    path: Path,
    layer: Layers,
    pooling: Pooling,
    batches: Iterable[Batch],
    count: int,
    device: torch.device,
    known: dict[str, Any],
    progress: bool = True,
) -> None:
    """Writes one layer's features batch by batch: at no time is more than a batch of them in memory.

    Args:
        path: ``FILE.npz``, which appears when all is written: ``features`` float32 ``(count, D)``, ``labels`` int64
            ``(count,)``, and ``pra``, a JSON text of what is ``known``.
        layer: one layer of a model.
        pooling: of its tokens.
        batches: labelled images in order.
        count: images in all.
        device: the model's.
        known: where the features come from.
        progress: whether to show a bar.

    Raises:
        PraError: the disk is full or refuses, or as the batches; nothing is left behind.
    """
    width = layer.shape[2] * (2 if pooling is Pooling.BOTH else 1)

    def write(file: IO[bytes]) -> None:
        labels: list[Tensor] = []
        with zipfile.ZipFile(file, "w") as archive:
            with (
                archive.open("features.npy", "w", force_zip64=True) as array,
                Progress(total=count, unit="image", desc="features", disable=not progress) as bar,
            ):
                header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
                np.lib.format.write_array_header_1_0(array, header)
                for batch in batches:
                    vectors = layer(from_uint8(batch.images.to(device)), batch.start)[0]
                    array.write(select(vectors, pooling).cpu().numpy().astype("<f4").tobytes())
                    assert batch.labels is not None, "a source's images have labels"
                    labels.append(batch.labels)
                    bar.update(len(batch.images))
            for name, values in (("labels", torch.cat(labels).numpy()), ("pra", np.array(json.dumps(known)))):
                with archive.open(f"{name}.npy", "w") as array:
                    np.lib.format.write_array(array, values)

    write_atomically(path, write)

"""Batches in ADM's layout, written and read."""

import numpy as np
import pytest
import torch
from support.judging import pixels, stream
from support.refusal import refused

from pra.evaluation.metrics import Protocol
from pra.sampling.batches import NpzBatch, exported

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_batch_goes_through_a_file(tmp_path, labelled):
    path, images = tmp_path / "b.npz", torch.rand(20, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.arange(20) % 3 if labelled else None
    passed = [batch.images for batch in exported(stream(images, labels=labels), 20, path)]
    assert torch.equal(torch.cat(passed), images)
    assert list(tmp_path.iterdir()) == [path]
    with np.load(path) as file:
        assert set(file.files) == ({"arr_0", "arr_1"} if labelled else {"arr_0"})
        assert (file["arr_0"] == Protocol.ADM.quantise(images).permute(0, 2, 3, 1).numpy()).all()
    batch = NpzBatch(path)
    assert (batch.count, batch.size, batch.channels) == (20, (4, 5), 3)
    read = list(batch.batches(6))
    assert [b.start for b in read] == [0, 6, 12, 18]
    assert torch.equal(torch.cat([b.images for b in read]), Protocol.ADM.quantise(images))
    [part] = batch.batches(50, range(4, 9))
    assert torch.equal(part.images, Protocol.ADM.quantise(images[4:9]))
    assert (part.labels is None) if labels is None else torch.equal(part.labels, labels[4:9])  # type: ignore[arg-type]


def test_an_export_that_is_broken_off_leaves_nothing(tmp_path, full_disk):
    batches = exported(stream(pixels(20)), 20, tmp_path / "b.npz")
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not any(tmp_path.iterdir())
    with full_disk(200):
        refused(lambda: list(exported(stream(pixels(200)), 200, tmp_path / "b.npz")), "b.npz", "nothing was left")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arrays", "part"),
    [
        ({"mu": np.zeros(3)}, "mu"),
        ({"arr_0": IMAGES.astype(np.float32)}, "float32 (20, 8, 8, 1)"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, "(20, 1, 8, 8)"),
        ({"arr_0": IMAGES[:0]}, "(0, 8, 8, 1)"),
        ({"arr_0": IMAGES, "arr_1": np.zeros(4, np.int64)}, "(4,)"),
        ({"arr_0": IMAGES, "arr_1": np.zeros(20)}, "float64"),
        ({"arr_0": IMAGES, "arr_1": np.where(np.arange(20) == 7, -1, 3)}, "-1"),
    ],
)
def test_batches_of_other_arrays_are_refused(tmp_path, arrays, part):
    path = tmp_path / "b.npz"
    refused(lambda: NpzBatch(path), str(path), "cannot be read")
    np.savez(path, **arrays)
    refused(lambda: NpzBatch(path), str(path), part)

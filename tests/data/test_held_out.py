"""Held-out images: the choice, and refusals."""

import numpy as np
from support.refusal import refused

from pra.config import DataConfig
from pra.data import open_source
from pra.data.held_out import split
from pra.data.source import Part, own_test_split


def test_split_share_is_disjoint_even_and_decided_by_the_seed():
    source = open_source("digits")
    config = DataConfig(source="digits", validation=0.1)
    parts = [split(source, config, seed) for seed in (0, 0, 1)]
    places = [[part.where(i) for i in range(len(part))] for pair in parts for part in pair if part is not None]
    assert places[0] == places[2]
    assert places[1] == places[3] != places[5]
    assert sorted(places[0] + places[1]) == sorted(source.where(i) for i in range(len(source)))
    _, held = parts[0]
    assert held is not None
    assert len(held) == round(0.1 * len(source))
    counts, whole = (np.bincount(one.labels, minlength=10) for one in (held, source))
    assert np.abs(counts - 0.1 * whole).max() <= 1
    assert held.image(3).tobytes() == source.image(int(held.where(3).split()[1])).tobytes()


def test_split_names_the_test_split_or_another_source(tmp_path):
    source = open_source("digits")
    for validation_source in ("test", "digits@test"):
        training, held = split(source, DataConfig(source="digits", validation=validation_source), 0)
        assert training is source
        assert held is not None
        assert held.name == "digits@test"
    assert split(source, DataConfig(source="digits"), 0) == (source, None)
    assert own_test_split("idx:fashion") == "idx:fashion@test"


def test_split_bad_held_out_images_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        open_source("digits").image(0).save(tmp_path / name / "0.png")
    folder = f"folder:{tmp_path}"
    for source, validation, part, code in (
        ("digits", "digits", "is the training source", "conflict"),
        ("digits", "emojy", "did you mean 'emoji'", "unknown"),
        ("digits", 0.9999, "has 1498 images", "invalid"),
        ("digits", folder, "other classes than digits, such as 'a'", "mismatch"),
        (folder, "test", "has no test split", "unsupported"),
    ):
        config, opened = DataConfig(source=source, validation=validation), open_source(source)
        refused(lambda opened=opened, config=config: split(opened, config, 0), part, code=code)
    refused(lambda: own_test_split("digits@test"), code="unsupported", name="digits@test")

    class Stream(Part):
        lanes = 1

        def arranged(self, order, start):
            return order

    stream = Stream(open_source("digits"), np.arange(10))
    refused(lambda: split(stream, DataConfig(source="digits", validation=0.1), 0), "is a stream", "Name a source")

"""A separate cache for every test of data."""

import pytest
from support.data import picture, turned


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of cached indexes, labels and shards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pra"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The library ``datasets``, with a cache for this file."""
    datasets = pytest.importorskip("datasets", reason="datasets is in the extra 'hf'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf-cache"))
        yield datasets


@pytest.fixture
def photos(tmp_path):
    """Seven pictures of three classes in several formats and modes; cat/1.png is to be turned."""
    pictures = {
        "cat/0.jpg": picture(40, 60, 0),
        "cat/1.png": picture(20, 30, 1),
        "cat/2.webp": picture(33, 33, 2),
        "dog/3.bmp": picture(20, 25, 3),
        "dog/4.jpg": picture(50, 40, 4, "L"),
        "dog/5.png": picture(41, 37, 5, "P"),
        "emu/6.png": picture(64, 80, 6, "RGBA"),
    }
    for name, image in pictures.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if image.mode == "RGBA":
            image.putalpha(100)
        image.save(path, exif=turned() if name == "cat/1.png" else b"")
    return f"folder:{tmp_path}/photos"

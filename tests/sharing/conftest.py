"""What the tests of sharing have in common: a stand-in for the Hub, and an exported model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub import TOKEN, Hub, serving

import pra


@pytest.fixture(scope="session")
def shared(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained run as `pra export --half` writes it. To be read only."""
    return pra.export(trained, tmp_path_factory.mktemp("shared") / "model", half=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub in place of the network, an empty cache, and nobody logged in."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs pip install 'pra-pixels[hub]'")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving() as state:
        yield state


@pytest.fixture
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)

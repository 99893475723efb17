"""Fixtures of the tests of sharing: a stand-in for the Hub, and an exported model."""

import importlib

import pytest
from support.hub import TOKEN, Hub

import pra


@pytest.fixture(scope="session")
def shared(trained, tmp_path_factory):
    """The trained run as `pra export --half` writes it. To be read only."""
    return pra.export(trained, tmp_path_factory.mktemp("shared") / "model", half=True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub in place of the network, an empty cache, and nobody logged in."""
    library = pytest.importorskip("huggingface_hub", reason="needs pip install 'pra-pixels[hub]'")
    from huggingface_hub.utils._http import default_client_factory

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(library.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(library.constants, "HF_HUB_OFFLINE", False)
    http = importlib.import_module(library.errors.HTTPError.__module__.partition(".")[0])
    hub = Hub(http)

    def client():
        hooks = default_client_factory().event_hooks  # offline mode is one
        return http.Client(transport=http.MockTransport(hub.answer), event_hooks=hooks, follow_redirects=True)

    library.set_client_factory(client)
    yield hub
    library.set_client_factory(default_client_factory)


@pytest.fixture
def logged_in(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)

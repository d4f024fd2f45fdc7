"""A cache folder of its own for a test, and a server for the tests that any Ollama server must pass."""

from __future__ import annotations

import os

import ollama
import pytest

from lwa_helpers import paths
from lwa_helpers.teachers.address import server_url

REAL = os.environ.get("OLLAMA_HOST")  # read here, since tests set it for themselves


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of this test alone."""
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(params=["local", "real"])
def any_server(request) -> tuple[str, str]:
    """(address, model): the module's local server, and the real one at OLLAMA_HOST with its first model."""
    if request.param == "local":
        local = request.getfixturevalue("server")
        local.version = "0.12.11"
        return local.url, "llama3:latest"
    if not REAL:
        pytest.skip("OLLAMA_HOST is not set, so this is not tested against a real Ollama server")
    models = ollama.Client(server_url(REAL)).list().models
    assert models, f"the Ollama server at {REAL} has no model: run `ollama pull smollm2:135m`"
    return server_url(REAL), models[0].model

"""A local Ollama server of one model, and a small local model."""

from __future__ import annotations

import pytest
from ollama_server import OllamaServer
from teacher_questions import longest_first


@pytest.fixture
def server():
    with OllamaServer({"llama3:latest": longest_first}) as running:
        yield running


@pytest.fixture(scope="module")
def smollm2():
    from lwa_helpers.models.loading import load_teacher

    return load_teacher("smollm2-135m")

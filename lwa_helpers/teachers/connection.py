"""Reaching an Ollama server: the official client, retries, and what it says about a model."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import httpx
import ollama

from lwa_helpers.errors import LwaError
from lwa_helpers.teachers.address import is_local, no_server, server_url

OLDEST_VERSION = (0, 5, 0)  # the first that takes a JSON schema as `format`
LOGPROBS_VERSION = (0, 12, 11)  # the first that gives log-probabilities
DEVELOPMENT = (0, 0, 0)  # what a build from source says
CONNECT_S = 5.0
T = TypeVar("T")


class BrokenAnswer(Exception):
    """The server's answer ended early, came too late or is not Ollama's protocol: worth another attempt."""


@contextmanager
def protocol() -> Iterator[None]:
    """Turn what the client raises on a body that is not Ollama's protocol into BrokenAnswer."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenAnswer(f"the answer is not Ollama's protocol ({str(error).splitlines()[0]})") from error


def full_name(name: str) -> str:
    """Return a model's name with its tag, which is `latest` where none is given."""
    return name if ":" in name.rsplit("/")[-1] else f"{name}:latest"


def _of(name: str | None) -> str:
    return "" if name is None else f"model {name!r}: "


@dataclass(frozen=True)
class ServedModel:
    """What a server says about a model; digest or context_length is None where it says nothing.

    logprobs: whether the server is new enough to give log-probabilities.
    """

    digest: str | None
    context_length: int | None
    thinks: bool
    logprobs: bool


class Connection:
    """One server, asked through the official client; one on this machine is never asked through a proxy.

    Connection loss, time-outs, 5xx and broken answers are tried `retries` times more, after backoff_s, 2 backoff_s, …;
    4xx never. What is left of it is an LwaError that names the server and the model.
    """

    def __init__(
        self, host: str | None = None, timeout_s: float = 300.0, retries: int = 2, backoff_s: float = 1.0
    ) -> None:
        self.url, self.timeout_s, self.retries, self.backoff_s = server_url(host), timeout_s, retries, backoff_s
        self._http = {
            "timeout": httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S)),
            "trust_env": not is_local(self.url),
        }
        self.client = ollama.Client(self.url, **self._http)

    def version(self) -> str:
        """Ask /api/version (the client has no call for it)."""
        answer = httpx.get(f"{self.url}/api/version", **self._http)
        if answer.is_error:
            raise ollama.ResponseError(answer.text, answer.status_code)
        return str(answer.json()["version"])

    def models(self) -> dict[str, str | None]:
        """Return the digests of the server's models by full name."""
        return {model.model: model.digest for model in self.client.list().models if model.model}

    def find(self, name: str) -> ServedModel:
        """Check that the server is new enough and has the model. Raises LwaError."""
        version, models = self.look_round(name)
        digest = self.pick(name, models)
        shown = self._ask(name, lambda: self.client.show(name))
        info = shown.modelinfo or {}
        length = info.get(f"{info.get('general.architecture')}.context_length")
        logprobs = version >= LOGPROBS_VERSION or version == DEVELOPMENT
        return ServedModel(digest, length, "thinking" in (shown.capabilities or ()), logprobs)

    def look_round(self, name: str | None = None) -> tuple[tuple[int, ...], dict[str, str | None]]:
        """Return the server's version and its models; `name` is for messages. Raises LwaError when it is too old."""
        text = self._ask(name, self.version)
        version = tuple(int(part) for part in re.findall(r"\d+", text)[:3])
        if DEVELOPMENT < version < OLDEST_VERSION:
            raise LwaError(f"{_of(name)}Ollama at {self.url} is version {text}, 0.5.0 is needed: update it")
        return version, self._ask(name, self.models)

    def pick(self, name: str, models: dict[str, T]) -> T:
        """Return the model's entry of a server's list by full name. Raises LwaError when it has none."""
        if full_name(name) not in models:
            has = ", ".join(sorted(models)) or "none"
            raise LwaError(f"Ollama at {self.url} has no model {name!r} (it has: {has}): run `ollama pull {name}`")
        return models[full_name(name)]

    def loaded_bytes(self, name: str) -> float:
        """Return the memory that a model takes on its server by /api/ps, nan when it is not loaded."""
        running = self._ask(name, lambda: self.client.ps().models)
        return next((float(model.size) for model in running if model.model == full_name(name) and model.size), math.nan)

    def _ask(self, name: str | None, call: Callable[[], T]) -> T:
        def attempt(_: int) -> T:
            with protocol():
                return call()

        return self.retry(name, attempt)

    def retry(self, name: str | None, call: Callable[[int], T]) -> T:
        """Return call(attempt), attempt 0, 1, …, of the first that succeeds."""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff_s * 2 ** (attempt - 1))
            try:
                return call(attempt)
            except ollama.ResponseError as error:
                if 400 <= error.status_code < 500:
                    raise LwaError(f"{_of(name)}Ollama at {self.url} refused: {error}") from error
                last: Exception = error
            except (httpx.RequestError, ConnectionError, BrokenAnswer) as error:
                last = error
        raise LwaError(self._explain(name, last)) from last

    def _explain(self, name: str | None, error: Exception) -> str:
        attempts = f"{self.retries + 1} attempts"
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, ConnectionError)):
            return f"{_of(name)}{no_server(self.url)}"
        if isinstance(error, httpx.TimeoutException):
            return f"{_of(name)}Ollama at {self.url} gave no answer within {self.timeout_s:g} s ({attempts})"
        return f"{_of(name)}Ollama at {self.url} failed: {error or type(error).__name__} ({attempts})"

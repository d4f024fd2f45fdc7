"""Reaching an Ollama server: its address, the official client, retries, and what it says about a model."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

import httpx
import ollama

from lwa_helpers.errors import LwaError

OLDEST_VERSION = (0, 5, 0)  # the first that takes a JSON schema as `format`
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


def server_url(host: str | None = None) -> str:
    """Return http(s)://host:port of the server: `host`, else OLLAMA_HOST, else this machine's port 11434.

    Raises LwaError for any other scheme, a user name or password, white space, or a port that is no number.
    """
    host = host or os.environ.get("OLLAMA_HOST") or "127.0.0.1"
    usual = {"http": 80, "https": 443} if "://" in host else {"http": 11434}
    problem = LwaError(f"Ollama host {host!r}: give host, host:port or an http(s):// address, as argument or in OLLAMA_HOST")
    try:
        url = urlsplit(host if "://" in host else f"http://{host}")
        port = url.port or usual.get(url.scheme)
    except ValueError:
        raise problem from None
    if url.scheme not in ("http", "https") or "@" in url.netloc or re.search(r"[^!-~]", host):
        raise problem
    name = url.hostname or "127.0.0.1"
    return f"{url.scheme}://{f'[{name}]' if ':' in name else name}:{port}{url.path.rstrip('/')}"


@dataclass(frozen=True)
class ServedModel:
    """What a server says about a model; digest or context_length is None where it says nothing."""

    digest: str | None
    context_length: int | None
    thinks: bool


class Connection:
    """One server, asked through the official client; one on this machine is never asked through a proxy.

    Connection loss, time-outs, 5xx and broken answers are tried `retries` times more, after backoff_s, 2 backoff_s, …;
    4xx never. What is left of it is an LwaError that names the server and the model.
    """

    def __init__(self, host: str | None = None, timeout_s: float = 300.0, retries: int = 2, backoff_s: float = 1.0) -> None:
        self.url, self.timeout_s, self.retries, self.backoff_s = server_url(host), timeout_s, retries, backoff_s
        self._http = {
            "timeout": httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S)),
            "trust_env": urlsplit(self.url).hostname not in ("127.0.0.1", "localhost", "::1", "0.0.0.0"),
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
        version = self._ask(name, self.version)
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
        if (0, 0, 0) < numbers < OLDEST_VERSION:  # 0.0.0 is what a development build says
            raise LwaError(f"model {name!r}: Ollama at {self.url} is version {version}, 0.5.0 is needed: update it")
        models = self._ask(name, self.models)
        full_name = name if ":" in name.rsplit("/")[-1] else f"{name}:latest"
        if full_name not in models:
            has = ", ".join(sorted(models)) or "none"
            raise LwaError(f"Ollama at {self.url} has no model {name!r} (it has: {has}): run `ollama pull {name}`")
        shown = self._ask(name, lambda: self.client.show(name))
        info = shown.modelinfo or {}
        length = info.get(f"{info.get('general.architecture')}.context_length")
        return ServedModel(models[full_name], length, "thinking" in (shown.capabilities or ()))

    def _ask(self, name: str, call: Callable[[], T]) -> T:
        def attempt(_: int) -> T:
            with protocol():
                return call()

        return self.retry(name, attempt)

    def retry(self, name: str, call: Callable[[int], T]) -> T:
        """Return call(attempt), attempt 0, 1, …, of the first that succeeds."""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff_s * 2 ** (attempt - 1))
            try:
                return call(attempt)
            except ollama.ResponseError as error:
                if 400 <= error.status_code < 500:
                    raise LwaError(f"model {name!r}: Ollama at {self.url} refused: {error}") from error
                last: Exception = error
            except (httpx.TransportError, ConnectionError, BrokenAnswer) as error:
                last = error
        raise LwaError(self._explain(name, last)) from last

    def _explain(self, name: str, error: Exception) -> str:
        attempts = f"{self.retries + 1} attempts"
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, ConnectionError)):
            return f"model {name!r}: no Ollama server answers at {self.url}: start it with `ollama serve` or set OLLAMA_HOST"
        if isinstance(error, httpx.TimeoutException):
            return f"model {name!r}: Ollama at {self.url} gave no answer within {self.timeout_s:g} s ({attempts})"
        return f"model {name!r}: Ollama at {self.url} failed: {error or type(error).__name__} ({attempts})"

"""The connection to an Ollama server: the official client, retries, and what the server says about a model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

import httpx
import ollama
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from lwa_helpers.errors import LwaError
from lwa_helpers.models.registry import full_name
from lwa_helpers.teachers.address import no_server, server_url
from lwa_helpers.teachers.client import OllamaClient, ServerError, remedy, without_key, words

OLDEST_VERSION = (0, 5, 0)  # the first that takes a JSON schema as `format`
LOGPROBS_VERSION = (0, 12, 11)  # the first that gives log-probabilities
DEVELOPMENT = (0, 0, 0)  # the version that a build from source reports
CONNECT_S = 5.0
T = TypeVar("T")


class BrokenAnswer(Exception):
    """The answer ended early, came too late or does not follow Ollama's protocol; another attempt may succeed."""


TEMPORARY = (httpx.RequestError, ConnectionError, BrokenAnswer)


def _may_pass(error: BaseException) -> bool:
    return error.may_pass if isinstance(error, ServerError) else isinstance(error, TEMPORARY)


@contextmanager
def protocol() -> Iterator[None]:
    """Turn the errors that the official client raises on an answer into ours.

    Raises:
        ServerError: if a stream holds an error.
        BrokenAnswer: if the answer does not follow Ollama's protocol.
    """
    try:
        yield
    except ollama.ResponseError as error:
        raise ServerError(words(str(error.error))) from None  # the official one may show the key
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BrokenAnswer(f"the answer is not Ollama's protocol ({without_key(reason)})") from error


def _of(name: str | None) -> str:
    return "" if name is None else f"model {name!r}: "


@dataclass(frozen=True)
class ServedModel:
    """What a server says about a model.

    Attributes:
        digest: hash of the model; None if the server does not report it.
        context_length: the most tokens in the model's context; None if the server does not report it.
        thinks: whether the model can think before it answers.
        logprobs: whether the server is new enough to report log-probabilities.
    """

    digest: str | None
    context_length: int | None
    thinks: bool
    logprobs: bool


class Connection:
    """A connection to one server through the official client.

    Lost connections, time-outs, HTTP 5xx, 408 and 429, and broken answers are retried; any other HTTP 4xx is not. A
    failure that remains is an LwaError that names the server, the model, the cause and what to do.

    Args:
        host: as in server_url.
        timeout_s: how many seconds to wait for an answer.
        retries: how many attempts may follow the first one.
        backoff_s: seconds before the first retry; they double with each further one.
    """

    def __init__(
        self, host: str | None = None, timeout_s: float = 300.0, retries: int = 2, backoff_s: float = 1.0
    ) -> None:
        self.url, self.timeout_s, self.retries, self.backoff_s = server_url(host), timeout_s, retries, backoff_s
        self.client = OllamaClient(self.url, httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S)))

    def models(self) -> dict[str, str | None]:
        """Return the digest of each of the server's models, by full name."""
        return {model.model: model.digest for model in self.client.list().models if model.model}

    def find(self, name: str) -> ServedModel:
        """Return what the server says about a model; an LwaError if the server is too old or lacks the model."""
        version, models = self.look_round(name)
        digest = self.pick(name, models)
        shown = self._ask(name, lambda: self.client.show(name))
        info = shown.modelinfo or {}
        length = info.get(f"{info.get('general.architecture')}.context_length")
        length = length if isinstance(length, int) and length > 0 else None
        logprobs = version >= LOGPROBS_VERSION or version == DEVELOPMENT
        return ServedModel(digest, length, "thinking" in (shown.capabilities or ()), logprobs)

    def look_round(self, name: str | None = None) -> tuple[tuple[int, ...], dict[str, str | None]]:
        """Return the server's version and the digests of its models by full name.

        Args:
            name: the model that error messages name; None names none.

        Raises:
            LwaError: if the server is too old.
        """
        text = self._ask(name, self.client.version)
        version = tuple(int(part) for part in [*re.findall(r"\d+", text), 0, 0, 0][:3])
        if DEVELOPMENT < version < OLDEST_VERSION:
            raise LwaError(f"{_of(name)}Ollama at {self.url} is version {text}, 0.5.0 is needed: update it")
        return version, self._ask(name, self.models)

    def pick(self, name: str, models: dict[str, T]) -> T:
        """Return a model's entry in a server's list of models.

        Args:
            name: the model, with or without its tag.
            models: the list, by full name.

        Raises:
            LwaError: if the list does not have the model.
        """
        if full_name(name) not in models:
            has = ", ".join(sorted(models)) or "none"
            raise LwaError(f"Ollama at {self.url} has no model {name!r} (it has: {has}): run `ollama pull {name}`")
        return models[full_name(name)]

    def loaded_bytes(self, name: str) -> float:
        """Return the bytes of memory that a model takes on its server by /api/ps; nan if it is not loaded."""
        running = self._ask(name, lambda: self.client.ps().models)
        return next((float(model.size) for model in running if model.model == full_name(name) and model.size), math.nan)

    def _ask(self, name: str | None, call: Callable[[], T]) -> T:
        def attempt(_: int) -> T:
            with protocol():
                return call()

        return self.retry(name, attempt)

    def retry(self, name: str | None, call: Callable[[int], T]) -> T:
        """Return the result of the first call that succeeds.

        Args:
            name: the model that error messages name; None names none.
            call: called with the number of the attempt, 0, 1, ….

        Raises:
            LwaError: if the server refuses the request (HTTP 4xx), or the last attempt fails.
        """
        attempts = Retrying(
            stop=stop_after_attempt(self.retries + 1),
            wait=wait_exponential(self.backoff_s),
            retry=retry_if_exception(_may_pass),
            reraise=True,
        )
        numbers = count()
        try:
            return attempts(lambda: call(next(numbers)))
        except (ServerError, *TEMPORARY) as error:
            raise LwaError(self._explain(name, error)) from error

    def _explain(self, name: str | None, error: Exception) -> str:
        attempts = f"{self.retries + 1} attempt{'s' * (self.retries > 0)}"
        if isinstance(error, ServerError):
            answered = f"HTTP {error.status}, " if error.status else ""
            tried = f" ({attempts})" if error.may_pass else ""
            return f"{_of(name)}Ollama at {self.url} failed: {answered}{error.said}{tried}: {remedy(error, name)}"
        if unsafe := _tls_problem(error):
            return (
                f"{_of(name)}no secure connection to Ollama at {self.url} ({unsafe}): name the certificate of its "
                "authority in SSL_CERT_FILE, or use the address that begins with http:// if it speaks no TLS"
            )
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, ConnectionError)):
            return f"{_of(name)}{no_server(self.url)}"
        if isinstance(error, httpx.TimeoutException):
            return f"{_of(name)}Ollama at {self.url} gave no answer within {self.timeout_s:g} s ({attempts})"
        reason = without_key(str(error)) or type(error).__name__
        return f"{_of(name)}Ollama at {self.url} failed: {reason} ({attempts})"


def _tls_problem(error: BaseException | None) -> str:
    """Return what an error, or one that it came from, says about TLS; "" if it says nothing."""
    while error:
        if isinstance(error, httpx.ConnectError) and "SSL" in str(error):
            return str(error)
        error = error.__cause__ or error.__context__
    return ""

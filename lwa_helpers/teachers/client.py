"""The official client with one more call, and its errors as one kind that says what to do and never shows the key."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import httpx
import ollama

from lwa_helpers.errors import LwaError
from lwa_helpers.teachers.address import is_local

KEY = "OLLAMA_API_KEY"
LONGEST_WORDS = 200  # characters of what a server says that an error message repeats
OVERLOADED = (408, 429)  # refusals that may pass, as HTTP 5xx may
MARKUP = re.compile(r"<(style|script|head)\b.*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)


class ServerError(Exception):
    """The server answered with an error.

    Attributes:
        said: the server's words.
        status: the HTTP status; None for an error in place of an answer, or amid it.
    """

    def __init__(self, said: str, status: int | None = None) -> None:
        super().__init__(said)
        self.said, self.status = said, status

    @property
    def may_pass(self) -> bool:
        """Whether another attempt may succeed: not after a refusal of the request itself (HTTP 4xx)."""
        return self.status is None or not 400 <= self.status < 500 or self.status in OVERLOADED


class OllamaClient(ollama.Client):
    """The official client: every request, that for the version too, has its key, proxies, TLS settings and address.

    A server on this machine is never reached through a proxy.

    Args:
        url: the address, from server_url.
        timeout: of httpx.

    Raises:
        LwaError: if the key can be in no HTTP header, or a proxy or certificate of the environment cannot be used.
    """

    def __init__(self, url: str, timeout: httpx.Timeout) -> None:
        check_key()
        settings: dict[str, Any] = {"timeout": timeout, "event_hooks": {"response": [_raise_for_status]}}
        try:
            if is_local(url):
                settings["transport"] = httpx.HTTPTransport()  # of its own, so that no proxy takes its place
            super().__init__(url, **settings)
        except (OSError, ValueError, ImportError, httpx.InvalidURL) as error:
            raise LwaError(
                f"cannot connect to Ollama at {url} ({error or type(error).__name__}): check OLLAMA_HOST, HTTP_PROXY, "
                "HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
            ) from error

    def version(self) -> str:
        """Return the server's version from /api/version, for which the official client has no call."""
        return str(self._request_raw("GET", "/api/version").json()["version"])

    def _request_raw(self, *args: Any, **kwargs: Any) -> httpx.Response:
        """Send a request; an error that comes with HTTP 200 is one too."""
        answer: httpx.Response = super()._request_raw(*args, **kwargs)
        body = answer.json()
        if isinstance(body, dict) and body.get("error"):
            raise ServerError(words(answer.text))
        return answer


def _raise_for_status(response: httpx.Response) -> None:
    if response.is_error:
        response.read()
        raise ServerError(words(response.text), response.status_code)


def check_key() -> None:
    """Raise LwaError, which does not show the key, if OLLAMA_API_KEY can be in no HTTP header."""
    if re.search(r"[^!-~]", os.environ.get(KEY, "")):
        raise LwaError(f"{KEY} holds white space, a line break or a character outside ASCII: set it again without")


def without_key(text: str) -> str:
    """Return a text in which the key, if there is one, is replaced by three dots."""
    key = os.environ.get(KEY)
    return text.replace(key, "…") if key else text


def words(body: str) -> str:
    """Return the words of an error on one short line: the `error`, `message` or `detail` of JSON, a page without tags.

    Args:
        body: what the server sent.
    """
    try:
        found: Any = json.loads(body)
    except (ValueError, RecursionError):
        found = MARKUP.sub(" ", body) if body.lstrip().startswith("<") else body
    for _ in range(2):  # {"error": {"message": "…"}}
        if isinstance(found, dict):
            found = next((found[key] for key in ("error", "message", "detail") if found.get(key)), json.dumps(found))
    line = " ".join((found if isinstance(found, str) else json.dumps(found)).split())
    return without_key(line if len(line) <= LONGEST_WORDS else f"{line[:LONGEST_WORDS]}…")


def remedy(error: ServerError, name: str | None) -> str:
    """Return what to do about a server's error.

    Args:
        error: the error.
        name: the model that was asked for; None for none.
    """
    status = error.status or 500
    if name and re.search("model.*not found", error.said):
        return f"run `ollama pull {name}`"
    if "not support thinking" in error.said:
        return "leave `think` out of the model's entry in model_config.yaml"
    return _REMEDIES.get(status) or (
        "the model or the server failed: its log says why; a smaller model needs less memory"
        if status >= 500
        else "check the model and OLLAMA_HOST"
    )


_ADDRESS = "is this Ollama's address? OLLAMA_HOST ends before /api or /v1"
_AGAIN = "the server is busy or not up behind its proxy: try again later, or ask with less concurrency"
_REMEDIES = {
    401: f"set {KEY} to a key that this server accepts",
    403: f"the server or a proxy before it forbids this: check {KEY}, and what the key may use",
    404: _ADDRESS,
    405: _ADDRESS,
    408: _AGAIN,
    407: "give the proxy's user and password in HTTPS_PROXY",
    413: "ask with fewer candidates or a shorter history",
    429: "too many requests: ask with less concurrency, or later",
    502: _AGAIN,
    503: _AGAIN,
    504: _AGAIN,
}

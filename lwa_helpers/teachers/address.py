"""The address of an Ollama server."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from lwa_helpers.config import read_yaml
from lwa_helpers.errors import LwaError


def server_url(host: str | None = None) -> str:
    """Return the server's address as http(s)://host:port, followed by its path if it has one.

    Any other scheme, a user name or password, a query string or fragment, white space, a character outside ASCII, or a
    port that is not a number is an LwaError, which does not repeat the password or the query string.

    Args:
        host: host, host:port or an http(s):// address. None or "" takes OLLAMA_HOST, else the host in
            configs/ollama.yaml, else port 11434 of this machine.
    """
    host = host or os.environ.get("OLLAMA_HOST") or read_yaml("ollama.yaml")["host"] or "127.0.0.1"
    usual = {"http": 80, "https": 443} if "://" in host else {"http": 11434}
    problem = LwaError(
        f"Ollama host {_without_secrets(host)!r}: give host, host:port or an http(s):// address, in OLLAMA_HOST or "
        "ollama.yaml; no user, password or query string: a server that wants a key gets the one in OLLAMA_API_KEY"
    )
    try:
        url = urlsplit(host if "://" in host else f"http://{host}")
        port = url.port or usual.get(url.scheme)
    except ValueError:
        raise problem from None
    if url.scheme not in ("http", "https") or re.search(r"[^!-~]|[?#@]", host):
        raise problem
    name = url.hostname or "127.0.0.1"
    return f"{url.scheme}://{f'[{name}]' if ':' in name else name}:{port}{url.path.rstrip('/')}"


def _without_secrets(host: str) -> str:
    """Return an address without what may be a password: all before an "@", and all after a "?" or "#"."""
    return re.sub(r"(?s)([?#]).*", r"\1…", re.sub(r"(?s)(://|^).*@", r"\1…@", host))


def is_local(url: str) -> bool:
    """Return whether an address from server_url is on this machine, which is never reached through a proxy."""
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1", "0.0.0.0")


def no_server(url: str) -> str:
    """Return a message that no server answers at an address, and what to do about it."""
    return f"no Ollama server answers at {url}: start it with `ollama serve` or set OLLAMA_HOST"

"""Where an Ollama server is."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from lwa_helpers.config import read_yaml
from lwa_helpers.errors import LwaError


def server_url(host: str | None = None) -> str:
    """Return http(s)://host:port of the server: `host`, else OLLAMA_HOST, else configs/ollama.yaml, else this machine's 11434.

    Raises LwaError for any other scheme, a user name or password, white space, or a port that is no number.
    """
    host = host or os.environ.get("OLLAMA_HOST") or read_yaml("ollama.yaml")["host"] or "127.0.0.1"
    usual = {"http": 80, "https": 443} if "://" in host else {"http": 11434}
    problem = LwaError(
        f"Ollama host {host!r}: give host, host:port or an http(s):// address, in OLLAMA_HOST or ollama.yaml"
    )
    try:
        url = urlsplit(host if "://" in host else f"http://{host}")
        port = url.port or usual.get(url.scheme)
    except ValueError:
        raise problem from None
    if url.scheme not in ("http", "https") or "@" in url.netloc or re.search(r"[^!-~]", host):
        raise problem
    name = url.hostname or "127.0.0.1"
    return f"{url.scheme}://{f'[{name}]' if ':' in name else name}:{port}{url.path.rstrip('/')}"


def is_local(url: str) -> bool:
    """Whether an address from server_url is this machine, which no proxy is asked for."""
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1", "0.0.0.0")


def no_server(url: str) -> str:
    """Say that nothing answers there, and what to do."""
    return f"no Ollama server answers at {url}: start it with `ollama serve` or set OLLAMA_HOST"

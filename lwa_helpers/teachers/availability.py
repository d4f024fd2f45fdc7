"""Which teachers can be used on this machine, found out without loading any; a server is asked once."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lwa_helpers.assets import embedded_file
from lwa_helpers.errors import LwaError
from lwa_helpers.models.registry import ModelSpec, registry
from lwa_helpers.teachers.address import is_local, no_server, server_url

if TYPE_CHECKING:
    from lwa_helpers.teachers.connection import Connection

COMPARISON_S, STATUS_S = 5.0, 1.0
Server = Callable[[], tuple["Connection", dict[str, str | None]] | LwaError]


def reachable_teachers(
    names: Iterable[str], host: str | None = None, timeout_s: float = COMPARISON_S
) -> list[dict[str, Any]]:
    """Return one row per name: name, backend, reachable (bool), reason ("" or why not).

    A registered name, a directory or a .gguf file; a name that is none of these is a row that says so. timeout_s: how long
    each of the (two) requests to a server may take.
    """
    known, server = registry(), cache(lambda: _server(host, timeout_s))
    return [_row(known.get(name) or ModelSpec(name=name, backend="path", id=name), server) for name in names]


def _row(spec: ModelSpec, server: Server) -> dict[str, Any]:
    try:
        _CHECKS[spec.backend](spec, server)
        reason = ""
    except LwaError as error:
        reason = str(error)
    return {"name": spec.name, "backend": spec.backend, "reachable": not reason, "reason": reason}


def _server(host: str | None, timeout_s: float) -> tuple[Connection, dict[str, str | None]] | LwaError:
    """The server and the models that it has, or what is wrong with it; no HTTP client is imported where nothing listens."""
    try:
        _knock(server_url(host))
        from lwa_helpers.teachers.connection import Connection

        connection = Connection(host, timeout_s, retries=0)
        return connection, connection.look_round()[1]
    except LwaError as error:
        return error


def _knock(url: str) -> None:
    """Raise LwaError when the address is on this machine and nothing listens there (a far one may need a proxy)."""
    if not is_local(url):
        return
    try:
        socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), STATUS_S).close()
    except OSError as error:
        raise LwaError(no_server(url)) from error


def _check_ollama(spec: ModelSpec, server: Server) -> None:
    found = server()
    if isinstance(found, LwaError):
        raise found
    connection, models = found
    connection.pick(spec.id, models)


def _check_embedded(spec: ModelSpec, _: Server) -> None:
    embedded_file(spec.id)


def _check_huggingface(spec: ModelSpec, _: Server) -> None:
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(spec.id, "config.json", revision=spec.revision), str):
        raise LwaError(f"{spec.id} is not in the local Hugging Face cache: load_teacher downloads it")


def _check_path(spec: ModelSpec, _: Server) -> None:
    path = Path(spec.id)
    if not (path.is_dir() or (path.suffix == ".gguf" and path.is_file())):
        raise LwaError(f"{path} is neither a registered name nor a directory or .gguf file")


_CHECKS = {
    "ollama": _check_ollama,
    "embedded": _check_embedded,
    "huggingface": _check_huggingface,
    "path": _check_path,
}


def status_lines(host: str | None = None) -> list[str]:
    """Return one line per registered model: name, backend, and ready or the reason why not."""
    rows = reachable_teachers(registry(), host, STATUS_S)
    return [f"{row['name']:<16} {row['backend']:<12} {row['reason'] or 'ready'}" for row in rows]

"""Check which teachers can be used on this machine, without loading any; a server is asked once."""

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
    """Return one row per name: name, backend, reachable (bool), reason ("" or why it is not reachable).

    Args:
        names: registered names, directories or .gguf files. The row of any other name says that it is none of these.
        host: Ollama server; None is OLLAMA_HOST if it is set, else this machine.
        timeout_s: how many seconds each of the two requests to a server may take.
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
    """Return the server and the models that it has, or what is wrong with it.

    The HTTP client is imported only if the server may be there.
    """
    try:
        _knock(server_url(host))
        from lwa_helpers.teachers.connection import Connection

        connection = Connection(host, timeout_s, retries=0)
        return connection, connection.look_round()[1]
    except LwaError as error:
        return error


def _knock(url: str) -> None:
    """Check that something listens at an address on this machine.

    An address on another machine is not checked, since it may be reachable only through a proxy.

    Raises:
        LwaError: if nothing listens there.
    """
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
    """Return one line per registered model: name, backend, and "ready" or the reason why it is not."""
    rows = reachable_teachers(registry(), host, STATUS_S)
    return [f"{row['name']:<16} {row['backend']:<12} {row['reason'] or 'ready'}" for row in rows]

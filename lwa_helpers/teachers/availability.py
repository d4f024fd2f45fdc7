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
from lwa_helpers.models.registry import ModelSpec, find_spec, full_name, may_be_served, registry, unknown
from lwa_helpers.teachers.address import is_local, no_server, server_url

if TYPE_CHECKING:
    from lwa_helpers.teachers.connection import Connection

COMPARISON_S, STATUS_S = 5.0, 1.0
Server = Callable[[], tuple["Connection", dict[str, str | None]] | LwaError]


def find_model(name: str, host: str | None = None, timeout_s: float = COMPARISON_S) -> ModelSpec:
    """Return the entry of a registered name, or a new one for a path or for any model that the server lists.

    A server is asked only for a name that is neither registered nor a path. A path wins over a model of that name.

    Args:
        name: registered name, directory, .gguf file, or the name of a model on the server, with or without its tag
            `latest`.
        host: Ollama server; None is OLLAMA_HOST if it is set, else this machine.
        timeout_s: how many seconds each of the two requests to a server may take.

    Raises:
        LwaError: if there is no such model. The message lists those that there are, or says that no server answers.
    """
    return _find(name, lambda: _server(host, timeout_s))


def _find(name: str, server: Server) -> ModelSpec:
    spec = find_spec(name)
    if spec and not (spec.backend == "path" and not Path(spec.id).exists()):
        return spec
    found = server() if may_be_served(name) else None
    models = found[1] if isinstance(found, tuple) else {}
    if full_name(name) in models:
        return ModelSpec(name=name, backend="ollama", id=name)
    if spec:
        return spec
    raise LwaError(unknown(name, _not_served(found)))


def _not_served(found: tuple[Connection, dict[str, str | None]] | LwaError | None) -> str:
    """Return what an error message says about the server, which was not asked if `found` is None."""
    if found is None:
        return ", and no name of a model of Ollama"
    if isinstance(found, LwaError):
        return f"; {found}"
    connection, models = found
    return f", nor a model of Ollama at {connection.url} (it has: {', '.join(sorted(models)) or 'none'})"


def reachable_teachers(
    names: Iterable[str], host: str | None = None, timeout_s: float = COMPARISON_S
) -> list[dict[str, Any]]:
    """Return one row per name: name, backend, reachable (bool), reason ("" or why it is not reachable).

    Args:
        names: names as in find_model. The row of a name that stands for no model has the backend "unknown". A
            registered model of Ollama has its registered name.
        host: Ollama server; None is OLLAMA_HOST if it is set, else this machine.
        timeout_s: how many seconds each of the two requests to a server may take.
    """
    server = cache(lambda: _server(host, timeout_s))
    return [_row(name, server) for name in names]


def _row(name: str, server: Server) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "backend": "unknown"}
    try:
        spec = _find(name, server)
        row |= {"name": name if spec.backend == "path" else spec.name, "backend": spec.backend}
        _CHECKS[spec.backend](spec, server)
        reason = ""
    except LwaError as error:
        reason = str(error)
    return row | {"reachable": not reason, "reason": reason}


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
        raise LwaError(f"model file {path} does not exist")


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

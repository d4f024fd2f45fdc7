"""Which teachers can be used on this machine, found out without loading any."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lwa_helpers.config import read_yaml
from lwa_helpers.embedded import embedded_file
from lwa_helpers.errors import LwaError
from lwa_helpers.teachers.connection import Connection

PROBE_S = 3.0


def reachable_teachers(names: Iterable[str], host: str | None = None) -> list[dict[str, Any]]:
    """Return one row per name: name, backend, reachable (bool), reason ("" or why not).

    A registered name, a directory or a .gguf file; a name that is none of these is a row that says so.
    """
    known = read_yaml("model_config.yaml")
    return [_row(name, known.get(name, {"backend": "path", "id": name}), host) for name in names]


def _row(name: str, entry: dict[str, Any], host: str | None) -> dict[str, Any]:
    try:
        _CHECKS[entry["backend"]](entry, host)
        reason = ""
    except LwaError as error:
        reason = str(error)
    return {"name": name, "backend": entry["backend"], "reachable": not reason, "reason": reason}


def _check_ollama(entry: dict[str, Any], host: str | None) -> None:
    Connection(host, timeout_s=PROBE_S, retries=0).find(entry["id"])


def _check_embedded(entry: dict[str, Any], _: str | None) -> None:
    embedded_file(entry["id"])


def _check_huggingface(entry: dict[str, Any], _: str | None) -> None:
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(entry["id"], "config.json", revision=entry["revision"]), str):
        raise LwaError(f"{entry['id']} is not in the local Hugging Face cache: load_teacher downloads it")


def _check_path(entry: dict[str, Any], _: str | None) -> None:
    path = Path(entry["id"])
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
    rows = reachable_teachers(read_yaml("model_config.yaml"), host)
    return [f"{row['name']:<16} {row['backend']:<12} {row['reason'] or 'ready'}" for row in rows]

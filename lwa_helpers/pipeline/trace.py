"""Where a number of the paper comes from: the cell that recorded it, and the command that makes it again."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from lwa_helpers import files, paths
from lwa_helpers.errors import LwaError

PUBLISHED = "numbers.json"
FACTS = ("profile", "seed", "commit", "dirty", "device")


def write_origins(folder: Path, records: list[dict[str, Any]]) -> None:
    """Write which notebook and cell recorded each number of some manifests, and what made them."""
    with files.atomic_write(folder / PUBLISHED) as temporary:
        text = json.dumps(origins(records), indent=1, sort_keys=True) + "\n"
        temporary.write_text(text, encoding="utf-8")


def origins(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each number of some manifests where it comes from, by name."""
    found = dict[str, dict[str, Any]]()
    for record in records:
        facts = {name: record[name] for name in FACTS} | {"notebook": record["notebook"]}
        facts["overrides"] = record["records"]["overrides"]
        found |= {name: facts | {"text": n["text"], "cell": n.get("cell")} for name, n in record["numbers"].items()}
    return found


def trace(macro: str, run: str | None = None) -> str:
    r"""Say where a number comes from.

    Args:
        macro: Its name, with or without the backslash of LaTeX. The ends of an interval are traced with their estimate.
        run: A results folder; None takes the published run.

    Returns:
        The lines to print.

    Raises:
        LwaError: If no such number was recorded (the message offers the nearest names), or the run has no manifest.
    """
    name, found = macro.lstrip("\\"), _read(run)
    if name not in found:
        near = difflib.get_close_matches(name, found, n=3)
        raise LwaError(
            f"no number {name!r} in {run or 'the published run'}" + (f": is it {', '.join(near)}?" if near else "")
        )
    entry = found[name]
    ends = [found[name + end]["text"] for end in ("Low", "High") if name + end in found]
    cell = f"In [{entry['cell']}]" if entry["cell"] else "a cell that was not recorded"
    dirty = " with uncommitted changes" if entry["dirty"] else ""
    return "\n".join(
        [
            f"\\{name} = {entry['text']}" + (f" [{', '.join(ends)}]" if ends else ""),
            f"  notebook  {entry['notebook']}, {cell}",
            f"  run       profile {entry['profile']}, seed {entry['seed']}, {entry['device']}",
            f"  commit    {entry['commit']}{dirty}",
            f"  command   {_command(entry)}",
        ]
    )


def _read(run: str | None) -> dict[str, dict[str, Any]]:
    path = paths.PAPER / PUBLISHED if run is None else Path(run) / "manifest.json"
    if not path.is_file():
        raise LwaError(f"{path} does not exist: " + ("publish a run first" if run is None else "give a results folder"))
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if run is None else origins(list(content["notebooks"].values()))


def _command(entry: dict[str, Any]) -> str:
    settings = " ".join(f"--set {key}={json.dumps(value)}" for key, value in entry["overrides"].items())
    number = entry["notebook"].split("_")[0]
    return f"lwa reproduce --profile {entry['profile']} --only {number} {settings}".rstrip()

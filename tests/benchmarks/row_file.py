"""A CSV that grows by rows, so that a long benchmark can be stopped and started again; the record of what made them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import torch

from lwa_helpers.config import ExperimentConfig, load_config
from lwa_helpers.errors import LwaError
from lwa_helpers.files import atomic_write
from lwa_helpers.pipeline import manifest
from lwa_helpers.report.tables import format_number

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def write(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file, whole or not at all."""
    write(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def interval_macros(name: str, interval: Iterable[float], spec: str = "{:+.4f}") -> dict[str, str]:
    """The macros of a value and its interval: NAME, NAMELow, NAMEHigh."""
    return {f"{name}{end}": format_number(value, spec) for end, value in zip(("", "Low", "High"), interval)}


def made_by(options: dict, config: ExperimentConfig | None = None) -> dict:
    """What makes a benchmark's numbers: commit, device, packages, options, and the profile's settings, if any."""
    made = manifest.provenance(torch.device(DEVICE), config or load_config("quick"))
    kept = (
        made
        if config
        else {name: made[name] for name in ("commit", "dirty", "device", "has_bf16", "python", "packages")}
    )
    return json.loads(json.dumps(kept | {"options": options}, default=manifest.plain))


def keep_record(file: Path, options: dict, began: float, config: ExperimentConfig | None = None, **hashes: str) -> None:
    """Write what made a benchmark's table beside it; began: time.perf_counter() at its start."""
    write_json(file.with_suffix(".json"), made_by(options, config) | hashes | {"seconds": time.perf_counter() - began})


def keep_manifest(
    path: Path, config: ExperimentConfig, facts: dict, fix: str, hashes: Callable[[], dict] = dict
) -> str:
    """Write what makes a table's rows, as the manifest of the first run.

    Every later run must be alike in settings and in `facts`. fix: what to do where it is not. hashes: further
    facts, asked for by the first run alone. Returns the commit of this run, marked where files have been changed since.
    Raises LwaError where something differs.
    """
    summary = json.loads(json.dumps(manifest.provenance(torch.device(DEVICE), config) | facts, default=manifest.plain))
    commit = commit_of(summary)
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in ("settings", *facts) if before.get(key) != summary[key]]
        if changed:
            raise LwaError(f"{path} was made with other {', '.join(changed)}: {fix}")
        return commit
    write_json(path, summary | hashes())
    return commit


def commit_of(*made: dict) -> str:
    """The commit of some manifests of one run, marked where one of them was made with uncommitted changes."""
    return made[0]["commit"] + "-dirty" * any(each["dirty"] for each in made)


def short_commits(commits: Iterable[str]) -> str:
    """Commits as a README names them: each once, ten digits, in order."""
    return ", ".join(sorted({commit[:10] for commit in commits}))


def refuse_dirty(rows: pd.DataFrame, name: str, path: Path) -> None:
    """Raise LwaError, naming them by the column `name`, for rows that no commit made."""
    if (dirty := rows["commit"].str.endswith("-dirty")).any():
        raise LwaError(
            f"{path}: rows of uncommitted changes ({', '.join(map(str, rows[name][dirty]))}): run them again"
        )


class RowFile:
    """The finished rows of a benchmark at `path`; keys: the columns that tell rows apart, and the type of each."""

    def __init__(self, path: Path, **keys: type):
        self.path, self.keys = path, keys

    def read(self) -> pd.DataFrame:
        """All rows so far; at first there are only the columns of the keys."""
        return pd.read_csv(self.path, dtype=self.keys) if self.path.exists() else pd.DataFrame(columns=list(self.keys))

    def has(self, **key: object) -> bool:
        """Whether a row holds all of these values."""
        return bool((self.read()[list(key)] == list(key.values())).all(axis=1).any())

    def add(self, rows: pd.DataFrame) -> None:
        """Append rows; the file is seen with all of them or with none."""
        with atomic_write(self.path) as temporary:
            (pd.concat([self.read(), rows]) if self.path.exists() else rows).to_csv(temporary, index=False)

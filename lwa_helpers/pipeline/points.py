"""The runs of a study, as the notebook that compares its points reads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline import manifest
from lwa_helpers.pipeline.run import Run
from lwa_helpers.pipeline.study import Unit, load_study, units


@dataclass(frozen=True)
class PointRun:
    """One point of a study with one seed. What is read from it counts as an input of the notebook that reads it.

    Attributes:
        run: The run of the notebook that compares the points.
        unit: The point and the seed.
    """

    run: Run
    unit: Unit

    @cached_property
    def _records(self) -> list[dict[str, Any]]:
        return manifest.load_all(self.unit.folder)

    def has(self, notebook: str) -> bool:
        """Whether the point ran a notebook, such as "02"."""
        return any(record["notebook"].startswith(notebook) for record in self._records)

    def frame(self, name: str) -> pd.DataFrame:
        """Return data/<name>.parquet of the point. Raises LwaError if it has none."""
        return pd.read_parquet(self.run.input(f"{self.unit.name}/data/{name}.parquet"))

    def hash_of(self, name: str) -> str | None:
        """Return the hash of data/<name>.parquet, by which two points that share a result are known; None without."""
        outputs = (record["outputs"].get(f"data/{name}.parquet") for record in self._records)
        return next((output["sha256"] for output in outputs if output), None)

    def value(self, name: str) -> Any:
        """Return a number that the point recorded, or None."""
        return self._recorded("numbers", name, "value")

    def outcome(self, hypothesis: str) -> str | None:
        """Return the point's verdict on a hypothesis, or None."""
        return self._recorded("verdicts", hypothesis, "outcome")

    def _recorded(self, field: str, name: str, key: str) -> Any:
        self.run.uses(f"{self.unit.name}/{field}/{name}")
        return next((record[field][name][key] for record in self._records if name in record[field]), None)


def read_points(run: Run) -> list[PointRun]:
    """Return the runs of a study, point by point in the order of its file, and seed by seed.

    Args:
        run: The run of the notebook that compares them, opened with the study's name.

    Returns:
        The runs.

    Raises:
        LwaError: If the run belongs to no study, or a point has not run.
    """
    if run.study is None:
        raise LwaError(f'{run.notebook} compares the points of a study: open it with Run.open(…, study="NAME")')
    study = load_study(run.study)
    found = [PointRun(run, unit) for unit in sorted(units(study), key=lambda u: list(study.points).index(u.point))]
    if absent := [point.unit.name for point in found if not all(point.has(s.name) for s in point.unit.stages)]:
        raise LwaError(f"{', '.join(absent)} of {study.name} has not run: run `lwa study {run.study}` first")
    return found


def distinct(points: Iterable[PointRun], notebook: str, frame: str) -> dict[str, list[PointRun]]:
    """Return the points that have a result of their own, each with its runs, by name.

    Points that share a notebook's result (a teacher, say) have it under the name of the first of them.

    Args:
        points: The runs.
        notebook: The notebook, such as "02".
        frame: A frame that it saves.

    Returns:
        The runs of each point.
    """
    found: dict[str, list[PointRun]] = {}
    hashes: dict[str | None, str] = {}
    for point in points:
        if point.has(notebook) and hashes.setdefault(point.hash_of(frame), point.unit.point) == point.unit.point:
            found.setdefault(point.unit.point, []).append(point)
    return found

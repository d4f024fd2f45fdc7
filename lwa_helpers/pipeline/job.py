"""The notebooks of one results folder with one set of settings, each run only if it is stale."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lwa_helpers.config import ExperimentConfig
from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline import manifest
from lwa_helpers.pipeline.notebook import Progress, clock, execute
from lwa_helpers.pipeline.staleness import Stage, components, save_state, why_stale


@dataclass(frozen=True)
class Job:
    """What the notebooks of a results folder are run with.

    Attributes:
        stages: the notebooks, in order.
        config: their settings.
        overrides: those of the settings that differ from the profile's.
        results: the folder.
        study: the study whose points a notebook compares, if it does.
        expected: seconds that each notebook takes, as far as known.
        start: when the run began, on the monotonic clock.
    """

    stages: list[Stage]
    config: ExperimentConfig
    overrides: dict[str, Any]
    results: Path
    study: str | None = None
    expected: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)

    def label(self, stage: Stage) -> str:
        """How the lines about a notebook begin: [2/5] 02_fisher_heatmaps."""
        return f"[{self.stages.index(stage) + 1}/{len(self.stages)}] {stage.name}"

    def bring_up_to_date(self, stage: Stage, force: bool = False) -> None:
        """Run a notebook if it is stale, or skip it; one line says which and why.

        Args:
            stage: the notebook.
            force: run it even if it is current.

        Raises:
            LwaError: when the notebook fails, or ran through and saved nothing.
        """
        reason = self.why_stale(stage) or ("--force" if force else None)
        if reason is None:
            self.skip(stage)
        else:
            self.run(stage, reason)

    def why_stale(self, stage: Stage) -> str | None:
        """Say why a notebook has to run, or None; its outputs are hashed, which takes seconds for a model."""
        return why_stale(stage, self.config, self.results, by_hash=True)

    def skip(self, stage: Stage) -> None:
        """Say that a notebook is current, and what it warned of."""
        lines = warnings_of([manifest.load_named(self.results, stage.name)])
        print("\n".join([f"{self.label(stage)} is current", *lines]), flush=True)

    def run(self, stage: Stage, reason: str) -> None:
        """Run a notebook.

        Args:
            stage: the notebook.
            reason: why, for the line that says so.

        Raises:
            LwaError: when the notebook fails, or ran through and saved nothing.
        """
        print(f"{self.label(stage)} runs: {reason}", flush=True)
        before, began = components(stage, self.config), time.time()
        later = [self.expected.get(other.name) for other in self.stages if other.name > stage.name]
        remaining = None if None in later else sum(seconds for seconds in later if seconds)
        with Progress(self.label(stage), self.start, self.expected.get(stage.name), remaining) as progress:
            parameters: dict[str, Any] = {"profile": self.config.profile, "overrides": self.overrides}
            if self.study:
                parameters["study"] = self.study
            execute(stage.path, self.results, parameters, progress)
        record = manifest.load(self.results, stage.name)
        if record is None or record["started"] < began:
            raise LwaError(f"{stage.path.name} ran through but saved no results: it must end with run.finish()")
        seconds = time.time() - began
        save_state(self.results, stage, before, seconds)
        print("\n".join([f"{self.label(stage)} done in {clock(seconds)}", *warnings_of([record])]), flush=True)


def warnings_of(records: list[dict[str, Any]]) -> list[str]:
    """What the notebooks warned of, a line each."""
    return [f"warning: {text}" for record in records for text in record.get("warnings", [])]

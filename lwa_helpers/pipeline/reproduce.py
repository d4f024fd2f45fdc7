"""Run the numbered notebooks in order, each only if it is stale, and sum up what they found."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from lwa_helpers import files, paths
from lwa_helpers.config import ExperimentConfig, load_config
from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline import code_digest, manifest, publish, time_estimate
from lwa_helpers.pipeline.job import Job, warnings_of
from lwa_helpers.pipeline.locks import locked
from lwa_helpers.pipeline.notebook import clock
from lwa_helpers.pipeline.staleness import Stage, load_state, stages

NEEDED_BYTES = 2 * 1024**3


def reproduce(
    profile: str,
    overrides: dict[str, Any] | None = None,
    only: str | None = None,
    force: bool = False,
    publish_too: bool = False,
) -> None:
    """Bring a profile's results up to date: run each stale notebook, merge the numbers, print a summary, publish.

    Raises LwaError on bad settings or notebooks before anything runs, when a notebook fails, and when the system does
    not let results be written.
    """
    config = load_config(profile, overrides)
    chosen = stages(only)
    for stage in stages():
        code_digest.notebook_tree(stage.path)
    results = paths.results_dir(profile)
    with files.explained(results):
        whole = _run(config, overrides or {}, chosen, results, force)
        if whole and (publish_too or (profile == publish.paper_profile() and not overrides)):
            publish.publish(profile)


def _run(config: ExperimentConfig, overrides: dict[str, Any], chosen: list[Stage], results: Path, force: bool) -> bool:
    """Run the chosen stages that are stale, and sum up if all stages have been run. Return whether they have."""
    _check_disk(results)
    with locked(results):
        job = Job(stages(), config, overrides, results, expected=_expected(config.profile, results))
        for stage in chosen:
            job.bring_up_to_date(stage, force)
        missing = [stage.name for stage in stages() if manifest.load(results, stage.name) is None]
        if missing:
            print(f"not summed up: {', '.join(missing)} {'has' if len(missing) == 1 else 'have'} not been run yet")
            return False
        publish.merge(results, [stage.name for stage in stages()])
    print(summary(results, config, time.monotonic() - job.start))
    return True


def _expected(profile: str, results: Path) -> dict[str, float]:
    """What each stage took when it last ran here or, if one of them never did, what the published run lets expect."""
    states = {stage.name: load_state(results, stage) for stage in stages()}
    here = {name: state["seconds"] for name, state in states.items() if state}
    return here if len(here) == len(states) else time_estimate.expected_seconds(paths.PAPER, profile) | here


def summary(results: Path, config: ExperimentConfig, spent: float) -> str:
    """What was found, in how much time, and where everything lies."""
    records = manifest.load_all(results)
    lines = ["", "Hypotheses"]
    for key, found in sorted((key, found) for record in records for key, found in record["verdicts"].items()):
        lines.append(f"  {key} {found['outcome']}: {found['sentence']} [figures/{found['figure']}.pdf]")
    lines += ["Wall time of each notebook's last run", *_times(results, config, spent)]
    names = [name for record in records for name in record["outputs"]]
    figures = sum(name.startswith("figures/") and name.endswith(".pdf") for name in names)
    tables = sum(name.startswith("tables/") for name in names)
    numbers = sum(len(record["numbers"]) for record in records)
    lines += [
        f"Results in {results}",
        f"  figures/ {figures} figures, tables/ {tables} tables, results.tex {numbers} numbers,",
        "  notebooks/ executed copies, manifest.json what made each result",
    ]
    return "\n".join([*lines, *warnings_of(records)])


def _times(results: Path, config: ExperimentConfig, spent: float) -> list[str]:
    """Each notebook's wall time, and the total against the profile's target."""
    seconds = {stage.name: state["seconds"] for stage in stages() if (state := load_state(results, stage))}
    total = sum(seconds.values())
    word = "within" if total <= 60 * config.target_minutes else "over"
    target = f"{word} the {config.target_minutes:g} min meant for `{config.profile}` (this call: {clock(spent)})"
    lines = [f"  {name:28} {clock(value)}" for name, value in seconds.items()]
    return [*lines, f"  {'all':28} {clock(total)}, {target}"]


def _check_disk(results: Path) -> None:
    """Raise LwaError unless there is room for a run."""
    place = next(parent for parent in (results, *results.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < NEEDED_BYTES:
        raise LwaError(
            f"only {free / 1024**3:.1f} GiB are free on the disk of {place}, and a run needs "
            f"{NEEDED_BYTES / 1024**3:.0f} GiB: make room (an old results/<profile>/ can go) and start again"
        )

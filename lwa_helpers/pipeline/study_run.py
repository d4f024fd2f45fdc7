"""Run one point of a study with one seed: its notebooks in order, each only if it is stale and no other run has it."""

from __future__ import annotations

from lwa_helpers import files, paths
from lwa_helpers.pipeline import publish
from lwa_helpers.pipeline.job import Job
from lwa_helpers.pipeline.locks import locked
from lwa_helpers.pipeline.sharing import adopt, claimed
from lwa_helpers.pipeline.staleness import Stage
from lwa_helpers.pipeline.study import Unit


def run_unit(unit: Unit, expected: dict[str, float]) -> None:
    """Bring the results of a point and seed up to date. Two calls at once do the work once.

    Args:
        unit: The point and seed.
        expected: Seconds that each notebook takes, as far as known.

    Raises:
        LwaError: If a notebook fails, or results cannot be written.
    """
    with files.explained(unit.folder), locked(unit.folder, waits=f"{unit.name} waits: another process runs it"):
        job = Job(unit.stages, unit.config, unit.overrides, unit.folder, expected=expected)
        for stage in unit.stages:
            _take_over_or_run(job, stage)
        publish.merge(unit.folder, [stage.name for stage in unit.stages])


def _take_over_or_run(job: Job, stage: Stage) -> None:
    """Take over the results of a notebook from a run that has them, run it, or say that it is current."""
    reason = job.why_stale(stage)
    if reason is None:
        job.skip(stage)
        return
    with claimed(stage, job.config, job.results, job.label(stage)):
        donor = adopt(stage, job.config, job.overrides, job.results)
        if donor is None:
            job.run(stage, reason)
        else:
            print(f"{job.label(stage)} is shared with {donor.relative_to(paths.RESULTS)}", flush=True)

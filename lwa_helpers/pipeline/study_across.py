"""Run the notebook that compares the points of a study, once they have all run."""

from __future__ import annotations

from collections.abc import Sequence

from lwa_helpers import files
from lwa_helpers.config import load_config
from lwa_helpers.pipeline import publish
from lwa_helpers.pipeline.job import Job
from lwa_helpers.pipeline.locks import locked
from lwa_helpers.pipeline.overrides import typed
from lwa_helpers.pipeline.staleness import Stage, across_stage, why_stale
from lwa_helpers.pipeline.study import Study, Unit


def compare_points(study: Study, every: Sequence[Unit]) -> None:
    """Bring the comparison of a study's points up to date. Nothing happens as long as some have not run.

    Args:
        study: The study; nothing happens if it has no such notebook.
        every: All its runs.

    Raises:
        LwaError: If the notebook fails.
    """
    if not study.compares:
        return
    waiting = [unit.name for unit in every if unfinished(unit)]
    if waiting:
        print(f"the points are not compared yet: {', '.join(waiting)} {'has' if len(waiting) == 1 else 'have'} not run")
        return
    job = comparison_job(study, every)
    with files.explained(job.results), locked(job.results, waits=f"{study.name} waits: another process compares it"):
        job.bring_up_to_date(job.stages[0])
        publish.merge(job.results, [job.stages[0].name])


def comparison_job(study: Study, every: Sequence[Unit]) -> Job:
    """Return the one notebook that compares a study's points, with its settings.

    Args:
        study: The study.
        every: All its runs.
    """
    overrides = typed({"seed": study.seeds[0]})
    stage = across_stage(tuple(f"{unit.name} ({unit.title})" for unit in every))
    config = load_config(study.profile, overrides)
    return Job([stage], config, overrides, study.across, study=study.source)


def unfinished(unit: Unit) -> Stage | None:
    """Return the first notebook of a run that is stale, or None."""
    return next((stage for stage in unit.stages if why_stale(stage, unit.config, unit.folder)), None)

"""The engine "slurm": the runs of a study as a job array of Slurm, submitted by submitit.

All nodes must see the checkout at the same path. A job that is preempted or runs out of time is queued again and goes
on after the notebooks that it has finished. Options of sbatch come from the study's file, under `slurm`.
"""

from __future__ import annotations

from collections.abc import Sequence

from lwa_helpers import paths
from lwa_helpers.errors import LwaError, one_line
from lwa_helpers.pipeline.study import Unit, load_study
from lwa_helpers.pipeline.study_process import run_process, run_to_the_end

DEFAULTS = {"timeout_min": 24 * 60, "cpus_per_task": 1}


class SlurmTask:
    """What a job of the array does: submitit pickles it, and asks `checkpoint` what to do after a preemption."""

    def __call__(self, study: str, name: str) -> str | None:
        """Run one point of a study with one seed on the node. Return why it failed."""
        return run_to_the_end(lambda: run_process(study, name), name)

    def checkpoint(self, study: str, name: str):
        """Return what is queued again: the same, because finished notebooks are current then."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(SlurmTask(), study, name)


def run(units: Sequence[Unit], workers: int) -> dict[str, str]:
    """Run units as jobs of an array, and wait for all of them.

    Args:
        units: The runs.
        workers: How many jobs run at a time.

    Returns:
        Why runs failed, by name.

    Raises:
        LwaError: If submitit is not installed, or there is no Slurm.
    """
    try:
        import submitit
    except ImportError:
        raise LwaError('the engine "slurm" needs submitit: pip install "layerwise-adapter[slurm]"') from None
    folder = paths.STUDIES / units[0].study / ".slurm"
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
    except RuntimeError as error:
        raise LwaError(f"no Slurm can be reached from here: {error}") from error
    options = DEFAULTS | load_study(units[0].source).slurm
    executor.update_parameters(name=f"lwa-{units[0].study}", slurm_array_parallelism=workers, **options)
    jobs = executor.map_array(SlurmTask(), [unit.source for unit in units], [unit.name for unit in units])
    print(f"{len(jobs)} jobs are submitted; their output is in {folder}", flush=True)
    return {unit.name: reason for unit, job in zip(units, jobs) if (reason := _reason(job))}


def _reason(job) -> str | None:
    """Wait for a job. Return why it failed."""
    try:
        return job.result()
    except Exception as error:  # whatever ended the job; submitit raises kinds of its own and those of the job
        return one_line(error)[-200:]

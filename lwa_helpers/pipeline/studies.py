"""Run a study: the runs of its points and seeds on an engine, and what became of them."""

from __future__ import annotations

from collections.abc import Sequence

from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline import engine_local, engine_ray, engine_slurm
from lwa_helpers.pipeline.study import load_study, units
from lwa_helpers.pipeline.study_across import compare_points
from lwa_helpers.pipeline.study_plan import expected_seconds, plan
from lwa_helpers.pipeline.study_run import run_unit

ENGINES = {"local": engine_local.run, "ray": engine_ray.run, "slurm": engine_slurm.run}


def run_study(
    name: str, only: Sequence[str] = (), engine: str = "local", workers: int = 1, dry_run: bool = False
) -> None:
    """Bring the results of a study up to date.

    Args:
        name: A file in configs/studies, or the path of a .yaml file.
        only: Points or runs; the others are left out.
        engine: One of ENGINES.
        workers: How many runs at a time.
        dry_run: Only print what would run.

    Raises:
        LwaError: If the study or the engine is unknown, or runs failed. The message names each of them.
    """
    if engine not in ENGINES:
        raise LwaError(f"no engine {engine!r}: there are {', '.join(ENGINES)}")
    if workers < 1:
        raise LwaError(f"workers = {workers}: at least 1 is needed")
    study = load_study(name)
    chosen = units(study, list(only))
    if dry_run:
        print("\n".join(plan(chosen, workers)))
        return
    failed = ENGINES[engine](chosen, workers)
    print(f"{len(chosen) - len(failed)} of {len(chosen)} runs of {name} are done")
    if failed:
        listed = "\n".join(f"  {run}: {reason}" for run, reason in failed.items())
        raise LwaError(f"{len(failed)} runs failed; the same command goes on with them:\n{listed}")
    compare_points(study, units(study))


def run_one(name: str, run: str) -> None:
    """Run one point of a study with one seed in this process, which is what engines call.

    Args:
        name: The study.
        run: The run, such as "deeper/seed-1".
    """
    study = load_study(name)
    (unit,) = units(study, [run])
    run_unit(unit, expected_seconds(units(study)))

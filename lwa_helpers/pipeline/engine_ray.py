"""The engine "ray": the runs of a study as tasks of Ray, on this machine or on the cluster that RAY_ADDRESS names.

All machines must see the checkout at the same path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lwa_helpers import paths
from lwa_helpers.errors import LwaError, one_line
from lwa_helpers.pipeline.study import Unit
from lwa_helpers.pipeline.study_process import RESTARTS, Killed, run_process


def run(units: Sequence[Unit], workers: int) -> dict[str, str]:
    """Run units as Ray's tasks.

    Args:
        units: The runs.
        workers: How many run at a time. Each has its share of the cluster's processor cores and GPUs.

    Returns:
        Why runs failed, by name.

    Raises:
        LwaError: If Ray is not installed, or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise LwaError('the engine "ray" needs Ray: pip install "layerwise-adapter[ray]"') from None
    try:
        ray.init(
            include_dashboard=False,
            runtime_env={"env_vars": {"LWA_ROOT": str(paths.ROOT), "LWA_CACHE": str(paths.CACHE)}},
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise LwaError(f"no Ray cluster can be reached: {one_line(error)[:200]}") from error
    try:
        return _run_all(ray, units, workers)
    finally:
        ray.shutdown()


def _run_all(ray: Any, units: Sequence[Unit], workers: int) -> dict[str, str]:
    """Keep `workers` tasks running until all units are done. Return why runs failed, by name."""
    task = ray.remote(max_retries=RESTARTS, retry_exceptions=[Killed], **_share(ray, workers))(run_process)
    left, running, failed = list(units), dict[Any, str](), dict[str, str]()
    while left or running:
        while left and len(running) < workers:
            unit = left.pop(0)
            running[task.remote(unit.source, unit.name)] = unit.name
        (done,), _ = ray.wait(list(running), num_returns=1)
        name = running.pop(done)
        if reason := _reason(ray, done):
            failed[name] = reason
    return failed


def _share(ray: Any, workers: int) -> dict[str, float]:
    """Return what each task asks for: its share of the cores, no more than the smallest machine has, and of a GPU."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [machine.get("CPU", 0) for machine in machines]
    share = min(sum(cores) // workers, min(cores, default=1))
    return {"num_cpus": max(1, share), "num_gpus": min(1, sum(machine.get("GPU", 0) for machine in machines) / workers)}


def _reason(ray: Any, result: Any) -> str | None:
    try:
        return ray.get(result)
    except (ray.exceptions.RayError, Killed) as error:
        return one_line(error)[-200:]

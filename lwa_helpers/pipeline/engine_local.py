"""The engine "local": the runs of a study as processes of this machine, with a GPU each where there are several."""

from __future__ import annotations

import os
import queue
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from lwa_helpers.pipeline.study import Unit
from lwa_helpers.pipeline.study_process import run_process, run_to_the_end


def run(units: Sequence[Unit], workers: int) -> dict[str, str]:
    """Run units, each in a process of its own.

    Args:
        units: The runs.
        workers: How many run at a time.

    Returns:
        Why runs failed, by name.
    """
    slots: queue.Queue[dict[str, str]] = queue.Queue()
    n_gpus = _gpus()
    for slot in range(workers):
        slots.put(environment(slot, workers, n_gpus))
    with ThreadPoolExecutor(workers) as pool, _Processes() as processes:
        reasons = list(pool.map(lambda unit: processes.run(unit, slots), units))
    return {unit.name: reason for unit, reason in zip(units, reasons) if reason}


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def environment(slot: int, workers: int, n_gpus: int) -> dict[str, str]:
    """Return the environment of the runs in one of several slots: its GPU, and its share of the processor cores."""
    own = {}
    if n_gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(n_gpus)))).split(",")
        own["CUDA_VISIBLE_DEVICES"] = visible[slot % n_gpus]
    if workers > 1:
        own["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    return os.environ | own


class _Processes:
    """Processes that end with the block when it is interrupted."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen] = []
        self._ended = False

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self._ended = True
            for process in self._started:
                process.terminate()  # does nothing to one that has ended

    def run(self, unit: Unit, slots: queue.Queue[dict[str, str]]) -> str | None:
        """Run a unit to its end, again if its process is killed. Return why it failed."""
        own = slots.get()
        try:
            return run_to_the_end(
                lambda: run_process(unit.source, unit.name, own, self._started.append), unit.name, lambda: self._ended
            )
        finally:
            slots.put(own)

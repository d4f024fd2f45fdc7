"""Started twice by torchrun in test_progress.py: one dataset given to two processes, a model whole and sharded.

A second argument kills both processes at that batch of the sharded run; the next start resumes from its checkpoint.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "builders"))
from fisher_models import batch, build
from torch.distributed.fsdp import fully_shard

from lwa_helpers.fisher.calculator import FisherInformationCalculator

N_BATCHES = 5
RUNS = {
    "whole": ("empirical", None),
    "stopped": ("empirical", -1.0),
    "sharded": ("sampled", None),
}  # estimator, stop_at


def dataset():
    """An odd number of batches of different sizes, one at a time."""
    for seed in range(N_BATCHES):
        yield batch(lengths=(6, 8, 5)[: 1 + seed % 3], seed=seed)


def killed(batches, after: int):
    """The dataset up to a batch at which the process ends without a word, as by kill -9."""
    for index, rows in enumerate(batches):
        if index == after:
            os._exit(9)
        yield rows


def main(folder: Path, kill_at: int = N_BATCHES) -> None:
    dist.init_process_group("gloo")
    for name, (estimator, stop_at) in RUNS.items():
        model = build("llama").double()
        if name == "sharded":
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        checkpoint = folder / f"{name}.progress"
        calculator = FisherInformationCalculator(
            estimator, "parameter", checkpoint=checkpoint, checkpoint_every=2, stop_at=stop_at
        )
        rows = killed(dataset(), kill_at) if name == "sharded" else dataset()
        calculator.calculate(model, rows).save(folder / f"{name}{dist.get_rank()}")
    dist.barrier()  # on a busy machine, one process that is gone before the other takes leave can abort it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

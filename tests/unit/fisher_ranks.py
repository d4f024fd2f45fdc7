"""Started twice by torchrun in test_fisher_progress: the same dataset given to two processes, a model whole and sharded."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
from fisher_models import batch, build
from torch.distributed.fsdp import fully_shard

from lwa_helpers.fisher import FisherInformationCalculator

N_BATCHES = 5


def dataset():
    """An odd number of batches of different sizes, one at a time."""
    for seed in range(N_BATCHES):
        yield batch(lengths=(6, 8, 5)[: 1 + seed % 3], seed=seed)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    for name, estimator in (("whole", "empirical"), ("sharded", "sampled")):
        model = build("llama").double()
        if name == "sharded":
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        calculator = FisherInformationCalculator(estimator, "parameter", checkpoint=folder / "progress", checkpoint_every=2)
        calculator.calculate(model, dataset()).save(folder / f"{name}{dist.get_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

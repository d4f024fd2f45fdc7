"""One dataset read by several processes, and long runs that can be killed and resume where they were."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lwa_helpers.errors import LwaError
from lwa_helpers.files import atomic_write

TracesByBatch = dict[int, np.ndarray]  # traces (rows, columns) by the batch's place in the dataset


def ranks() -> tuple[int, int]:
    """Return this process's number and how many there are; (0, 1) outside torch.distributed.

    Raises:
        LwaError: If a launcher started several processes that do not know of each other.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LwaError(
            f"a launcher started {os.environ['WORLD_SIZE']} processes without a process group: call "
            "torch.distributed.init_process_group() or make an accelerate.Accelerator() first"
        )
    return 0, 1


def merge(found: TracesByBatch) -> TracesByBatch:
    """Return what all processes have found, in the order of the batches."""
    parts: list[TracesByBatch] = [found] * ranks()[1]
    if len(parts) > 1:
        dist.all_gather_object(parts, found)
    joined = {index: traces for part in parts for index, traces in part.items()}
    return {index: joined[index] for index in sorted(joined)}


def collect_sums(sums: Iterable[Tensor]) -> None:
    """Move the sums of all processes to the first, in place; the others keep zeros."""
    rank, size = ranks()
    for total in sums if size > 1 else ():
        dist.reduce(total, dst=0)
        if rank > 0:
            total.zero_()


def share_sums(sums: Iterable[Tensor]) -> None:
    """Add up the sums of all processes, in place, so that every process has the total."""
    for total in sums if ranks()[1] > 1 else ():
        dist.all_reduce(total)


def save_progress(path: str | Path, fingerprint: dict, found: TracesByBatch, sums: dict[str, Tensor]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: The file.
        fingerprint: What identifies the calculation; load_progress refuses a file with another one.
        found: Traces (rows, columns) of the batches 0 … k-1. The file also tells how many rows each batch had.
        sums: Running sums of the diagonal.
    """
    tensors = {f"sum.{name}": value for name, value in sums.items()}
    tensors["traces"] = torch.from_numpy(np.concatenate(list(found.values())))
    tensors["rows"] = torch.tensor([len(traces) for traces in found.values()])
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"meaning": json.dumps(fingerprint)})


def load_progress(path: str | Path, fingerprint: dict) -> tuple[TracesByBatch, dict[str, Tensor]]:
    """Return the traces and sums that save_progress wrote.

    Args:
        path: The file.
        fingerprint: What identifies the calculation.

    Raises:
        LwaError: If the file belongs to a calculation of another kind.
    """
    with safe_open(path, "pt") as file:
        if json.loads((file.metadata() or {}).get("meaning", "null")) != json.loads(json.dumps(fingerprint)):
            raise LwaError(f"{path} is the checkpoint of another calculation: delete it, or name another file")
    tensors = load_file(path)
    parts = tensors["traces"].split(tensors["rows"].tolist())
    sums = {name.removeprefix("sum."): value for name, value in tensors.items() if name.startswith("sum.")}
    return {index: part.numpy() for index, part in enumerate(parts)}, sums


def forget(path: str | Path) -> None:
    """Delete a checkpoint whose calculation is done, before any process continues."""
    rank, size = ranks()
    if rank == 0:
        Path(path).unlink(missing_ok=True)
    if size > 1:
        dist.barrier()

"""What a model costs: its parameters, the memory of its weights and of a process that uses it, and its run time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from torch import nn


def n_parameters(model: nn.Module) -> int:
    """Number of parameters; tied parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Size of the parameters and buffers in bytes; tied tensors count once."""
    held = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()]
    }
    return sum(held.values())


PEAK = """
import json, sys
from pathlib import Path
from lwa_helpers.models.loading import load_teacher
from lwa_helpers.ranking.item_head import rank_catalogue
asked = json.load(sys.stdin)
lm = load_teacher(asked["folder"])
rank_catalogue(lm.model, asked["prompts"], lm.items.tokens, asked["batch_size"], progress=False)
status = Path("/proc/self/status")
if status.exists():
    peak = next(int(line.split()[1]) for line in status.read_text("utf-8").splitlines() if line.startswith("VmHWM:"))
else:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # macOS counts in bytes
print(1024 * peak)
"""


def peak_memory(folder: str | Path, prompts: Sequence[Sequence[int]], batch_size: int) -> int:
    """Measure the peak memory of a separate process that loads a checkpoint and ranks the catalogue in float32.

    On Linux this is VmHWM from /proc, because ru_maxrss would also count the parent that started the process. The
    interpreter and torch are included. If the process fails, subprocess.CalledProcessError is raised.

    Args:
        folder: the checkpoint, with item tokens.
        prompts: token ids of each prompt, at least one each.
        batch_size: number of prompts that are read together.

    Returns:
        The peak memory in bytes.
    """
    request = json.dumps(
        {"folder": str(folder), "prompts": [list(map(int, prompt)) for prompt in prompts], "batch_size": batch_size}
    )
    done = subprocess.run([sys.executable, "-c", PEAK], input=request, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def time_side_by_side(calls: dict[str, Callable[[], object]], rounds: int) -> pd.DataFrame:
    """Time callables in turn (A B A B …), so that a busy machine disturbs all of them alike.

    Each callable is called once before the timing starts.

    Args:
        calls: the callables by name.
        rounds: how often each is timed.

    Returns:
        One row per timed call, with columns round, name and seconds.
    """
    for call in calls.values():
        call()
    rows = []
    for number in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            rows.append({"round": number, "name": name, "seconds": time.perf_counter() - start})
    return pd.DataFrame(rows)


def speed_ratio(times: pd.DataFrame, slow: str, fast: str) -> pd.Series:
    """Time of `slow` divided by time of `fast`, for each round of time_side_by_side."""
    wide = times.pivot(index="round", columns="name", values="seconds")
    return wide[slow] / wide[fast]

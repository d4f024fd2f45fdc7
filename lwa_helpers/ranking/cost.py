"""What a model costs: parameters, memory of its weights and of a process that uses it, and time side by side with another."""

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
    """Number of parameters, a tied one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Bytes that parameters and buffers hold, a tied one counted once."""
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
    peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
else:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # macOS counts in bytes
print(1024 * peak)
"""


def peak_memory(folder: str | Path, prompts: Sequence[Sequence[int]], batch_size: int) -> int:
    """Return the most bytes that a process of its own holds while it loads a checkpoint and ranks the catalogue, in float32.

    Linux: VmHWM of /proc, since ru_maxrss would also count the parent that started it. The interpreter and torch are part of it.
    Raises subprocess.CalledProcessError where the process fails.
    """
    eval_cases = json.dumps(
        {"folder": str(folder), "prompts": [list(map(int, prompt)) for prompt in prompts], "batch_size": batch_size}
    )
    done = subprocess.run([sys.executable, "-c", PEAK], input=eval_cases, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def time_side_by_side(calls: dict[str, Callable[[], object]], rounds: int) -> pd.DataFrame:
    """Time callables in turn, A B A B …, after one untimed call each, so that a busy machine disturbs all alike.

    Returns columns round, name, seconds.
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
    """Time of `slow` over time of `fast` in each round of time_side_by_side."""
    wide = times.pivot(index="round", columns="name", values="seconds")
    return wide[slow] / wide[fast]

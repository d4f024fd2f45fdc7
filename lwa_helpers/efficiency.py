"""What a model costs: parameters, memory of its weights, and time side by side with another."""

from __future__ import annotations

import time
from collections.abc import Callable

import pandas as pd
from torch import nn


def n_parameters(model: nn.Module) -> int:
    """Number of parameters, a tied one counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Bytes that parameters and buffers hold, a tied one counted once."""
    held = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()]}
    return sum(held.values())


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

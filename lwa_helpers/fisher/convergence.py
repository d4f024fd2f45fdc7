"""How many examples are enough: how well two halves of the examples agree on the order of the layers."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

SMALLEST = 4  # examples at which a convergence curve starts and the stopping rule is first checked


def split_half_spearman(per_example: np.ndarray, n_splits: int = 20, seed: int = 0) -> float:
    """Split the examples at random into halves and compare the halves' mean traces by Spearman's rho.

    Args:
        per_example: Trace of each layer for each example, (n, L) with n >= 2 and L >= 2.
        n_splits: Number of random splits.
        seed: Seed of the splits.

    Returns:
        The mean of rho over the splits.
    """
    rng = np.random.default_rng(seed)
    half = len(per_example) // 2
    rhos = []
    for _ in range(n_splits):
        order = rng.permutation(len(per_example))
        rhos.append(spearmanr(per_example[order[:half]].mean(0), per_example[order[half:]].mean(0)).statistic)
    return float(np.mean(rhos))


def convergence_curve(per_example: np.ndarray, n_splits: int = 20, seed: int = 0) -> pd.DataFrame:
    """Compute the split-half Spearman of the first n examples for about a dozen n.

    Args:
        per_example: Trace of each layer for each example, (N, L).
        n_splits: Number of random splits for each n.
        seed: Seed of the splits.

    Returns:
        One row per n, with the columns n_examples and spearman.
    """
    n_max = len(per_example)
    sizes = np.unique(np.geomspace(min(SMALLEST, n_max), n_max, 12).round().astype(int))
    rows = [(int(n), split_half_spearman(per_example[:n], n_splits, seed)) for n in sizes if n >= 2]
    return pd.DataFrame(rows, columns=["n_examples", "spearman"])


def examples_needed(curve: pd.DataFrame, threshold: float = 0.95) -> int | None:
    """Return the smallest n from which the curve stays at or above the threshold, or None if there is none."""
    below = np.flatnonzero(~(curve["spearman"].to_numpy() >= threshold))
    start = below[-1] + 1 if len(below) else 0
    return int(curve["n_examples"].iloc[start]) if start < len(curve) else None

"""How many examples are enough: agreement between two halves of the examples on the order of the layers."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

SMALLEST = 4


def split_half_spearman(per_example: np.ndarray, n_splits: int = 20, seed: int = 0) -> float:
    """Mean over random halvings of Spearman's rho between the halves' mean traces; per_example (n, L), n >= 2, L >= 2."""
    rng = np.random.default_rng(seed)
    half = len(per_example) // 2
    rhos = []
    for _ in range(n_splits):
        order = rng.permutation(len(per_example))
        rhos.append(spearmanr(per_example[order[:half]].mean(0), per_example[order[half:]].mean(0)).statistic)
    return float(np.mean(rhos))


def convergence_curve(per_example: np.ndarray, n_splits: int = 20, seed: int = 0) -> pd.DataFrame:
    """Split-half Spearman of the first n examples for about a dozen n: columns n_examples, spearman."""
    n_max = len(per_example)
    sizes = np.unique(np.geomspace(min(SMALLEST, n_max), n_max, 12).round().astype(int))
    rows = [(int(n), split_half_spearman(per_example[:n], n_splits, seed)) for n in sizes if n >= 2]
    return pd.DataFrame(rows, columns=["n_examples", "spearman"])


def examples_needed(curve: pd.DataFrame, threshold: float = 0.95) -> int | None:
    """Smallest n of the curve from which it stays at or above the threshold; None when it never does."""
    below = np.flatnonzero(~(curve["spearman"].to_numpy() >= threshold))
    start = below[-1] + 1 if len(below) else 0
    return int(curve["n_examples"].iloc[start]) if start < len(curve) else None

"""Rows for items that nobody has chosen yet, predicted from their titles."""

from __future__ import annotations

import numpy as np

PENALTIES = np.geomspace(1e-3, 1e3, 13)  # times the mean square of the features


def with_cold_rows(rows: np.ndarray, counts: np.ndarray, titles: np.ndarray) -> np.ndarray:
    """Return `rows` with the rows of items without interactions replaced by predictions from their titles, (N, k).

    A ridge regression predicts an item's row from its title vector and log(1 + count). It is fitted on the items with
    interactions and evaluated at count 0, so that a new item does not inherit the popularity that rows encode. The
    penalty is the one with the lowest leave-one-out error (PRESS; Golub, Heath & Wahba, Technometrics 1979). If all
    items have interactions, or fewer than three do, `rows` is returned as it is.

    Args:
        rows: one row per item, (N, k).
        counts: number of interactions of each item in the train part, (N,).
        titles: a vector for each item's title, (N, d).
    """
    known = counts > 0
    if known.all() or known.sum() < 3:
        return rows
    features = np.column_stack([titles, np.log1p(counts)]).astype(np.float64)
    centre, spread = features[known].mean(0), features[known].std(0) + 1e-12  # a constant feature has no spread
    features, values = (features - centre) / spread, rows[known].astype(np.float64)
    mean = values.mean(0)
    left, scale, right = np.linalg.svd(features[known], full_matrices=False)
    fits = [_shrunk(left, scale, values - mean, penalty) for penalty in PENALTIES]
    _, weights = min(fits, key=lambda fit: fit[0])
    filled = rows.copy()
    filled[~known] = mean + features[~known] @ right.T @ weights
    return filled


def _shrunk(left: np.ndarray, scale: np.ndarray, values: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
    """Return the leave-one-out error of a ridge regression in the coordinates of an SVD, and its weights there."""
    share = scale**2 / (scale**2 + penalty * len(left))
    fitted = left @ (share[:, None] * (left.T @ values))
    leverage = (left**2 * share).sum(1) + 1 / len(left)  # 1 / n: the mean is fitted too
    error = float((((values - fitted) / (1 - leverage)[:, None]) ** 2).mean())
    return error, (share / np.maximum(scale, 1e-12))[:, None] * (left.T @ values)

"""Rows for items that nobody has chosen yet, predicted from their titles."""

from __future__ import annotations

import numpy as np

PENALTIES = np.geomspace(1e-3, 1e3, 13)  # of the mean square of the features


def with_cold_rows(rows: np.ndarray, counts: np.ndarray, titles: np.ndarray) -> np.ndarray:
    """Return rows (N, k) in which those of items without an interaction are predicted from their titles.

    A ridge regression of the other items' rows on title and log(1 + count), read off at count 0, so that the popularity which
    a row carries is not lent to a new item. Its penalty is the one with the least leave-one-out error.

    Args:
        rows: (N, k).
        counts: interactions of each item in the train part, (N,).
        titles: a vector of each item's title, (N, d).

    Source of the leave-one-out error: Golub, Heath & Wahba, Technometrics 1979 (PRESS).
    """
    known = counts > 0
    if known.all() or known.sum() < 3:
        return rows
    features = np.column_stack([titles, np.log1p(counts)]).astype(np.float64)
    centre, spread = features[known].mean(0), features[known].std(0) + 1e-12
    features, values = (features - centre) / spread, rows[known].astype(np.float64)
    mean = values.mean(0)
    left, scale, right = np.linalg.svd(features[known], full_matrices=False)
    weights = min((_shrunk(left, scale, values - mean, penalty) for penalty in PENALTIES), key=lambda found: found[0])[
        1
    ]
    filled = rows.copy()
    filled[~known] = mean + features[~known] @ right.T @ weights
    return filled


def _shrunk(left: np.ndarray, scale: np.ndarray, values: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
    """Leave-one-out error of a ridge regression in the coordinates of an SVD, and its weights there."""
    share = scale**2 / (scale**2 + penalty * len(left))
    fitted = left @ (share[:, None] * (left.T @ values))
    leverage = (left**2 * share).sum(1) + 1 / len(left)
    error = float((((values - fitted) / (1 - leverage)[:, None]) ** 2).mean())
    return error, (share / np.maximum(scale, 1e-12))[:, None] * (left.T @ values)

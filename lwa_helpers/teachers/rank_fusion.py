"""Rank fusion: combine several rankings into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.stats import rankdata

RRF_K = 60


def fuse(
    rankings: Sequence[np.ndarray],
    weights: Sequence[float] | None = None,
    method: Literal["rrf", "borda", "score"] = "rrf",
) -> np.ndarray:
    """Combine the scores of several teachers.

    The methods are:

    * "rrf": the sum of w / (60 + rank), by Cormack, Clarke and Buettcher (SIGIR 2009).
    * "borda": the sum of w (C - rank).
    * "score": the sum of w z, where z are the scores of a row, standardised to mean 0 and standard deviation 1. z is 0
      if all scores of the row are equal.

    Equal scores share their mean rank. Weights that are negative, not finite, all zero or not one per ranking are a
    ValueError, as is an unknown method.

    Args:
        rankings: one array of scores per teacher, (B, C); higher is better.
        weights: w, one per teacher; None is 1 for each.
        method: "rrf", "borda" or "score".

    Returns:
        The combined scores, (B, C); higher is better.

    Raises:
        ValueError: if the scores differ in shape or are not finite.
    """
    shapes = {np.shape(ranking) for ranking in rankings}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"rankings of shapes {sorted(shapes)}: give one or more (B, C) arrays of one shape")
    scores = np.stack([np.asarray(ranking, dtype=np.float64) for ranking in rankings])
    if not np.isfinite(scores).all():
        raise ValueError("rankings hold scores that are not finite")
    return np.einsum("t,tbc->bc", _weights(weights, len(scores)), _points(scores, method))


def _points(scores: np.ndarray, method: str) -> np.ndarray:
    if method == "score":
        centred = scores - scores.mean(axis=2, keepdims=True)
        spread = scores.std(axis=2, keepdims=True)
        return np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0)
    ranks = rankdata(-scores, axis=2)
    if method == "rrf":
        return 1 / (RRF_K + ranks)
    if method == "borda":
        return scores.shape[2] - ranks
    raise ValueError(f"unknown fusion method {method!r}: choose rrf, borda or score")


def _weights(weights: Sequence[float] | None, n: int) -> np.ndarray:
    given = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if given.shape != (n,) or not np.isfinite(given).all() or (given < 0).any() or not given.any():
        raise ValueError(f"weights {weights}: give {n} finite numbers >= 0, not all zero")
    return given

"""Ranking metrics with one relevant item per user, as vectorised functions of the target's rank."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from lwa_helpers.errors import LwaError

KS = (1, 3, 5, 10, 20)


class ShortCatalogue(LwaError, ValueError):
    """A list of recommendations is longer than what a user has not seen."""


def rank_of_target(scores: np.ndarray, target: np.ndarray, exclude: np.ndarray | Sequence | None = None) -> np.ndarray:
    """Rank the target among the N items of each row; ties count against the target.

    rank_b = 1 + #{j != target_b, j not excluded : scores[b, j] >= scores[b, target_b]}

    Args:
        scores: (B, N) numbers.
        target: (B,) integers in [0, N).
        exclude: items to leave out of the comparison, for example those seen: a boolean mask (B, N) or B sequences of
            item indices. The target itself is never left out.

    Returns:
        The ranks, int64 (B,); 1 is the best.

    Raises:
        ValueError: for NaN, wrong shapes and indices outside [0, N).
    """
    scores = _score_matrix(scores)
    target = _indices(target, scores.shape[1], "target")
    if target.shape != scores.shape[:1]:
        raise ValueError(f"target must have shape ({len(scores)},) to match scores {scores.shape}, got {target.shape}")
    rows = np.arange(len(scores))
    ahead = scores >= scores[rows, target][:, None]
    if exclude is not None:
        ahead &= ~_mask(exclude, scores.shape)
    ahead[rows, target] = True
    return ahead.sum(axis=1, dtype=np.int64)


def top_k(scores: np.ndarray, k: int, exclude: np.ndarray | Sequence | None = None) -> np.ndarray:
    """Find the k highest scores of each row.

    Args:
        scores: (B, N) numbers.
        k: the number of items.
        exclude: items to leave out, as in `rank_of_target`.

    Returns:
        The item indices, int64 (B, k), best first, equal scores in item order.

    Raises:
        ValueError: for NaN.
        ShortCatalogue: if a row has fewer than k items left; `sizes.fitting_ks` says which k fit.
    """
    scores, k = _score_matrix(scores), _positive(k)
    left_out = np.zeros(scores.shape, bool) if exclude is None else _mask(exclude, scores.shape)
    if len(scores) and (~left_out).sum(axis=1).min() < k:
        raise ShortCatalogue(f"k = {k}, but some row has fewer than {k} items that are not excluded: lower k")
    falling = np.where(left_out, -np.inf, scores)
    return np.lexsort((-falling, left_out), axis=1)[:, :k]


def hit_rate_at_k(rank: np.ndarray, k: int) -> np.ndarray:
    """Compute HR@k of each example: 1 if rank <= k, else 0.

    Raises ValueError for k < 1, rank < 1, or ranks that are not one-dimensional and whole.

    Args:
        rank: (B,) ranks from 1; inf stands for a target that was not among the candidates.
        k: the cut-off.

    Returns:
        The values, float64 (B,).
    """
    return _within_k(np.ones_like, rank, k)


def ndcg_at_k(rank: np.ndarray, k: int) -> np.ndarray:
    """Return NDCG@k of each example with one relevant item: 1 / log2(1 + rank) if rank <= k, else 0.

    The ideal DCG is 1. Arguments, result and errors are those of `hit_rate_at_k`.
    """
    return _within_k(lambda r: 1.0 / np.log2(1.0 + r), rank, k)


def mrr_at_k(rank: np.ndarray, k: int) -> np.ndarray:
    """Return MRR@k, the reciprocal rank of each example cut at k: 1 / rank if rank <= k, else 0.

    Arguments, result and errors are those of `hit_rate_at_k`.
    """
    return _within_k(lambda r: 1.0 / r, rank, k)


METRICS = {"HR": hit_rate_at_k, "NDCG": ndcg_at_k, "MRR": mrr_at_k}


def coverage_at_k(top: np.ndarray, n_items: int, k: int) -> float:
    """Compute the share of the catalogue that is among at least one user's first k recommendations.

    Raises ValueError for bad shapes or indices.

    Args:
        top: (B, K) item indices, best first, K >= k.
        n_items: the number of items in the catalogue.
        k: the cut-off.

    Returns:
        The share, in [0, 1].
    """
    return np.unique(_first_k(top, n_items, k)).size / n_items


def popularity_at_k(top: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    """Compute the mean popularity percentile of each user's first k recommendations.

    The percentile of item j is (rank of counts_j - 1/2) / N, where ties share their mean rank. Its mean over the
    catalogue is exactly 0.5, which is also what random recommendations have.

    Args:
        top: (B, K) item indices, best first, K >= k.
        counts: (N,) training interactions of each item.
        k: the cut-off.

    Returns:
        The means, float64 (B,).

    Raises:
        ValueError: for bad shapes or indices.
    """
    counts = np.asarray(counts)
    if counts.ndim != 1 or not counts.size:
        raise ValueError(f"counts must have shape (N,), N >= 1, got {counts.shape}")
    percentile = (stats.rankdata(counts) - 0.5) / counts.size
    return percentile[_first_k(top, counts.size, k)].mean(axis=1)


def bias_frame(top: np.ndarray, counts: np.ndarray, ks: Sequence[int] = KS) -> pd.DataFrame:
    """Return `coverage_at_k` and the mean of `popularity_at_k` at every k, in the columns k, coverage, popularity."""
    rows = [(k, coverage_at_k(top, len(counts), k), popularity_at_k(top, counts, k).mean()) for k in ks]
    return pd.DataFrame(rows, columns=["k", "coverage", "popularity"])


def _within_k(gain: Callable[[np.ndarray], np.ndarray], rank: np.ndarray, k: int) -> np.ndarray:
    rank, k = _rank(rank), _positive(k)
    return np.where(rank <= k, gain(rank), 0.0)


def _rank(rank: np.ndarray) -> np.ndarray:
    rank = np.asarray(rank)
    if rank.ndim != 1 or rank.dtype.kind not in "iuf":
        raise ValueError(f"rank must be a one-dimensional array of numbers, got shape {rank.shape}, {rank.dtype}")
    rank = rank.astype(np.float64)
    if not np.all((rank >= 1) & (rank == np.floor(rank))):
        raise ValueError("rank must hold whole numbers >= 1 (1 = best)")
    return rank


def _positive(k: int) -> int:
    try:
        k = operator.index(k)
    except TypeError:
        raise ValueError(f"k must be an integer >= 1, got {k!r}") from None
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    return k


def _score_matrix(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.ndim != 2 or scores.dtype.kind not in "iuf":
        raise ValueError(f"scores must be a (B, N) array of numbers, got shape {scores.shape}, {scores.dtype}")
    if np.isnan(scores).any():
        raise ValueError(f"scores hold NaN, first in row {int(np.isnan(scores).any(axis=1).argmax())}")
    return scores


def _indices(values: np.ndarray, n_items: int, name: str) -> np.ndarray:
    values = np.asarray(values)
    if values.size == 0:
        return values.astype(np.int64)
    if values.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integer item indices, got {values.dtype}")
    if values.min() < 0 or values.max() >= n_items:
        raise ValueError(f"{name} must lie in [0, {n_items}), got {values.min()}..{values.max()}")
    return values.astype(np.int64)


def _first_k(top: np.ndarray, n_items: int, k: int) -> np.ndarray:
    top, k = _indices(top, n_items, "top"), _positive(k)
    if top.ndim != 2 or not len(top) or top.shape[1] < k:
        raise ValueError(f"top must have shape (B, K), B >= 1, K >= {k}, got {top.shape}")
    return top[:, :k]


def _mask(exclude: np.ndarray | Sequence, shape: tuple[int, int]) -> np.ndarray:
    if isinstance(exclude, np.ndarray) and exclude.dtype == bool:
        if exclude.shape != shape:
            raise ValueError(f"the exclude mask must have the shape of scores {shape}, got {exclude.shape}")
        return exclude
    if len(exclude) != shape[0]:
        raise ValueError(f"exclude must hold one sequence of items per row: {shape[0]} rows, got {len(exclude)}")
    mask = np.zeros(shape, bool)
    for row, items in zip(mask, exclude, strict=True):
        row[_indices(np.asarray(items).ravel(), shape[1], "exclude")] = True
    return mask

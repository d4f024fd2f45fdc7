"""Calibration of recommenders: the scale at which scores are the best log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from lwa_helpers.evaluation.metrics import ndcg_at_k, rank_of_target
from lwa_helpers.evaluation.protocol import Cases

RANGE = np.log(1e-3), np.log(1e3)


class Calibration(NamedTuple):
    """How a recommender enters an ensemble: the scale of its scores, and its weight."""

    scale: float
    weight: float


def fitted_scale(scores: np.ndarray, targets: np.ndarray) -> float:
    """Fit the scale s of scores by temperature scaling, s = 1 / temperature, on the valid part.

    Source: Guo et al., ICML 2017.

    Args:
        scores: (B, N) scores of all items for each case.
        targets: (B,) indices of the target items.

    Returns:
        The s in [0.001, 1000] for which softmax(s scores) gives the targets the highest likelihood.
    """
    rows, scores = np.arange(len(targets)), np.asarray(scores, dtype=np.float64)

    def nll(log_scale: float) -> float:
        return -log_softmax(np.exp(log_scale) * scores, axis=1)[rows, targets].mean()

    return float(np.exp(minimize_scalar(nll, bounds=RANGE, method="bounded").x))


def calibrated(scores: np.ndarray, eval_cases: Cases) -> Calibration:
    """Fit the scale of a recommender's scores, and measure its weight.

    Args:
        scores: (B, N) scores of all items for each case.
        eval_cases: the B cases, of the valid part.

    Returns:
        The fitted scale, and the recommender's NDCG@10 as its weight.
    """
    rank = rank_of_target(scores, eval_cases.targets, exclude=eval_cases.histories)
    return Calibration(fitted_scale(scores, eval_cases.targets), float(ndcg_at_k(rank, 10).mean()))


def weights(calibration: Mapping[str, Calibration], names: Sequence[str]) -> list[float]:
    """Return the weights of some recommenders; if none of them hits anything on the valid part, all count alike."""
    found = [calibration[name].weight for name in names]
    return found if any(found) else [1.0] * len(found)


def ensemble(scores: dict[str, np.ndarray], calibration: dict[str, Calibration]) -> np.ndarray:
    """Return the weighted mean of the probabilities that several recommenders give each item, (B, N)."""
    shares = weights(calibration, list(scores))
    total = sum(shares)
    parts = [
        share / total * np.exp(log_softmax(calibration[name].scale * values.astype(np.float64), axis=1))
        for share, (name, values) in zip(shares, scores.items())
    ]
    return sum(parts)

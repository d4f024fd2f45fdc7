"""How sure a recommender may be: the scale at which its scores are best read as log-probabilities."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from lwa_helpers.evaluation.metrics import ndcg_at_k, rank_of_target
from lwa_helpers.evaluation.protocol import Cases

RANGE = np.log(1e-3), np.log(1e3)


class Calibration(NamedTuple):
    """What a recommender is worth beside others: the scale of its scores, and its weight in an ensemble."""

    scale: float
    weight: float


def fitted_scale(scores: np.ndarray, targets: np.ndarray) -> float:
    """Return the s in [0.001, 1000] for which softmax(s scores) gives the targets the highest likelihood.

    Temperature scaling, s = 1 / temperature (Guo et al., ICML 2017); fit it on the valid part. scores (B, N); targets (B,).
    """
    rows, scores = np.arange(len(targets)), np.asarray(scores, dtype=np.float64)

    def nll(log_scale: float) -> float:
        return -log_softmax(np.exp(log_scale) * scores, axis=1)[rows, targets].mean()

    return float(np.exp(minimize_scalar(nll, bounds=RANGE, method="bounded").x))


def calibrated(scores: np.ndarray, eval_cases: Cases) -> Calibration:
    """Return the fitted scale of a recommender's scores (B, N), and its NDCG@10 as its weight.

    asked: cases of the valid part, which the scores answer.
    """
    rank = rank_of_target(scores, eval_cases.targets, exclude=eval_cases.histories)
    return Calibration(fitted_scale(scores, eval_cases.targets), float(ndcg_at_k(rank, 10).mean()))


def ensemble(scores: dict[str, np.ndarray], calibration: dict[str, Calibration]) -> np.ndarray:
    """Return the weighted mean of the probabilities that several recommenders give each item, (B, N)."""
    total = sum(calibration[name].weight for name in scores)
    parts = [
        calibration[name].weight
        / total
        * np.exp(log_softmax(calibration[name].scale * values.astype(np.float64), axis=1))
        for name, values in scores.items()
    ]
    return sum(parts)

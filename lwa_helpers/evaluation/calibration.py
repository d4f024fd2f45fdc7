"""How sure a recommender may be: the scale at which its scores are best read as log-probabilities."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from lwa_helpers.evaluation.metrics import ndcg_at_k
from lwa_helpers.evaluation.protocol import Baseline, Cases, ranks

RANGE = np.log(1e-3), np.log(1e3)


def fitted_scale(scores: np.ndarray, targets: np.ndarray) -> float:
    """Return the s in [0.001, 1000] for which softmax(s scores) gives the targets the highest likelihood.

    Temperature scaling, s = 1 / temperature (Guo et al., ICML 2017); fit it on the valid part. scores (B, N); targets (B,).
    """
    rows, scores = np.arange(len(targets)), np.asarray(scores, dtype=np.float64)

    def nll(log_scale: float) -> float:
        return -log_softmax(np.exp(log_scale) * scores, axis=1)[rows, targets].mean()

    return float(np.exp(minimize_scalar(nll, bounds=RANGE, method="bounded").x))


def calibrated(system: Baseline, asked: Cases) -> tuple[float, float]:
    """Return the fitted scale of a recommender's scores, and its NDCG@10: how it is heard beside other teachers.

    asked: cases of the valid part.
    """
    return fitted_scale(system.scores(asked.histories), asked.targets), float(ndcg_at_k(ranks(system, asked), 10).mean())

"""What the hypotheses ask of the data, and when a verdict is given."""

from __future__ import annotations

import numpy as np

from lwa_helpers.evaluation.statistics import Interval

UPPER_DEPTH = 0.3


def upper_layers(n_layers: int, depth: float = UPPER_DEPTH) -> np.ndarray:
    """Return a mask (L,) of the layers in the top `depth` share of the stack, at least one of them."""
    return np.arange(n_layers) >= n_layers - max(1, round(depth * n_layers))


def layer_contrast(per_example: np.ndarray, upper: np.ndarray, seed: int, resamples: int = 2000) -> Interval:
    """Return the mean trace of an upper layer over that of a lower one, with a 95 % bootstrap interval over examples.

    per_example (n, L): trace of each layer for each example; upper (L,): mask.
    """
    above, below = per_example[:, upper].mean(1), per_example[:, ~upper].mean(1)
    rows = np.random.default_rng(seed).integers(len(above), size=(resamples, len(above)))
    low, high = np.quantile(above[rows].mean(1) / below[rows].mean(1), [0.025, 0.975])
    return Interval(float(above.mean() / below.mean()), float(low), float(high))


def verdict_of(low: float, high: float, null: float = 0.0) -> str:
    """Return "supported" when the interval lies above `null`, "refuted" when below it, else "undecided"."""
    if low > null:
        return "supported"
    return "refuted" if high < null else "undecided"

"""The four hypotheses: what each asks of the data, and the verdict on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lwa_helpers.evaluation.statistics import Interval, difference_of_arms, paired_difference, spearman

UPPER_DEPTH = 0.3
GROWING = ("linear", "exponential", "schedule")
LLAMA = "llama3:latest"


class Verdict(NamedTuple):
    """supported, refuted or undecided; the effect with its 95 % interval, how that was made, from how many units, in words.

    Where nothing could be measured, effect, low and high are NaN and n_units is 0.
    """

    verdict: str
    effect: float
    low: float
    high: float
    test: str
    n_units: int
    sentence: str


def verdict_of(low: float, high: float, null: float = 0.0) -> str:
    """Return "supported" when the interval lies above `null`, "refuted" when below it, else "undecided"."""
    if low > null:
        return "supported"
    return "refuted" if high < null else "undecided"


def h1_upper_layers(per_example: np.ndarray, seed: int) -> Verdict:
    """H1: the upper layers have a larger mean trace than the lower ones; ratio above 1.

    per_example (n, L): Fisher trace of each layer for each window.
    """
    ratio = layer_contrast(per_example, upper_layers(per_example.shape[1]), seed)
    low, high = ratio.low, ratio.high
    return Verdict(
        verdict_of(low, high, null=1.0), *ratio, "bootstrap over windows", len(per_example),
        f"An upper layer has {ratio.estimate:.2f} [{low:.2f}, {high:.2f}] times the Fisher trace of a lower one.",
    )


def h2_foretells_worth(trace: np.ndarray, harm: np.ndarray, block_influence: np.ndarray, seed: int) -> Verdict:
    """H2: a layer's trace foretells the loss of leaving it out; Spearman's correlation above 0.

    trace, harm (the leave-one-layer-out loss) and the rival block_influence: (L,).
    """
    own = spearman(trace, harm, seed=seed)
    rival, depth = (spearman(x, harm, seed=seed).estimate for x in (block_influence, np.arange(len(harm))))
    return Verdict(
        verdict_of(own.low, own.high), *own[:3], "bootstrap over layers", len(harm),
        f"Its rank correlation with the leave-one-out loss is {own.estimate:.2f} [{own.low:.2f}, {own.high:.2f}], "
        f"beside {rival:.2f} for block influence and {depth:.2f} for depth alone.",
    )


def h3_growing_weights(ndcg: Mapping[str, np.ndarray], seed: int) -> Verdict:
    """H3: layer weights that grow with depth, pooled, give a better student than uniform ones; difference above 0.

    ndcg: for "uniform" and any of GROWING, NDCG@10 (users, seeds).
    """
    growing = np.mean([ndcg[name] for name in GROWING if name in ndcg], axis=0)
    pooled = difference_of_arms(growing, ndcg["uniform"], seed=seed)
    users, seeds = growing.shape
    return Verdict(
        verdict_of(pooled.low, pooled.high), *pooled[:3],
        "t interval over users and seeds" if seeds > 1 else "paired bootstrap over users", users,
        f"Weights that grow with depth differ from uniform ones by {pooled.estimate:+.4f} "
        f"[{pooled.low:+.4f}, {pooled.high:+.4f}] NDCG@10.",
    )


def h4_best_teacher(ndcg: Mapping[str, np.ndarray], untuned: Sequence[str], seed: int) -> Verdict:
    """H4: llama3 is the best untuned teacher; its lead over the best of the others above 0.

    ndcg: NDCG@10 (users,) of each of `untuned` that answered.
    """
    rivals = [name for name in untuned if name != LLAMA]
    if LLAMA not in untuned or not rivals:
        sentence = "llama3 could not be reached from the machine of this run, so nothing was measured for it."
        if LLAMA in untuned:
            sentence = "llama3 was the only untuned teacher that could be reached, so there is nothing to compare it with."
        return Verdict("undecided", np.nan, np.nan, np.nan, "none", 0, sentence)
    rival = max(rivals, key=lambda name: ndcg[name].mean())
    lead = paired_difference(ndcg[LLAMA], ndcg[rival], seed=seed)
    return Verdict(
        verdict_of(lead.low, lead.high), *lead, "paired bootstrap over users", len(ndcg[LLAMA]),
        f"llama3 differs from the best other teacher, {rival}, by {lead.estimate:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}].",
    )


def upper_layers(n_layers: int, depth: float = UPPER_DEPTH) -> np.ndarray:
    """Return a mask (L,) of the layers in the top `depth` share of the stack, at least one of them."""
    return np.arange(n_layers) >= n_layers - max(1, round(depth * n_layers))


def layer_contrast(per_example: np.ndarray, upper: np.ndarray, seed: int, resamples: int = 2000) -> Interval:
    """Return the mean trace of an upper layer over that of a lower one, with a 95 % bootstrap interval over examples.

    per_example (n, L): trace of each layer for each example; upper (L,): mask. ValueError on NaN or fewer than two examples.
    """
    if len(per_example) < 2 or not np.isfinite(per_example).all():
        raise ValueError(f"need finite traces of two or more examples, got {len(per_example)} examples")
    above, below = per_example[:, upper].mean(1), per_example[:, ~upper].mean(1)
    rows = np.random.default_rng(seed).integers(len(above), size=(resamples, len(above)))
    low, high = np.quantile(above[rows].mean(1) / below[rows].mean(1), [0.025, 0.975])
    return Interval(float(above.mean() / below.mean()), float(low), float(high))

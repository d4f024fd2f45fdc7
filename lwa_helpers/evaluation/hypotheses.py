"""The four hypotheses: the test of each, and its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lwa_helpers.evaluation.statistics import difference_of_arms, paired_difference, ratio_of_means, spearman

UPPER_DEPTH = 0.3
FEWEST = 5  # windows, or layers, that a bootstrap interval needs
GROWING = ("linear", "exponential", "schedule")
LLAMA = "llama3:latest"


class Verdict(NamedTuple):
    """The outcome of a hypothesis test.

    If nothing could be measured, effect, low and high are NaN and n_units is 0.

    Attributes:
        verdict: "supported", "refuted" or "undecided".
        effect: the estimated effect.
        low: lower end of the effect's 95 % interval.
        high: upper end of the effect's 95 % interval.
        test: how the interval was computed.
        n_units: the number of units (windows, layers or users) that it was computed from.
        sentence: the result in words.
    """

    verdict: str
    effect: float
    low: float
    high: float
    test: str
    n_units: int
    sentence: str


def verdict_of(low: float, high: float, null: float = 0.0) -> str:
    """Return "supported" if the interval lies above `null`, "refuted" if it lies below, else "undecided"."""
    if low > null:
        return "supported"
    return "refuted" if high < null else "undecided"


def unmeasured(sentence: str) -> Verdict:
    """Return the verdict for a hypothesis that could not be measured."""
    return Verdict("undecided", np.nan, np.nan, np.nan, "none", 0, sentence)


def h1_upper_layers(per_example: np.ndarray, seed: int) -> Verdict:
    """Test H1: the upper layers have a larger mean trace than the lower ones.

    Raises ValueError for NaN.

    Args:
        per_example: (n, L) Fisher trace of each layer for each window.
        seed: of the bootstrap.

    Returns:
        The verdict. The effect is the ratio of the mean traces; H1 says that it is above 1.
    """
    n, n_layers = per_example.shape
    if n < FEWEST or n_layers < 2:
        return unmeasured(f"{n} windows and {n_layers} layers are too few to tell upper layers from lower ones.")
    upper = upper_layers(n_layers)
    ratio = ratio_of_means(per_example[:, upper].mean(1), per_example[:, ~upper].mean(1), seed=seed)
    low, high = ratio.low, ratio.high
    return Verdict(
        verdict_of(low, high, null=1.0),
        *ratio,
        "bootstrap over windows",
        n,
        f"An upper layer has {ratio.estimate:.2f} [{low:.2f}, {high:.2f}] times the Fisher trace of a lower one.",
    )


def h2_predicts_worth(trace: np.ndarray, harm: np.ndarray, block_influence: np.ndarray, seed: int) -> Verdict:
    """Test H2: a layer's trace predicts the loss when the layer is left out.

    Raises ValueError for NaN, or if all layers have the same value.

    Args:
        trace: (L,) Fisher trace of each layer.
        harm: (L,) leave-one-layer-out loss of each layer.
        block_influence: (L,) block influence of each layer, a rival predictor.
        seed: of the bootstrap.

    Returns:
        The verdict. The effect is Spearman's correlation of trace and harm; H2 says that it is above 0.
    """
    if len(harm) < FEWEST:
        return unmeasured(f"{len(harm)} layers are too few for a rank correlation.")
    own = spearman(trace, harm, seed=seed)
    rival, depth = (spearman(x, harm, seed=seed).estimate for x in (block_influence, np.arange(len(harm))))
    return Verdict(
        verdict_of(own.low, own.high),
        *own[:3],
        "bootstrap over layers",
        len(harm),
        f"Its rank correlation with the leave-one-out loss is {own.estimate:.2f} [{own.low:.2f}, {own.high:.2f}], "
        f"beside {rival:.2f} for block influence and {depth:.2f} for depth alone.",
    )


def h3_growing_weights(ndcg: Mapping[str, np.ndarray], seed: int) -> Verdict:
    """Test H3: layer weights that grow with depth give a better student than uniform ones.

    Args:
        ndcg: (users, seeds) NDCG@10 of each arm. Only "uniform" and the arms of GROWING are used.
        seed: of the bootstrap.

    Returns:
        The verdict. The effect is the mean of the arms of GROWING minus "uniform"; H3 says that it is above 0.
    """
    grown = [ndcg[name] for name in GROWING if name in ndcg]
    if not grown or "uniform" not in ndcg:
        return unmeasured(
            f"The ablation needs the arm uniform and one of {', '.join(GROWING)}; it has {', '.join(ndcg)}."
        )
    growing = np.mean(grown, axis=0)
    pooled = difference_of_arms(growing, ndcg["uniform"], seed=seed)
    users, seeds = growing.shape
    return Verdict(
        verdict_of(pooled.low, pooled.high),
        *pooled[:3],
        "t interval over users and seeds" if seeds > 1 else "paired bootstrap over users",
        users,
        f"Weights that grow with depth differ from uniform ones by {pooled.estimate:+.4f} "
        f"[{pooled.low:+.4f}, {pooled.high:+.4f}] NDCG@10.",
    )


def h4_best_teacher(ndcg: Mapping[str, np.ndarray], untuned: Sequence[str], seed: int) -> Verdict:
    """Test H4: llama3 is the best untuned teacher.

    Args:
        ndcg: (users,) NDCG@10 of each teacher.
        untuned: names of the untuned teachers that answered.
        seed: of the bootstrap.

    Returns:
        The verdict. The effect is llama3's lead over the best of the others; H4 says that it is above 0.
    """
    rivals = [name for name in untuned if name != LLAMA]
    if LLAMA not in untuned or not rivals:
        sentence = "llama3 gave no answer on the machine of this run, so nothing was measured for it."
        if LLAMA in untuned:
            sentence = "llama3 was the only untuned teacher that answered, so there is nothing to compare it with."
        return unmeasured(sentence)
    rival = max(rivals, key=lambda name: ndcg[name].mean())
    lead = paired_difference(ndcg[LLAMA], ndcg[rival], seed=seed)
    return Verdict(
        verdict_of(lead.low, lead.high),
        *lead,
        "paired bootstrap over users",
        len(ndcg[LLAMA]),
        f"llama3 differs from the best other teacher, {rival}, by {lead.estimate:+.3f} "
        f"[{lead.low:+.3f}, {lead.high:+.3f}].",
    )


def upper_layers(n_layers: int, depth: float = UPPER_DEPTH) -> np.ndarray:
    """Return a mask (L,) of the layers in the top `depth` share of the stack, at least one layer."""
    return np.arange(n_layers) >= n_layers - max(1, round(depth * n_layers))

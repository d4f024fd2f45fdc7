"""Verdicts and contrasts by hand, and the cost of a model."""

import numpy as np
import pytest

from lwa_helpers.evaluation.hypotheses import (
    LLAMA,
    h1_upper_layers,
    h2_predicts_worth,
    h3_growing_weights,
    h4_best_teacher,
    upper_layers,
    verdict_of,
)


@pytest.mark.parametrize(("n_layers", "first_upper"), [(30, 21), (32, 22), (10, 7), (3, 2), (1, 0)])
def test_upper_layers(n_layers, first_upper):
    assert upper_layers(n_layers).nonzero()[0].tolist() == list(range(first_upper, n_layers))


def test_h1_is_the_ratio_of_an_upper_layer_to_a_lower_one():
    per_example = np.tile([1.0, 1, 4], (20, 1)) * np.arange(1, 21)[:, None]
    h1 = h1_upper_layers(per_example, seed=0)
    assert h1[:4] == ("supported", *[pytest.approx(4)] * 3) and h1.n_units == 20


@pytest.mark.parametrize(
    ("low", "high", "null", "verdict"),
    [
        (0.1, 0.2, 0, "supported"),
        (-0.2, -0.1, 0, "refuted"),
        (-0.1, 0.1, 0, "undecided"),
        (0.5, 0.9, 1, "refuted"),
        (0.0, 0.1, 0, "undecided"),
    ],
)
def test_verdicts(low, high, null, verdict):
    assert verdict_of(low, high, null) == verdict


def noise(*shape):
    return np.random.default_rng(0).normal(0, 0.05, shape)


@pytest.mark.parametrize(("step", "verdict"), [(+0.1, "supported"), (-0.1, "refuted"), (0.0, "undecided")])
def test_each_hypothesis_is_supported_refuted_and_left_open(step, verdict):
    """The same data with the effect put in, turned round and left out."""
    depth = np.arange(10)
    h1 = h1_upper_layers(1 + noise(50, 10) + step * depth, seed=0)
    assert h1.verdict == verdict and h1.n_units == 50 and h1.low < h1.effect < h1.high
    unrelated = np.array([5, 1, 2, 8, 3, 9, 4, 0, 6, 7])
    harm = np.array([3, 1, 4, 1.5, 9, 2, 6, 5, 3.5, 8])
    h2 = h2_predicts_worth(step * harm + (step == 0) * unrelated, harm, harm, seed=0)
    assert h2.verdict == verdict and h2.n_units == 10 and "beside 1.00 for block influence" in h2.sentence
    for seeds in (1, 4):
        values = 0.5 + noise(200, seeds)
        uniform, grown = 0.5 + noise(2, 200, seeds)[1], values + step
        arms = {"uniform": uniform, "linear": grown, "exponential": grown, "fisher": values - 9}
        h3 = h3_growing_weights(arms, seed=0)
        assert h3.verdict == verdict and h3.n_units == 200 and h3.effect == pytest.approx(step, abs=0.02)
        assert ("seeds" in h3.test) == (seeds > 1)
    ndcg = {LLAMA: 0.5 + noise(80) + step, "a": 0.5 + noise(2, 80)[1], "b": 0.1 + noise(80), "teacher": np.ones(80)}
    h4 = h4_best_teacher(ndcg, [LLAMA, "a", "b"], seed=0)
    assert h4.verdict == verdict and h4.n_units == 80 and "teacher, a, by" in h4.sentence


@pytest.mark.parametrize("seeds", [1, 3])
def test_arms_that_end_up_equal_leave_h3_open(seeds):
    values = np.random.default_rng(0).random((20, seeds))
    h3 = h3_growing_weights({"uniform": values, "linear": values}, seed=0)
    assert h3[:4] == ("undecided", 0, 0, 0) and h3.n_units == 20


def test_h1_is_not_judged_from_what_is_no_number():
    with pytest.raises(ValueError, match="finite"):
        h1_upper_layers(np.where(np.eye(9), np.nan, 1.0), seed=0)


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (lambda: h1_upper_layers(np.ones((4, 9)), seed=0), "4 windows"),
        (lambda: h1_upper_layers(np.ones((9, 1)), seed=0), "1 layers"),
        (lambda: h2_predicts_worth(*np.random.default_rng(0).random((3, 4)), seed=0), "4 layers are too few"),
        (
            lambda: h3_growing_weights({"uniform": np.ones((9, 1)), "fisher": np.ones((9, 1))}, seed=0),
            "has uniform, fisher",
        ),
        (lambda: h3_growing_weights({"linear": np.ones((9, 1))}, seed=0), "needs the arm uniform"),
    ],
)
def test_a_hypothesis_that_nothing_can_be_said_of_is_undecided(verdict, words):
    found = verdict()
    assert found.verdict == "undecided" and found.n_units == 0 and np.isnan(found.effect) and words in found.sentence


@pytest.mark.parametrize(("untuned", "words"), [(["a"], "gave no answer"), ([LLAMA], "the only untuned")])
def test_no_best_teacher_without_llama_and_a_rival(untuned, words):
    h4 = h4_best_teacher({name: np.ones(9) for name in untuned}, untuned, seed=0)
    assert h4.verdict == "undecided" and h4.n_units == 0 and np.isnan(h4.effect) and words in h4.sentence

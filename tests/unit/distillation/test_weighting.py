"""Layer weights: hand-worked values, mean one, and the extension point."""

import numpy as np
import pytest
from tiny_lm import result

from lwa_helpers import LayerwiseDistillation
from lwa_helpers.distillation.weighting import fisher_at_depths, get_strategy, layer_map, layer_weights
from lwa_helpers.errors import LwaError


@pytest.mark.parametrize("n_layers", [1, 2, 7, 8])
@pytest.mark.parametrize("name", sorted(LayerwiseDistillation.strategies))
def test_every_strategy_gives_non_negative_weights_of_mean_one(name, n_layers):
    fisher = result(np.random.default_rng(0).uniform(0.1, 5, 30))
    weights = get_strategy(name).calculate_layer_weights(fisher, n_layers)
    assert weights.shape == (n_layers,) and (weights >= 0).all()
    if name != "shuffled_fisher":
        assert weights.mean() == pytest.approx(1)
    assert layer_weights(fisher, name, n_layers).mean() == pytest.approx(1)


def test_hand_worked_weights():
    np.testing.assert_allclose(get_strategy("linear").calculate_layer_weights(None, 4), [0.4, 0.8, 1.2, 1.6])
    exponential = get_strategy("exponential").calculate_layer_weights(None, 3)
    np.testing.assert_allclose(exponential[1:] / exponential[:-1], np.sqrt(10))
    schedule = get_strategy("schedule").calculate_layer_weights(None, 10)
    np.testing.assert_allclose(schedule / schedule[-1], np.arange(1, 11) / 10)


def test_fisher_is_averaged_over_equal_slices_of_the_teacher():
    np.testing.assert_allclose(fisher_at_depths(result([1, 3, 5, 7]), 2, "fisher"), [2, 6])
    # three layers in two slices: the middle one counts half on either side
    np.testing.assert_allclose(fisher_at_depths(result([2, 4, 8]), 2, "fisher"), [(2 + 2) / 1.5, (2 + 8) / 1.5])
    np.testing.assert_allclose(get_strategy("fisher").calculate_layer_weights(result([1, 3]), 2), [0.5, 1.5])
    np.testing.assert_allclose(get_strategy("inverse_fisher").calculate_layer_weights(result([1, 3]), 2), [1.5, 0.5])


def test_strategies_on_fisher_traces_by_hand():
    fisher = result([1, 4, 2, 9])
    for name, expected in {
        "fisher_x_depth": [1, 8, 6, 36],
        "softmax_fisher": [1, 2, np.sqrt(2), 3],
        "fisher_ahead": [16, 15, 11, 9],
    }.items():
        weights = get_strategy(name).calculate_layer_weights(fisher, 4)
        np.testing.assert_allclose(weights, np.array(expected) / np.mean(expected))
    np.testing.assert_allclose(
        get_strategy("fisher_ahead").calculate_layer_weights(fisher, 2), np.array([8, 5.5]) / 6.75
    )


def test_shuffled_weights_are_the_fisher_weights_in_another_order():
    fisher = result(np.arange(1.0, 9.0))
    plain = get_strategy("fisher").calculate_layer_weights(fisher, 8)
    shuffled = get_strategy("shuffled_fisher").calculate_layer_weights(fisher, 8)
    assert sorted(shuffled) == pytest.approx(sorted(plain)) and not np.allclose(shuffled, plain)


def test_shuffled_weights_are_drawn_anew_for_each_seed_and_once_for_one():
    """Without a seed of its own every arm of an ablation would have the same accidental order."""
    fisher = result(np.arange(1.0, 9.0))
    drawn = [layer_weights(fisher, "shuffled_fisher", 8, seed=seed) for seed in (0, 1, 2, 1)]
    assert len({tuple(weights) for weights in drawn}) == 3 and (drawn[1] == drawn[3]).all()
    for weights in drawn:
        np.testing.assert_allclose(sorted(weights), np.arange(1, 9) / 4.5)
    plain = [layer_weights(fisher, "fisher", 8, seed=seed) for seed in (0, 1)]
    assert (plain[0] == plain[1]).all()


def test_layers_that_are_not_matched_have_no_weight():
    np.testing.assert_allclose(layer_weights(None, "linear", 4, "no_last"), np.array([1, 2, 3, 0]) * 4 / 6)
    np.testing.assert_allclose(layer_weights(None, "uniform", 4, "last"), [0, 0, 0, 4])


def test_a_subclass_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr(LayerwiseDistillation, "strategies", dict(LayerwiseDistillation.strategies))

    class LastOnly(LayerwiseDistillation):
        name = "last_only"

        def calculate_layer_weights(self, fisher_scores, n_layers):
            return np.eye(n_layers)[-1]

    for given in ("last_only", LastOnly(), LastOnly):
        np.testing.assert_allclose(layer_weights(None, given, 4), [0, 0, 0, 4])


def test_bad_input_is_named():
    with pytest.raises(LwaError, match="known are"):
        get_strategy("fishy")
    with pytest.raises(LwaError, match="needs Fisher scores"):
        layer_weights(None, "fisher", 4)
    with pytest.raises(LwaError, match="3 layer weights for a student of 4"):
        layer_weights(np.ones(3), "fisher", 4)
    with pytest.raises(LwaError, match="3 layer weights for a student of 1"):
        layer_weights(np.ones(3), "fisher", 1, "no_last")
    with pytest.raises(LwaError, match="finite"):
        layer_weights(np.array([1.0, -1, 1, 1]), "fisher", 4)
    with pytest.raises(LwaError, match="1 layer weights for a student of 4"):
        layer_weights(2.0, "fisher", 4)
    with pytest.raises(LwaError, match=r"shape \(4, 1\)"):
        layer_weights(np.ones((4, 1)), "fisher", 4)
    for unknown in ("fishy", 3, None):
        with pytest.raises(LwaError, match="unknown weighting strategy"):
            layer_weights(np.ones(4), unknown, 4)
    with pytest.raises(LwaError, match="`name`"):
        type("Nameless", (LayerwiseDistillation,), {})


def test_layers_are_matched_at_the_same_relative_depth():
    assert layer_map(8, 32) == [4, 8, 12, 16, 20, 24, 28, 32]
    assert layer_map(8, 30) == [4, 8, 11, 15, 19, 22, 26, 30]
    assert layer_map(3, 3) == [1, 2, 3]
    assert layer_map(5, 2) == [1, 1, 1, 2, 2] and layer_map(6, 1) == [1] * 6  # a student deeper than its teacher

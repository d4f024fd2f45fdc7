"""Verdicts and contrasts by hand, and the cost of a model."""

import time

import numpy as np
import pytest
import torch
from torch import nn

from lwa_helpers.efficiency import n_parameters, speed_ratio, time_side_by_side, weight_bytes
from lwa_helpers.hypotheses import layer_contrast, upper_layers, verdict_of


@pytest.mark.parametrize(("n_layers", "first_upper"), [(30, 21), (32, 22), (10, 7), (3, 2), (1, 0)])
def test_upper_layers(n_layers, first_upper):
    assert upper_layers(n_layers).nonzero()[0].tolist() == list(range(first_upper, n_layers))


def test_layer_contrast():
    per_example = np.tile([1.0, 1, 4], (20, 1)) * np.arange(1, 21)[:, None]
    ratio = layer_contrast(per_example, np.array([False, False, True]), seed=0)
    assert ratio == pytest.approx((4, 4, 4))
    noisy = np.random.default_rng(0).exponential(1.0, (400, 4))
    estimate, low, high = layer_contrast(noisy, np.array([False, False, False, True]), seed=0)
    assert low < 1 < high and low < estimate < high


@pytest.mark.parametrize(("low", "high", "null", "verdict"), [
    (0.1, 0.2, 0, "supported"), (-0.2, -0.1, 0, "refuted"), (-0.1, 0.1, 0, "undecided"), (0.5, 0.9, 1, "refuted"),
    (0.0, 0.1, 0, "undecided"),
])
def test_verdicts(low, high, null, verdict):
    assert verdict_of(low, high, null) == verdict


def test_tied_weights_count_once():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.Linear(3, 2).to(torch.bfloat16))
    assert n_parameters(model) == 9 + 8 and weight_bytes(model) == 9 * 4 + 8 * 2


def test_times_are_taken_in_turn():
    order = []
    calls = {"slow": lambda: (order.append("slow"), time.sleep(0.02)), "fast": lambda: order.append("fast")}
    times = time_side_by_side(calls, rounds=3)
    assert order == ["slow", "fast"] * 4 and len(times) == 6
    assert (speed_ratio(times, "slow", "fast") > 1).all()

"""What a model costs: parameters, bytes, the memory of a process that uses it, and time side by side."""

import subprocess
import time

import pytest
import torch
from tiny_lm import item_lm, reading_of
from torch import nn

from lwa_helpers.ranking.cost import n_parameters, peak_memory, speed_ratio, time_side_by_side, weight_bytes


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


def test_a_process_of_its_own_holds_the_weights_and_what_they_need(tmp_path):
    """Of two checkpoints that differ in width alone, the larger needs its additional bytes once, not thrice."""
    peaks, held = [], []
    for width in (32, 1536):
        lm = item_lm(layers=2, hidden=width)
        lm.save(tmp_path / str(width))
        prompts = [reading_of(lm).prompt(history) for history in ([0, 1], [3])]
        peaks.append(peak_memory(tmp_path / str(width), prompts, batch_size=2))
        held.append(weight_bytes(lm.model))
    more = held[1] - held[0]
    assert more > 100e6 and 50e6 < peaks[0] < 2e9
    assert more < peaks[1] - peaks[0] < 3 * more


def test_a_process_that_fails_says_so(tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        peak_memory(tmp_path, [[1]], 1)

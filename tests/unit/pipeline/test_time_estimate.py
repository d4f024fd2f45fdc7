"""How long a run will take on a machine where it has never run."""

import json

import pytest

from lwa_helpers.pipeline import time_estimate


def record(notebook, seconds, speed):
    return {"profile": "paper", "notebook": notebook, "seconds": seconds, "speed": speed}


def test_a_machine_of_half_the_speed_is_expected_to_take_twice_as_long(tmp_path, monkeypatch):
    time_estimate.write_times(
        tmp_path, [record("01", 10.04, None), record("02", 600.0, 80.0), record("03", 7.0, 100.0)]
    )
    monkeypatch.setattr(time_estimate, "machine_speed", lambda: 50.0)
    assert time_estimate.expected_seconds(tmp_path, "paper") == pytest.approx({"01": 20.0, "02": 1200.0, "03": 14.0})
    assert time_estimate.expected_seconds(tmp_path, "quick") == {}
    assert json.loads((tmp_path / "times.json").read_text())["speed"] == 100.0


def test_nothing_is_expected_where_nothing_is_published_or_was_computed(tmp_path):
    assert time_estimate.expected_seconds(tmp_path, "paper") == {}
    time_estimate.write_times(tmp_path, [record("01", 10.0, None)])
    assert time_estimate.expected_seconds(tmp_path, "paper") == {}


def test_the_speed_of_a_machine_is_that_of_the_products_it_is_asked_for(monkeypatch):
    """By a clock that ticks a second at each look: the number of products in the time is then known."""
    ticks = iter(range(1000))
    monkeypatch.setattr(time_estimate.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(time_estimate, "SECONDS", 5.5)
    # begun at 0; at 1 to 5 another product is begun, at 6 no more; it is 7 when the time is taken
    assert time_estimate.machine_speed() == pytest.approx(5 * 2e-9 * 512 * 576 * 1536 / 7)

"""The numbers of the benchmarks that the paper quotes, against ratios worked by hand."""

import importlib
import json
from pathlib import Path

import pandas as pd
import pytest

from lwa_helpers.errors import LwaError

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def numbers(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("benchmark_numbers")


def test_ratios_are_of_the_smallest_and_the_largest_catalogue_at_the_first_history(numbers):
    rows = [(110, 100, "naive", 8.0), (110, 100, "title", 0.8), (110, 100, "item", 0.05), (110, 400, "title", 2.0),
            (110, 400, "item", 0.05), (110, 2420, "naive", 90.0), (110, 2420, "title", 9.0), (110, 2420, "item", 0.06),
            (28, 100, "title", 7.0), (28, 100, "item", 7.0)]  # fmt: skip
    found = numbers.speed_numbers(pd.DataFrame(rows, columns=["history_tokens", "items", "system", "seconds"]))
    assert found == {"SpeedHistoryTokens": "110", "SpeedFew": "100", "SpeedMany": "2,420", "SpeedTitleFew": "10",
                     "SpeedItemFew": "16", "SpeedItemMany": "150"}  # fmt: skip


def test_a_ratio_of_rounds_is_their_median_least_and_most(numbers):
    seconds = {
        "live teacher": [4.0, 5.0, 9.0],
        "cached outputs": [2.0, 2.0, 3.0],
        "teacher": [4, 4, 4],
        "student": [1, 1, 1],
        "teacher, title head": [300, 300, 300],
        "student, item head": [1, 1, 1],
    }
    what = {name: what for what, slow, fast in numbers.distillation_speed.PAIRS for name in (slow, fast)}
    rows = [(n, name, value, what[name]) for name, values in seconds.items() for n, value in enumerate(values)]
    found = numbers.step_numbers(pd.DataFrame(rows, columns=["round", "name", "seconds", "what"]))
    assert [found[f"SpeedCachedStep{end}"] for end in ("", "Low", "High")] == ["2.5", "2.0", "3.0"]
    assert found["SpeedStudent"] == "4.0" and found["SpeedHeads"] == "300"


def test_what_no_commit_made_and_what_has_not_run_is_refused(numbers, tmp_path):
    file = tmp_path / "some.csv"
    with pytest.raises(LwaError, match="run some.py first"):
        numbers.measured(file, "some.py")
    file.write_text("a\n1\n")
    file.with_suffix(".json").write_text(json.dumps({"dirty": True}))
    with pytest.raises(LwaError, match="uncommitted changes, run some.py again"):
        numbers.measured(file, "some.py")
    file.with_suffix(".json").write_text(json.dumps({"dirty": False}))
    frame, made = numbers.measured(file, "some.py")
    assert frame.a.tolist() == [1] and made == {"dirty": False}

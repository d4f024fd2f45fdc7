"""Controls beside the first row of the table of data sets, from ranks written by hand."""

import importlib
from pathlib import Path

import pandas as pd
import pytest

from lwa_helpers.errors import LwaError

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def across(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("across_data")


def ranked(folder: Path, ranks: list[int], users: str = "abcd") -> Path:
    (folder / "data").mkdir(parents=True)
    pd.DataFrame({"user_id": list(users), "teacher": ranks}).to_parquet(folder / "data" / "teacher_ranks.parquet")
    return folder


def test_a_control_differs_from_the_first_teacher_by_the_mean_over_users(across, tmp_path):
    first, control = ranked(tmp_path / "first", [1, 1, 100, 3]), ranked(tmp_path / "control", [1, 3, 100, 100])
    found = across.against_first(control, first)
    assert found["to_first"] == pytest.approx((0 - 0.5 + 0 - 0.5) / 4)  # NDCG@10 of ranks 1, 3 and 100: 1, 1/2 and 0
    assert found["to_first_low"] <= found["to_first"] <= found["to_first_high"] <= 0
    frame = pd.DataFrame([{"name": "MovieLens"}, {"name": "control: random weights"} | found])
    macros = across.control_macros(frame)
    assert set(macros) == {"ControlRandomWeights", "ControlRandomWeightsLow", "ControlRandomWeightsHigh"}
    assert macros["ControlRandomWeights"] == "$-$0.250"


def test_a_control_of_other_users_is_refused(across, tmp_path):
    first, control = ranked(tmp_path / "first", [1, 2, 3, 4]), ranked(tmp_path / "control", [1, 2, 3, 4], "abce")
    with pytest.raises(LwaError, match="control and .*first ranked for different users"):
        across.against_first(control, first)

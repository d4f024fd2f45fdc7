"""The README's times of whole runs, from manifests written by hand."""

import importlib
import json
from pathlib import Path

import pandas as pd
import pytest

from lwa_helpers.errors import LwaError

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def times(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("run_times")


def run(folder: Path, dirty=False, bf16=True) -> Path:
    for name in ("manifests", "state"):
        (folder / name).mkdir(parents=True)
    for name, seconds, device in (("01_data", 30.0, None), ("02_fisher_heatmaps", 240.0, "cpu (X, 2 cores)")):
        made = {"notebook": name, "seconds": seconds - 8, "commit": "abcdef012345", "dirty": dirty, "profile": "quick",
                "seed": 0, "device": device, "instructions": "AVX2", "has_bf16": bf16, "speed": 99.6}  # fmt: skip
        (folder / "manifests" / f"{name}.json").write_text(json.dumps(made))
        (folder / "state" / f"{name}.json").write_text(json.dumps({"seconds": seconds}))  # with the start of its Python
    return folder


def test_minutes_are_those_on_the_wall_and_their_sum(times, tmp_path):
    frame = pd.DataFrame([times.row(run(tmp_path / "a")), times.row(run(tmp_path / "b", bf16=False))])
    assert frame["total"].tolist() == [4.5, 4.5] and frame.run.tolist() == ["a", "b"]
    table = times.markdown(frame).splitlines()
    assert table[0] == "| profile | computes in | instructions | 01 | 02 | minutes | GFLOP/s |"
    assert table[2:4] == [f"| quick | {name} | AVX2 | 0.5 | 4.0 | 4.5 | 100 |" for name in ("bfloat16", "float32")]
    assert "cpu (X, 2 cores); commits abcdef0123" in table[-1]


def test_a_folder_without_runs_is_named_and_uncommitted_changes_show(times, tmp_path):
    with pytest.raises(LwaError, match="nothing has no manifests"):
        times.row(tmp_path / "nothing")
    assert times.row(run(tmp_path / "c", dirty=True))["commit"].endswith("-dirty")

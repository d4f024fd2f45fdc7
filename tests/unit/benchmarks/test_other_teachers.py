"""H1 and H2 for several teachers: what notebook 02 wrote down is what the table and the macros say."""

import importlib
import json
from pathlib import Path

import pytest

from lwa_helpers.errors import LwaError

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
pytestmark = pytest.mark.unit


@pytest.fixture
def other(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("other_teachers")
    monkeypatch.setattr(module.paths, "PAPER", tmp_path / "paper")
    monkeypatch.setattr(module.paths, "ROOT", tmp_path)
    (tmp_path / "paper").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{module.START}\n{module.END}\nafter\n")
    return module


def finished_run(folder, other, model, data, outcomes, value, dirty=False):
    """A folder of results with the numbers of notebook 02: each is `value`, its interval 0.5 to either side."""
    numbers = {shown[0]: {"value": value} for shown in other.COLUMNS.values() if shown}
    for name in ("TeacherNdcg", "FisherUpperLowerRatio", "FisherLooSpearman"):
        numbers |= {f"{name}Low": {"value": value - 0.5}, f"{name}High": {"value": value + 0.5}}
    made = {
        "numbers": numbers, "verdicts": {name: {"outcome": outcome} for name, outcome in zip(("H1", "H2"), outcomes)},
        "commit": "1" * 40, "dirty": dirty, "device": "cpu",
        "records": {"overrides": {"data.root": "/home/me", "teacher.model": model}},
        "settings": {"teacher": {"model": model}, "data": {"name": data, "root": "/home/me"}},
    }  # fmt: skip
    (folder / "manifests").mkdir(parents=True)
    (folder / "manifests" / "02_fisher_heatmaps.json").write_text(json.dumps(made))
    return folder


def run(other, monkeypatch, *folders):
    monkeypatch.setattr("sys.argv", ["other_teachers.py", *map(str, folders)])
    other.main()


def test_each_run_is_a_row_and_each_outcome_is_counted(other, monkeypatch, tmp_path):
    one = finished_run(tmp_path / "a", other, "gemma3-270m", "movielens", ("supported", "undecided"), 0.75)
    two = finished_run(tmp_path / "b", other, "my-model", "Office_Products", ("supported", "refuted"), -0.25)
    run(other, monkeypatch, one, two)
    rows = [
        line
        for line in (tmp_path / "paper" / "other_teachers_table.tex").read_text().splitlines()
        if line.endswith(r"\\")
    ]
    assert len(rows) == 3 and rows[1].startswith("Gemma-3-270M & MovieLens-100K & 1 & 0.750 & 1 & 1 & 0.75 {")
    assert (
        "& supported & " in rows[1]
        and rows[1].endswith(r"& undecided \\")
        and rows[2].startswith("my-model & Office Products &")
    )
    macros = (tmp_path / "paper" / "other_teachers.tex").read_text()
    for name, count in {
        "Teachers": 2,
        "HOneSupported": 2,
        "HOneRefuted": 0,
        "HTwoRefuted": 1,
        "HTwoUndecided": 1,
    }.items():
        assert rf"\newcommand{{\Other{name}}}{{{count}}}" in macros
    assert r"\newcommand{\OtherBlockLeast}{$-$0.25}" in macros and r"\newcommand{\OtherBlockMost}{0.75}" in macros
    readme = (tmp_path / "README.md").read_text()
    assert "| 1 tokens | teacher.model=gemma3-270m | supported: 0.75 [0.25, 1.25] |" in readme
    assert (
        "| refuted: −0.25 [−0.75, 0.25], block influence −0.25 |" in readme
        and readme.startswith("before")
        and readme.endswith("after\n")
    )
    assert "/home/me" not in (tmp_path / "paper" / "other_teachers.json").read_text()


def test_what_has_not_run_and_what_no_commit_made_is_refused(other, monkeypatch, tmp_path):
    with pytest.raises(LwaError, match="02_fisher_heatmaps.json does not exist"):
        run(other, monkeypatch, tmp_path / "nothing")
    dirty = finished_run(
        tmp_path / "a", other, "gemma3-270m", "movielens", ("supported", "undecided"), 0.75, dirty=True
    )
    with pytest.raises(LwaError, match=r"uncommitted changes \(Gemma-3-270M\)"):
        run(other, monkeypatch, dirty)
    assert not list((tmp_path / "paper").iterdir())

"""What a notebook's run checks, writes and records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from tiny_project import make_project, point_paths_at

from lwa_helpers import files, paths
from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline import manifest
from lwa_helpers.pipeline.run import Run


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project = make_project(tmp_path / "project")
    point_paths_at(project, monkeypatch)
    return project


def open_run(name: str = "01_first") -> Run:
    return Run.open(name, profile="smoke")


def drawn() -> Figure:
    figure = Figure()
    figure.subplots().plot([1, 2])
    return figure


def test_outputs_appear_only_when_the_run_finishes(root: Path) -> None:
    run = open_run()
    run.save_frame("table", pd.DataFrame({"a": [1, 2]}))
    folder = run.path("models/small")
    folder.mkdir()
    (folder / "weights.bin").write_bytes(b"123")
    assert not (run.dir / "data").exists()
    assert run.load_frame("table")["a"].tolist() == [1, 2]
    record = json.loads(run.finish().read_text())
    assert (run.dir / "models/small/weights.bin").read_bytes() == b"123"
    assert record["outputs"]["models/small"]["bytes"] == 3
    assert record["outputs"]["data/table.parquet"]["rows"] == 2
    assert record["settings"]["profile"] == "smoke" and record["seed"] == 0 and record["packages"]["torch"]


def test_a_rerun_replaces_folders_and_drops_what_it_no_longer_makes(root: Path) -> None:
    for names in (("a", "b"), ("b",)):
        run = open_run()
        for name in names:
            run.path(f"models/{name}").mkdir()
            (run.path(f"models/{name}") / f"{len(names)}.bin").write_bytes(b"x")
        run.finish()
    assert [str(p.relative_to(run.dir)) for p in sorted(run.dir.glob("models/**/*"))] == ["models/b", "models/b/1.bin"]


def test_an_unfinished_run_leaves_earlier_results(root: Path) -> None:
    first = open_run()
    first.save_json("x", 1)
    first.finish()
    open_run().save_json("x", 2)
    assert open_run("02_second").load_json("x") == 1


def test_inputs_are_recorded_and_a_missing_one_names_its_notebook(root: Path) -> None:
    with pytest.raises(LwaError, match=r"needs data/squares.json.*run 01_first first"):
        open_run("02_second").load_json("squares")
    maker = open_run()
    maker.save_json("squares", [1])
    maker.finish()
    reader = open_run("02_second")
    reader.load_json("squares")
    reader.save_json("total", 1)
    reader.finish()
    assert manifest.load(reader.dir, "02_second")["inputs"] == {
        "data/squares.json": files.sha256_of(reader.dir / "data/squares.json")
    }


def test_a_declared_output_must_be_written(root: Path) -> None:
    run = open_run()
    with pytest.raises(LwaError, match="saved nothing"):
        run.finish()
    run.path("data/forgotten.bin")
    with pytest.raises(LwaError, match="forgotten.bin was declared but is missing or empty"):
        run.finish()
    run.path("data/forgotten.bin").touch()
    with pytest.raises(LwaError, match="missing or empty"):
        run.finish()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ".hidden", "", "a//b", "a b"])
def test_names_stay_below_the_results(root: Path, name: str) -> None:
    with pytest.raises(LwaError, match="output name"):
        open_run().path(name)
    with pytest.raises(LwaError, match="notebook name"):
        open_run(name)


def test_figures(root: Path) -> None:
    run = open_run()
    run.save_figure(drawn(), "line", caption="C", alt="A")
    again = run.staging / "figures/line.pdf"
    first = again.read_bytes()
    run.save_figure(drawn(), "line", caption="C", alt="A")
    assert again.read_bytes() == first and b"CreationDate" not in first
    with pytest.raises(LwaError, match="is empty"):
        run.save_figure(Figure(), "none", caption="C", alt="A")
    with pytest.raises(LwaError, match="alternative text"):
        run.save_figure(drawn(), "silent", caption="C", alt=" ")


def test_tables(root: Path) -> None:
    run = open_run()
    text = run.save_table(pd.DataFrame({"a_b": [0.5], "who": ["x & y"]}), "t", caption="C").read_text()
    assert "\\toprule\na\\_b & who \\\\\n\\midrule\n0.5000 & x \\& y \\\\\n\\bottomrule" in text
    with pytest.raises(LwaError, match="toprule"):
        run.save_table("\\begin{tabular}", "u", caption="C")


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (0.06123, "{:.3f}", "0.061"),
        (np.float32(0.5), "{:.1f}", "0.5"),
        (np.int64(1682), "{:,}", "1,682"),
        (0.932, "{:.1%}", "93.2\\%"),
        ("a_b", "{}", "a\\_b"),
        (7, "{}", "7"),
    ],
)
def test_numbers_are_printed_for_latex(root: Path, value: object, form: str, text: str) -> None:
    assert open_run().number("Name", value, form) == text


def test_bad_numbers_and_verdicts(root: Path) -> None:
    run = open_run()
    run.number("Same", 1)
    for name, value, message in (
        ("Same", 1, "twice"),
        ("Ndcg10", 1, "letters only"),
        ("Nan", float("nan"), "finite"),
        ("Inf", np.inf, "finite"),
    ):
        with pytest.raises(LwaError, match=message):
            run.number(name, value)
    with pytest.raises(LwaError, match="'proved' is not"):
        run.verdict("H1", "proved", "So.", figure="line")
    run.save_json("x", 1)
    run.verdict("H1", "refuted", "So.", figure="line")
    with pytest.raises(LwaError, match="figures/line.pdf, which no notebook saved"):
        run.finish()


def test_what_there_was_too_little_data_for_is_a_dash(root: Path) -> None:
    run = open_run()
    run.save_json("x", 1)
    run.interval("Kept", (0.5, 0.25, 0.75), "{:.0f}", 100)
    run.interval("Ratio", (np.nan, np.nan, np.nan), "{:.2f}")
    assert run.number("Drift", np.nan, "{:.2f}", optional=True) == "--"
    with pytest.raises(LwaError, match="finite"):
        run.interval("Half", (0.5, np.nan, np.nan), "{:.2f}")
    numbers = json.loads(run.finish().read_text())["numbers"]
    texts = {name: number["text"] for name, number in numbers.items() if name != "Half"}
    assert texts == {"Kept": "50", "KeptLow": "25", "KeptHigh": "75", "Drift": "--"} | dict.fromkeys(
        ("Ratio", "RatioLow", "RatioHigh"), "--"
    )


def test_settings_that_papermill_hands_on_as_texts_are_read_by_their_type(root: Path) -> None:
    run = Run.open("01_first", profile="smoke", overrides={"teacher.learning_rate": "1e-4", "data.name": "No"})
    assert run.config.teacher.learning_rate == 0.0001 and run.config.data.name == "No"
    run.save_json("x", 1)
    recorded = json.loads(run.finish().read_text())["records"]["overrides"]
    assert recorded == {"teacher.learning_rate": 0.0001, "data.name": "No"}


def test_atomic_write(tmp_path: Path) -> None:
    target = tmp_path / "deep/x.txt"
    with files.atomic_write(target) as temporary:
        temporary.write_text("new")
        assert temporary.suffix == ".txt" and not target.exists()
    with pytest.raises(ZeroDivisionError), files.atomic_write(target) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == "new" and list(target.parent.iterdir()) == [target]


def test_a_package_without_its_checkout_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_paths_at(tmp_path, monkeypatch)
    with pytest.raises(LwaError, match="no notebooks/ folder.*LWA_ROOT"):
        open_run()
    with pytest.raises(LwaError, match="profile '../x'"):
        paths.results_dir("../x")

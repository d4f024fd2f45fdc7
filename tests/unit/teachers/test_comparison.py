"""The comparison of teachers: candidates of any catalogue, and notebook 05 with teachers that fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ollama_server import OllamaServer, Served
from teacher_questions import longest_first
from tiny_lm import item_lm, language_model, office
from tiny_project import point_paths_at

from lwa_helpers import paths
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.protocol import Cases
from lwa_helpers.files import sha256_of
from lwa_helpers.teachers.comparison import Failures, draw_candidates, with_reasons
from lwa_helpers.teachers.ollama_teacher import OllamaTeacher

NOTEBOOK = paths.ROOT / "notebooks" / "05_teacher_comparison.ipynb"


def cases(n_items, *histories):
    """Cases whose target is the item after the history, in a catalogue of n_items."""
    return Cases(
        [f"u{i}" for i in range(len(histories))],
        [list(range(n)) for n in histories],
        np.array([n % n_items for n in histories]),
    )


# Candidates


def test_candidates_are_the_target_and_unseen_items_in_the_order_of_the_first_version():
    """Oracle: the draw as notebook 05 made it, which published numbers depend on."""
    given, rng = cases(100, *range(3, 40)), np.random.default_rng(7)
    users = np.sort(rng.choice(37, 10, replace=False))
    expected = []
    for user in users:
        unseen = np.setdiff1d(np.arange(100), [*given.histories[user], given.targets[user]])
        expected.append(rng.permutation([*rng.choice(unseen, 19, replace=False), given.targets[user]]))
    got, candidates = draw_candidates(given, 100, 10, 20, seed=7)
    np.testing.assert_array_equal(got, users)
    np.testing.assert_array_equal(candidates, expected)


def test_a_small_catalogue_gives_short_lists():
    users, candidates = draw_candidates(cases(8, 2, 3, 2, 4), 8, 60, 20, seed=0)
    assert users.tolist() == [0, 1, 2, 3] and candidates.shape == (4, 4)  # user 3 has three unseen items
    for user, row in zip(users, candidates):
        n = [2, 3, 2, 4][user]
        assert n in row and len(set(row)) == 4 and min(row) >= n


def test_users_who_have_seen_nearly_all_cost_the_others_nothing():
    histories = [5] * 18 + [28, 30]  # of 30 items: one unseen, none
    users, candidates = draw_candidates(cases(30, *histories), 30, 20, 20, seed=0)
    assert users.tolist() == list(range(18)) and candidates.shape == (18, 20)


@pytest.mark.parametrize("histories", [(8, 8, 8), (3, 8), (3,)])
def test_without_two_users_who_can_be_asked_there_is_no_comparison(histories):
    with pytest.raises(LwaError, match=r"of \d users have an item among 8"):
        draw_candidates(cases(8, *histories), 8, 20, 20, seed=0)


# Failures


def test_a_failure_is_noted_and_an_interruption_ends_the_comparison(capsys):
    failures = Failures()
    with failures.of("a"):
        raise LwaError("no server")
    with failures.of("b"):
        with failures.of("b", "written"):
            raise RuntimeError("out of memory")
        with failures.of("b", "memory"):
            raise LwaError("gone")
    with failures.of("c"):
        pass
    assert failures == {"a": "no server", "b": "written: RuntimeError: out of memory; memory: gone"}
    assert "a: no server" in capsys.readouterr().out
    for stop in (KeyboardInterrupt, SystemExit):
        with pytest.raises(stop), failures.of("c"):
            raise stop


def test_rows_have_the_reasons_and_no_answer_at_all_is_an_error():
    rows = pd.DataFrame(
        [("a", "ollama", True, ""), ("b", "ollama", False, "down"), ("c", "path", True, "")],
        columns=["name", "backend", "reachable", "reason"],
    )
    frame = with_reasons(rows, {"a": "broke"}, {"c": 1})
    assert frame.reason.tolist() == ["broke", "down", ""] and frame.answered.tolist() == [False, False, True]
    with pytest.raises(LwaError, match="(?s)no teacher answered.*a: broke.*b: down"):
        with_reasons(rows, {"a": "broke"}, {})


# Notebook 05


@pytest.fixture
def run_notebook(tmp_path, monkeypatch):
    """Run the notebook's cells on a catalogue of eight items, with tiny models in place of the tuned ones."""
    point_paths_at(tmp_path, monkeypatch)
    monkeypatch.setitem(OllamaTeacher.__init__.__kwdefaults__, "cache", tmp_path / "kept")
    monkeypatch.setitem(OllamaTeacher.__init__.__kwdefaults__, "backoff_s", 0.01)
    (tmp_path / "notebooks").mkdir()
    results = tmp_path / "results" / "smoke"
    for name in ("teacher", "student"):
        item_lm().save(results / "models" / name)
    models = {f"models/{name}": {"sha256": sha256_of(results / "models" / name)} for name in ("teacher", "student")}
    made = {"notebook": "04_distillation", "outputs": models, "numbers": {}, "verdicts": {}}
    (results / "manifests").mkdir(parents=True)
    (results / "manifests" / "04_distillation.json").write_text(json.dumps(made))
    settings = {
        "data.name": "Office_Products", "data.root": str(office(tmp_path / "data")), "data.split": "file",
        "data.k_core": 0, "comparison.n_users": 12, "comparison.fisher_windows": 40,
    }  # fmt: skip

    def run(**overrides) -> Path:
        cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
        names = {"display": print}
        for cell in cells:
            source = "".join(cell["source"])
            if "parameters" in cell["metadata"].get("tags", []):
                source = f"profile, overrides = 'smoke', {settings | overrides!r}"
            exec(compile(source, cell["id"], "exec"), names)
        return results

    return run


def bad(messages, schema):
    return "I would rather not say."


def half(messages, schema):
    """Names the best, and cannot write a ranking."""
    return longest_first(messages, schema) if "best" in schema["properties"] else bad(messages, schema)


@pytest.mark.filterwarnings("ignore")
def test_notebook_05_compares_those_that_answer_and_says_why_others_do_not(run_notebook, tmp_path, monkeypatch):
    """The teacher that was tuned is not on the list, the catalogue is small, one teacher fails, one cannot write."""
    language_model(layers=2).save(tmp_path / "own")
    served = {"good:latest": longest_first, "bad:latest": bad, "half:8b": half}
    with OllamaServer({name: Served(answer) for name, answer in served.items()}, "0.12.11") as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        teachers = ["bad", "good", "half:8b", "qwen3", "nobody"]
        results = run_notebook(**{"comparison.teachers": teachers, "teacher.model": str(tmp_path / "own")})
    rows = pd.read_parquet(results / "data/teachers_reachable.parquet").set_index("name")
    assert rows.index.tolist() == [*teachers, str(tmp_path / "own")]
    assert rows.answered.tolist() == [False, True, True, False, False, True]
    assert "rather not say" in rows.reason["bad"] and "written: " in rows.reason["half:8b"]
    assert "ollama pull qwen3" in rows.reason["qwen3"] and "unknown model" in rows.reason["nobody"]
    ndcg = pd.read_parquet(results / "data/teacher_ndcg.parquet")
    assert {"good", "half:8b", "fusion", "teacher", "student"} < set(ndcg) and not {"bad", "qwen3"} & set(ndcg)
    made = json.loads((results / "manifests/05_teacher_comparison.json").read_text())
    assert [warning.split(":")[0] for warning in made["warnings"]] == [
        "seen nearly all of 8 items", "teacher bad failed", "teacher half",
    ]  # fmt: skip
    numbers = made["numbers"]
    values = {name: number["value"] for name, number in numbers.items()}
    assert values["ComparisonAsked"] == 6 and values["ComparisonReached"] == 3 and values["ComparisonCandidates"] == 3
    assert values["TeacherZeroShotNdcg"] == pytest.approx(ndcg[str(tmp_path / "own")].mean())
    table = (results / "tables/teachers.tex").read_text()
    assert "bad & failed" in table and "qwen3 & not reachable" in table and "Form" in table


@pytest.mark.filterwarnings("ignore")
def test_notebook_05_goes_on_where_the_tuned_model_fails_as_it_was_and_ends_where_all_do(run_notebook, monkeypatch):
    with OllamaServer({"good:latest": longest_first, "bad:latest": bad}) as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        asked = {"comparison.teachers": ["good"], "teacher.model": "/absent.gguf"}
        results = run_notebook(**asked)
        numbers = json.loads((results / "manifests/05_teacher_comparison.json").read_text())["numbers"]
        assert {numbers[name]["text"] for name in ("TeacherZeroShotNdcg", "TuningGain")} == {"--"}
        with pytest.raises(LwaError, match="(?s)no teacher answered.*bad: .*rather not say.*absent.gguf"):
            run_notebook(**asked | {"comparison.teachers": ["bad"]})

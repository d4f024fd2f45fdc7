"""The `lwa` command: arguments, messages, exit statuses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_project import make_project, point_paths_at, write_notebook

from lwa_helpers import cli, paths
from lwa_helpers.config import PROFILES
from lwa_helpers.models import loading
from lwa_helpers.pipeline import reproduce
from lwa_helpers.pipeline.compare import compare

REFERENCE = {
    "Same": "0.061", "Word": "first", "Gone": "1", "Count": "1\\,000", "HOneSentence": "It has 0.5 [0.2, 1,000].",
    "Near": "$-$0.020", "NearLow": "$-$0.031", "NearHigh": "+0.002",
    "Far": "50.0\\%", "FarLow": "40.0\\%", "FarHigh": "59.9\\%",
}  # fmt: skip
RUN = {
    "Same": "0.061", "Word": "last", "Added": "2", "Count": "1\\,001", "HOneSentence": "It has 1.5 [0.3, 20].",
    "Near": "+0.002", "NearLow": "$-$0.001", "NearHigh": "+0.002",
    "Far": "60.0\\%", "FarLow": "40.0\\%", "FarHigh": "61.0\\%",
}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> tuple[str, str]:
    """A run's results folder, and a reference's results.tex."""
    for name, numbers in (("run", RUN), ("reference", REFERENCE)):
        (tmp_path / name).mkdir()
        lines = [f"\\newcommand{{\\{key}}}{{{value}}}" for key, value in numbers.items()]
        (tmp_path / name / "results.tex").write_text("% profile: smoke\n" + "\n".join(lines) + "\n")
    return str(tmp_path / "run"), str(tmp_path / "reference/results.tex")


def names(found: dict[str, list[dict]]) -> dict[str, list[str]]:
    return {kind: [entry["name"] for entry in entries] for kind, entries in found.items()}


def test_compare_judges_by_the_references_intervals(results) -> None:
    assert names(compare(*results)) == {
        "identical": ["FarLow", "NearHigh", "Same"],
        "within noise": ["HOneSentence", "Near", "NearLow"],
        "changed": ["Count", "Far", "FarHigh", "Word"],
        "missing": ["Gone"],
        "new": ["Added"],
    }


def test_compare_reports_and_exits(results, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", *results]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "3 identical, 3 within noise, 4 changed, 1 missing, 1 new"
    assert "  changed      Far: expected 50.0\\%, obtained 60.0\\%\n" in out
    assert cli.main(["compare", *results, "--ignore", "Far|Word|Gone|Count", "--json"]) == 0
    assert names(json.loads(capsys.readouterr().out))["within noise"] == ["HOneSentence", "Near", "NearLow"]
    assert cli.main(["compare", results[0], results[0]]) == 0


def test_compare_reads_manifests_and_refuses_what_holds_no_numbers(results, tmp_path: Path, capsys) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"numbers": {name: {"text": text, "value": 0} for name, text in RUN.items()}}))
    assert cli.main(["compare", results[0], str(path)]) == 0
    for content, name in (("[]", "a.json"), ("{", "b.json"), ("", "c.tex")):
        (tmp_path / name).write_text(content)
        assert cli.main(["compare", results[0], str(tmp_path / name)]) == 2
    assert cli.main(["compare", results[0], str(tmp_path / "absent")]) == 2
    assert "absent does not exist" in capsys.readouterr().err
    assert cli.main(["compare", *results, "--ignore", "Seconds|["]) == 2
    assert "'Seconds|[' is no regular expression" in capsys.readouterr().err


def test_settings_are_read_by_the_type_of_their_field(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(reproduce, "reproduce", lambda *arguments: calls.append(arguments))
    line = "reproduce --profile smoke --only 02 --force --set data.name=No --set ablation.seeds=0,1 --set seed=3"
    assert cli.main(line.split()) == 0
    assert calls == [("smoke", {"data.name": "No", "ablation.seeds": [0, 1], "seed": 3}, "02", True, False)]


def test_a_path_of_any_command_may_begin_at_home(results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["compare", "~/run", "~/run/results.tex"]) == 0


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_a_stream_cannot_encode_does_not_end_a_command(encoding: str, monkeypatch) -> None:
    text, out = "· ♥ \u2212 café \udcff", io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding))
    monkeypatch.setattr(reproduce, "reproduce", lambda *_: print(text))
    assert cli.main(["reproduce"]) == 0
    sys.stdout.flush()
    expected = text.encode(encoding, "replace").decode(encoding)
    assert out.getvalue().decode(encoding) == expected + "\n" and len(expected) == len(text)


PRINTS = """
import sys, warnings
from lwa_helpers import cli
from lwa_helpers.pipeline import reproduce
def many(*_):
    warnings.warn("odd line", stacklevel=1)
    for number in range(20_000):
        print(f"{number} · é", flush=True)
    open("done", "w").write("done")
reproduce.reproduce = many
sys.argv = ["lwa", "reproduce"]
sys.exit(cli.main())
"""


@pytest.mark.parametrize("shell", ["{} | head -1", "{} >&-", "{} >&- 2>&-", "{} 2>&1 | true", "LC_ALL=C {}", "{} <&-"])
def test_a_reader_that_goes_away_does_not_end_a_run(shell: str, tmp_path: Path) -> None:
    (tmp_path / "prints.py").write_text(PRINTS)
    command = shell.format(f"{sys.executable} prints.py")
    environment = os.environ | {"PYTHONPATH": str(paths.PACKAGE.parent), "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0 and (tmp_path / "done").read_text() == "done"
    assert done.stderr in (b"", b"warning: odd line\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "fast"], "unknown profile 'fast': choose one of smoke, quick, paper"),
        (["--set", "data.nam=x"], "data.nam: no such setting"),
        (["--set", "seed=abc"], "seed = 'abc'"),
        (["--set", "seed"], "write it as KEY=VALUE"),
        (["--set", "seed=[1"], "seed = '[1': Input should be a valid integer"),
        (["--set", "seed=1", "--set", "seed=1"], "seed is given twice"),
        (["--only", "9"], "no notebook 9"),
    ],
)
def test_bad_input_is_one_message_and_status_2(arguments, message: str, tmp_path, monkeypatch, capsys) -> None:
    point_paths_at(make_project(tmp_path / "project"), monkeypatch)
    assert cli.main(["reproduce", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lwa: ") and message in captured.err and captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paint"], "No such command 'paint'"),
        (["compare", "x"], "Missing argument 'reference'"),
        (["reproduce", "--fast"], "No such option: --fast"),
        (["study", "x", "--workers", "many"], "Invalid value for '--workers'"),
    ],
)
def test_wrong_usage_is_refused_with_status_2(arguments: list[str], message: str, capsys) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


HEAVY = {
    "torch",
    "pandas",
    "polars",
    "numpy",
    "scipy",
    "transformers",
    "matplotlib",
    "nbformat",
    "nbclient",
    "papermill",
    "IPython",
    "ollama",
    "httpx",
    "lwa_helpers.data",
    "lwa_helpers.models.loading",
    "lwa_helpers.pipeline.run",
}


def test_status_loads_nothing_heavy_where_results_are_compared(tmp_path: Path) -> None:
    """Every profile was run, so that all modules are read; nothing listens at the server's address."""
    root = make_project(tmp_path / "project")
    write_notebook(root / "notebooks/03_other.ipynb", "from lwa_helpers.pipeline.run import Run")
    for profile in PROFILES:
        for folder, record in (
            ("state", {"seconds": 1.0, "components": {}}),
            ("manifests", {"outputs": {}, "inputs": {}}),
        ):
            path = root / "results" / profile / folder / "01_first.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(record | {"started": 1.0}))
    code = (
        "import sys; from lwa_helpers.cli import main; main(['status']); "
        f"print('loaded', *({HEAVY} & sys.modules.keys()))"
    )
    environment = os.environ | {
        "LWA_ROOT": str(root),
        "PYTHONPATH": str(paths.PACKAGE.parent),
        "LWA_CACHE": str(tmp_path),
        "OLLAMA_HOST": "127.0.0.1:9",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for profile in PROFILES:
        first, second = lines[lines.index(f"profile {profile}") + 1 :][:2]
        assert first.split(maxsplit=1)[0] == "01_first" and "stale: code is new (and" in first
        assert second == "  02_second                    stale: it has not been run"
    assert any(line.startswith("  smollm2-135m") for line in lines) and lines[-1] == "loaded"


def test_status_of_a_profile_that_was_not_run_says_how(tmp_path: Path, monkeypatch, capsys) -> None:
    point_paths_at(make_project(tmp_path / "project"), monkeypatch)
    assert cli.main(["status"]) == 0
    assert "profile quick\n  not run yet: lwa reproduce --profile quick\n" in capsys.readouterr().out


def test_data_convert_loads_each_embedded_model_once(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    asked = []
    monkeypatch.setattr(
        loading, "load_teacher", lambda name: asked.append(name) or SimpleNamespace(sha256=f"hash of {name}")
    )
    assert cli.main(["data", "convert"]) == 0
    assert asked == ["smollm2-135m", "gemma3-270m"]
    assert capsys.readouterr().out.splitlines() == [f"{name}: hash of {name}" for name in asked]

"""The runner, on tiny notebooks that papermill really executes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_project import FIRST, SECOND, make_project, point_paths_at, write_notebook

from lwa_helpers import files, paths
from lwa_helpers.config import load_config
from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline import code_digest, manifest
from lwa_helpers.pipeline import reproduce as runner
from lwa_helpers.pipeline.notebook import Progress, clock
from lwa_helpers.pipeline.publish import merge, publish
from lwa_helpers.pipeline.reproduce import reproduce
from lwa_helpers.pipeline.staleness import difference, stages, status, why_stale

TITLES = load_config("smoke").data.max_items


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose two notebooks have been run once."""
    root = make_project(tmp_path_factory.mktemp("finished") / "project")
    with pytest.MonkeyPatch.context() as patch:
        point_paths_at(root, patch)
        reproduce("smoke")
    return root


@pytest.fixture
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it that a test may change."""
    root = tmp_path / "project"
    shutil.copytree(finished, root, symlinks=True)
    point_paths_at(root, monkeypatch)
    return root


def reason(number: int, **overrides: object) -> str | None:
    config = load_config("smoke", {key.replace("__", "."): value for key, value in overrides.items()})
    return why_stale(stages()[number - 1], config, paths.results_dir("smoke"))


def edit(root: Path, name: str, code: str, **more: str) -> None:
    write_notebook(root / "notebooks" / f"{name}.ipynb", code, **more)


def test_outputs_and_records_of_a_run(project: Path) -> None:
    results = project / "results/smoke"
    assert json.loads((results / "data/total.json").read_text()) == sum(n * n for n in range(TITLES))
    macros = (results / "results.tex").read_text()
    assert f"\\newcommand{{\\LargestSquare}}{{{(TITLES - 1) ** 2:,}}}\n" in macros
    assert "\\newcommand{\\Total}" in macros and "\\newcommand{\\HOneVerdict}{supported}" in macros
    assert "\\newcommand{\\LwaProfile}{smoke}" in macros
    assert all(f"% {key}: " in macros for key in ("profile", "seed", "commit", "dirty", "device"))
    assert 'profile = "smoke"' in (results / "notebooks/02_second.ipynb").read_text().replace("\\", "")
    assert (results / "figures/squares.pdf").read_bytes().startswith(b"%PDF")
    record = manifest.load(results, "02_second")
    assert record["inputs"] == {"data/squares.json": files.sha256_of(results / "data/squares.json")}
    assert not list(results.glob(".staging/*"))


def test_a_second_run_skips_what_is_current(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reproduce("smoke")
    out = capsys.readouterr().out
    assert "[1/2] 01_first is current\n[2/2] 02_second is current\n" in out
    assert "cell" not in out
    assert "H1 supported: Squares add up. [figures/squares.pdf]" in out
    assert "figures/ 1 figures, tables/ 1 tables, results.tex 2 numbers" in out


def test_warnings_are_printed_after_their_notebook_and_at_the_end_though_it_is_current(project: Path, capsys) -> None:
    warned = 'run.warn("Toys.csv: 2 lines are\\nbroken, first line 3 · \\x1b[31m")\nrun.finish()'
    edit(project, "01_first", FIRST.replace("run.finish()", warned))
    line = "warning: Toys.csv: 2 lines are broken, first line 3 · ?[31m"
    for state in ("done in", "is current"):
        reproduce("smoke")
        lines = capsys.readouterr().out.splitlines()
        (place,) = [n for n, text in enumerate(lines) if text.startswith("[1/2] 01_first " + state)]
        assert lines[place + 1] == line == lines[-1] and lines.count(line) == 2


def test_notebooks_are_chosen_by_number_or_name(project: Path) -> None:
    for only in ("02", "2", " 02 ", "02_second"):
        assert [stage.name for stage in stages(only)] == ["02_second"]
    assert len(stages("2,1")) == 2
    for only in ("", "3", "first"):
        with pytest.raises(LwaError, match="there are 01_first, 02_second"):
            stages(only)


def test_prose_comments_space_and_docstrings_do_not_count(project: Path) -> None:
    edit(project, "01_first", "# a comment\n" + FIRST.replace(", caption", ",   caption"), prose="Other words")
    (project / "constraints.txt").write_text("# a comment\nnumpy==2.4.6\n")
    assert reason(1) is None and reason(2) is None


@pytest.mark.parametrize(
    ("change", "first", "second"),
    [
        (lambda root: edit(root, "01_first", FIRST.replace("n * n", "n + n")), "code changed", None),
        (
            lambda root: (root / "constraints.txt").write_text("numpy==2.0\n"),
            "file constraints.txt changed",
            "file constraints.txt changed",
        ),
        (
            lambda root: (root / "results/smoke/tables/squares.tex").unlink(),
            "its output tables/squares.tex is missing",
            None,
        ),
        (lambda root: (root / "results/smoke/state/02_second.json").unlink(), None, "interrupted"),
        (
            lambda root: (root / "results/smoke/manifests/01_first.json").unlink(),
            "not been run",
            "input data/squares.json changed",
        ),
    ],
)
def test_why_a_stage_is_stale(project: Path, change, first: str | None, second: str | None) -> None:
    change(project)
    for number, expected in ((1, first), (2, second)):
        found = reason(number)
        assert (found is None) if expected is None else (expected in found)


def test_only_the_settings_that_a_notebook_reads_count(project: Path) -> None:
    assert f"setting data.max_items changed from {TITLES} to {TITLES + 1}" in reason(1, data__max_items=TITLES + 1)
    assert reason(2, data__max_items=TITLES + 1) is None
    assert reason(1, distillation__n_layers=3) is None
    assert "setting seed" in reason(2, seed=7777)


def test_a_changed_helper_module_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = project / "lwa_helpers"
    shutil.copytree(paths.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(paths, "PACKAGE", package)
    (package / "pipeline/run.py").write_text(
        '"""Another docstring."""\n' + (package / "pipeline/run.py").read_text().split('"""', 2)[2]
    )
    (package / "models/low_rank.py").write_text("changed = 1\n")
    code_digest._public_names.cache_clear()
    assert reason(1) is None
    with open(package / "pipeline/manifest.py", "a") as file:
        file.write("\nADDED = 1\n")
    code_digest.module_tree.cache_clear()
    assert reason(1) == "module lwa_helpers.pipeline.manifest changed"


def test_an_input_with_the_same_content_does_not_make_a_stage_stale(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(project, "01_first", FIRST.replace("n * n", "n ** 2"))
    assert "02_second" in status("smoke")[1] and "reads 01_first, which is stale" in status("smoke")[1]
    reproduce("smoke")
    out = capsys.readouterr().out
    assert "[1/2] 01_first runs: code changed\n" in out and "[2/2] 02_second is current\n" in out
    assert "[1/2] 01_first cell 1/3 · 00:0" in out and "eta unknown" not in out


def test_a_failure_is_explained_and_leaves_earlier_results(project: Path) -> None:
    results = project / "results/smoke"
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file() and path.name != ".lock"}
    edit(project, "02_second", SECOND.split("run.number")[0] + "\n1 / 0")
    with pytest.raises(LwaError) as caught:
        reproduce("smoke")
    message = str(caught.value)
    assert "02_second.ipynb failed in cell 3/3" in message and "ZeroDivisionError: division by zero" in message
    assert "first line     from lwa_helpers.pipeline.run import Run" in message
    assert (results / "notebooks/02_second.attempt.ipynb").exists()
    assert str(results / "notebooks/02_second.attempt.ipynb") in message
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("code", "message"),
    [("x = 1", "must end with run.finish"), ("import os\nos._exit(1)", "cell 3: the kernel died")],
)
def test_no_results_and_a_dead_kernel_are_failures(project: Path, code: str, message: str) -> None:
    edit(project, "02_second", code)
    with pytest.raises(LwaError, match=message):
        reproduce("smoke", only="02")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (None, "0 cells tagged `parameters`"),
        ('profile = "smoke"', "must set"),
        ('profile = "smoke"\noverrides = {}\nextra = 1', "extra"),
        ('profile = "smoke"\noverrides = []', "overrides = .* must be of type dict"),
        ("profile = 3\noverrides = {}", "profile = 3 must be of type str"),
        ('profile = str("smoke")\noverrides = {}', "plain values"),
    ],
)
def test_a_wrong_parameters_cell_stops_the_run_before_it_begins(
    project: Path, parameters: str | None, message: str
) -> None:
    edit(project, "01_first", FIRST.replace("n * n", "n"))
    edit(project, "02_second", SECOND, parameters=parameters)
    with pytest.raises(LwaError, match=message):
        reproduce("smoke")
    assert reason(1) == "code changed"


def test_bad_arguments(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LwaError, match="unknown profile"):
        reproduce("fast")
    with pytest.raises(LwaError, match="no notebook 07"):
        reproduce("smoke", only="01,07")
    with pytest.raises(LwaError, match="no such setting"):
        reproduce("smoke", {"data.nam": "x"})
    usage = shutil.disk_usage(project)._replace(free=10**6)
    monkeypatch.setattr(runner.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(LwaError, match="GiB are free"):
        reproduce("smoke")


def test_killed_at_any_moment_it_goes_on_where_it_was(project: Path, tmp_path: Path) -> None:
    shutil.rmtree(project / "results")
    flag = tmp_path / "waiting"
    edit(
        project,
        "02_second",
        SECOND.replace(
            "run.number",
            f"import pathlib, time\nif not pathlib.Path({str(flag)!r}).exists():"
            f"\n    pathlib.Path({str(flag)!r}).touch()\n    time.sleep(60)\nrun.number",
            1,
        ),
    )
    command = [sys.executable, "-m", "lwa_helpers.cli", "reproduce", "--profile", "smoke"]
    environment = os.environ | {"PYTHONPATH": str(paths.PACKAGE.parent), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not flag.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    with pytest.raises(LwaError, match="another run is writing"):
        reproduce("smoke")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert manifest.load(project / "results/smoke", "02_second") is None
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "01_first is current" in done.stdout and "02_second runs: it has not been run" in done.stdout


def test_publishing(project: Path) -> None:
    (project / "figures").mkdir()
    (project / "figures/old.pdf").write_text("superseded")
    publish("smoke")
    assert sorted(path.name for path in (project / "figures").iterdir()) == [
        "manifest.json",
        "squares.pdf",
        "squares.png",
    ]
    assert [path.name for path in (project / "paper/tables").iterdir()] == ["squares.tex"]
    assert (project / "paper/results.tex").read_bytes() == (project / "results/smoke/results.tex").read_bytes()
    entry = json.loads((project / "figures/manifest.json").read_text())["squares.pdf"]
    assert entry["notebook"] == "01_first" and entry["profile"] == "smoke" and entry["alt"] == "A rising curve."
    assert entry["sha256"] == files.sha256_of(project / "figures/squares.pdf")
    total = sum(n * n for n in range(TITLES))
    assert f"| supported: {total} |" in (project / "README.md").read_text()


def test_publishing_is_automatic_only_for_the_papers_profile(project: Path) -> None:
    reproduce("smoke")
    assert not (project / "figures").exists()
    (project / "paper/PROFILE").write_text("smoke\n")
    reproduce("smoke")
    assert (project / "figures/squares.pdf").exists()


def test_stale_results_are_not_published(project: Path) -> None:
    edit(project, "01_first", FIRST.replace("n * n", "n"))
    with pytest.raises(LwaError, match="01_first is stale .code changed."):
        publish("smoke")
    assert not (project / "figures").exists()


def test_a_number_recorded_by_two_notebooks_is_an_error(project: Path) -> None:
    results = project / "results/smoke"
    path = manifest.path_of(results, "02_second")
    record = json.loads(path.read_text())
    record["numbers"]["LargestSquare"] = {"value": 1, "text": "1"}
    path.write_text(json.dumps(record))
    with pytest.raises(LwaError, match="LargestSquare of 02_second"):
        merge(results, ["01_first", "02_second"])


def test_the_difference_names_the_first_change_and_counts_the_rest() -> None:
    assert difference({"a": "1"}, {"a": "1"}) is None
    assert difference({"code": "1", "file x": "2"}, {"code": "3"}) == "code changed (and 1 more)"
    assert difference({}, {"file x": "2"}) == "file x is new"
    assert difference({"setting seed": "1"}, {"setting seed": "2"}) == "setting seed changed from 1 to 2"


def test_progress_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lwa_helpers.pipeline.notebook.HEARTBEAT", 0.5)
    with Progress("[3/5] 03_x", time.monotonic() - 130, expected=60.0, later=160.0) as progress:
        progress.enter_cell(7, 18)
        progress.write("\r 10%|#   | 1/10 [00:01<00:09]\r 20%|##  | 2/10 [00:02<00:08]\n")
        time.sleep(1.3)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "[3/5] 03_x cell 7/18 · 02:10 elapsed · eta 03:40"
    assert second.startswith("[3/5] 03_x cell 7/18 · 02:1") and second.endswith(" · 20%|##  | 2/10 [00:02<00:08]")
    assert [clock(0), clock(59.6), clock(3599), clock(3725)] == ["00:00", "01:00", "59:59", "1:02:05"]

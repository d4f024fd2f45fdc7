"""Studies of tiny notebooks that papermill really executes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_project import POINTS, STUDY, comparing_study, make_project, point_paths_at, write_study

from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline import engine_local, manifest
from lwa_helpers.pipeline.staleness import stages
from lwa_helpers.pipeline.studies import run_study
from lwa_helpers.pipeline.study import load_study, units

TOTALS = {"narrow": 30, "wide": 91, "long": 30}  # sums of the squares of 0 to 4 and 0 to 6


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a study of three points, of which two differ only in a setting that no notebook reads."""
    root = make_project(tmp_path / "project")
    point_paths_at(root, monkeypatch)
    return write_study(root, STUDY)


def totals(study: str, seed: int = 0) -> dict[str, int]:
    folders = {point: Path(study).parent / f"results/studies/tiny/{point}/seed-{seed}" for point in POINTS}
    return {point: json.loads((folder / "data/total.json").read_text()) for point, folder in folders.items()}


def command(study: str) -> subprocess.Popen:
    arguments = [sys.executable, "-m", "lwa_helpers.cli", "study", study, "--workers", "2"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(arguments, start_new_session=True, **options)


def test_every_point_is_run_and_what_points_have_in_common_once(study: str, capsys) -> None:
    run_study(study, workers=2)
    out = capsys.readouterr().out
    assert totals(study) == TOTALS
    assert out.count(" done in ") == 4 and out.count(" is shared with studies/tiny/") == 2
    assert out.endswith(f"3 of 3 runs of {study} are done\n")
    folder = units(load_study(study), ["long"])[0].folder
    record = manifest.load(folder, "02_second")
    assert record["shared_from"] == "studies/tiny/narrow/seed-0" and record["settings"]["teacher"]["epochs"] == 2.0
    assert "\\newcommand{\\Total}{30}" in (folder / "results.tex").read_text()
    run_study(study)
    out = capsys.readouterr().out
    assert out.count(" is current") == 6 and " done in " not in out and " shared " not in out


def test_a_dry_run_says_what_would_run_and_why_and_runs_nothing(study: str, capsys) -> None:
    run_study(study, dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    names = ("01_first", "02_second")
    assert lines[:3] == ["narrow/seed-0", *(f"  {name:28} runs: it has not been run" for name in names)]
    assert lines[7:9] == [f"  {name:28} shared with narrow/seed-0, which runs it" for name in names]
    assert lines[9].startswith("about 0.0 hours, and 01_first, 02_second, which has not run here yet")
    assert not (Path(study).parent / "results").exists()


def test_points_and_seeds_can_be_chosen(study: str) -> None:
    loaded = load_study(write_study(Path(study).parent, STUDY | {"seeds": [3, 4]}))
    every = [unit.name for unit in units(loaded)]
    assert every == [f"{point}/seed-{seed}" for seed in (3, 4) for point in POINTS]
    some = [unit.name for unit in units(loaded, ["wide", "long/seed-4"])]
    assert some == ["wide/seed-3", "wide/seed-4", "long/seed-4"]
    assert {unit.config.seed for unit in units(loaded, ["wide"])} == {3, 4}
    with pytest.raises(LwaError, match="no point 'deep': there are narrow, wide, long"):
        units(loaded, ["deep"])


def test_settings_are_read_by_their_type_as_on_the_command_line(study: str) -> None:
    """To YAML 1e-4 is a text."""
    points = {"gentle": {"teacher.learning_rate": "1e-4", "distillation.frontier": "4,2"}}
    (unit,) = units(load_study(write_study(Path(study).parent, STUDY | {"points": points})))
    assert unit.config.teacher.learning_rate == 1e-4 and unit.config.distillation.frontier == [4, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile": "huge"}, "profile"),
        ({"points": {}}, "points"),
        ({"points": {"../x": {}}}, "cannot be a folder"),
        ({"points": {"a": {"data.max_item": 3}}}, "(?s)point a: .*max_item"),
        ({"points": {"a": {"seed": 3}}}, "seed and profile are no settings"),
        ({"seeds": [1, 1]}, "a seed is named twice"),
        ({"seeds": []}, "seeds"),
        ({"notebooks": ["07"]}, "no notebook 07"),
        ({"notebook": ["01"]}, "notebook"),
        ({"points": {"across": {}}}, "cannot be called across"),
        ({"points": {"a": {"notebooks": ["9"]}}}, "point a: no notebook 9"),
        ({"points": {"a": 3}}, "points.a"),
    ],
)
def test_a_wrong_study_is_one_error(study: str, change: dict, message: str) -> None:
    path = write_study(Path(study).parent, STUDY | change)
    with pytest.raises(LwaError, match=message):
        units(load_study(path))


@pytest.fixture
def compared(study: str) -> str:
    """The study with a notebook that compares its points, which have titles."""
    return comparing_study(Path(study).parent)


def test_the_points_are_compared_once_they_have_all_run(compared: str, capsys) -> None:
    root = Path(compared).parent
    run_study(compared, ["wide"])
    assert "not compared yet: narrow/seed-0, long/seed-0 have not run" in capsys.readouterr().out
    run_study(compared)
    across = root / "results/studies/tiny/across"
    totals = json.loads((across / "data/totals.json").read_text())
    assert totals == {f"The {name}": total for name, total in TOTALS.items()}
    assert "\\newcommand{\\Widest}{91}" in (across / "results.tex").read_text()
    read = manifest.load(across, "06_across")["inputs"]
    assert read["wide/seed-0/numbers/Total"] == "91" and len(read["wide/seed-0/data/squares.json"]) == 64
    capsys.readouterr()
    run_study(compared)
    assert capsys.readouterr().out.endswith("[1/1] 06_across is current\n")


def test_another_point_or_another_result_of_one_makes_the_comparison_stale(compared: str, capsys) -> None:
    run_study(compared)
    content = yaml.safe_load(Path(compared).read_text())
    content["points"]["wide"]["data.max_items"] = 8
    write_study(Path(compared).parent, content)
    run_study(compared)
    assert "06_across runs: input wide/seed-0/data/squares.json changed" in capsys.readouterr().out
    content["points"]["wide"]["title"] = "The widest"
    write_study(Path(compared).parent, content)
    run_study(compared)
    assert "06_across runs: points changed" in capsys.readouterr().out


def test_a_run_of_one_setting_does_not_compare_points(compared: str) -> None:
    assert [stage.name for stage in stages()] == ["01_first", "02_second"]


def test_a_damaged_output_is_found_by_its_hash_and_made_again(study: str, capsys) -> None:
    run_study(study, ["wide"])
    total = Path(study).parent / "results/studies/tiny/wide/seed-0/data/total.json"
    total.write_text("92\n")  # as long as it was
    capsys.readouterr()
    run_study(study, ["wide"])
    assert "02_second runs: its output data/total.json is missing or was changed" in capsys.readouterr().out
    assert json.loads(total.read_text()) == 91


def test_a_point_has_notebooks_of_its_own(study: str) -> None:
    points = {"short": {"notebooks": ["01"], "data.max_items": 4}, "long": {}}
    first, second = units(load_study(write_study(Path(study).parent, STUDY | {"points": points})))
    assert [stage.name for stage in first.stages] == ["01_first"] and len(second.stages) == 2
    assert first.config.data.max_items == 4 and first.title == "short"


def test_an_unknown_study_or_engine_names_those_that_there_are(study: str) -> None:
    with pytest.raises(LwaError, match="no study 'papr': there are .*smoke"):
        load_study("papr")
    with pytest.raises(LwaError, match="no engine 'cloud': there are local, ray, slurm"):
        run_study(study, engine="cloud")


def test_a_failing_point_is_named_and_the_others_are_done(study: str, capsys) -> None:
    path = write_study(Path(study).parent, STUDY | {"points": POINTS | {"wide": {"data.name": "Absent"}}})
    second = Path(study).parent / "notebooks/02_second.ipynb"
    check = "assert run.config.data.name != 'Absent'"
    second.write_text(second.read_text().replace("run.finish()", f"{check}\\nrun.finish()"))
    with pytest.raises(LwaError, match=r"1 runs failed; the same command goes on with them:\n  wide/seed-0: "):
        run_study(path, workers=2)
    assert "2 of 3 runs" in capsys.readouterr().out


def test_two_studies_at_once_run_nothing_twice(study: str) -> None:
    both = [command(study) for _ in range(2)]
    out = "".join(process.communicate(timeout=300)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0], out
    assert totals(study) == TOTALS
    assert out.count(" done in ") == 4


def test_a_killed_run_starts_again_and_a_killed_study_goes_on(study: str) -> None:
    process = command(study)
    time.sleep(4.0)
    for worker in children(process.pid):
        os.kill(worker, signal.SIGKILL)  # they start again
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    again = command(study)
    out = again.communicate(timeout=300)[0]
    assert again.returncode == 0, out
    assert totals(study) == TOTALS


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_each_slot_has_a_gpu_and_its_share_of_the_cores(monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    slots = [engine_local.environment(slot, 4, 2) for slot in range(4)]
    assert [own["CUDA_VISIBLE_DEVICES"] for own in slots] == ["0", "1", "0", "1"]
    assert {own["OMP_NUM_THREADS"] for own in slots} == {"2"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert engine_local.environment(1, 2, 2)["CUDA_VISIBLE_DEVICES"] == "7"
    alone = engine_local.environment(0, 1, 0)
    assert alone.get("OMP_NUM_THREADS") is None and alone["CUDA_VISIBLE_DEVICES"] == "5,7"

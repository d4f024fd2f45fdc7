"""A study on a real Ray and a real Slurm gives what it gives in processes of this machine, also after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import one_node_slurm
import psutil
import pytest
import yaml
from tiny_project import SECOND, make_project, write_notebook

pytestmark = pytest.mark.smoke
TOTALS = {"narrow": 30, "wide": 91}  # sums of the squares of 0 to 4 and 0 to 6
POINTS = {"narrow": {"data.max_items": 5}, "wide": {"data.max_items": 7}}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The file of a study of two points, whose second notebook takes a while."""
    root = make_project(tmp_path / "project")
    write_notebook(root / "notebooks/02_second.ipynb", "import time\ntime.sleep(8)\n" + SECOND)
    content = {"profile": "smoke", "notebooks": ["01", "02"], "seeds": [0], "points": POINTS}
    (root / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return root / "tiny.yaml"


def start(study: Path, engine: str, environment: dict[str, str]) -> subprocess.Popen:
    own = {"LWA_ROOT": str(study.parent), "LWA_CACHE": str(study.parent / ".cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lwa_helpers.cli", "study", str(study), "--engine", engine, "--workers", "2"]
    log = open(study.parent / "log", "w")  # noqa: SIM115 - the process writes into it
    return subprocess.Popen(command, env=environment | own, stdout=log, stderr=subprocess.STDOUT)


def runs_of(study: Path) -> list[psutil.Process]:
    """The processes that run a point of the study, whoever started them."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if str(study) in command and "--run" in command:
            found.append(process)
    return found


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.5)


def outcome(process: subprocess.Popen, study: Path) -> dict[str, int]:
    status = process.wait(timeout=300)
    assert status == 0, (study.parent / "log").read_text()[-3000:]
    folder = study.parent / "results/studies/tiny"
    return {point: json.loads((folder / point / "seed-0/data/total.json").read_text()) for point in POINTS}


def said(environment: dict[str, str], *command: str) -> str:
    """What a command of Slurm prints."""
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def has_first(study: Path) -> bool:
    """Whether both points have finished their first notebook."""
    return len(list(study.parent.glob("results/studies/tiny/*/seed-0/state/01_first.json"))) == len(POINTS)


def log_of_notebook(study: Path, name: str) -> dict[str, float]:
    """When each point's notebook began."""
    paths = study.parent.glob(f"results/studies/tiny/*/seed-0/manifests/{name}.json")
    return {str(path): json.loads(path.read_text())["started"] for path in paths}


def test_ray_starts_a_killed_run_again_and_finished_notebooks_stay(study: Path) -> None:
    pytest.importorskip("ray")
    process = start(study, "ray", dict(os.environ))
    wait_for(lambda: has_first(study))
    before = log_of_notebook(study, "01_first")
    runs_of(study)[0].send_signal(signal.SIGKILL)
    assert outcome(process, study) == TOTALS
    assert log_of_notebook(study, "01_first") == before


def test_slurm_queues_a_preempted_job_again_which_goes_on_where_it_was(study: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    if reason := one_node_slurm.missing():
        pytest.skip(reason)
    with one_node_slurm.slurm(tmp_path / "slurm") as environment:
        process = start(study, "slurm", environment)
        wait_for(lambda: has_first(study))
        before = log_of_notebook(study, "01_first")
        subprocess.run(["scancel", "--signal=USR2", "1_0"], env=environment, check=True)  # what a preemption sends
        wait_for(lambda: "PENDING" in said(environment, "squeue", "--noheader", "--format=%T"))
        said(environment, "scontrol", "update", "JobId=1_0", "StartTime=now")  # Slurm would wait for two minutes
        assert outcome(process, study) == TOTALS
        assert log_of_notebook(study, "01_first") == before
        logs = "".join(path.read_text() for path in study.parent.glob("results/studies/tiny/.slurm/*log.err"))
        assert "Requeued" in logs or "requeue" in logs.lower()

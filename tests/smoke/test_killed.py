"""Killed at a random moment, a run goes on where it was and ends in the same files and numbers.

LWA_KILLS=20 python -m pytest tests/smoke/test_killed.py tries twenty moments of each kind.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tiny_project import comparing_study, make_project

from lwa_helpers import files, paths

pytestmark = pytest.mark.smoke
KILLS = int(os.environ.get("LWA_KILLS", "1"))
COMMANDS = {"reproduce": ["reproduce", "--profile", "smoke"], "study": ["study", "tiny.yaml", "--workers", "2"]}
VICTIMS: dict[str, Callable[[psutil.Process, list[str]], bool]] = {
    "runner": lambda process, command: False,  # the command itself
    "worker": lambda process, command: "--run" in command,
    "kernel": lambda process, command: "ipykernel_launcher" in command,
}
KINDS = [("reproduce", "runner"), ("reproduce", "kernel"), *(("study", victim) for victim in VICTIMS)]


def start(root: Path, name: str) -> subprocess.Popen:
    environment = os.environ | {"LWA_ROOT": str(root), "LWA_CACHE": str(root / ".cache")}
    environment["PYTHONPATH"] = str(paths.PACKAGE.parent)
    command = [sys.executable, "-m", "lwa_helpers.cli", *COMMANDS[name]]
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def made(root: Path) -> dict[str, str]:
    """The hash of every file that the notebooks made, and the numbers."""
    kinds = ("data", "figures", "tables")
    found = sorted(path for path in (root / "results").rglob("*") if path.is_file() and path.parent.name in kinds)
    hashes = {str(path.relative_to(root)): files.sha256_of(path) for path in found}
    numbers = sorted((root / "results").rglob("results.tex"))
    own = {str(p.relative_to(root)): re.sub(r"(?m)^%.*\n|.*RunMinutes.*\n", "", p.read_text()) for p in numbers}
    return hashes | own


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_project(tmp_path_factory.mktemp("killed") / "project")
    comparing_study(root)
    return root


@pytest.fixture(scope="module")
def whole(project: Path) -> dict[str, tuple[dict[str, str], float]]:
    """What each command makes when nothing is killed, and the seconds that it takes."""
    found = {}
    for name in COMMANDS:
        root = project.with_name(name)
        shutil.copytree(project, root)
        began = time.monotonic()
        process = start(root, name)
        out = process.communicate(timeout=300)[0]
        assert process.returncode == 0, out
        found[name] = made(root), time.monotonic() - began
        assert len(found[name][0]) >= 5
    return found


def kill(process: subprocess.Popen, victim: str, rng: random.Random) -> str:
    """Kill a process of this kind, if there is one at the moment; the runner itself for "runner"."""
    runner = psutil.Process(process.pid)
    try:
        every = [child for child in runner.children(recursive=True) if VICTIMS[victim](child, child.cmdline())]
        chosen = runner if victim == "runner" else rng.choice(every) if every else None
        if chosen is None:
            return "nothing to kill"
        chosen.kill()
        return f"killed {chosen.pid}"
    except psutil.NoSuchProcess:
        return "gone before it was killed"


@pytest.mark.parametrize("moment", range(KILLS))
@pytest.mark.parametrize(("name", "victim"), KINDS)
def test_it_goes_on_and_ends_in_the_same(
    name: str, victim: str, moment: int, whole, project: Path, tmp_path: Path
) -> None:
    want, seconds = whole[name]
    root = tmp_path / "project"
    shutil.copytree(project, root)
    process = start(root, name)
    rng = random.Random(f"{name} {victim} {moment}")
    waited = rng.uniform(0.05, 1.0) * seconds
    time.sleep(waited)
    what, told = kill(process, victim, rng), []
    told.append(process.communicate(timeout=300)[0])
    for _ in range(3):  # a kernel that was killed is an error that names it; the same command goes on
        if process.returncode == 0:
            break
        process = start(root, name)
        told.append(process.communicate(timeout=300)[0])
    said = f"{what} after {waited:.2f} of {seconds:.1f} s\n" + "\n---\n".join(told)
    assert process.returncode == 0, said
    assert "Traceback" not in said, said
    assert made(root) == want, said
    assert not list((root / "results").rglob("*.tmp*")) and not list((root / "results").rglob(".staging/*")), said

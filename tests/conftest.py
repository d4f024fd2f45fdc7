"""Test tiers: unit (the default), smoke (the real notebooks), gpu; tests must leave the tree clean."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIERS = {
    "smoke": "runs the real notebooks at a reduced size",
    "gpu": "needs a CUDA device",
    "unit": "everything else",
}
_BEFORE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not shutil.which("nvidia-smi"):
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, by whatever test comes first
    for name, meaning in TIERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    config.stash[_BEFORE] = _changes()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not any(item.get_closest_marker(name) for name in TIERS):
            item.add_marker(pytest.mark.unit)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


def pytest_sessionfinish(session: pytest.Session) -> None:
    after = _changes()
    if os.environ.get("CI") and after != session.config.stash[_BEFORE]:
        print(f"\nthe tests changed the working tree:\n{after}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _changes() -> str:
    done = subprocess.run(["git", "-C", ROOT, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""

"""One run of a study as a process of its own, whichever engine starts it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping


def run_process(
    study: str,
    name: str,
    environment: Mapping[str, str] | None = None,
    started: Callable[[subprocess.Popen], None] | None = None,
) -> tuple[int, str]:
    """Run one point of a study with one seed and print its lines with its name before them.

    Args:
        study: The name or path by which the study is loaded.
        name: The run, such as "deeper/seed-1".
        environment: Its environment variables; None gives it those of this process.
        started: Called with the process.

    Returns:
        Its exit status, negative if it was killed by a signal, and the last line that it printed.
    """
    command = [sys.executable, "-m", "lwa_helpers.cli", "study", study, "--run", name]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=None if environment is None else dict(environment),
    ) as process:
        if started:
            started(process)
        last = ""
        assert process.stdout is not None
        for line in process.stdout:
            last = line.rstrip() or last
            print(f"[{name}] {line.rstrip()}", flush=True)
    return process.returncode, last

"""One run of a study as a process of its own, whichever engine starts it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping

RESTARTS = 2  # of a run whose process was killed; a notebook that fails is not run again


class Killed(RuntimeError):
    """A signal ended a run's process, so that starting it again may help."""


def run_process(
    study: str,
    name: str,
    environment: Mapping[str, str] | None = None,
    started: Callable[[subprocess.Popen], None] | None = None,
) -> str | None:
    """Run one point of a study with one seed and print its lines with its name before them.

    Args:
        study: The name or path by which the study is loaded.
        name: The run, such as "deeper/seed-1".
        environment: Its environment variables; None gives it those of this process.
        started: Called with the process.

    Returns:
        Why it failed: the last line that it printed; None if it did not.

    Raises:
        Killed: If a signal ended its process.
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
    if process.returncode < 0:
        raise Killed(f"was killed (signal {-process.returncode})")
    return None if process.returncode == 0 else last or f"exit status {process.returncode}"


def run_to_the_end(run: Callable[[], str | None], name: str, ended: Callable[[], bool] = lambda: False) -> str | None:
    """Call `run` again as long as it raises Killed, at most RESTARTS times.

    Args:
        run: Runs the process and returns why it failed.
        name: The run, for the line that says that it starts again.
        ended: Whether everything is to end, so that nothing starts any more.

    Returns:
        Why it failed, or None.
    """
    reason = "interrupted"
    for _ in range(1 + RESTARTS):
        if ended():
            break
        try:
            return run()
        except Killed as killed:
            reason = str(killed)
            print(f"[{name}] {reason} and starts again", flush=True)
    return reason

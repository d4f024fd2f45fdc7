"""The peak memory of a part of this process, from Linux's /proc (ru_maxrss would also count the process's parent)."""

from __future__ import annotations

from pathlib import Path


def reset_peak() -> None:
    """Begin again: the peak is what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Largest resident set since the program started or reset_peak was called."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

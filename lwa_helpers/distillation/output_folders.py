"""Folders of cached teacher outputs that several runs share: which are in use, and which may go."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
import warnings
import weakref
from contextlib import suppress
from pathlib import Path

META = "meta.json"
DAY = 86400.0  # seconds; a run that is being written writes more often


def hold(owner: object, folder: Path) -> None:
    """Keep other runs from deleting a folder of outputs as long as an object lives.

    Args:
        owner: the object that reads the outputs.
        folder: the folder of finished outputs; a missing one raises FileNotFoundError.
    """
    file = os.open(folder / META, os.O_RDONLY)
    weakref.finalize(owner, os.close, file)
    with suppress(OSError):  # a file system without locks, on which delete_old deletes nothing
        fcntl.flock(file, fcntl.LOCK_SH)


def delete_old(parent: Path, kept: int) -> None:
    """Delete all but the most recently used outputs in a folder, except those that a run holds.

    Outputs that a killed run left half written are deleted after a day.

    Args:
        parent: the folder of all outputs.
        kept: how many finished outputs stay.
    """
    entries = [path for path in parent.iterdir() if path.is_dir()]
    for left in (path for path in entries if path.name.startswith(".") and _last_used(path) < time.time() - DAY):
        shutil.rmtree(left, ignore_errors=True)
    finished = [path for path in entries if not path.name.startswith(".")]
    for old in sorted(finished, key=lambda path: _mtime(path), reverse=True)[kept:]:
        _delete(old)


def _mtime(path: Path) -> float:
    """Return when a path was last changed; 0 if another run has deleted it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _last_used(folder: Path) -> float:
    """Return when a folder or a file in it was last changed."""
    return max(map(_mtime, [folder, *folder.glob("*")]))


def _delete(folder: Path) -> None:
    """Delete a folder unless a run holds it; it is moved aside first, so that no run sees half of it."""
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(folder / META, "r+", encoding="utf-8") as file:  # some file systems lock only what may be written
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.replace(folder, aside)
    except (BlockingIOError, FileNotFoundError):  # a run holds it, or has deleted it
        return
    except OSError as error:
        warnings.warn(f"{folder.parent} has no locks ({error.strerror}): delete old outputs yourself", stacklevel=2)
        return
    shutil.rmtree(aside, ignore_errors=True)

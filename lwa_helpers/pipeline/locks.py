"""Locks that keep two runs from writing the same results; a lock ends with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lwa_helpers import files
from lwa_helpers.errors import LwaError

NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}  # of a file system without locks


@contextmanager
def locked(folder: Path, name: str = ".lock", waits: str | None = None) -> Iterator[None]:
    """Let one process at a time write into a folder.

    Args:
        folder: the folder, which is made if it is not there.
        name: of the lock's file in it.
        waits: the line to print before waiting for another process; None does not wait.

    Raises:
        LwaError: where another process has the lock and `waits` is None, or the file cannot be written.
    """
    with files.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / name, "w", encoding="utf-8")  # noqa: SIM115 - closed below, by the other `with`
    with file:
        with files.explained(folder):
            _take(file, folder, waits)
        yield


def _take(file: IO[str], folder: Path, waits: str | None) -> None:
    """Take the lock that a file stands for."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waits is None:
            raise LwaError(f"another run is writing {folder}: wait for it, or end it") from None
        print(waits, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(
            f"the file system of {folder} has no locks ({error.strerror}), so nothing keeps a second run out: "
            "start only one at a time",
            stacklevel=1,
        )

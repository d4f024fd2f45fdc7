"""Atomic writes of files and folders, SHA-256 hashes, and what the user can do when the disk refuses."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lwa_helpers.errors import LwaError

_FULL = "there is no room left for it: delete what is not needed there, or ask for a larger quota"
_BARRED = "this user may not read or write it: change its owner or its permissions"
FIXES = {  # why the system refuses a file, and the way out
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EACCES: _BARRED,
    errno.EPERM: _BARRED,
    errno.EROFS: "its file system is read-only: mount it for writing, or work in a checkout elsewhere (LWA_ROOT)",
    errno.ENOTDIR: "a file stands where a folder should be: move it away",
    errno.EEXIST: "a file or a broken link stands where a folder should be: move it away",
    errno.EISDIR: "a folder stands where a file should be: move it away",
    errno.ESTALE: "the network drive has lost it: mount the drive again",
    errno.EIO: "the disk, or the network drive behind it, failed: check it",
    errno.ENAMETOOLONG: "its path is too long for the file system: work in a checkout with a shorter path",
    errno.ELOOP: "its links lead in a circle: remove one of them",
    errno.ENOMEM: "memory has run out: free some, or set smaller batches (tokens_per_batch, batch_size)",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENOTEMPTY: "another process writes into it: wait until that has ended",
}


def fix(error_number: int | None) -> str | None:
    """Return why the system refuses a file, and what to do about it; None for errors of another kind."""
    return FIXES.get(error_number) if error_number is not None else None


@contextmanager
def explained(place: Path | str) -> Iterator[None]:
    """Turn a system error that keeps the block from a file into one clear message.

    Args:
        place: the path to name if the system names none.

    Raises:
        LwaError: with the path, the cause and the fix.
        OSError: as it is, if it has nothing to do with files.
    """
    try:
        yield
    except OSError as error:
        if (way_out := fix(error.errno)) is None:
            raise
        raise LwaError(f"{error.filename or place} ({error.strerror}): {way_out}") from error


def replace(source: Path, target: Path) -> None:
    """Move a finished file or folder to `target`, replacing what is there.

    Other processes never see a partly written `target`. An existing folder is moved aside first and deleted at the end;
    if the program is killed in between, the next write to `target`, or `recover`, moves it back.

    Args:
        source: the finished file or folder, on the same file system as `target`.
        target: where it goes. Missing parent folders are created.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    if not target.is_dir():
        os.replace(source, target)
        return
    old = _aside(target)
    os.replace(target, old)
    try:
        os.replace(source, target)
    except BaseException:
        os.replace(old, target)
        raise
    with suppress(OSError):  # the new folder is in place; `recover` deletes what is left of the old one next time
        remove(old)


def recover(target: Path) -> None:
    """Undo a replacement of the folder `target` that was interrupted: put the old one back, or delete it if done."""
    old = _aside(target)
    if not os.path.lexists(old):
        return
    if os.path.lexists(target):
        remove(old)
    else:
        os.replace(old, target)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move what was written there to `path` when the block succeeds.

    The block may write a file or a folder. If the block raises, the temporary path is removed and `path` is unchanged.

    Args:
        path: the file or folder to write. Missing parent folders are created.

    Yields:
        The temporary path. Its name has the same suffix as `path`.

    Raises:
        LwaError: if the system does not let it be written, with the fix.
    """
    path = Path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path)
        try:
            yield temporary
            replace(temporary, path)
        finally:
            remove(temporary)


def remove(path: Path) -> None:
    """Delete a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file or folder in hexadecimal.

    The hash of a file covers its contents. The hash of a folder covers the relative names and the hashes of its files.
    """
    if not path.is_dir():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listing = "".join(f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n" for file in files)
    return sha256_of_text(listing)


def sha256_of_text(text: str) -> str:
    """Return the SHA-256 of a text, encoded in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _beside(path: Path) -> Path:
    """Return a hidden temporary path with a random name in the same folder, with the same suffix."""
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")


def _aside(path: Path) -> Path:
    """Return the hidden path in the same folder that a folder waits at while another takes its place."""
    return path.with_name(f".{path.name}.old")

"""Atomic writes of files and folders, and SHA-256 hashes."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace(source: Path, target: Path) -> None:
    """Move a finished file or folder to `target`, replacing what is there.

    Other processes never see a partly written `target`. An existing folder is first moved aside and deleted at the end.

    Args:
        source: the finished file or folder, on the same file system as `target`.
        target: where it goes. Missing parent folders are created.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_dir():
        os.replace(source, target)
        return
    old = _beside(target)
    os.replace(target, old)
    os.replace(source, target)
    shutil.rmtree(old)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move what was written there to `path` when the block succeeds.

    The block may write a file or a folder. If the block raises, the temporary path is removed and `path` is unchanged.

    Args:
        path: the file or folder to write. Missing parent folders are created.

    Yields:
        The temporary path. Its name has the same suffix as `path`.
    """
    path = Path(path)
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

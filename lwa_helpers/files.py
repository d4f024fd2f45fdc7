"""Files that are never half written, and their hashes."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace(source: Path, target: Path) -> None:
    """Move a finished file or folder over `target`, which is seen either as it was or as it will be."""
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
    """Yield a temporary path beside `path` for a file or folder, and move it there when the block succeeds.

    The temporary name keeps the suffix. When the block raises, nothing is left behind and `path` stays as it was.
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
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's contents; of a folder, over the relative names and hashes of its files."""
    if not path.is_dir():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listing = "".join(f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n" for file in files)
    return sha256_of_text(listing)


def sha256_of_text(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")

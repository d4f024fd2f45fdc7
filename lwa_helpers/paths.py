"""The only module that knows where files live."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lwa_helpers.errors import LwaError

PACKAGE = Path(__file__).resolve().parent
ROOT = Path(os.environ.get("LWA_ROOT") or PACKAGE.parent).resolve()
CONFIGS = PACKAGE / "configs"
NOTEBOOKS = ROOT / "notebooks"
FIGURES = ROOT / "figures"
PAPER = ROOT / "paper"
RESULTS = ROOT / "results"
DATASET = ROOT / "dataset"
CACHE = Path(os.environ.get("LWA_CACHE") or ROOT / ".cache").resolve()
TRAINER_OUTPUT = CACHE / "trainer"  # transformers.Trainer insists on a folder, even where it saves nothing


def checkout() -> Path:
    """The repository's root folder.

    Raises LwaError when the package was installed without its checkout (no notebooks/ folder beside it).
    """
    if not NOTEBOOKS.is_dir():
        raise LwaError(
            f"{ROOT} holds no notebooks/ folder: lwa_helpers runs from a checkout. "
            "Install it there with `make setup`, or name the checkout in LWA_ROOT."
        )
    return ROOT


def results_dir(profile: str) -> Path:
    """The folder that all of one profile's outputs go to: results/<profile>."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", profile):
        raise LwaError(f"profile {profile!r}: use lower-case letters, digits and underscores")
    return RESULTS / profile


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


def cached_sha256(path: Path) -> str:
    """SHA-256 of a file, remembered under the cache folder by path, size and modification time."""
    stat = path.stat()
    key = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    note = CACHE / "sha256" / f"{sha256_of_text(key[0])[:16]}.json"
    if note.exists() and (known := json.loads(note.read_text(encoding="utf-8")))["key"] == key:
        return known["sha256"]
    digest = sha256_of(path)
    with atomic_write(note) as temporary:
        temporary.write_text(json.dumps({"key": key, "sha256": digest}), encoding="utf-8")
    return digest


def sha256_of_text(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")

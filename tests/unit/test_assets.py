"""Embedded files: found without importing, checked by hash."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from lwa_helpers import assets, files, paths
from lwa_helpers.assets import EMBEDDED, Embedded, embedded_file
from lwa_helpers.errors import LwaError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a file in two parts, whose code must never run; and an empty cache."""
    folder = tmp_path / "lib/odd_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "a.part").write_bytes(b"one ")
    (folder / "b.part").write_bytes(b"two")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    digest = hashlib.sha256(b"one two").hexdigest()
    entry = Embedded("odd==1", (("odd_package", "a.part"), ("odd_package", "b.part")), digest)
    monkeypatch.setitem(EMBEDDED, "odd", entry)
    return folder


def test_parts_are_joined_and_the_package_is_not_imported(package: Path) -> None:
    path = embedded_file("odd")
    assert path.read_bytes() == b"one two" and path.is_relative_to(paths.CACHE)
    assert "odd_package" not in sys.modules
    assert embedded_file("odd") == path


def test_a_changed_part_is_an_error_and_not_kept(package: Path) -> None:
    (package / "b.part").write_bytes(b"TWO")
    with pytest.raises(LwaError, match="not the file of odd==1"):
        embedded_file("odd")
    (package / "b.part").write_bytes(b"two")
    assert embedded_file("odd").read_bytes() == b"one two"


def test_the_check_is_repeated_when_the_file_changes_and_only_then(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = embedded_file("odd")
    hashed = []
    monkeypatch.setattr(
        files, "sha256_of", lambda file: hashed.append(file) or hashlib.sha256(file.read_bytes()).hexdigest()
    )
    embedded_file("odd")
    assert hashed == []
    path.write_bytes(b"one_two")
    with pytest.raises(LwaError, match="SHA-256 differs"):
        embedded_file("odd")
    assert hashed == [path]


def test_missing_things_are_named(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LwaError, match="no embedded file 'bert'"):
        embedded_file("bert")
    (package / "a.part").unlink()
    with pytest.raises(LwaError, match="a.part is missing from the package odd==1"):
        embedded_file("odd")
    monkeypatch.setitem(EMBEDDED, "odd", Embedded("absent==2", (("absent_package", "x"),), ""))
    with pytest.raises(LwaError, match="absent==2 .*make setup"):
        embedded_file("odd")


@pytest.mark.parametrize("name", sorted(assets.EMBEDDED))
def test_the_real_files_are_the_pinned_ones(name: str) -> None:
    assert embedded_file(name).stat().st_size > 10_000

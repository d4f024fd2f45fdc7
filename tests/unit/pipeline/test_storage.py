"""What happens when the system refuses a file of results/: one message with path, cause and fix, and nothing lost."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pandas as pd
import pytest
from tiny_project import make_project, point_paths_at

from lwa_helpers import cli, files
from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline import reproduce as runner
from lwa_helpers.pipeline.locks import locked
from lwa_helpers.pipeline.publish import publish
from lwa_helpers.pipeline.run import Run

REFUSALS = {
    errno.ENOSPC: "no room left",
    errno.EDQUOT: "larger quota",
    errno.EROFS: "read-only",
    errno.EACCES: "permissions",
    errno.EPERM: "permissions",
    errno.ESTALE: "mount the drive again",
    errno.EIO: "check it",
    errno.ENOTDIR: "move it away",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project = make_project(tmp_path / "project")
    point_paths_at(project, monkeypatch)
    return project


def refuse(number: int, path: str | None = None):
    """A function of the system that fails with an error of this number."""

    def call(*_, **__):
        raise OSError(number, os.strerror(number), path)

    return call


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_warned_of(root: Path, monkeypatch, number: int) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    with pytest.warns(UserWarning, match="no locks.*start only one at a time"), locked(root / "results/smoke"):
        assert (root / "results/smoke/.lock").exists()


@pytest.mark.parametrize(("number", "words"), REFUSALS.items())
@pytest.mark.parametrize("function", ["mkdir", "flock"])
def test_a_refusal_of_the_results_folder_is_explained(
    root: Path, monkeypatch, capsys, number: int, words: str, function: str
) -> None:
    monkeypatch.setattr(Path, "mkdir", refuse(number, "/far/results")) if function == "mkdir" else None
    monkeypatch.setattr(fcntl, "flock", refuse(number)) if function == "flock" else None
    place = "/far/results" if function == "mkdir" else str(root / "results/smoke")
    with pytest.raises(LwaError, match=f"{place} .*{words}"):
        runner.reproduce("smoke")
    assert cli.main(["reproduce", "--profile", "smoke"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"lwa: {place} (") and words in err and "Traceback" not in err


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")])
def test_a_file_where_the_folder_of_results_should_be(root: Path, make) -> None:
    make(root / "results")
    for start in (lambda: runner.reproduce("smoke"), lambda: Run.open("01_first", "smoke")):
        with pytest.raises(LwaError, match="results.*move it away"):
            start()


def test_a_full_disk_in_the_middle_of_a_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.open("01_first", "smoke")
    monkeypatch.setattr(pd.DataFrame, "to_parquet", refuse(errno.ENOSPC, "results/x.parquet"))
    with pytest.raises(LwaError, match=r"results/x.parquet \(No space left on device\)"):
        run.save_frame("x", pd.DataFrame({"a": [1]}))
    run = Run.open("01_first", "smoke")
    run.save_json("y", 1)
    monkeypatch.setattr(os, "replace", refuse(errno.EDQUOT))
    with pytest.raises(LwaError, match="results .*larger quota"):
        run.finish()


def test_publishing_to_a_read_only_checkout(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lwa_helpers.pipeline.publish._current_records", refuse(errno.EROFS, "figures"))
    with pytest.raises(LwaError, match="figures .*read-only"):
        publish("smoke")


def test_errors_that_are_no_refusal_pass(tmp_path: Path) -> None:
    with pytest.raises(ConnectionRefusedError), files.explained(tmp_path):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")
    with pytest.raises(FileNotFoundError), files.atomic_write(tmp_path / "x"):
        (tmp_path / "absent").read_text()


@pytest.fixture
def replaced(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with an old file, and the new folder that is to take its place."""
    target, source = tmp_path / "figures", tmp_path / "new"
    for folder, text in ((target, "old"), (source, "new")):
        folder.mkdir()
        (folder / "a").write_text(text)
    return target, source


class Killed(BaseException):
    """The program ends here, without clearing up."""


def killed_at(place: int, monkeypatch: pytest.MonkeyPatch, target: Path, source: Path) -> None:
    """Replace the folder, and end the program before its step of that number."""
    steps, real = iter(range(9)), {"replace": os.replace, "remove": files.remove}

    def step(name):
        def call(*arguments):
            if next(steps) >= place:
                raise Killed
            return real[name](*arguments)

        return call

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", step("replace"))
        patch.setattr(files, "remove", step("remove"))
        files.replace(source, target)


@pytest.mark.parametrize(("place", "kept"), [(0, "old"), (1, "old"), (2, "new")])
def test_a_folder_is_never_lost_between_the_two_moves(replaced, monkeypatch, place: int, kept: str) -> None:
    target, source = replaced
    killed_at(place, monkeypatch, target, source)
    files.recover(target)
    assert (target / "a").read_text() == kept
    assert {path.name for path in target.parent.iterdir()} == {"figures"} | ({"new"} if kept == "old" else set())


def test_the_next_write_recovers_too(replaced, monkeypatch: pytest.MonkeyPatch) -> None:
    target, source = replaced
    killed_at(1, monkeypatch, target, source)
    assert not target.exists()
    with files.atomic_write(target) as folder:
        folder.mkdir()
        (folder / "a").write_text("newest")
    assert (target / "a").read_text() == "newest" and not (target.parent / ".figures.old").exists()


def test_a_folder_that_cannot_move_in_leaves_the_old_one(replaced, monkeypatch: pytest.MonkeyPatch) -> None:
    target, source = replaced
    real = os.replace

    def only_aside(one: Path, other: Path) -> None:
        if one == source:
            raise OSError(errno.EXDEV, "other disk")
        real(one, other)

    monkeypatch.setattr(os, "replace", only_aside)
    with pytest.raises(OSError, match="other disk"):
        files.replace(source, target)
    assert (target / "a").read_text() == "old" and not (target.parent / ".figures.old").exists()

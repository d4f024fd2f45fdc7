"""The cache of teacher outputs, shared by runs at the same time: nothing that a run reads or writes is deleted."""

import errno
import fcntl
import os
import shutil
import time

import numpy as np
import pytest
from tiny_lm import item_lm, windows

from lwa_helpers.distillation import teacher_cache
from lwa_helpers.distillation.output_folders import DAY, META, delete_old, hold
from lwa_helpers.distillation.teacher_cache import TeacherOutputs
from lwa_helpers.ranking.training import window_loader


class Run:
    """What holds a folder."""


def folders(parent, n):
    """Finished folders, the first used last."""
    for place in range(n):
        folder = parent / f"f{place}"
        folder.mkdir()
        (folder / META).write_text("{}")
        os.utime(folder, (1e9 - place, 1e9 - place))
    return parent


def names(parent):
    return sorted(path.name for path in parent.iterdir())


def test_the_least_recently_used_go_but_what_a_run_holds_stays(tmp_path):
    run = Run()
    hold(run, folders(tmp_path, 5) / "f4")
    delete_old(tmp_path, 2)
    assert names(tmp_path) == ["f0", "f1", "f4"]
    del run
    delete_old(tmp_path, 2)
    assert names(tmp_path) == ["f0", "f1"]


def test_what_another_run_is_writing_stays_and_what_a_killed_one_left_goes(tmp_path):
    for name, age in ((".writing.tmp", 0.5), (".left.tmp", 1.5)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "logits.npy"
        file.write_bytes(b"")
        for path in (file, tmp_path / name):
            os.utime(path, (time.time() - age * DAY,) * 2)
    delete_old(folders(tmp_path, 1), 8)
    assert names(tmp_path) == [".writing.tmp", "f0"]


def test_a_folder_that_another_run_deletes_meanwhile_is_no_error(tmp_path, monkeypatch):
    folders(tmp_path, 4)
    replace = os.replace

    def first(source, target):
        shutil.rmtree(tmp_path / "f2", ignore_errors=True)
        replace(source, target)

    monkeypatch.setattr(os, "replace", first)
    delete_old(tmp_path, 1)
    assert names(tmp_path) == ["f0"]


def test_without_locks_nothing_is_deleted_and_that_is_said(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    run = Run()
    hold(run, folders(tmp_path, 2) / "f0")
    with pytest.warns(UserWarning, match="has no locks .*delete old outputs yourself"):
        delete_old(tmp_path, 1)
    assert names(tmp_path) == ["f0", "f1"]


def test_outputs_that_go_while_they_are_opened_are_computed_again(cache, monkeypatch):
    lm = item_lm()
    ordered = window_loader(windows(lm), 60, 0, 0, shuffle=False)
    first = TeacherOutputs.cached(lm, ordered, [4], bf16=False)
    want, load = np.array(first.logits), np.load

    def gone(path, *args, **options):
        monkeypatch.setattr(np, "load", load)
        shutil.rmtree(first.directory)
        return load(path, *args, **options)

    monkeypatch.setattr(np, "load", gone)
    again = TeacherOutputs.cached(lm, ordered, [4], bf16=False)
    np.testing.assert_array_equal(again.logits, want)
    assert again.directory == first.directory


def test_outputs_in_use_outlive_many_others(cache, monkeypatch):
    monkeypatch.setattr(teacher_cache, "KEPT", 2)
    lm = item_lm()
    ordered = window_loader(windows(lm), 60, 0, 0, shuffle=False)
    mine = TeacherOutputs.cached(lm, ordered, [4], bf16=False)
    for layer in (1, 2, 3):
        TeacherOutputs.cached(lm, ordered, [layer], bf16=False)
    assert mine.directory.is_dir() and len(names(cache / "teacher_outputs")) == 3

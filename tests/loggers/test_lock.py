# SPDX-License-Identifier: Apache-2.0
"""FolderLock: one process at a time, and nothing that a dead one leaves behind is in the way."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from leyden.errors import MisconfigurationException
from leyden.loggers import lock as lock_module
from leyden.loggers.lock import LOCK_FILE, FolderLock

fcntl = pytest.importorskip("fcntl", reason="this system has no locks that end with their process")

# what FolderLock does, in a process that need not import torch
HOLD = (
    "import fcntl, os, sys; file = open(sys.argv[1], 'a+'); fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB); "
    "file.write(sys.argv[2]); file.flush(); print('ready', flush=True); sys.stdin.readline(); "
    "os.unlink(sys.argv[1]) if sys.argv[2] else None"
)


def hold(folder, text="42 on there"):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder / LOCK_FILE), text],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("text", "holder"), [("42 on there", "42 on there"), ("", "unknown")])
def test_another_process_has_it(tmp_path, text, holder):
    process = hold(tmp_path, text)
    with pytest.raises(MisconfigurationException, match=rf"being written by another process \({holder}\)\. Wait"):
        FolderLock(str(tmp_path))
    process.communicate("go\n", timeout=60)
    FolderLock(str(tmp_path)).release()


def test_a_killed_process_is_no_obstacle(tmp_path):
    process = hold(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert (tmp_path / LOCK_FILE).exists()
    lock = FolderLock(str(tmp_path))
    assert lock.held_here
    assert (tmp_path / LOCK_FILE).read_text().startswith(f"{os.getpid()} on ")
    lock.release()


def test_release(tmp_path):
    lock = FolderLock(str(tmp_path))
    lock.release()
    assert not lock.held_here
    assert os.listdir(tmp_path) == []
    lock.release()
    hold(tmp_path).communicate("go\n", timeout=60)


def test_release_after_the_folder_is_gone(tmp_path):
    lock = FolderLock(str(tmp_path))
    os.unlink(tmp_path / LOCK_FILE)
    lock.release()
    assert not lock.held_here


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of its threads: none of them is needed
def test_a_forked_process_does_not_have_it(tmp_path):
    lock = FolderLock(str(tmp_path))
    child = os.fork()
    if child == 0:
        lock.release()  # does nothing: the file stays
        os._exit(int(lock.held_here))
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / LOCK_FILE).exists()
    assert lock.held_here
    lock.release()


def test_a_lock_on_a_file_that_its_owner_has_just_removed_does_not_count(tmp_path, monkeypatch):
    real, calls = fcntl.lockf, []

    def lockf(file, flags):
        real(file, flags)
        calls.append(flags)
        if len(calls) == 1:
            os.unlink(tmp_path / LOCK_FILE)  # by the owner, between our opening the file and our lock

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock = FolderLock(str(tmp_path))
    assert len(calls) == 2
    assert (tmp_path / LOCK_FILE).exists()
    lock.release()


def test_where_there_are_no_locks_nothing_is_locked(tmp_path, monkeypatch):
    def lockf(file, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock = FolderLock(str(tmp_path))
    assert lock.held_here
    lock.release()
    monkeypatch.setattr(lock_module, "_fcntl", lambda: None)
    FolderLock(str(tmp_path)).release()
    assert os.listdir(tmp_path) == []

# SPDX-License-Identifier: Apache-2.0
"""Temporary names, what is swept away and what is not, and what is said about a failed write."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from leyden import atomic


def test_a_temporary_name_is_hidden_ours_and_fits(tmp_path: Path) -> None:
    for name in ("a.ckpt", "x" * 250, "😀" * 60):
        temporary = atomic.temporary_name(name)
        assert temporary.startswith(f".{name[:10]}")
        assert atomic.is_temporary(temporary)
        assert temporary != atomic.temporary_name(name)
        (tmp_path / temporary).touch()
    for name in ("a.ckpt", ".a.ckpt", ".a.ckpt.tmp", ".a.ckpt.12.tmp", ".a.12-x-y.tmp", ".12-00000000-00000000.tmp"):
        assert not atomic.is_temporary(name)


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_the_dead_are_swept_and_nothing_else(tmp_path: Path) -> None:
    mine = f".{os.getpid()}-"
    names = {
        "dead": atomic.temporary_name("a").replace(mine, f".{dead_process()}-"),
        "before me": atomic.temporary_name("a"),  # this process writes nothing now: one with the same number did
        "parent": atomic.temporary_name("a").replace(mine, f".{os.getppid()}-"),
        "elsewhere": ".a.1-00000000-00000000.tmp",
        "elsewhere, old": ".a.1-00000000-00000001.tmp",
        "theirs": ".a.tmp",
    }
    for name in names.values():
        (tmp_path / name).touch()
    os.utime(tmp_path / names["elsewhere, old"], (1, 1))
    (tmp_path / "b").symlink_to("nowhere")
    with atomic.temporary(tmp_path / "a") as writing:
        writing.touch()
        atomic.sweep(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {
            names["parent"], names["elsewhere"], names["theirs"], writing.name, "b",
        }  # fmt: skip
    atomic.sweep(tmp_path / "nowhere")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "er" / "file"
    atomic.write_file(path, lambda file: file.write_text("one") and None)
    for fails in ("write", "check"):

        def write(file: Path, fails: str = fails) -> None:
            file.write_text("two")
            if fails == "write":
                raise ValueError

        def check(file: Path) -> None:
            raise ValueError

        with pytest.raises(ValueError):  # ours, just above
            atomic.write_file(path, write, check)
        assert path.read_text() == "one"
        assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    atomic.write_file(path, lambda file: file.write_text("two") and None, lambda file: file.read_text())
    assert path.read_text() == "two"


def test_folders_that_are_made_are_flushed_into_those_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(atomic, "sync_folder", flushed.append)
    atomic.make_folder(tmp_path / "a" / "b")
    atomic.make_folder(tmp_path / "a" / "b")
    assert flushed == [tmp_path, tmp_path / "a"]


class DistributedError(BaseException):
    """As torch.distributed.checkpoint raises: the errors of all processes in a dict."""

    def __init__(self, error: Exception) -> None:
        self.failures = {0: (error, "traceback")}


def test_the_cause_is_found_behind_other_errors() -> None:
    error = RuntimeError("writer failed")
    error.__context__ = OSError(errno.EDQUOT, "quota")
    assert "the quota is full" in atomic.explain(error)
    assert "the disk failed" in atomic.explain(DistributedError(OSError(errno.EIO, "broken")))
    assert atomic.explain(ValueError("odd")) == "ValueError: odd."


def test_what_this_process_writes_is_no_leftover_however_its_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads may write to one folder, one by its relative path."""
    monkeypatch.chdir(tmp_path)
    with atomic.temporary(Path("a")) as file:
        file.write_text("x")
        atomic.sweep(tmp_path)
        assert file.exists()
        os.replace(file, "a")
    assert os.listdir(tmp_path) == ["a"]

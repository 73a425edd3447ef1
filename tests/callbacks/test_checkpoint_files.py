# SPDX-License-Identifier: Apache-2.0
"""Tests of the ledger of checkpoint files and of the few questions asked of a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from leyden import atomic, files, folders
from leyden.callbacks.checkpoint_files import (
    Ledger,
    bears,
    exists,
    is_inside,
    is_url,
    link,
    open_path,
    paths_in,
)


def test_ledger_keeps_its_own_books(tmp_path):
    ledger = Ledger()
    ledger.add("a")
    twin = ledger.copy()
    ledger.add("b")
    ledger.add("b")
    assert (ledger.files, twin.files, twin.mark) == (["a", "b"], ["a"], ledger.mark)
    assert Ledger().mark != Ledger().mark
    other = Ledger()
    inside = str(tmp_path / "x.ckpt")
    other.load_state_dict({"mark": "m", "files": [inside, "/etc/passwd"], "doomed": ["/etc/passwd"]}, str(tmp_path))
    assert other.state_dict() == {"mark": "m", "files": [inside], "doomed": []}


def test_bears_takes_the_mark_and_the_name(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"weight": torch.zeros(3), "state": {"run": {"mark": "0123abcd", "files": [str(path)]}}}, path)
    assert bears(str(path), "0123abcd")
    assert not bears(str(path), "ffffffff")
    copied = tmp_path / "b.ckpt"
    copied.write_bytes(path.read_bytes())
    assert not bears(str(copied), "0123abcd")
    os.symlink("a.ckpt", tmp_path / "last.ckpt")
    assert bears(str(tmp_path / "last.ckpt"), "0123abcd")
    (tmp_path / "text.ckpt").write_text("0123abcd text.ckpt")
    assert not bears(str(tmp_path / "text.ckpt"), "0123abcd")
    assert not bears(str(tmp_path / "none.ckpt"), "0123abcd")


def test_paths(tmp_path):
    assert paths_in(str(tmp_path / "none")) == []
    (tmp_path / "a").touch()
    assert paths_in(str(tmp_path)) == [str(tmp_path / "a")]
    os.symlink("nowhere", tmp_path / "dangling")
    assert exists(str(tmp_path / "dangling"))
    assert is_inside(str(tmp_path / "x" / "y"), str(tmp_path))
    assert not is_inside(str(tmp_path / ".." / "y"), str(tmp_path))
    assert not is_inside(str(tmp_path) + "2/x", str(tmp_path))
    assert is_inside("s3://b/c/x", "s3://b/c")
    assert not is_inside("s3://b/cc/x", "s3://b/c/")
    assert (is_url("s3://b"), is_url(Path("/b")), is_url("C:\\b")) == (True, False, False)


def test_remote_paths():
    pytest.importorskip("fsspec")
    folder = "memory://ledger"
    assert paths_in(folder) == []
    with open_path(f"{folder}/a.ckpt", "wb") as stream:
        torch.save({"run": ["0123abcd", "a.ckpt"]}, stream)
    assert exists(f"{folder}/a.ckpt")
    assert [path.rsplit("/", 1)[1] for path in paths_in(folder)] == ["a.ckpt"]
    assert bears(f"{folder}/a.ckpt", "0123abcd")
    assert not bears(f"{folder}/a.ckpt", "ffffffff")


def test_a_folder_that_a_link_replaces_is_never_half_a_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    files.save_folder(tmp_path / "last.ckpt", lambda folder: (folder / "x").write_text("x"))
    monkeypatch.setattr(atomic, "delete", lambda path: None)  # killed while its files go
    link(str(tmp_path / "a"), str(tmp_path / "last.ckpt"))
    assert os.readlink(tmp_path / "last.ckpt") == "a"
    [rest] = [path for path in tmp_path.iterdir() if path.name not in ("a", "last.ckpt")]
    assert atomic.is_temporary(rest.name)
    assert not (rest / folders.MANIFEST).exists()


def test_link_replaces_what_was_there(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").touch()
    for name in ("folder", "fresh"):
        link(str(tmp_path / "a"), str(tmp_path / name))
        assert os.readlink(tmp_path / name) == "a"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder", "fresh"]

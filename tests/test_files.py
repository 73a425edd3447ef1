# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: atomic (C1, C2), safe, clear about what is wrong, and found by the step inside (C5)."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from datetime import datetime, timedelta, timezone
from pathlib import Path

import fsspec
import pytest
import torch

from leyden import atomic, files
from leyden.errors import CheckpointError, CheckpointNotFoundError, LeydenWarning


class Custom:
    """Something that is no plain data."""


STATE = {"global_step": 3, "state_dict": {"w": torch.arange(1000.0)}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.ckpt"


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


# ------------------------------------------------------------------ write


@pytest.mark.parametrize("kind", [str, Path, lambda p: f"file://{p}"])
def test_round_trip_makes_folders(tmp_path, kind):
    path = tmp_path / "new" / "er" / "a.ckpt"
    files.save(STATE, kind(path))
    loaded = files.load(kind(path), verify=True)
    assert torch.equal(loaded["state_dict"]["w"], STATE["state_dict"]["w"])
    assert names(path.parent) == ["a.ckpt"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    files.save(STATE, "~/b.ckpt")
    assert files.load("~/b.ckpt")["global_step"] == 3


def test_permissions_are_those_of_any_new_file(path):
    (path.parent / "other").touch()
    files.save(STATE, path)
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode


def test_a_link_is_replaced_not_followed(tmp_path, path):
    files.save({"global_step": 1}, tmp_path / "old.ckpt")
    path.symlink_to(tmp_path / "old.ckpt")
    files.save({"global_step": 2}, path)
    assert files.load(tmp_path / "old.ckpt")["global_step"] == 1
    assert files.load(path)["global_step"] == 2


def test_order_of_operations(path, monkeypatch):
    """Flushed before it is renamed, and the folder after."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=real: (calls.append(n), f(*a))[1])
    files.save(STATE, path)
    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("step", ["open", "write", "fsync", "verify", "replace"])
def test_C2_a_failed_write_raises_and_leaves_the_old_file(path, monkeypatch, step):
    files.save({"global_step": 1}, path)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "open":
        monkeypatch.setattr("builtins.open", fail)
    elif step == "write":
        monkeypatch.setattr(torch, "save", fail)
    elif step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif step == "verify":
        monkeypatch.setattr(zipfile.ZipExtFile, "read", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(
        CheckpointError,
        match="a.ckpt' (could not be written: the disk or the quota is full|is damaged)|a.ckpt is damaged",
    ):
        files.save(STATE, path)
    monkeypatch.undo()
    assert names(path.parent) == ["a.ckpt"]
    assert files.load(path)["global_step"] == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_really_full_disk(path, monkeypatch):
    real = open

    def opened(name, mode="r", *args, **kwargs):
        return real("/dev/full", "wb") if mode == "xb" else real(name, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", opened)
    with pytest.raises(CheckpointError, match="is full.*Free some room"):
        files.save({"w": torch.ones(100_000)}, path)
    assert names(path.parent) == []


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EACCES, "no permission to write there.*Choose another folder"),
        (errno.EROFS, "no permission"),
        (errno.EDQUOT, "quota is full"),
        (errno.EIO, "the disk failed.*oops.*another disk"),
        (errno.EEXIST, "a file where a folder is needed"),
        (errno.EBUSY, "OSError.*oops"),
    ],
)
def test_causes_and_remedies(path, monkeypatch, number, text):
    def fail(*args):
        raise OSError(number, "oops")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match=text):
        files.save(STATE, path)


def test_a_folder_is_in_the_way(path):
    path.mkdir()
    with pytest.raises(CheckpointError, match="there is a folder of that name"):
        files.save(STATE, path)
    assert names(path.parent) == ["a.ckpt"]


def test_what_cannot_be_pickled(path):
    with pytest.raises(CheckpointError, match="cannot be pickled.*lambda"):
        files.save({"f": lambda: 1}, path)
    assert names(path.parent) == []


def test_an_interrupt_passes_through(path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.save(STATE, path)
    assert names(path.parent) == []


@pytest.mark.parametrize("letter", ["ü", "模", "😀"])
def test_a_long_name_in_any_script(tmp_path, letter):
    path = tmp_path / (letter * (240 // len(letter.encode())) + ".ckpt")
    files.save(STATE, path)
    assert names(tmp_path) == [path.name]


def test_very_long_name(tmp_path):
    name = "x" * 250 + ".ckpt"
    files.save(STATE, tmp_path / name)
    assert names(tmp_path) == [name]


KILLED = """
import os, signal, sys, torch
from leyden import atomic, files
at, path = sys.argv[1:]
def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
if at == "write":
    real = torch.save
    def half(obj, file):
        file.write(b"PK\\x03\\x04 half"); file.flush(); die()
    torch.save = half
elif at == "verify":
    files.archive.check = die
elif at == "fsync":
    os.fsync = die
elif at == "replace":
    os.replace = die
elif at == "sync":
    files.atomic.sync_folder = die
files.save({"global_step": 2}, path)
"""


@pytest.mark.parametrize(("at", "expected"), [("write", 1), ("fsync", 1), ("verify", 1), ("replace", 1), ("sync", 2)])
def test_C1_killed_at_any_moment(path, at, expected):
    files.save({"global_step": 1}, path)
    done = subprocess.run([sys.executable, "-c", KILLED, at, str(path)], env={**os.environ, "PYTHONPATH": "src"})
    assert done.returncode == -signal.SIGKILL
    assert files.load(path, verify=True)["global_step"] == expected
    assert files.newest(path.parent) == path
    left = [name for name in names(path.parent) if name != "a.ckpt"]
    assert all(name.startswith(".") and name.endswith(".tmp") for name in left)


# ------------------------------------------------------------------ read


def test_file_objects():
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    buffer.seek(0)
    assert files.load(buffer, verify=True)["global_step"] == 3


def test_file_object_of_another_kind():
    with pytest.raises(CheckpointError, match="The checkpoint the file is not a checkpoint"):
        files.load(io.BytesIO(b"hello world"))


def test_missing_names_similar_ones(tmp_path):
    files.save(STATE, tmp_path / "epoch=1-step=10.ckpt")
    with pytest.raises(CheckpointNotFoundError, match="Did you mean 'epoch=1-step=10.ckpt'"):
        files.load(tmp_path / "epoch=1-step=11.ckpt")
    with pytest.raises(FileNotFoundError, match="In that folder: epoch=1-step=10.ckpt."):
        files.load(tmp_path / "zzz")
    with pytest.raises(CheckpointNotFoundError, match="no folder '.*nowhere'"):
        files.load(tmp_path / "nowhere" / "a.ckpt")


def test_folder(tmp_path):
    files.save(STATE, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="is a folder. Give the file in it: a.ckpt."):
        files.load(tmp_path)


def test_empty(path):
    path.touch()
    with pytest.raises(CheckpointError, match="a.ckpt' is empty"):
        files.load(path)


@pytest.mark.parametrize("keep", [0.9, 0.5, -1, 100])
def test_cut_off(path, keep):
    files.save(STATE, path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(CheckpointError, match="a.ckpt' is cut off"):
        files.load(path)


def test_not_a_checkpoint(path):
    path.write_text("hello world")
    with pytest.raises(CheckpointError, match="a.ckpt' is not a checkpoint"):
        files.load(path)


def test_C6_flipped_bit(path):
    files.save(STATE, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.tensor(500.0).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: (the checksum of .*data/0' is wrong|Bad CRC)"):
        files.load(path, verify=True)


def test_code_is_refused_and_named(path):
    files.save({"x": Custom()}, path)
    with pytest.raises(CheckpointError, match=r"contains '.*test_files.Custom'.*weights_only=False"):
        files.load(path)
    assert isinstance(files.load(path, weights_only=False)["x"], Custom)


def test_no_code_runs(path, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"x": Evil()}, path)
    with pytest.raises(CheckpointError, match="contains '(posix|nt).mkdir', which is code"):
        files.load(path)
    with pytest.warns(LeydenWarning, match="Passed over"):
        assert files.newest(tmp_path) is None
    assert not (tmp_path / "owned").exists()


def test_absent_code(path, monkeypatch):
    files.save({"x": Custom()}, path)
    monkeypatch.delattr(sys.modules[__name__], "Custom")
    with pytest.raises(CheckpointError, match="needs code that is not here.*Custom"):
        files.load(path, weights_only=False)


def test_old_format(path):
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    assert files.load(path)["global_step"] == 3


def test_out_of_memory_is_not_blamed_on_the_file(path, monkeypatch):
    files.save(STATE, path)

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(torch.OutOfMemoryError):
        files.load(path)


def test_tensors_of_an_absent_device_come_to_the_cpu(path):
    code = f"""
    import torch
    from leyden import files
    torch.serialization.location_tag, real = (lambda storage: "cuda:7"), torch.serialization.location_tag
    files.save({{"w": torch.ones(2)}}, {str(path)!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "PYTHONPATH": "src"}, check=True)
    assert files.load(path)["w"].device.type == "cpu"
    assert files.load(path, map_location="meta")["w"].device.type == "meta"


# ------------------------------------------------------------------ find, remove, remote


def test_C5_newest_is_by_recorded_step(tmp_path):
    for name, step in (("z", 5), ("a", 20), ("m", 7)):
        files.save({**STATE, "global_step": step}, tmp_path / f"{name}.ckpt")
    torch.save(STATE["state_dict"], tmp_path / "weights.ckpt")  # no step
    torch.save([1], tmp_path / "list.ckpt")
    (tmp_path / ".b.ckpt.1-2.tmp").write_bytes(b"PK\x03\x04")
    (tmp_path / ".hidden.ckpt").write_bytes(b"PK\x03\x04")
    (tmp_path / "folder.ckpt").mkdir()
    torch.save({"global_step": 99}, tmp_path / "other.pt")
    assert files.newest(tmp_path) == tmp_path / "a.ckpt"
    assert files.recorded_step(tmp_path / "m.ckpt") == 7


def test_C5_newest_passes_over_the_damaged(tmp_path, path):
    files.save({**STATE, "global_step": 5}, path)
    files.save({**STATE, "global_step": 50}, tmp_path / "b.ckpt")
    (tmp_path / "b.ckpt").write_bytes((tmp_path / "b.ckpt").read_bytes()[:-10])
    with pytest.warns(LeydenWarning, match="b.ckpt' is cut off"):
        assert files.newest(tmp_path) == path


def test_newest_between_equals_is_the_last_written(tmp_path):
    for i, name in enumerate(("z", "a")):
        files.save(STATE, tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (i, i))
    assert files.newest(tmp_path) == tmp_path / "a.ckpt"


def test_newest_of_nothing(tmp_path):
    assert files.newest(tmp_path) is None
    assert files.newest(tmp_path / "nowhere") is None


def test_newest_of_an_old_format(path):
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    assert files.newest(path.parent) == path


def test_remove(tmp_path, path):
    files.save(STATE, path)
    link = tmp_path / "last.ckpt"
    link.symlink_to(path)
    files.remove(link)
    assert path.exists()
    files.remove(str(path))
    files.remove(path)
    assert names(tmp_path) == []


def test_remove_takes_no_folders(tmp_path):
    with pytest.raises(CheckpointError, match="could not be removed"):
        files.remove(tmp_path)
    assert tmp_path.exists()


def test_C5_newest_in_a_remote_folder():
    fs = fsspec.filesystem("memory")
    for name, step in (("z", 5), ("a", 20), ("m", 7)):
        files.save({**STATE, "global_step": step}, f"memory://runs/one/{name}.ckpt")
    assert files.newest("memory://runs/one") == "memory://runs/one/a.ckpt"
    fs.pipe("/runs/one/a.ckpt", fs.cat("/runs/one/a.ckpt")[:-9])
    with pytest.warns(LeydenWarning, match="a.ckpt' is cut off.*runs/one/m.ckpt', of step 7, is taken instead"):
        assert files.newest(["memory://runs/one/", "memory://nowhere"]) == "memory://runs/one/m.ckpt"
    assert files.newest("memory://nowhere") is None
    fs.rm("/runs", recursive=True)


def test_remote(monkeypatch):
    path = "memory://folder/deep/a.ckpt"
    files.save(STATE, path)
    files.save({**STATE, "global_step": 4}, path)
    assert files.load(path, verify=True)["global_step"] == 4
    fs = fsspec.filesystem("memory")
    assert [p.rpartition("/")[2] for p in fs.ls("/folder/deep", detail=False)] == ["a.ckpt"]
    monkeypatch.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "cut")))
    with pytest.raises(
        CheckpointError, match="memory://folder/deep/a.ckpt' could not be written: the disk failed.*cut"
    ):
        files.save(STATE, path)
    monkeypatch.undo()
    assert files.load(path)["global_step"] == 4
    files.remove(path)
    files.remove(path)
    with pytest.raises(CheckpointNotFoundError, match="memory://folder/deep/a.ckpt"):
        files.load(path)
    assert not fs.ls("/folder/deep", detail=False)


def test_what_contains_itself_is_saved_as_torch_saves_it(path):
    loop = [torch.ones(2)]
    loop.append(loop)
    files.save({"loop": loop, "leyden": {}}, path)
    found = files.load(path)["loop"]
    assert found[1] is found


@pytest.mark.parametrize("name", ["a\0b", "\x1b[2J", "\u0308\u20ac"])
def test_B1_a_class_of_any_name_is_looked_at(path, name):
    torch.save({"x": timedelta(1)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in parts.items():
            archive.writestr(entry, content.replace(b"cdatetime\ntimedelta\n", f"csome\n{name}\n".encode()))
    shown = repr(files.look(path)["x"])
    assert shown == f"<some.{name.encode('unicode_escape').decode()}>"
    with pytest.raises(CheckpointError, match="not opened"):
        files.load(path)


def test_a_manifest_that_somebody_spoilt_is_a_warning(path):
    files.save({"state_dict": {"w": torch.ones(2)}, "leyden": {}}, path)
    content = files.load(path)
    content["leyden"]["manifest"]["state_dict"] = 7
    torch.save(content, path)
    with pytest.warns(LeydenWarning, match=r"what is noted of 'state_dict' is 7"):
        files.load(path)


@pytest.fixture
def remote():
    """A remote file system that counts what is read of each file."""
    from fsspec.implementations.memory import MemoryFileSystem

    class Counting(MemoryFileSystem):
        protocol = "counted"
        store, pseudo_dirs, cachable = {}, [""], False
        read = {}

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.replace("counted://", "memory://"))

        def open(self, path, mode="rb", **kwargs):
            file = super().open(path, mode, **kwargs)
            if mode != "rb":
                return file
            content, read, name = io.BytesIO(file.getvalue()), self.read, path.rpartition("/")[2]

            class Reader(io.RawIOBase):
                def readable(self):
                    return True

                def seekable(self):
                    return True

                def seek(self, *args):
                    return content.seek(*args)

                def tell(self):
                    return content.tell()

                def readinto(self, buffer):
                    count = content.readinto(buffer)
                    read[name] = read.get(name, 0) + count
                    return count

            return Reader()

    fsspec.register_implementation("counted", Counting, clobber=True)
    Counting.store.clear()
    Counting.read.clear()
    return Counting


def test_of_a_remote_folder_only_the_newest_is_fetched_whole(remote):
    big = torch.zeros(1 << 20)
    for step in (1, 2, 3):
        files.save({"global_step": step, "state_dict": {"w": big, "b": torch.ones(3)}}, f"counted://runs/{step}.ckpt")
    remote.read.clear()
    assert files.newest("counted://runs") == "counted://runs/3.ckpt"
    assert remote.read["1.ckpt"] < 20_000
    assert remote.read["2.ckpt"] < 20_000
    assert remote.read["3.ckpt"] > 4 << 20
    remote.read.clear()
    found = files.look("counted://runs/1.ckpt")
    assert (found["state_dict"]["w"].shape, found["state_dict"]["w"].device.type) == (big.shape, "meta")
    assert remote.read["1.ckpt"] < 20_000
    assert torch.equal(files.load("counted://runs/1.ckpt")["state_dict"]["w"], big)


def test_what_is_damaged_in_a_remote_folder_is_told(remote):
    for step in (1, 2, 3, 4):
        files.save({"global_step": step, "state_dict": {"w": torch.rand(5000)}}, f"counted://runs/{step}.ckpt")
    fs = fsspec.filesystem("counted")
    content = bytearray(fs.cat("/runs/4.ckpt"))
    content[len(content) // 2] ^= 1  # in the tensor
    fs.pipe("/runs/4.ckpt", bytes(content))
    content = bytearray(fs.cat("/runs/3.ckpt"))
    content[content.index(b"global_step")] ^= 1
    fs.pipe("/runs/3.ckpt", bytes(content))
    fs.pipe("/runs/5.ckpt", b"not a checkpoint")
    with pytest.warns(LeydenWarning) as said:
        assert files.newest("counted://runs") == "counted://runs/2.ckpt"
    assert sorted(str(each.message).partition(".ckpt")[0][-1] for each in said) == ["3", "4", "5"]


def test_what_a_killed_write_left_in_a_remote_folder_goes(remote):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    fs = fsspec.filesystem("counted")
    own = atomic.temporary_name("a.ckpt")
    left = own.replace(f".{os.getpid()}-", f".{dead.pid}-")
    theirs = own.replace(f".{os.getpid()}-", f".{os.getppid()}-")
    elsewhere = ".a.ckpt.1-00000000-00000000.tmp"
    for name in (left, theirs, elsewhere, ".a.tmp", "b.ckpt"):
        fs.pipe(f"/runs/{name}", b"half")
    files.save({"global_step": 1}, "counted://runs/a.ckpt")
    names = sorted(path.rpartition("/")[2] for path in fs.ls("/runs", detail=False))
    assert names == sorted([theirs, elsewhere, ".a.tmp", "b.ckpt", "a.ckpt"])
    fs.store["/runs/" + elsewhere].modified = datetime.fromtimestamp(1, tz=timezone.utc)
    files.save({"global_step": 1}, "counted://runs/a.ckpt")
    assert elsewhere not in str(fs.ls("/runs", detail=False))

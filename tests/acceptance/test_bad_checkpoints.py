# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are wrong: damaged at any byte, in the wrong place, hostile. A clear error or a stated fallback, always."""

from __future__ import annotations

import errno
import io
import os
import pickle
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

import leyden as L
from leyden import files
from leyden.callbacks import ModelCheckpoint
from leyden.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError, LeydenWarning
from leyden.loading import PICKLED

QUIET: dict[str, Any] = {
    "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu",
}  # fmt: skip
STATE: dict[str, Any] = {
    "epoch": 1,
    "global_step": 12,
    "state_dict": {"net.weight": torch.arange(64.0), "net.bias": torch.ones(3, dtype=torch.bfloat16)},
    "optimizer_states": [{"state": {0: {"step": torch.tensor(12.0)}}, "param_groups": [{"lr": 0.1}]}],
    "leyden": {"format": 1},
}


class Model(L.LightningModule):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(2, width)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(4, 2), batch_size=2)


def fit(folder: Path, epochs: int, ckpt_path: Any = None, **checkpointing: Any) -> L.Trainer:
    saver = ModelCheckpoint(folder, save_top_k=-1, **checkpointing)
    trainer = L.Trainer(**QUIET, max_epochs=epochs, callbacks=saver)
    trainer.fit(Model(), ckpt_path=ckpt_path)
    return trainer


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def flip_a_weight(path: Path) -> None:
    content = path.read_bytes()
    weight = torch.load(path, weights_only=True)["state_dict"]["net.weight"]
    flip(path, content.index(weight.numpy().tobytes()))


# ---------------------------------------------------------------------------------------------- C5, C6: damaged files


@pytest.fixture
def run(tmp_path: Path) -> Path:
    fit(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"epoch={n}-step={2 * n + 2}.ckpt" for n in range(3)]
    return tmp_path


def test_C5_C6_last_falls_back_to_the_newest_good_one(run: Path) -> None:
    flip_a_weight(run / "epoch=2-step=6.ckpt")
    with pytest.warns(
        LeydenWarning, match=r"epoch=2-step=6.ckpt' is damaged.*epoch=1-step=4.ckpt', of step 4, is taken"
    ):
        trainer = fit(run, 4, ckpt_path="last")
    assert trainer.global_step == 8


def test_C5_last_is_never_a_silent_restart(run: Path) -> None:
    for path in run.iterdir():
        flip_a_weight(path)
    with pytest.raises(
        CheckpointDamagedError, match=r"There is no good checkpoint in .*step=6.*Remove what is damaged"
    ):
        fit(run, 4, ckpt_path="last")


def test_C6_an_explicit_path_that_is_damaged_is_an_error_that_names_the_newest_good_one(run: Path) -> None:
    flip_a_weight(run / "epoch=2-step=6.ckpt")
    with pytest.raises(
        CheckpointDamagedError, match=r"is damaged.*newest good one beside it is .*epoch=1-step=4.ckpt', of"
    ):
        fit(run, 4, ckpt_path=run / "epoch=2-step=6.ckpt")
    with pytest.raises(CheckpointDamagedError, match="is damaged"):
        Model.load_from_checkpoint(run / "epoch=2-step=6.ckpt")
    (run / "epoch=0-step=2.ckpt").unlink()
    (run / "epoch=1-step=4.ckpt").unlink()
    with pytest.raises(CheckpointDamagedError, match="There is no good one beside it"):
        fit(run, 4, ckpt_path=run / "epoch=2-step=6.ckpt")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    files.save(STATE, path)
    return path.read_bytes()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def noticed_or_harmless(path: Path, content: bytes, whole: Any) -> bool:
    path.write_bytes(content)
    try:
        return same(files.load(path), whole)
    except CheckpointError:
        return True


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_C6_any_flipped_byte_is_noticed_or_does_not_matter(good: bytes, tmp_path_factory: Any, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.ckpt"
    path.write_bytes(good)
    whole = files.load(path)
    content = bytearray(good)
    content[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    assert noticed_or_harmless(path, bytes(content), whole)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_C6_truncated_at_any_byte(good: bytes, tmp_path_factory: Any, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.ckpt"
    path.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    with pytest.raises(CheckpointDamagedError, match="cut off|is empty|not a checkpoint"):
        files.load(path)
    with pytest.raises(CheckpointDamagedError):
        files.recorded_step(path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_C6_every_byte(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(good)
    whole = files.load(tmp_path / "a.ckpt")
    folder = tmp_path / "flips"
    folder.mkdir()
    missed = []
    for at in range(len(good)):
        content = bytearray(good)
        content[at] ^= 0xFF
        if not noticed_or_harmless(folder / "a.ckpt", bytes(content), whole):
            missed.append(at)
        (folder / "a.ckpt").write_bytes(good[:at])
        with pytest.raises(CheckpointDamagedError):
            files.load(folder / "a.ckpt")
    print(f"{len(good) - len(missed)} of {len(good)} flipped bytes noticed or harmless")
    assert not missed


def test_C6_one_bit_that_makes_torch_read_nothing_and_say_nothing(good: bytes, tmp_path: Path) -> None:
    """An entry of the archive that is marked as a folder: torch leaves its tensor as the memory was."""
    at = good.rindex(b"archive/data/0") - 8
    (tmp_path / "a.ckpt").write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    with pytest.raises(CheckpointDamagedError, match="'archive/data/0' is marked as a folder"):
        files.load(tmp_path / "a.ckpt")


def test_C6_checksums_are_written_whatever_torch_is_told(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        files.save(STATE, tmp_path / "a.ckpt")
        torch.save(STATE, tmp_path / "without.ckpt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert files.verify(tmp_path / "a.ckpt")
    assert not files.verify(tmp_path / "without.ckpt")  # theirs: it can be read, but not compared
    assert files.load(tmp_path / "without.ckpt")["global_step"] == 12


def test_a_file_that_somebody_changed_is_read_with_a_warning(tmp_path: Path) -> None:
    files.save(STATE, tmp_path / "a.ckpt")
    content = files.load(tmp_path / "a.ckpt")
    assert content["leyden"]["manifest"]["state_dict"] == [2, 64 * 4 + 3 * 2]
    del content["optimizer_states"]
    content["state_dict"]["net.weight"] = torch.ones(5)
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.warns(
        LeydenWarning, match=r"'optimizer_states' is missing; 'state_dict' has 2 tensors of 26 bytes, it was"
    ):
        files.load(tmp_path / "a.ckpt")


# ---------------------------------------------------------------------------------------------- the wrong place


def test_a_dangling_link_says_so(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").symlink_to("gone.ckpt")
    with pytest.raises(CheckpointNotFoundError, match=r"last.ckpt' is a link to 'gone.ckpt', which is not there"):
        fit(tmp_path, 1, ckpt_path=tmp_path / "last.ckpt")


def test_a_folder_names_the_files_in_it(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder. Give the file in it: epoch=0-step=2.ckpt"):
        fit(run, 4, ckpt_path=run)


def test_an_empty_file(run: Path) -> None:
    (run / "epoch=2-step=6.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointDamagedError, match=r"step=6.ckpt' is empty.*newest good one.*step=4.ckpt"):
        fit(run, 4, ckpt_path=run / "epoch=2-step=6.ckpt")


def as_nobody(work: Callable[[], None]) -> str:
    """Do ``work`` in a child process that is not root; return the message of the CheckpointError that it must raise."""
    if os.getuid() != 0:
        with pytest.raises(CheckpointError) as caught:
            work()
        return str(caught.value)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            work()
        except CheckpointError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as message:
        return message.read()


@pytest.fixture
def closed(tmp_path: Path) -> Any:
    """A folder that nobody but its owner may open; and the way to it that anybody may."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/") and str(folder) != "/tmp":
            folder.chmod(folder.stat().st_mode | 0o055)
    files.save(STATE, tmp_path / "a.ckpt")
    yield tmp_path
    tmp_path.chmod(0o755)


def test_no_permission_to_write(closed: Path) -> None:
    closed.chmod(0o555)
    message = as_nobody(lambda: files.save(STATE, closed / "a.ckpt"))
    assert "no permission to write there" in message
    assert "Choose another folder" in message
    assert [path.name for path in closed.iterdir()] == ["a.ckpt"]
    assert files.load(closed / "a.ckpt")["global_step"] == 12


def test_no_permission_to_read(closed: Path) -> None:
    (closed / "a.ckpt").chmod(0o000)
    assert "a.ckpt' cannot be read" in as_nobody(lambda: files.load(closed / "a.ckpt"))
    closed.chmod(0o000)
    message = as_nobody(lambda: files.load(closed / "a.ckpt"))
    assert "cannot be read" in message
    assert "Change its permissions" in message


def test_a_full_quota_in_the_middle_of_a_file(tmp_path: Path) -> None:
    files.save(STATE, tmp_path / "a.ckpt")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(CheckpointError, match="the disk or the quota is full.*Free some room"):
            files.save({**STATE, "big": torch.ones(5000)}, tmp_path / "a.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    assert files.load(tmp_path / "a.ckpt")["global_step"] == 12


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A real file system of 300 kB."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("this process may not mount a file system")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_C2_a_full_disk_keeps_the_former_file_and_the_run_raises(small_disk: Path) -> None:
    files.save(STATE, small_disk / "a.ckpt")
    with pytest.raises(CheckpointError, match="the disk or the quota is full"):
        files.save({**STATE, "big": torch.ones(100_000)}, small_disk / "a.ckpt")
    with pytest.raises(CheckpointError, match="the disk or the quota is full"):
        files.save_folder(small_disk / "b.ckpt", lambda folder: (folder / "big").write_bytes(b"0" * 400_000) and None)
    assert [path.name for path in small_disk.iterdir()] == ["a.ckpt"]
    assert files.load(small_disk / "a.ckpt")["global_step"] == 12
    (small_disk / "filler").write_bytes(b"0" * 240_000)
    with pytest.raises(CheckpointError, match="the disk or the quota is full"):
        fit(small_disk / "run", 50)
    assert files.newest(small_disk / "run") is not None
    assert not [path.name for path in (small_disk / "run").iterdir() if path.name.startswith(".")]


def test_a_read_only_file_system(small_disk: Path) -> None:
    files.save(STATE, small_disk / "a.ckpt")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="no permission to write there.*Read-only"):
        files.save(STATE, small_disk / "a.ckpt")
    assert files.load(small_disk / "a.ckpt")["global_step"] == 12


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(CheckpointError, match="there is a file where a folder is needed"):
        files.save(STATE, tmp_path / "runs" / "a.ckpt")
    assert (tmp_path / "runs").read_text() == "a file"


@pytest.mark.parametrize(("number", "raises"), [("EINVAL", False), ("ENOTSUP", False), ("EIO", True), ("ENOSPC", True)])
def test_a_file_system_that_cannot_flush_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str, raises: bool
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(getattr(errno, number), number)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if raises:
        with pytest.raises(CheckpointError, match=number):
            files.save(STATE, tmp_path / "a.ckpt")
    else:
        files.save(STATE, tmp_path / "a.ckpt")
        files.save_folder(tmp_path / "b.ckpt", lambda folder: (folder / "x").write_text("x") and None)
    assert files.load(tmp_path / "a.ckpt")["global_step"] == 12
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


# ---------------------------------------------------------------------------------------------- B1: hostile files


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.place,)


class EvilByEval:
    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> Any:
        return eval, (f"__import__('os').mkdir({self.place!r})",)


class EvilState:
    """Runs its code through the state of an object, rather than through a call."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __setstate__(self, state: Any) -> None:
        os.mkdir(state["place"])


def _tar(path: Path, evil: Any) -> None:
    """Torch's first format: a tar of pickles."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in (("storages", 0), ("tensors", 0), ("pickle", evil)):
            data = pickle.dumps(content, protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


ATTACKS: dict[str, Callable[[Path, Path], None]] = {
    "a call": lambda path, place: torch.save({**STATE, "x": Evil(place)}, path),
    "eval": lambda path, place: torch.save({**STATE, "x": EvilByEval(place)}, path),
    "state": lambda path, place: torch.save({**STATE, "x": EvilState(place)}, path),
    "an array of objects": lambda path, place: torch.save({**STATE, "x": np.array([Evil(place)], dtype=object)}, path),
    "legacy": lambda path, place: torch.save({**STATE, "x": Evil(place)}, path, _use_new_zipfile_serialization=False),
    "tar": lambda path, place: _tar(path, Evil(place)),
    "a bare pickle": lambda path, place: path.write_bytes(pickle.dumps(Evil(place))) and None,  # type: ignore[dict-item]
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_B1_a_hostile_file_says_why_and_does_not_run(tmp_path: Path, attack: str) -> None:
    path, place = tmp_path / "evil.ckpt", tmp_path / "owned"
    ATTACKS[attack](path, place)
    for use in (
        lambda: files.load(path),
        lambda: files.recorded_step(path),
        lambda: Model.load_from_checkpoint(path),
        lambda: fit(tmp_path / "run", 1, ckpt_path=path),
    ):
        with pytest.raises(CheckpointError, match=r"evil.ckpt.* (not opened|not a checkpoint)"):
            use()
    if path.stat().st_size and attack != "a bare pickle":
        with pytest.warns(LeydenWarning, match="Passed over"):
            assert files.newest(tmp_path) is None
    files.verify(path) if attack != "a bare pickle" else None
    try:
        files.look(path)
    except CheckpointError:
        assert attack in ("a call", "legacy", "tar", "a bare pickle", "an array of objects")
    assert not place.exists()


def test_B1_pickled_hyperparameters_stay_closed(tmp_path: Path) -> None:
    place = tmp_path / "owned"
    data = pickle.dumps({"width": Evil(place)})
    hostile = {
        **STATE,
        "state_dict": Model().state_dict(),
        PICKLED: {"hyper_parameters": {"names": ["width"], "data": data}},
    }
    files.save(hostile, tmp_path / "a.ckpt")
    with pytest.warns(LeydenWarning, match=r"not plain data \(width\); they were left closed"):
        Model.load_from_checkpoint(tmp_path / "a.ckpt")
    assert not place.exists()


def test_B1_a_folder_of_torchs_own_is_not_unpickled(tmp_path: Path) -> None:
    place = tmp_path / "owned"
    folder = tmp_path / "evil.ckpt"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(place)))
    with (
        pytest.warns(LeydenWarning, match="has no manifest"),
        pytest.raises(CheckpointError, match=r"mkdir', which is code"),
    ):
        files.load(folder)
    assert not place.exists()


# ---------------------------------------------------------------------------------------------- a process of its own


def test_C1_what_a_killed_process_left_is_cleared_away_and_nothing_else_is(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom leyden import files\nos.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.save({'global_step': 1}, sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.ckpt")], check=False, timeout=60)
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".a.ckpt.")
    theirs = [".a.ckpt.tmp", "a.ckpt.tmp", f".a.ckpt.{os.getpid()}.tmp", ".b.ckpt.1-2.tmp"]
    for name in theirs:
        (tmp_path / name).write_text("not ours")
    assert files.newest(tmp_path) is None
    files.save(STATE, tmp_path / "b.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*theirs, "b.ckpt"])

# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are folders: committed whole (C1), replaced and removed only if ours (C4), read without running code."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from leyden import atomic, files, folders, sharded
from leyden.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError, LeydenWarning


def write(step: int) -> Any:
    """Return what writes a small training state of ``step``, as sharded runs do."""

    def into(folder: Path) -> None:
        model = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(model.weight, step)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that there is one process
            dcp.save(
                {"model": model.state_dict(), "optimizer_0": optimizer.state_dict()}, checkpoint_id=folder, no_dist=True
            )
        torch.save({"global_step": step, "epoch": 0, "leyden": {"format": 1}}, folder / "meta.pt")

    return into


def save(path: Path, step: int) -> None:
    files.save_folder(path, write(step), {"global_step": step})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save(tmp_path / "a.ckpt", 3)
    return tmp_path / "a.ckpt"


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_folder_of_torch_distributed_checkpoint_comes_back_as_the_dict_of_a_file(path: Path) -> None:
    assert names(path) == [".metadata", "__0_0.distcp", "leyden-manifest.json", "meta.pt"]
    assert names(path.parent) == ["a.ckpt"]
    content = files.load(path)
    assert (content["global_step"], files.recorded_step(path), files.newest(path.parent)) == (3, 3, path)
    assert torch.equal(content["state_dict"]["weight"], torch.full((2, 3), 3.0) - 0.001 * torch.ones(2, 3))
    optimizer = torch.optim.Adam(torch.nn.Linear(3, 2).parameters())
    optimizer.load_state_dict(content["optimizer_states"][0])
    assert optimizer.state_dict()["state"][0]["step"] == 1
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert files.load(path, map_location="meta")["state_dict"]["weight"].device.type == "meta"


def test_torchs_own_reader_opens_it_too(path: Path) -> None:
    state = {"model": {"weight": torch.empty(2, 3), "bias": torch.empty(2)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=path, no_dist=True)
        assert state["model"]["weight"][0, 0] == pytest.approx(2.999)
        again = {"model": {"weight": torch.zeros(2, 3)}, "optimizer_0": {"param_groups": [{"lr": 9.0}]}}
        dcp.load(again, storage_reader=sharded.Reader(path), planner=sharded.Planner(), no_dist=True)
    assert torch.equal(again["model"]["weight"], state["model"]["weight"])


def test_a_folder_is_replaced_and_the_former_one_goes(path: Path) -> None:
    save(path, 4)
    assert files.load(path)["global_step"] == 4
    assert names(path.parent) == ["a.ckpt"]


def test_C1_a_folder_without_its_manifest_is_never_taken(path: Path) -> None:
    save(path.parent / "b.ckpt", 9)
    (path.parent / "b.ckpt" / folders.MANIFEST).unlink()
    assert files.newest(path.parent) == path
    with pytest.raises(
        CheckpointDamagedError, match="is a folder without leyden-manifest.json.*newest good one.*a.ckpt"
    ):
        files.load(path.parent / "b.ckpt")


@pytest.mark.parametrize("what", ["flipped", "short", "gone", "manifest", "manifest text"])
def test_C6_a_damaged_folder_is_noticed_and_passed_over(path: Path, what: str) -> None:
    newer = path.parent / "b.ckpt"
    save(newer, 9)
    data = newer / "__0_0.distcp"
    if what == "flipped":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif what == "short":
        data.write_bytes(data.read_bytes()[:-1])
    elif what == "gone":
        data.unlink()
    elif what == "manifest":
        text = (newer / folders.MANIFEST).read_text()
        (newer / folders.MANIFEST).write_text(text.replace('"global_step": 9', '"global_step": 8'))
    else:
        (newer / folders.MANIFEST).write_text("{")
    with pytest.raises(CheckpointDamagedError, match="b.ckpt' is damaged"):
        files.verify(newer)
    with pytest.raises(
        CheckpointDamagedError, match="is damaged.*The newest good one beside it is .*a.ckpt', of step 3"
    ):
        files.load(newer)
    with pytest.warns(LeydenWarning, match="b.ckpt' is damaged.*a.ckpt', of step 3, is taken instead"):
        assert files.newest(path.parent) == path


def test_a_newer_format_says_so(path: Path) -> None:
    content = json.loads((path / folders.MANIFEST).read_text())
    del content["crc32"]
    content["format"] = 99
    folders._write_manifest(path, content)
    with pytest.raises(CheckpointError, match="has format 99; this version of Leyden reads up to format 1"):
        files.load(path)


def test_C4_what_is_not_ours_is_neither_replaced_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "photo").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name, reason in (
        ("data", "a folder of that name, and it is no checkpoint of ours"),
        ("file", "a file of that name"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            save(tmp_path / name, 1)
    with pytest.raises(CheckpointError, match="no checkpoint of ours"):
        files.remove(tmp_path / "data")
    with pytest.raises(CheckpointError, match="must be on a local or shared file system"):
        files.save_folder("memory://a.ckpt", write(1))
    assert names(tmp_path) == ["data", "file"]
    assert (tmp_path / "data" / "photo").read_text() == "precious"


def test_remove(path: Path) -> None:
    files.remove(path)
    files.remove(path)
    assert names(path.parent) == []


def test_C2_an_error_of_the_writer_leaves_what_was_there(path: Path) -> None:
    def fails(folder: Path) -> None:
        write(4)(folder)
        raise ValueError("no")

    with pytest.raises(CheckpointError, match="could not be written: ValueError: no"):
        files.save_folder(path, fails)
    with pytest.raises(CheckpointError, match="no file was written"):
        files.save_folder(path, lambda folder: None)
    with pytest.raises(KeyboardInterrupt):
        files.save_folder(path, lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    assert names(path.parent) == ["a.ckpt"]
    assert files.load(path)["global_step"] == 3


def test_a_file_that_no_process_noted_is_not_committed(tmp_path: Path) -> None:
    folder = folders.begin(tmp_path / "a.ckpt")
    (folder / "one").write_text("1")
    folders.note(folder)
    (folder / "late").write_text("2")
    with pytest.raises(CheckpointError, match="is not whole: late"):
        folders.commit(folder, tmp_path / "a.ckpt")
    folders.abandon(folder)
    assert names(tmp_path) == []


def test_a_folder_in_waiting_stands_for_the_one_that_is_missing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two folders cannot change names in one step, and the process died between its two renames."""
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    real = os.rename

    class Killed(KeyboardInterrupt):
        pass

    def rename(one: Any, other: Any) -> None:
        if str(other) == str(path):
            raise Killed
        real(one, other)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(folders, "_discard", lambda folder: None)
    with pytest.raises(Killed):
        save(path, 4)
    monkeypatch.undo()
    assert not path.exists()
    assert files.load(path)["global_step"] == 4
    assert files.recorded_step(files.newest(path.parent)) == 4
    save(path.parent / "b.ckpt", 1)  # whoever writes next puts it in place
    assert names(path.parent) == ["a.ckpt", "b.ckpt"]
    assert files.load(path)["global_step"] == 4


def test_leftovers_of_the_living_are_left_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = path.parent / atomic.temporary_name("b.ckpt").replace(f".{os.getpid()}-", f".{os.getppid()}-")
    elsewhere = path.parent / ".b.ckpt.1-00000000-00000000.tmp"
    for folder in (theirs, elsewhere):
        folder.mkdir()
    mine = folders.begin(path.parent / "c.ckpt")  # this process writes two at once
    save(path, 4)
    assert {theirs.name, elsewhere.name, mine.name} < set(names(path.parent))
    os.utime(elsewhere, (1, 1))  # of another machine, and a day old
    folders.abandon(mine)
    save(path, 5)
    assert names(path.parent) == sorted([theirs.name, "a.ckpt"])


# ------------------------------------------------------------------ other people's folders


def test_B3_a_folder_of_lightning_is_read_with_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "theirs.ckpt"
    folder.mkdir()
    write(2)(folder)
    torch.save({"global_step": 2, "epoch": 0, "pytorch-lightning_version": "2.6.6"}, folder / "meta.pt")
    with pytest.warns(LeydenWarning, match="has no manifest: whether it is complete cannot be known"):
        content = files.load(folder)
    assert set(content["state_dict"]) == {"weight", "bias"}
    assert files.newest(tmp_path) is None  # never chosen


class Evil:
    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.place,)


def test_B1_values_in_a_folder_are_not_unpickled(tmp_path: Path) -> None:
    place = tmp_path / "owned"

    def hostile(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"model": {"w": torch.ones(2)}, "x": Evil(place)}, checkpoint_id=folder, no_dist=True)

    files.save_folder(tmp_path / "a.ckpt", hostile, {"global_step": 1})
    with pytest.raises(CheckpointError, match="mkdir', which is code"):
        files.load(tmp_path / "a.ckpt")
    state = {"model": {"w": torch.zeros(2)}, "x": 0}
    with warnings.catch_warnings(), pytest.raises(BaseException, match="mkdir', which is code"):
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=sharded.Reader(tmp_path / "a.ckpt"), planner=sharded.Planner(), no_dist=True)
    assert files.look(tmp_path / "a.ckpt")["x"] == "<a value>"
    assert not place.exists()


def test_B1_a_table_of_contents_may_not_point_outside(path: Path, tmp_path: Path) -> None:
    contents = pickle.loads((path / ".metadata").read_bytes())
    for info in contents.storage_data.values():
        info.relative_path = "../secret"
    (path / ".metadata").write_bytes(pickle.dumps(contents))
    with pytest.raises(CheckpointError, match="points to '../secret', outside of it"):
        sharded.load(path, verify=False)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        files.load(tmp_path / "a.ckpt")


# ------------------------------------------------------------------ what a hostile reviewer tried


def test_C4_a_link_that_is_replaced_leaves_what_it_led_to_a_checkpoint(path: Path) -> None:
    link = path.parent / "last.ckpt"
    link.symlink_to(path.name)
    save(link, 4)
    assert (link.is_symlink(), files.load(link)["global_step"]) == (False, 4)
    assert files.load(path)["global_step"] == 3
    assert names(path.parent) == ["a.ckpt", "last.ckpt"]


@pytest.mark.parametrize("text", ["[]", "7", "[" * 100_000, "\ufeff", "null"])
def test_C6_a_manifest_of_any_other_kind_is_damage(path: Path, text: str) -> None:
    (path / folders.MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointDamagedError, match="manifest"):
        files.load(path)
    with pytest.raises(CheckpointDamagedError, match="no good checkpoint"):
        files.newest(path.parent)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../b.ckpt"}, {"name": 7}, {"record": None}, {"format": "1"}, {"files": []},
        {"files": {"../secret": {"bytes": 1, "crc32": "00000000"}}},
        {"files": {"/dev/zero": {"bytes": 0, "crc32": "00000000"}}},
        {"files": {"meta.pt": 7}}, {"files": {"meta.pt": {}}},
    ],
)  # fmt: skip
def test_B1_a_manifest_of_a_stranger_speaks_of_its_own_folder_only(path: Path, change: dict[str, Any]) -> None:
    content = json.loads((path / folders.MANIFEST).read_text())
    content = {**{key: value for key, value in content.items() if key != "crc32"}, **change}
    text = json.dumps({"crc32": folders._checksum(content), **content})
    (path / folders.MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointDamagedError, match="did not write"):
        files.verify(path)


def test_any_plain_record_can_be_kept(tmp_path: Path) -> None:
    files.save_folder(
        tmp_path / "a.ckpt", write(1), {"global_step": 1, "scores": {9: 0.5, 10: float("nan"), "x": None}}
    )
    assert files.verify(tmp_path / "a.ckpt")


def test_every_folder_in_a_checkpoint_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(atomic, "sync_folder", lambda folder: flushed.append(folder.name))

    def deep(folder: Path) -> None:
        (folder / "a" / "b" / "c").mkdir(parents=True)
        (folder / "a" / "b" / "c" / "file").write_text("x")

    files.save_folder(tmp_path / "a.ckpt", deep)
    assert {"a", "b", "c"} <= set(flushed)
    assert flushed[-1] == tmp_path.name


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_C6_a_folder_of_lightning_without_its_data_is_an_error_of_ours(tmp_path: Path, how: str) -> None:
    write(3)(tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt" / "meta.pt").unlink()
    data = tmp_path / "a.ckpt" / "__0_0.distcp"
    content = data.read_bytes()
    data.unlink()
    if how == "cut":
        data.write_bytes(content[: len(content) // 3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointDamagedError, match=r"a\.ckpt.* cannot be read"):
            files.load(tmp_path / "a.ckpt")


@pytest.mark.parametrize("verb", [files.load, files.look])
def test_C6_a_table_of_contents_of_which_parts_are_missing_is_damage(tmp_path: Path, verb: Any) -> None:
    write(3)(tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt" / "meta.pt").unlink()  # as Lightning's are, it has nothing to be compared with
    table = tmp_path / "a.ckpt" / ".metadata"
    table.write_bytes(table.read_bytes().replace(b"\x04size", b"\x04sjze"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CheckpointDamagedError, match=r"a\.ckpt.* cannot be read"):
            verb(tmp_path / "a.ckpt")


def test_what_is_no_dict_beside_the_shards_says_so(tmp_path: Path) -> None:
    files.save_folder(tmp_path / "a.ckpt", lambda folder: torch.save([1, 2], folder / "meta.pt"))
    with pytest.raises(CheckpointError, match="holds a list in meta.pt"):
        files.load(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "to", [lambda storage, location: storage, {"cuda:0": "cpu"}, "cpu", torch.device("meta"), None]
)
def test_map_location_moves_tensors_whatever_else_there_is(tmp_path: Path, to: Any) -> None:
    def into(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = {"model": {"w": torch.ones(2)}, "hyper_parameters": Namespace(lr=0.1)}
            dcp.save(state, checkpoint_id=folder, no_dist=True)

    files.save_folder(tmp_path / "a.ckpt", into)
    content = files.load(tmp_path / "a.ckpt", map_location=to)
    assert content["hyper_parameters"] == Namespace(lr=0.1)
    assert content["state_dict"]["w"].device.type == ("meta" if to == torch.device("meta") else "cpu")


def test_a_second_folder_has_the_same_files_and_outlives_the_first(path: Path) -> None:
    other = path.parent / "b.ckpt"
    folders.second(path, other)
    assert folders.check(other)["record"] == folders.manifest(path)["record"]
    assert all((path / name).samefile(other / name) for name in folders.manifest(path)["files"])
    folders.remove(path)
    assert files.load(other)["global_step"] == 3
    assert names(path.parent) == ["b.ckpt"]


def test_several_processes_share_out_the_checksums(path: Path) -> None:
    noted = list(folders.manifest(path)["files"])
    spoilt = path / noted[1]
    content = bytearray(spoilt.read_bytes())
    content[-1] ^= 1
    spoilt.write_bytes(bytes(content))
    folders.check(path, 0, 2)
    with pytest.raises(CheckpointDamagedError, match=re.escape(repr(noted[1]))):
        folders.check(path, 1, 2)

# SPDX-License-Identifier: Apache-2.0
"""Tests of the plug-in that writes on a thread: order, waiting, failures."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from leyden.checkpoint_io import AsyncCheckpointIO, TorchCheckpointIO
from leyden.errors import CheckpointError


class Gate(TorchCheckpointIO):
    """Waits before it writes until it is let through; fails for a file called "bad"."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.events: list[str] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.entered.set()
        assert self.open.wait(60)
        if path.name == "bad":
            raise OSError("the disk is full")
        super().save_checkpoint(checkpoint, path, storage_options)
        self.events.append(path.name)


@pytest.fixture
def gate() -> Gate:
    return Gate()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "leyden-checkpoint"]


def test_a_save_returns_before_it_is_written(gate, tmp_path):
    plugin, weight = AsyncCheckpointIO(gate), torch.zeros(100)
    plugin.save_checkpoint({"w": weight}, tmp_path / "a")
    weight += 1
    assert gate.entered.wait(60)
    assert not (tmp_path / "a").exists()
    assert [thread.daemon for thread in threads()] == [False]
    gate.open.set()
    plugin.settle()
    assert threads() == []
    assert torch.equal(torch.load(tmp_path / "a")["w"], torch.zeros(100))


@pytest.mark.parametrize(
    "verb", ["save_checkpoint", "load_checkpoint", "remove_checkpoint", "then", "together", "teardown"]
)
def test_what_comes_next_waits(verb, gate, tmp_path):
    plugin = AsyncCheckpointIO(gate)
    plugin.save_checkpoint({"w": 1}, tmp_path / "a")
    assert gate.entered.wait(60)
    threading.Timer(0.05, gate.open.set).start()
    if verb == "save_checkpoint":
        plugin.save_checkpoint({"w": 2}, tmp_path / "b")
        assert gate.events[0] == "a"
    elif verb == "load_checkpoint":
        assert plugin.load_checkpoint(tmp_path / "a") == {"w": 1}
    elif verb == "remove_checkpoint":
        plugin.remove_checkpoint(tmp_path / "a")
        assert not (tmp_path / "a").exists()
    elif verb == "then":
        plugin.then(lambda: gate.events.append("then"))
        assert gate.events == ["a", "then"]
    elif verb == "together":
        with plugin.together():
            assert gate.events == ["a"]
    else:
        plugin.teardown()
        assert gate.events == ["a"]
    plugin.teardown()


def test_saves_of_one_moment_are_written_in_order_after_it(gate, tmp_path):
    plugin, seen = AsyncCheckpointIO(gate), []
    gate.open.set()
    with plugin.together(), plugin.together():
        for name in "ab":
            plugin.save_checkpoint({}, tmp_path / name)
            plugin.then(lambda: seen.append(sorted(gate.events)))
            plugin.otherwise(lambda: seen.append("undone"))
        assert not gate.entered.is_set()
    plugin.settle()
    assert seen == [["a"], ["a", "b"]]


@pytest.mark.parametrize("fails", ["write", "action"])
def test_a_failure_ends_the_moment_and_is_raised_once(fails, gate, tmp_path):
    plugin, seen = AsyncCheckpointIO(gate), []
    gate.open.set()
    plugin.listen(seen.append)
    with plugin.together():
        plugin.save_checkpoint({}, tmp_path / "a")
        plugin.otherwise(lambda: seen.append("undo a"))
        plugin.save_checkpoint({}, tmp_path / ("bad" if fails == "write" else "b"))
        plugin.then(lambda: 1 / 0)
        plugin.otherwise(lambda: seen.append("undo b"))
        plugin.save_checkpoint({}, tmp_path / "c")
        plugin.otherwise(lambda: seen.append("undo c"))
        plugin.then(lambda: seen.append("then"))
    with pytest.raises(OSError if fails == "write" else ZeroDivisionError) as caught:
        plugin.settle()
    assert seen == ["undo c", "undo b", caught.value]
    assert gate.events == (["a"] if fails == "write" else ["a", "b"])
    plugin.settle()
    plugin.save_checkpoint({}, tmp_path / "d")
    plugin.teardown()
    assert (tmp_path / "d").exists()


def test_without_anybody_who_listens_the_next_call_raises(gate, tmp_path):
    plugin = AsyncCheckpointIO(gate)
    gate.open.set()
    plugin.save_checkpoint({}, tmp_path / "bad")
    with pytest.raises(OSError, match="full"):
        plugin.save_checkpoint({}, tmp_path / "a")
    plugin.save_checkpoint({}, tmp_path / "bad")
    with pytest.raises(OSError, match="full"):
        plugin.teardown()
    assert gate.events == []


def test_an_error_in_between_leaves_what_was_saved_before(gate, tmp_path):
    plugin = AsyncCheckpointIO(gate)
    gate.open.set()
    with pytest.raises(CheckpointError, match="cannot be pickled"), plugin.together():
        plugin.save_checkpoint({}, tmp_path / "a")
        plugin.save_checkpoint({"f": lambda: None}, tmp_path / "b")
    plugin.settle()
    assert gate.events == ["a"]


def test_whoever_is_told_of_a_file_may_save_and_wait(gate, tmp_path):
    plugin = AsyncCheckpointIO(gate)
    gate.open.set()

    def told() -> None:
        plugin.settle()
        plugin.save_checkpoint({}, tmp_path / "copy")
        with plugin.together():
            assert plugin.load_checkpoint(tmp_path / "a") == {}

    with plugin.together():
        plugin.save_checkpoint({}, tmp_path / "a")
        plugin.then(told)
    plugin.settle()
    assert gate.events == ["a", "copy"]


def test_memory_goes_back_on_teardown(tmp_path):
    plugin = AsyncCheckpointIO()
    plugin.save_checkpoint({"w": torch.zeros(1000)}, tmp_path / "a")
    plugin.settle()
    assert plugin._staging.nbytes == 4000
    plugin.teardown()
    assert plugin._staging.nbytes == 0
    assert torch.load(tmp_path / "a")["w"].shape == (1000,)

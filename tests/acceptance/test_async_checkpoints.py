# SPDX-License-Identifier: Apache-2.0
"""Asynchronous saving: files of exactly one step, nothing lost when it fails or is killed, everybody waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import async_checkpoint_script
import leyden as L
from async_checkpoint_script import SIZE, Model
from leyden.callbacks import Callback, ModelCheckpoint
from leyden.checkpoint_io import AsyncCheckpointIO, TorchCheckpointIO
from leyden.errors import CheckpointError, LeydenWarning
from leyden.loggers import Logger

SCRIPT = Path(__file__).with_name("async_checkpoint_script.py")


class Slow(TorchCheckpointIO):
    """Writes each file only when training has made ``steps`` more of them, or has ended; then it may fail."""

    def __init__(self, steps: int = 2, fails_at: int = -1) -> None:
        self.steps, self.fails_at = steps, fails_at
        self.trainer: Any = None
        self.written: list[tuple[str, int]] = []  # name, steps made when it was complete

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        until = checkpoint["global_step"] + self.steps
        waiting = threading.Event()
        for _ in range(2000):
            if self.trainer.global_step >= until or self.trainer.waits:
                break
            waiting.wait(0.001)
        if checkpoint["global_step"] == self.fails_at:
            raise CheckpointError(f"The checkpoint {path!r} could not be written: the disk is full.")
        super().save_checkpoint(checkpoint, path, storage_options)
        self.written.append((os.path.basename(path), self.trainer.global_step))


class Trainer(L.Trainer):
    waits = False
    """Whether somebody waits for what is being written: what is slow must not wait for training then."""


class Paced(Callback):
    """Lets the thread have its turn, and says when training is over."""

    def __init__(self, **errors: BaseException) -> None:
        self.errors = errors

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        settle = trainer.strategy.checkpoint_io.settle

        def settled() -> None:
            trainer.waits = True
            settle()
            trainer.waits = False

        trainer.strategy.checkpoint_io.settle = settled

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        threading.Event().wait(0.01)
        if trainer.global_step in self.errors:
            raise self.errors[trainer.global_step]


def run(
    folder: Path, io: Slow, *more: Callback, fails: dict[int, BaseException] | None = None, **arguments: Any
) -> Any:
    paced = Paced()
    paced.errors = fails or {}  # type: ignore[assignment]
    callback = ModelCheckpoint(folder, **{"async_save": True, "filename": "{step}", **arguments})
    trainer = Trainer(
        max_epochs=2, callbacks=[paced, callback, *more], logger=False, enable_progress_bar=False, plugins=io,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    io.trainer = trainer
    return trainer


def step_of(path: Any) -> int:
    """The step of a file, after checking that every number in it is of that step."""
    content = torch.load(path, weights_only=True)
    step: int = content["global_step"]
    assert len(content["state_dict"]) == 4
    for weight in content["state_dict"].values():
        assert torch.equal(weight, torch.full((SIZE,), float(step)))
    assert content["leyden"]["progress"]["global_step"] == step
    return step


def files(folder: Path) -> dict[str, int]:
    return {path.name: step_of(path) for path in sorted(folder.glob("*.ckpt"))}


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "leyden-checkpoint"]


def test_every_file_is_of_one_step_while_training_goes_on(tmp_path):
    io = Slow(steps=2)
    trainer = run(tmp_path, io, every_n_train_steps=3, save_top_k=-1)
    trainer.fit(Model())
    assert files(tmp_path) == {"step=3.ckpt": 3, "step=6.ckpt": 6, "step=9.ckpt": 9}
    assert io.written[0][1] >= 5  # training went on meanwhile
    assert threads() == []
    assert trainer.strategy.checkpoint_io is io


def test_a_second_save_waits_for_the_first(tmp_path):
    io = Slow(steps=100)
    run(tmp_path, io, every_n_train_steps=2, save_top_k=-1).fit(Model())
    assert io.written == [
        ("step=2.ckpt", 4),
        ("step=4.ckpt", 6),
        ("step=6.ckpt", 8),
        ("step=8.ckpt", 10),
        ("step=10.ckpt", 10),
    ]


@pytest.mark.parametrize("save_last", [True, "link"])
def test_C3_what_is_replaced_goes_when_the_new_file_is_complete(save_last, tmp_path, monkeypatch):
    io, at_removal = Slow(), []
    remove = io.remove_checkpoint

    def removing(path: Any) -> None:
        at_removal.append((os.path.basename(path), files(tmp_path)))
        remove(path)

    monkeypatch.setattr(io, "remove_checkpoint", removing)
    trainer = run(tmp_path, io, every_n_train_steps=3, save_last=save_last)
    trainer.fit(Model())
    assert at_removal[0] == ("step=3.ckpt", {"last.ckpt": 6, "step=3.ckpt": 3, "step=6.ckpt": 6})
    assert files(tmp_path) == {"last.ckpt": 10, "step=9.ckpt": 9}


@pytest.mark.parametrize("async_save", [True, False])
def test_K3_a_link_is_made_when_its_target_is_complete(async_save, tmp_path):
    io = Slow()
    trainer = run(tmp_path, io, every_n_train_steps=5, save_last="link", async_save=async_save)
    if not async_save:
        io.steps = 0

    class Looks(Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            last = tmp_path / "last.ckpt"
            assert last.exists() == last.is_symlink()  # never dangling

    trainer.callbacks.insert(0, Looks())
    trainer.fit(Model())
    assert os.readlink(tmp_path / "last.ckpt") == "step=10.ckpt"


class Told(Logger):
    name, version = "told", 0

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, int, int]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        path = checkpoint_callback.last_model_path or checkpoint_callback.best_model_path
        assert checkpoint_callback.best_model_path
        self.heard.append((os.path.basename(path), step_of(checkpoint_callback.best_model_path), len(threads())))


def test_loggers_are_told_when_the_file_is_complete(tmp_path):
    io, logger = Slow(), Told()
    trainer = run(tmp_path, io, every_n_train_steps=4)
    trainer.loggers = [logger]
    trainer.fit(Model())
    assert logger.heard == [("step=4.ckpt", 4, 1), ("step=8.ckpt", 8, 1)]


def test_a_failed_write_ends_the_fit_within_one_step(tmp_path):
    class Waits(Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            if trainer.global_step == 7:
                for thread in threads():
                    thread.join()

    io = Slow(steps=1, fails_at=6)
    trainer = run(tmp_path, io, Waits(), every_n_train_steps=3, save_top_k=-1)
    with pytest.raises(CheckpointError, match=r"step=6\.ckpt.*the disk is full"):
        trainer.fit(Model())
    assert trainer.global_step == 7  # it fails in the batch after the save, and that batch is the last one
    assert files(tmp_path) == {"step=3.ckpt": 3}
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "step=3.ckpt")
    assert trainer.checkpoint_callback.files == (str(tmp_path / "step=3.ckpt"),)
    assert threads() == []


def test_a_write_that_fails_after_the_last_step_ends_the_fit_too(tmp_path):
    io = Slow(steps=100, fails_at=10)
    trainer = run(tmp_path, io, save_last=True)
    with (
        pytest.raises(CheckpointError, match=r"step=10\.ckpt"),
        pytest.warns(LeydenWarning, match="could not be saved"),
    ):
        trainer.fit(Model())
    assert trainer.interrupted
    assert files(tmp_path) == {"last.ckpt": 5, "step=5.ckpt": 5}
    assert trainer.checkpoint_callback.last_model_path == str(tmp_path / "last.ckpt")


def test_a_failed_write_does_not_take_the_place_of_an_exception(tmp_path):
    io = Slow(steps=100, fails_at=6)
    trainer = run(tmp_path, io, every_n_train_steps=3, fails={7: ZeroDivisionError("mine")})
    with (
        pytest.raises(ZeroDivisionError, match="mine"),
        pytest.warns(LeydenWarning, match="could not be written while"),
    ):
        trainer.fit(Model())
    assert files(tmp_path) == {"step=3.ckpt": 3}


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt()])
def test_exceptions_and_ctrl_c_wait_for_the_writer(error, tmp_path):
    io = Slow(steps=100)
    trainer = run(tmp_path, io, every_n_train_steps=3, save_last=True, fails={7: error})
    if isinstance(error, KeyboardInterrupt):
        trainer.fit(Model())
        assert trainer.interrupted
    else:
        with pytest.raises(ZeroDivisionError, match="mine"):
            trainer.fit(Model())
    assert files(tmp_path) == {"last.ckpt": 7, "step=6.ckpt": 6}
    assert threads() == []
    assert trainer.strategy.checkpoint_io is io


def test_a_save_inside_fit_returns_at_once_and_a_test_right_after_waits(tmp_path):
    at_return = []

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "mine.ckpt")
                at_return.append((tmp_path / "mine.ckpt").exists())

    class Tested(Model):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("weight", self.weights[0].mean())

        test_dataloader = Model.train_dataloader

    io = Slow()
    trainer = run(tmp_path / "ckpts", io, Saves())
    trainer.fit(Tested())
    assert at_return == [False]
    assert step_of(tmp_path / "mine.ckpt") == 4
    trainer.save_checkpoint(tmp_path / "after.ckpt")  # no run: complete when it returns
    assert step_of(tmp_path / "after.ckpt") == 10
    assert trainer.test(ckpt_path="best", verbose=False) == [{"weight": 10.0}]


def test_as_a_plug_in_it_takes_every_save_and_serves_a_second_fit(tmp_path):
    io = AsyncCheckpointIO()
    callback = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_last=True, filename="{step}")
    trainer = L.Trainer(
        max_epochs=1, callbacks=callback, logger=False, enable_progress_bar=False, enable_model_summary=False,
        plugins=[io], accelerator="cpu",
    )  # fmt: skip
    model = Model()
    trainer.fit(model)
    assert files(tmp_path) == {"last.ckpt": 5, "step=3.ckpt": 3}
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert files(tmp_path) == {"last.ckpt": 10, "step=9.ckpt": 9}
    assert trainer.strategy.checkpoint_io is io
    assert io._staging.nbytes == 0
    assert threads() == []


def test_files_of_one_step_share_one_copy_of_the_state(tmp_path):
    sizes = []

    class Looks(Callback):
        order = 101

        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            sizes.append(trainer.strategy.checkpoint_io._staging.nbytes)

    io = Slow(steps=1)
    run(tmp_path, io, Looks(), every_n_train_steps=3, save_last=True).fit(Model())
    state = 4 * 4 * SIZE
    assert max(sizes) <= 1.05 * state


@pytest.mark.parametrize("async_save", [False, True])
def test_K1_C3_in_a_remote_folder(async_save, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    folder = f"memory://{tmp_path.name}/ckpts"
    callback = ModelCheckpoint(folder, every_n_train_steps=3, save_last=True, filename="{step}", async_save=async_save)
    trainer = L.Trainer(
        max_epochs=2, callbacks=callback, logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Model())
    memory = fsspec.filesystem("memory")
    names = sorted(path.rsplit("/", 1)[1] for path in memory.ls(folder, detail=False))
    assert names == ["last.ckpt", "step=9.ckpt"]
    for path, step in ((callback.last_model_path, 10), (callback.best_model_path, 9)):
        with memory.open(path, "rb") as file:
            assert step_of(file) == step
    again = ModelCheckpoint(folder, every_n_train_steps=3, save_last=True, filename="{step}", async_save=async_save)
    resumed = L.Trainer(
        max_epochs=3, callbacks=again, logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu",
    )  # fmt: skip
    resumed.fit(Model(), ckpt_path=callback.last_model_path)
    names = sorted(path.rsplit("/", 1)[1] for path in memory.ls(folder, detail=False))
    assert names == ["last.ckpt", "step=15.ckpt"]
    assert set(again.files) == {again.best_model_path, again.last_model_path}


MOMENTS = ["2:begin", "3:1000000", "3:end", "4:rename"]
MORE = [
    "1:begin",
    "2:10000",
    "2:rename",
    "3:begin",
    "3:rename",
    "4:5",
    "4:begin",
    "4:end",
    "5:begin",
    "6:1000",
    "6:rename",
]


@pytest.mark.parametrize("moment", [*MOMENTS, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE)])
def test_C1_K4_killed_in_the_middle_of_a_write_the_one_before_is_there(moment, tmp_path, recwarn):
    folder = tmp_path / "ckpts"
    command = [sys.executable, str(SCRIPT), str(folder), moment]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    number, what = moment.split(":")
    complete = int(number) - (what != "end")  # in turn step=3, last, step=6, last, step=9, last ...
    steps = files(folder) if folder.is_dir() else {}
    assert max(steps.values(), default=0) == 3 * ((complete + 1) // 2)
    async_checkpoint_script.main(folder, "99:begin")
    # K4: the same names as those of a run that was never killed
    assert files(folder) == {"last.ckpt": 15, "step=15.ckpt": 15}


def test_P2_a_signal_waits_for_the_writer(tmp_path, recwarn):
    folder = tmp_path / "ckpts"
    command = [sys.executable, str(SCRIPT), str(folder), "3:sigterm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 143, done.stderr
    found = files(folder)
    assert found["step=6.ckpt"] == 6
    stopped = found["last.ckpt"]
    assert 6 <= stopped < 15
    assert not list(folder.glob(".*"))
    async_checkpoint_script.main(folder, "99:begin")
    assert files(folder) == {"last.ckpt": 15, "step=15.ckpt": 15}

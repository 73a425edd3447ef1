# SPDX-License-Identifier: Apache-2.0
"""Tests of the checkpoint that is saved when an exception ends a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from leyden.callbacks import Checkpoint, OnExceptionCheckpoint
from leyden.errors import MisconfigurationException
from leyden.types import TrainerFn


def steps_in(folder: Path) -> dict[str, int]:
    return {path.name: torch.load(path, weights_only=True)["global_step"] for path in folder.glob("*.ckpt")}


def fail(make_trainer: Any, *callbacks: Any, at: int = 2, ckpt_path: str | None = None, named: bool = False) -> None:
    trainer = make_trainer(callbacks)
    trainer.fails = {f"batch {at}": ZeroDivisionError("mine")}
    with pytest.raises(ZeroDivisionError, match="mine"):
        trainer.fit(ckpt_path, named)


def test_it_saves_the_state_at_the_exception(make_trainer, tmp_path):
    callback = OnExceptionCheckpoint(tmp_path)
    assert isinstance(callback, Checkpoint)
    assert callback.ckpt_path == str(tmp_path / "on_exception.ckpt")
    fail(make_trainer, callback)
    assert steps_in(tmp_path) == {"on_exception.ckpt": 2}


def test_a_run_that_ends_well_leaves_nothing(make_trainer, tmp_path):
    callback = OnExceptionCheckpoint(tmp_path / "never", "mine")
    make_trainer([callback]).fit()
    assert not (tmp_path / "never").exists()


def test_it_goes_when_what_it_was_kept_for_is_done(make_trainer, tmp_path):
    callback = OnExceptionCheckpoint(tmp_path)
    fail(make_trainer, callback)
    make_trainer([callback]).fit()  # the same object
    assert steps_in(tmp_path) == {}
    fail(make_trainer, callback)
    fail(make_trainer, OnExceptionCheckpoint(tmp_path), at=1, ckpt_path=callback.ckpt_path)  # the run that goes on
    assert list(steps_in(tmp_path)) == ["on_exception.ckpt"]
    make_trainer([OnExceptionCheckpoint(tmp_path)]).fit(callback.ckpt_path, named=True)
    assert list(steps_in(tmp_path)) == ["on_exception.ckpt"]
    make_trainer([OnExceptionCheckpoint(tmp_path)]).fit(callback.ckpt_path)
    assert steps_in(tmp_path) == {}


def test_C4_a_file_of_another_run_is_left_alone(make_trainer, tmp_path):
    fail(make_trainer, OnExceptionCheckpoint(tmp_path), at=1)
    make_trainer([OnExceptionCheckpoint(tmp_path)]).fit()
    assert steps_in(tmp_path) == {"on_exception.ckpt": 1}
    other = OnExceptionCheckpoint(tmp_path)
    fail(make_trainer, other, at=3)
    assert steps_in(tmp_path) == {"on_exception.ckpt": 1, "on_exception-v1.ckpt": 3}
    assert other.ckpt_path == str(tmp_path / "on_exception-v1.ckpt")


def test_nothing_for_a_test_or_a_fast_dev_run(make_trainer, tmp_path):
    callback = OnExceptionCheckpoint(tmp_path)
    trainer = make_trainer([callback])
    trainer.state.fn = TrainerFn.TESTING
    trainer.call("on_exception", ValueError())
    trainer = make_trainer([callback])
    trainer.fast_dev_run = True
    trainer.call("on_exception", ValueError())
    assert steps_in(tmp_path) == {}


def test_a_failed_save_is_not_in_the_books(make_trainer, tmp_path):
    callback = OnExceptionCheckpoint(tmp_path)
    trainer = make_trainer([callback])
    trainer.fails = {"save on_exception.ckpt": OSError("full")}
    with pytest.raises(OSError, match="full"):
        trainer.call("on_exception", ValueError())
    assert (callback.files, callback.state_dict()["path"]) == ((), "")


def test_an_empty_name():
    with pytest.raises(MisconfigurationException, match="filename=''"):
        OnExceptionCheckpoint(".", "")

# SPDX-License-Identifier: Apache-2.0
"""Counters under Lightning's names: in a checkpoint, and as attributes of the fit loop."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import leyden as L
from leyden.errors import MisconfigurationException, NoModuleError, RemovedHookError
from leyden.loops.lightning_loops import from_lightning, to_lightning
from leyden.progress import Progress

QUIET: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu",
}  # fmt: skip


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(6, 2), batch_size=2)


def test_the_loop_shows_the_counters_that_lightning_2_6_6_shows() -> None:
    trainer = L.Trainer(**QUIET, max_epochs=2, accumulate_grad_batches=2)
    assert not trainer.fit_loop.done
    trainer.fit(Model())
    loop = trainer.fit_loop
    inner = loop.epoch_loop
    assert (loop.done, loop.total_batch_idx, loop.global_step) == (True, 5, 4)
    assert (loop.epoch_progress.current.completed, loop.epoch_progress.current.ready) == (2, 2)
    assert (inner.batch_progress.total.ready, inner.batch_progress.is_last_batch) == (6, True)
    assert inner.automatic_optimization.optim_progress.optimizer.step.total.completed == 4
    assert (inner.global_step, inner.total_batch_idx, inner.max_steps) == (4, 5, -1)


def test_a_test_may_say_where_the_run_is() -> None:
    trainer = L.Trainer(**QUIET, max_epochs=3)
    trainer.fit_loop.epoch_progress.current.completed = 2
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 7
    assert (trainer.current_epoch, trainer.global_step) == (2, 7)
    with pytest.raises(AttributeError, match="ready cannot be set"):
        trainer.fit_loop.epoch_progress.current.ready = 3
    with pytest.raises(AttributeError, match="has no 'epoch_progres'"):
        _ = trainer.fit_loop.epoch_progres  # type: ignore[attr-defined, unused-ignore]


def test_a_trainer_can_still_be_pickled() -> None:
    assert not pickle.loads(pickle.dumps(L.Trainer(**QUIET, max_epochs=1))).fit_loop.done


@pytest.mark.parametrize("automatic", [True, False])
def test_steps_by_hand_are_counted_where_lightning_counts_them(automatic: bool) -> None:
    progress = Progress(epoch=1, batch_idx=2, batches=5, global_step=7, optimizer_steps=[5, 2])
    fit = to_lightning(progress, [], False, automatic)["fit_loop"]
    ours = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    by_hand = fit["epoch_loop.manual_optimization.optim_step_progress"]["total"]["completed"]
    assert (ours, by_hand) == ((7, 0) if automatic else (0, 7))
    back = Progress()
    from_lightning({"loops": {"fit_loop": fit}, "global_step": 7, "optimizer_states": [{}, {}]}, back)
    assert (back.optimizer_steps, back.epoch, back.batch_idx) == ([7, 0], 1, 2)


def test_errors_are_of_the_kinds_that_lightning_raises() -> None:
    with pytest.raises(TypeError, match=r"test\(\)` requires a `LightningModule"):
        L.Trainer(**QUIET).test()
    assert issubclass(NoModuleError, MisconfigurationException)
    Model.training_epoch_end = lambda self, outputs: None  # type: ignore[attr-defined]
    try:
        with pytest.raises(NotImplementedError, match="Support for `training_epoch_end` has been removed") as raised:
            L.Trainer(**QUIET, fast_dev_run=1).fit(Model())
    finally:
        del Model.training_epoch_end  # type: ignore[attr-defined]
    assert isinstance(raised.value, RemovedHookError)

# SPDX-License-Identifier: Apache-2.0
"""Names of Lightning's loops and connectors that libraries reach for, and hyperparameters as they read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import leyden
from leyden import hparams
from leyden.compat.connector import _AcceleratorConnector, _load_from_checkpoint


class Module(leyden.LightningModule):
    def __init__(self, width: int = 4, sizes: dict[str, int] | None = None, **more: Any) -> None:
        sizes = sizes or {"default": width}
        more["added"] = 1
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, 1)
        self.seen: list[Any] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loop = self.trainer.fit_loop.epoch_loop
        self.seen.append((loop.batch_idx, loop.total_batch_idx, loop.global_step, loop._batches_that_stepped))
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.has_validation = self.trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()
        return torch.optim.SGD(self.parameters(), 0.1)


class Validated(Module):
    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        pass


def quiet(**more: Any) -> leyden.Trainer:
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return leyden.Trainer(accelerator="cpu", **{**off, "max_epochs": 2, **more})


DATA = torch.utils.data.DataLoader(torch.ones(9, 2), batch_size=3)


def test_the_epoch_loop_says_where_a_fit_stands() -> None:
    module, trainer = Module(), quiet()
    trainer.fit(module, DATA)
    assert module.seen == [(index % 3, index, index, index) for index in range(6)]
    progress = trainer.fit_loop.epoch_progress
    assert (progress.current.completed, progress.current.ready) == (2, 2)
    loop = trainer.fit_loop.epoch_loop
    assert loop.batch_progress.total.ready == 6
    assert loop.automatic_optimization.optim_progress.optimizer.step.total.completed == 6


def test_the_source_of_validation_is_known_when_optimizers_are_configured() -> None:
    for module, data, known in ((Module(), None, False), (Validated(), DATA, True)):
        quiet().fit(module, DATA, data)
        assert module.has_validation is known
    assert not quiet().fit_loop.epoch_loop.val_loop._data_source.is_defined()


def test_counters_that_libraries_set_are_those_of_the_trainer() -> None:
    trainer = quiet()
    trainer.fit_loop.epoch_progress.current.completed = 1
    trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed += 5
    trainer.fit_loop.epoch_loop._batches_that_stepped = 7
    assert (trainer.current_epoch, trainer.global_step, trainer.progress.batches_that_stepped) == (1, 5, 7)
    with pytest.raises(AttributeError, match=r"cannot be set.*trainer.progress"):
        trainer.fit_loop.epoch_loop.batch_progress.total.ready = 3


@pytest.mark.parametrize("reach", ["fit_loop.epoch_lop", "validate_loop.epoch_loop", "fit_loop.epoch_loop._results"])
def test_a_name_that_is_not_there_says_what_the_public_way_is(reach: str) -> None:
    trainer = quiet()  # its loops do not keep it
    found: Any = trainer
    *path, last = reach.split(".")
    for name in path:
        found = getattr(found, name)
    with pytest.raises(AttributeError, match=rf"has no '{last}'.*the public way is the Trainer"):
        getattr(found, last)


def test_the_connector_of_a_trainer_and_one_without() -> None:
    for found in (quiet(devices=1)._accelerator_connector, _AcceleratorConnector(devices=1, accelerator="cpu")):
        assert not found.is_distributed
        assert (found._accelerator_flag, found._devices_flag) == ("cpu", 1)
        assert found._parallel_devices == [torch.device("cpu")]
    assert _AcceleratorConnector._choose_auto_accelerator() in ("cpu", "cuda", "mps")
    assert _AcceleratorConnector(devices=2, accelerator="cpu", strategy="ddp").is_distributed


def test_hyperparameters_have_the_values_of_the_call_or_as_they_are_by_now() -> None:
    assert Module(3, other=2).hparams == {"width": 3, "sizes": None, "other": 2}
    assert hparams.take_values("current") == "passed"
    try:
        assert Module(3, other=2).hparams == {"width": 3, "sizes": {"default": 3}, "other": 2}

        class Derived(Module):
            def __init__(self, depth: int, width: int = 9) -> None:
                depth += 1
                super().__init__(width=width + 1)

        assert Derived(1).hparams == {"width": 9, "sizes": {"default": 10}, "depth": 2}
    finally:
        hparams.take_values("passed")


def test_loading_by_the_private_function(tmp_path: Path) -> None:
    trainer = quiet(max_epochs=1)
    trainer.fit(Module(5), DATA)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert _load_from_checkpoint(Module, tmp_path / "a.ckpt", width=6).hparams.width == 6

# SPDX-License-Identifier: Apache-2.0
"""A mixed process: objects whose classes come from another library with the names of ours (a stand-in for it)."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from leyden import LightningModule, Trainer
from leyden.callbacks import ModelCheckpoint
from leyden.errors import MisconfigurationException


def foreign(name: str, *bases: type, **members: Any) -> Any:
    """A class as it would be in another library, which is there to be imported: jsonargparse does that with subclasses."""
    made = type(name, bases, {"__module__": "thunder.pytorch", **members})
    for module in ("thunder", "thunder.pytorch"):
        sys.modules.setdefault(module, ModuleType(module))
    setattr(sys.modules["thunder.pytorch"], name, made)
    return made


def nothing(*_: Any, **__: Any) -> None:
    """A hook of the other library's base class."""


HOOKS = ("setup", "teardown", "on_fit_start", "on_train_start", "on_train_batch_end", "on_train_end", "on_exception")
TheirCallback = foreign("Callback", **dict.fromkeys(HOOKS, nothing))
TheirModule = foreign("LightningModule", torch.nn.Module)


def loader(*_: Any) -> DataLoader[Any]:
    return DataLoader(torch.ones(4, 2), batch_size=2)


TheirData = foreign(
    "LightningDataModule", prepare_data=nothing, setup=nothing, teardown=nothing, train_dataloader=loader
)


class Small(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**arguments: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_epochs=1, **{"enable_checkpointing": False, **quiet, **arguments})


def test_a_callback_of_another_library_works_by_its_methods() -> None:
    seen: list[int] = []

    class Counts(TheirCallback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch_idx)

    trainer(callbacks=[Counts()]).fit(Small(), loader())
    assert seen == [0, 1]


@pytest.mark.parametrize("name", ["LearningRateMonitor", "DeviceStatsMonitor", "GradientAccumulationScheduler"])
def test_one_that_needs_its_own_trainer_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(
        MisconfigurationException, match=rf"{name} of 'thunder' .* its own Trainer\. Use leyden\.callbacks"
    ):
        trainer(callbacks=[foreign(name, TheirCallback)()])


def test_one_derived_from_such_a_class_is_refused_too() -> None:
    theirs = foreign("Mine", foreign("LearningRateMonitor", TheirCallback))
    with pytest.raises(MisconfigurationException, match=r"Mine of 'thunder' logs through the private state"):
        trainer(callbacks=[theirs()])


def test_its_checkpoint_callback_is_one(tmp_path: Any) -> None:
    theirs = foreign("ModelCheckpoint", foreign("Checkpoint", TheirCallback))()
    found = trainer(callbacks=[theirs], enable_checkpointing=True, default_root_dir=tmp_path).callbacks
    assert theirs in found
    assert not [item for item in found if isinstance(item, ModelCheckpoint)]


def test_a_module_of_another_library_is_refused_with_the_reason() -> None:
    with pytest.raises(TypeError, match=r"is a LightningModule of 'thunder', whose log\(\).*leyden run"):
        trainer().fit(foreign("Net", TheirModule)(), loader())


@pytest.mark.parametrize("by_name", [True, False])
def test_a_data_module_of_another_library_works_in_both_places(by_name: bool) -> None:
    run = trainer()
    if by_name:
        run.fit(Small(), datamodule=TheirData())
    else:
        run.fit(Small(), TheirData())
    assert run.global_step == 2

# SPDX-License-Identifier: Apache-2.0
"""Tests of the plug-in that keeps checkpoints in files, and of a user's own in a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import leyden as L
from leyden.callbacks import ModelCheckpoint
from leyden.checkpoint_io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from leyden.errors import CheckpointError, MisconfigurationException
from leyden.precision import Precision
from leyden.strategies import SingleDeviceStrategy


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch).mean()

    test_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(6, 2), batch_size=2)

    test_dataloader = train_dataloader


class Shelf(CheckpointIO):
    """Keeps checkpoints in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.events: list[str] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.kept[str(path)] = checkpoint
        self.events.append(f"save {Path(path).name} {storage_options}")

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.events.append(f"load {Path(path).name} {map_location} {weights_only}")
        return self.kept[str(path)]

    def remove_checkpoint(self, path: Any) -> None:
        self.events.append(f"remove {Path(path).name}")
        del self.kept[str(path)]

    def teardown(self) -> None:
        self.events.append("teardown")


def trainer(**arguments: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "max_epochs": 2, **arguments})


def test_it_is_abstract_in_three_methods():
    with pytest.raises(TypeError, match="load_checkpoint.*remove_checkpoint.*save_checkpoint"):
        CheckpointIO()  # type: ignore[abstract]


def test_files(tmp_path):
    plugin = TorchCheckpointIO()
    path = tmp_path / "folder" / "x.ckpt"
    plugin.save_checkpoint({"a": torch.ones(2)}, path)
    assert torch.equal(plugin.load_checkpoint(path)["a"], torch.ones(2))
    plugin.remove_checkpoint(path)
    plugin.remove_checkpoint(path)
    assert list(path.parent.iterdir()) == []
    plugin.teardown()
    torch.save({"a": Shelf}, path)
    with pytest.raises(CheckpointError, match="weights_only=False"):
        plugin.load_checkpoint(path)
    assert plugin.load_checkpoint(path, weights_only=False) == {"a": Shelf}


def test_what_follows_a_save_happens_at_once():
    plugin, seen = TorchCheckpointIO(), []
    with plugin.together():
        plugin.then(lambda: seen.append("then"))
        plugin.otherwise(lambda: seen.append("otherwise"))
    plugin.listen(seen.append)
    plugin.settle()
    assert seen == ["then"]


@pytest.mark.parametrize("behind", [False, True])
def test_a_plug_in_of_the_user_gets_every_checkpoint(behind, tmp_path):
    shelf = Shelf()
    plugin = AsyncCheckpointIO(shelf) if behind else shelf
    run = trainer(plugins=[plugin], callbacks=ModelCheckpoint(tmp_path, filename="{step}"))
    assert run.strategy.checkpoint_io is plugin
    run.fit(Model())
    assert shelf.events == ["save step=3.ckpt None", "save step=6.ckpt None", "remove step=3.ckpt", "teardown"]
    assert list(tmp_path.iterdir()) == []
    run.save_checkpoint(tmp_path / "x.ckpt", storage_options={"a": 1})
    run.test(ckpt_path="best", verbose=False)
    again = trainer(plugins=plugin, max_epochs=3, callbacks=ModelCheckpoint(tmp_path, filename="{step}"))
    again.fit(Model(), ckpt_path=tmp_path / "x.ckpt")
    assert again.global_step == 9
    assert shelf.events[4:7] == ["save x.ckpt {'a': 1}", "load step=6.ckpt cpu True", "teardown"]
    assert "load x.ckpt cpu True" in shelf.events


def test_a_plug_in_of_the_user_without_weights_only():
    class Old(Shelf):
        def load_checkpoint(self, path: Any, map_location: Any = None) -> dict[str, Any]:  # type: ignore[override]
            return super().load_checkpoint(path, map_location)

    for old in (Old(), AsyncCheckpointIO(Old())):
        run = trainer(plugins=old, max_epochs=1, enable_checkpointing=False)
        run.fit(Model())
        run.save_checkpoint("shelf/x.ckpt")
        run.test(Model(), ckpt_path="shelf/x.ckpt", verbose=False)


def test_it_can_be_exchanged_on_the_strategy():
    run = trainer(enable_checkpointing=False, max_epochs=1)
    assert type(run.strategy.checkpoint_io) is TorchCheckpointIO
    run.strategy.checkpoint_io = shelf = Shelf()
    run.fit(Model())
    run.save_checkpoint("x.ckpt")
    assert list(shelf.kept) == ["x.ckpt"]
    given = SingleDeviceStrategy(checkpoint_io=shelf)
    assert trainer(strategy=given).strategy.checkpoint_io is shelf
    other = Shelf()
    assert trainer(strategy=given, plugins=[Precision(), other]).strategy.checkpoint_io is other


def test_plug_ins_that_cannot_be():
    with pytest.raises(MisconfigurationException, match="give one CheckpointIO, not several"):
        trainer(plugins=[Shelf(), TorchCheckpointIO()])
    with pytest.raises(MisconfigurationException, match=r"not a class\. Did you mean Shelf\(\.\.\.\)\?"):
        trainer(plugins=Shelf)
    with pytest.raises(
        MisconfigurationException,
        match="must be a Precision, CheckpointIO, ClusterEnvironment or LayerSync object, not str",
    ):
        trainer(plugins=["async"])

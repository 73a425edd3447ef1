# SPDX-License-Identifier: Apache-2.0
"""A model as it was written in 2019, and a Trainer that is quiet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as ptl


def batches(count: int, size: int = 4) -> DataLoader[Any]:
    """``count`` batches of two samples: four numbers and a class."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2 * count, size, generator=generator)
    return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), batch_size=2)


class Model(ptl.LightningModel):
    """What the page asks for, and no more; ``calls`` notes what was called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
        self.calls: list[Any] = []

    def forward(self, x: Any) -> Any:
        return self.layer(x)

    def loss(self, batch: Any) -> Any:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.forward(x), y)

    def training_step(self, data_batch: Any, batch_nb: int) -> Any:
        return {"loss": self.loss(data_batch)}

    def validation_step(self, data_batch: Any, batch_nb: int) -> Any:
        return {"val_loss": self.loss(data_batch)}

    def validation_end(self, outputs: Any) -> Any:
        return {"avg_val_loss": torch.stack([x["val_loss"] for x in outputs]).mean()}

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.1)]

    @ptl.data_loader
    def tng_dataloader(self) -> Any:
        return batches(20)

    @ptl.data_loader
    def val_dataloader(self) -> Any:
        return batches(4)


@pytest.fixture
def model() -> type[Model]:
    """The class of the model."""
    return Model


@pytest.fixture
def make_batches() -> Callable[..., Any]:
    """The function that makes a loader."""
    return batches


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., ptl.Trainer]:
    """Build a Trainer of 2019 for the CPU that shows nothing, and that keeps no log unless it is told to."""

    def make(**arguments: Any) -> ptl.Trainer:
        given: dict[str, Any] = {
            "gpus": None, "max_nb_epochs": 1, "progress_bar": False, "print_weights_summary": False,
            "checkpoint_callback": False, "default_root_dir": tmp_path, **arguments,
        }  # fmt: skip
        if "experiment" not in given:
            given["logger"] = False
        if given["checkpoint_callback"] == "default":
            del given["checkpoint_callback"]
        return ptl.Trainer(**given)

    return make


@pytest.fixture
def experiment(tmp_path: Path) -> Any:
    """An Experiment in a folder of the test's."""
    found = ptl.Experiment(save_dir=tmp_path / "logs", name="test")
    yield found
    found.close()

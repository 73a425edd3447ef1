# SPDX-License-Identifier: Apache-2.0
"""A script of 2019 that can be killed in a step and started again: python killed_script.py <folder> <version> <step>."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as ptl
from leyden import Experiment, Trainer
from leyden.callbacks import ModelCheckpoint


class Model(ptl.LightningModule):
    """Small, with all that a session has: dropout, shuffling, momentum, a schedule."""

    def __init__(self, killed_at: int) -> None:
        super().__init__()
        self.killed_at, self.steps = killed_at, 0
        self.net = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))

    def training_step(self, data_batch: Any, batch_nb: int) -> Any:
        if self.steps == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.steps += 1
        return {"loss": self.net(data_batch[0]).square().mean()}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def tng_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.arange(80.0).reshape(20, 4) / 80), batch_size=2, shuffle=True)


def main(folder: str, version: int, killed_at: int = -1) -> tuple[Model, Trainer]:
    """Train for four epochs of ten steps; the checkpoints of all versions go to one folder."""
    torch.manual_seed(1)
    experiment = Experiment(save_dir=folder, name="killed", version=version)
    trainer = Trainer(
        experiment=experiment, checkpoint_callback=ModelCheckpoint(filepath=os.path.join(folder, "weights")),
        max_nb_epochs=4, progress_bar=False, print_weights_summary=False, gpus=None,
    )  # fmt: skip
    model = Model(killed_at)
    trainer.fit(model)
    return model, trainer


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

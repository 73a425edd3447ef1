# SPDX-License-Identifier: Apache-2.0
"""A module and loaders that other processes can import: what the tests of ``verify_resume`` train."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L


class Net(L.LightningModule):
    """Dropout, running statistics, values on step and on epoch, a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def loaders() -> tuple[DataLoader, DataLoader]:
    """Loaders for training, four shuffled batches, and for validation."""
    data = TensorDataset(torch.sin(torch.arange(48.0)).reshape(16, 3))
    return DataLoader(data, batch_size=4, shuffle=True), DataLoader(data, batch_size=8)

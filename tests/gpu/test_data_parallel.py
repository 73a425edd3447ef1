# SPDX-License-Identifier: Apache-2.0
"""dp on two GPUs: copies of the module at the same time, and the numbers of one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as L

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        self.devices: set[Any] = set()  # the copies share it

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.devices.add((batch[0].device, self.device))
        loss = (self.layer(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_f1_two_gpus_give_the_losses_of_one(precision: str) -> None:
    x = torch.randn(61, 4, generator=torch.Generator().manual_seed(1))
    found, modules = [], []
    for strategy, count in (("single_device", 1), ("dp", 2)):
        L.seed_everything(2, verbose=False)
        module = Net()
        loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 8, shuffle=True)
        trainer = L.Trainer(
            accelerator="gpu", devices=count, strategy=strategy, max_epochs=2, logger=False, precision=precision,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader, loader)
        found.append([*(p.detach() for p in module.parameters()), *trainer.callback_metrics.values()])
        modules.append(module)
    zero, one = torch.device("cuda", 0), torch.device("cuda", 1)
    assert modules[1].devices == {(zero, zero), (one, one)}
    tolerance = 1e-5 if precision == "32-true" else 1e-2
    assert all(torch.allclose(a, b, atol=tolerance) for a, b in zip(*found, strict=True))

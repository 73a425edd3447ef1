# SPDX-License-Identifier: Apache-2.0
"""Compiled runs on a GPU: the same losses and logged values, also where torch records CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L


class Net(L.LightningModule):
    """Logs per step and per epoch, and reads a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1))
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss * 2 if self.current_epoch else loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(compile: Any, **options: Any) -> tuple[list[float], float]:
    """Return the losses of all steps, and the mean that was logged."""
    torch.manual_seed(1)
    module, inputs = Net(), torch.randn(70, 8)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(accelerator="cuda", devices=1, max_epochs=2, compile=compile, **quiet, **options)
    trainer.fit(module, DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=16))
    return module.losses, float(trainer.callback_metrics["loss_epoch"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("compile", [True, {"mode": "reduce-overhead"}])
def test_y1_a_compiled_run_on_a_gpu_has_the_losses_of_an_uncompiled_one(compile: Any, accumulate: int) -> None:
    losses, mean = fit(compile, accumulate_grad_batches=accumulate)
    plain, plain_mean = fit(False, accumulate_grad_batches=accumulate)
    assert losses == pytest.approx(plain, rel=1e-3)
    assert mean == pytest.approx(plain_mean, rel=1e-3)

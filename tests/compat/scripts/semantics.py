# SPDX-License-Identifier: Apache-2.0
"""Where the two differ on purpose, Lightning's own: a short window of accumulation, a bare schedule, the folder."""

import json
import os

import torch
from lightning import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.layer(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.5)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=30)]


seed_everything(5)
x = torch.randn(100, 3)
data = TensorDataset(x, x @ torch.tensor([[1.0], [-2.0], [0.5]]))
trainer = Trainer(max_epochs=4, accumulate_grad_batches=4, log_every_n_steps=1)
model = Regression()
trainer.fit(model, DataLoader(data, batch_size=10))

print(
    json.dumps(
        {
            "loss": trainer.callback_metrics["loss"].item(),
            "weight": model.layer.weight.flatten().tolist(),
            "rate": trainer.optimizers[0].param_groups[0]["lr"],
            "steps": trainer.global_step,
            "folders": sorted(name for name in os.listdir(".") if os.path.isdir(name)),
        }
    )
)

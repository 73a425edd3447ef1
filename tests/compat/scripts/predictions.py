# SPDX-License-Identifier: Apache-2.0
"""Several loaders in training and validation, predictions that a callback writes, a profiler, another precision."""

import json
import os

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, LambdaCallback
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader, grad_norm
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader


class Writer(BasePredictionWriter):
    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        torch.save(prediction, os.path.join("predictions", f"{dataloader_idx}_{batch_idx}.pt"))


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        loss = (self(batch["a"]).mean() - 1) ** 2 + (self(batch["b"]).mean() + 1) ** 2
        self.log("loss", loss, batch_size=8)
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.log_dict(grad_norm(self, norm_type=2))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val", self(batch).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


L.seed_everything(6)
os.mkdir("predictions")
seen = []
loaders = CombinedLoader(
    {"a": DataLoader(torch.randn(32, 2), 8), "b": DataLoader(torch.randn(20, 2), 8)}, "max_size_cycle"
)
trainer = L.Trainer(
    max_epochs=3,
    logger=False,
    enable_checkpointing=False,
    precision="64-true",
    profiler=SimpleProfiler(filename="profile"),
    callbacks=[Writer("batch"), LambdaCallback(on_fit_start=lambda trainer, module: seen.append(trainer.state.fn))],
)
model = Model()
trainer.fit(model, loaders, [DataLoader(torch.randn(12, 2), 5), DataLoader(torch.randn(4, 2), 4)])
metrics = {name: value.item() for name, value in sorted(trainer.callback_metrics.items())}
predicted = trainer.predict(model, DataLoader(torch.randn(10, 2), 4))
try:
    trainer.fit(torch.nn.Linear(1, 1))
except (TypeError, MisconfigurationException):
    refused = True

print(
    json.dumps(
        {
            "loss": metrics["loss"],
            "metrics": metrics,
            "predicted": sum(part.sum().item() for part in predicted),
            "files": sorted(os.listdir("predictions")),
            "fitting": seen == [TrainerFn.FITTING],
            "refused": refused,
            "dtype": str(predicted[0].dtype),
        }
    )
)

# SPDX-License-Identifier: Apache-2.0
"""Validation, early stopping, the best checkpoint, the csv logger, test, and the model loaded again."""

import csv
import json
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset, random_split


class Classifier(pl.LightningModule):
    def __init__(self, hidden: int = 16, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.model = torch.nn.Sequential(torch.nn.Linear(4, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 3))

    def _shared_step(self, batch, stage):
        x, y = batch
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        self.log_dict({f"{stage}_loss": loss, f"{stage}_acc": (logits.argmax(1) == y).float().mean()}, prog_bar=True)
        return loss

    def training_step(self, batch, batch_idx):
        return self._shared_step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self._shared_step(batch, "val")

    def test_step(self, batch, batch_idx):
        self._shared_step(batch, "test")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


pl.seed_everything(2)
x = torch.randn(256, 4)
train, val = random_split(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), [192, 64])
checkpoint = ModelCheckpoint(dirpath="best", monitor="val_loss", filename="{epoch:02d}-{val_loss:.2f}")
trainer = pl.Trainer(
    max_epochs=12,
    accelerator="cpu",
    devices=1,
    logger=CSVLogger("logs", name="run"),
    log_every_n_steps=2,
    callbacks=[checkpoint, EarlyStopping("val_loss", patience=2), LearningRateMonitor("epoch")],
)
model = Classifier()
trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=32))
(tested,) = trainer.test(model, DataLoader(val, batch_size=20), ckpt_path="best", verbose=False)
again = Classifier.load_from_checkpoint(checkpoint.best_model_path)
with Path("logs/run/version_0/metrics.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))

print(
    json.dumps(
        {
            "loss": tested["test_loss"],
            "accuracy": tested["test_acc"],
            "best": checkpoint.best_model_score.item(),
            "file": Path(checkpoint.best_model_path).name,
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "weight": again.model[0].weight.sum().item(),
            "rows": len(rows),
            "columns": sorted(rows[0]),
            "hidden": again.hparams.hidden,
        }
    )
)

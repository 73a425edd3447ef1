# SPDX-License-Identifier: Apache-2.0
"""Three ways to change the learning rate: by step, by epoch after a warm-up, and when a metric no longer improves."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, ReduceLROnPlateau, SequentialLR
from torch.utils.data import DataLoader, TensorDataset

import leyden as L


class Classifier(L.LightningModule):
    def __init__(self, schedule: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("loss", nn.functional.cross_entropy(self.net(images), labels))
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 5e-3)
        match self.hparams.schedule:
            case "step":  # a schedule that knows how many steps there are
                total = self.trainer.estimated_stepping_batches
                scheduler = {"scheduler": OneCycleLR(optimizer, 1e-2, total_steps=total), "interval": "step"}
            case "epoch":  # two epochs up, then down
                parts = [LinearLR(optimizer, 0.1, total_iters=2), CosineAnnealingLR(optimizer, T_max=6)]
                scheduler = {"scheduler": SequentialLR(optimizer, parts, milestones=[2]), "interval": "epoch"}
            case "plateau":  # a tenth, once the loss has not improved for an epoch
                scheduler = {"scheduler": ReduceLROnPlateau(optimizer, factor=0.1, patience=0), "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    train, val = TensorDataset(images[:1300], labels[:1300]), TensorDataset(images[1300:], labels[1300:])
    for schedule in sys.argv[1:] or ("step", "epoch", "plateau"):
        L.seed_everything(1, verbose=False)
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=8, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Classifier(schedule), DataLoader(train, 32, shuffle=True), DataLoader(val, 256))
        rate, accuracy = trainer.optimizers[0].param_groups[0]["lr"], float(trainer.callback_metrics["accuracy"])
        print(f"{schedule}: accuracy {accuracy:.4f}, last learning rate {rate:.2e}")


if __name__ == "__main__":
    main()

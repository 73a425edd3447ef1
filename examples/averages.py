# SPDX-License-Identifier: Apache-2.0
"""Train a small network on digits with noisy labels, with and without an average of its weights, and compare the two."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import leyden as L
from leyden.callbacks import EMAWeightAveraging


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        noise = torch.randint(0, 10, labels.shape)
        labels = torch.where(torch.rand(labels.shape) < 0.3, noise, labels)
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    everything = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    train, val = random_split(everything, [0.6, 0.4], torch.Generator().manual_seed(0))
    for name, callbacks in (("plain", []), ("average", [EMAWeightAveraging(decay=0.98)])):
        L.seed_everything(1)
        trainer = L.Trainer(max_epochs=8, logger=False, enable_checkpointing=False, callbacks=callbacks)
        trainer.fit(Classifier(), DataLoader(train, 32, shuffle=True), DataLoader(val, 256))
        print(f"{name} accuracy {float(trainer.callback_metrics['accuracy']):.4f}")


if __name__ == "__main__":
    main()

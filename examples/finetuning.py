# SPDX-License-Identifier: Apache-2.0
"""Train a backbone to know the digits 0 to 4, then a new head on it for 5 to 9, and thaw the backbone after three epochs."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import BackboneFinetuning


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, 5)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.head(self.backbone(images)), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.head(self.backbone(images)).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        # what is frozen now gets a parameter group of its own when it is thawed
        return torch.optim.Adam(filter(lambda parameter: parameter.requires_grad, self.parameters()), lr=1e-2)


def loaders(digits: range) -> tuple[DataLoader, DataLoader]:
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    chosen = (labels >= digits.start) & (labels < digits.stop)
    images, labels = images[chosen], labels[chosen] - digits.start
    train, val = TensorDataset(images[:100], labels[:100]), TensorDataset(images[100:], labels[100:])
    return DataLoader(train, 16, shuffle=True), DataLoader(val, 256)


def main() -> None:
    L.seed_everything(1)
    model = Classifier()
    trainer = L.Trainer(max_epochs=6, logger=False, enable_checkpointing=False)
    trainer.fit(model, *loaders(range(5)))

    other = Classifier()
    other.backbone.load_state_dict(model.backbone.state_dict())
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=3, lambda_func=lambda epoch: 1.5, verbose=True)
    trainer = L.Trainer(max_epochs=14, logger=False, enable_checkpointing=False, callbacks=thaw)
    trainer.fit(other, *loaders(range(5, 10)))
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    print(f"accuracy {float(trainer.callback_metrics['accuracy']):.4f}")
    print(f"learning rates of head and backbone: {rates[0]:.4f} {rates[1]:.4f}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Five-fold cross-validation: one data module for each fold, a new model and a new Trainer each time."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import leyden as L


class Fold(L.LightningDataModule):
    def __init__(self, number: int, folds: int = 5, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        everything = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
        splits = StratifiedKFold(self.hparams.folds, shuffle=True, random_state=self.hparams.seed).split(images, labels)
        train, held_out = list(splits)[self.hparams.number]
        self.train, self.held_out = Subset(everything, train.tolist()), Subset(everything, held_out.tolist())

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 32, shuffle=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, 256)


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def test_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


def main() -> None:
    found = []
    for number in range(5):
        L.seed_everything(number, verbose=False)
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=8, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        fold = Fold(number)
        trainer.fit(model := Classifier(), datamodule=fold)
        (figures,) = trainer.test(model, datamodule=fold, verbose=False)
        found.append(figures["accuracy"])
        print(f"fold {number}: accuracy {figures['accuracy']:.4f}")
    accuracy = torch.tensor(found)
    print(f"accuracy {accuracy.mean():.4f}, standard deviation {accuracy.std():.4f}")


if __name__ == "__main__":
    main()

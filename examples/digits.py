# SPDX-License-Identifier: Apache-2.0
"""Train a small network to read the 1,797 real handwritten digits that scikit-learn carries. `make demo` runs this."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import leyden as L
from leyden.callbacks import LearningRateMonitor, ModelCheckpoint
from leyden.loggers import CSVLogger, TensorBoardLogger


class Digits(L.LightningDataModule):
    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        everything = TensorDataset(images, torch.tensor(labels))
        self.train, self.val, self.test = random_split(everything, [0.7, 0.1, 0.2], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=256)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=256)


class Classifier(L.LightningModule):
    def __init__(self, width: int = 32, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(1, 1, 8, 8)
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3),
            nn.Linear(2 * width * 4 * 4, 10),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)

    def step(self, batch: tuple[torch.Tensor, torch.Tensor], stage: str) -> torch.Tensor:
        images, labels = batch
        logits = self(images)
        loss = nn.functional.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log_dict({f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}, prog_bar=True)
        return loss

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        self.step(batch, "val")

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        self.step(batch, "test")

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)}


def main() -> None:
    L.seed_everything(1, verbose=False)
    board = TensorBoardLogger("leyden_logs", name="digits")
    table = CSVLogger("leyden_logs", name="digits", version=board.version)
    best = ModelCheckpoint(monitor="val/accuracy", mode="max", filename="best")
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=10,
        logger=[board, table],
        callbacks=[best, LearningRateMonitor()],
        log_every_n_steps=10,
    )
    data = Digits()
    trainer.fit(Classifier(), datamodule=data)
    trainer.test(ckpt_path="best", datamodule=data)

    print(f"best model   {best.best_model_path}   (Classifier.load_from_checkpoint(path) opens it)")
    print(f"all figures  {table.log_dir}/metrics.csv   (any spreadsheet or pandas.read_csv opens it)")
    print("curves       tensorboard --logdir leyden_logs   (then open http://localhost:6006)")


if __name__ == "__main__":
    main()

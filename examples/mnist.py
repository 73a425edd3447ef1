# SPDX-License-Identifier: Apache-2.0
"""Train MNIST to more than 98 % in three epochs.

python examples/mnist.py --data DIR    DIR holds the four raw files (train-images-idx3-ubyte ...), gzipped or not
python examples/mnist.py               torchvision downloads them, where it is installed
"""

import argparse
import gzip
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import leyden as L


def read_idx(folder: Path, name: str) -> torch.Tensor:
    """Read one file of the idx format: a magic number with the rank, the sizes as big-endian int32, the bytes."""
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)
    if path is None:
        raise SystemExit(f"{folder} has neither {name} nor {name}.gz")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rank = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=4 + 4 * rank).reshape(shape)


class MNIST(L.LightningDataModule):
    def __init__(self, folder: Path | None, batch_size: int = 64) -> None:
        super().__init__()
        self.folder, self.batch_size = folder, batch_size

    def prepare_data(self) -> None:
        if self.folder is None:
            from torchvision.datasets import MNIST as Download  # noqa: PLC0415 - optional, and only for the download

            Download("datasets", download=True)

    def load(self, split: str) -> TensorDataset:
        folder = self.folder or Path("datasets/MNIST/raw")
        images, labels = read_idx(folder, f"{split}-images-idx3-ubyte"), read_idx(folder, f"{split}-labels-idx1-ubyte")
        return TensorDataset(images.float().unsqueeze(1) / 255, labels.long())

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.train, self.val = random_split(self.load("train"), [0.9, 0.1], torch.Generator().manual_seed(0))
        elif stage == "test":
            self.test = self.load("t10k")

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=500)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=500)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 5 * 5, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10),
        )  # fmt: skip

    def step(self, batch: tuple[torch.Tensor, torch.Tensor], stage: str) -> torch.Tensor:
        images, labels = batch
        logits = self.net(images)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log(f"{stage}_loss", loss)
        self.log(f"{stage}_accuracy", (logits.argmax(1) == labels).float().mean(), prog_bar=True)
        return loss

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        self.step(batch, "val")

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        self.step(batch, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the four raw files")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(max_epochs=options.epochs)
    data = MNIST(options.data)
    trainer.fit(Net(), datamodule=data)
    trainer.test(ckpt_path="best", datamodule=data)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The smallest module, data sets and data modules that train: what tests subclass to change the one thing they are about.

Layers, shapes, sizes, the order of random draws and the learning rate are those that test suites written for Lightning
count on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from leyden.datamodule import LightningDataModule
from leyden.module import LightningModule
from leyden.types import STEP_OUTPUT


class RandomDataset(Dataset[Any]):
    """``length`` rows of ``size`` normal numbers, drawn when it is made."""

    def __init__(self, size: int, length: int) -> None:
        self.len = length
        self.data = torch.randn(length, size)

    def __getitem__(self, index: int) -> Tensor:
        row: Tensor = self.data[index]
        return row

    def __len__(self) -> int:
        return self.len


class RandomDictDataset(Dataset[Any]):
    """The same rows as ``{"a": row, "b": row + 2}``."""

    def __init__(self, size: int, length: int) -> None:
        self.len = length
        self.data = torch.randn(length, size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.data[index]
        return {"a": row, "b": row + 2}

    def __len__(self) -> int:
        return self.len


class RandomIterableDataset(IterableDataset[Any]):
    """``count`` rows of ``size`` normal numbers, drawn anew in each pass; it has no length."""

    def __init__(self, size: int, count: int) -> None:
        self.count, self.size = count, size

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.randn(self.size) for _ in range(self.count))


class RandomIterableDatasetWithLen(IterableDataset[Any]):
    """The same, with a length."""

    def __init__(self, size: int, count: int) -> None:
        self.count, self.size = count, size

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.randn(self.size) for _ in range(len(self)))

    def __len__(self) -> int:
        return self.count


class BoringModel(LightningModule):
    """One linear layer, 32 to 2, that learns to answer 1; 64 batches of one row in each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out

    def loss(self, preds: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean squared distance to the labels, which are 1 if none are given."""
        return functional.mse_loss(preds, torch.ones_like(preds) if labels is None else labels)

    def step(self, batch: Any) -> Tensor:
        """The loss of a batch."""
        return self.loss(self(batch))

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        return {"loss": self.step(batch)}

    def validation_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        return {"x": self.step(batch)}

    def test_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        return {"y": self.step(batch)}

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        optimizer = SGD(self.parameters(), lr=0.1)
        return [optimizer], [StepLR(optimizer, step_size=1)]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(RandomDataset(32, 64))

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(RandomDataset(32, 64))

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(RandomDataset(32, 64))

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(RandomDataset(32, 64))


class ManualOptimBoringModel(BoringModel):
    """The same under manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        optimizer: Any = self.optimizers()
        loss = self.step(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


class _FromSets(LightningDataModule):
    """A data module whose loaders are made of what ``setup`` has put into its attributes."""

    random_train: Dataset[Any]
    random_val: Dataset[Any]
    random_test: Dataset[Any]
    random_predict: Dataset[Any]

    def train_dataloader(self) -> Any:
        return DataLoader(self.random_train)

    def val_dataloader(self) -> Any:
        return DataLoader(self.random_val)

    def test_dataloader(self) -> Any:
        return DataLoader(self.random_test)

    def predict_dataloader(self) -> Any:
        return DataLoader(self.random_predict)

    def _fill(self, stage: str, make: Callable[[int], Dataset[Any]]) -> None:
        """Set the data that a stage needs; ``make`` takes the place of a split: train, val, test, predict."""
        places = {"fit": (0, 1), "validate": (1,), "test": (2,), "predict": (3,)}
        for place in places.get(stage, ()):
            setattr(self, f"random_{('train', 'val', 'test', 'predict')[place]}", make(place))


class BoringDataModule(_FromSets):
    """64 rows of 32 numbers in each of four splits of one ``RandomDataset``."""

    def __init__(self) -> None:
        super().__init__()
        self.random_full = RandomDataset(32, 64 * 4)

    def setup(self, stage: str) -> None:
        self._fill(stage, lambda place: Subset(self.random_full, range(64 * place, 64 * (place + 1))))


class BoringDataModuleNoLen(_FromSets):
    """Data sets without a length: 512 rows to train, 128 to validate, 256 to test, 64 to predict."""

    def __init__(self) -> None:
        super().__init__()

    def setup(self, stage: str) -> None:
        self._fill(stage, lambda place: RandomIterableDataset(32, (512, 128, 256, 64)[place]))


class IterableBoringDataModule(LightningDataModule):
    """Two loaders in each stage, one with a length and one without; rows of 4 numbers."""

    train_datasets: list[Dataset[Any]]
    val_datasets: list[Dataset[Any]]
    test_datasets: list[Dataset[Any]]
    predict_datasets: list[Dataset[Any]]

    def __init__(self) -> None:
        super().__init__()

    def setup(self, stage: str) -> None:
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
        for name in wanted.get(stage, ()):
            length = {"train": 16, "val": 32, "test": 64, "predict": 128}[name]
            setattr(self, f"{name}_datasets", [RandomDataset(4, length), RandomIterableDataset(4, length)])

    def train_dataloader(self) -> Iterable[DataLoader[Any]]:
        return [DataLoader(one) for one in self.train_datasets]

    def val_dataloader(self) -> Any:
        return [DataLoader(one) for one in self.val_datasets]

    def test_dataloader(self) -> Any:
        return [DataLoader(one) for one in self.test_datasets]

    def predict_dataloader(self) -> Any:
        return [DataLoader(one) for one in self.predict_datasets]


class DemoModel(LightningModule):
    """One linear layer, 32 to ``out_dim``, with a ReLU behind it; the loss is the sum of what comes out."""

    def __init__(self, out_dim: int = 10, learning_rate: float = 0.02) -> None:
        super().__init__()
        self.l1 = nn.Linear(32, out_dim)
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.l1(x.view(x.size(0), -1)))

    def training_step(self, batch: Any, batch_nb: int) -> STEP_OUTPUT:
        out: Tensor = self(batch)
        return out.sum()

    def configure_optimizers(self) -> Optimizer:
        return Adam(self.parameters(), lr=self.learning_rate)


class Net(nn.Module):
    """A convolutional network for images of 1 x 28 x 28: log-probabilities of ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv2(functional.relu(self.conv1(x))))
        x = self.dropout1(functional.max_pool2d(x, 2))
        x = self.dropout2(functional.relu(self.fc1(torch.flatten(x, 1))))
        return functional.log_softmax(self.fc2(x), dim=1)

# SPDX-License-Identifier: Apache-2.0
"""MNIST: from torchvision where that is installed, else as two files of tensors that are fetched once."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, random_split

from leyden import atomic
from leyden.compat.pieces.available import package_available
from leyden.datamodule import LightningDataModule

_FILES = "https://pl-public-data.s3.amazonaws.com/MNIST/processed"


def _put(content: bytes, path: Path) -> None:
    path.write_bytes(content)


class FetchedMNIST(Dataset[Any]):
    """The images as 1 x 28 x 28 floats, normalized, and their classes as ints.

    Args:
        root: The files are, or will be, below it.
        train: The 60000 images to train with, or the 10000 to test with.
        normalize: Mean and deviation; None leaves 0 to 255.
        download: Fetch the files if they are not there.
        kwargs: Accepted, so that arguments of torchvision's may be passed.
    """

    def __init__(
        self,
        root: str,
        train: bool = True,
        normalize: tuple[float, float] | None = (0.1307, 0.3081),
        download: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        file = Path(root) / "MNIST" / "complete" / ("training.pt" if train else "test.pt")
        if download and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(f"{_FILES}/{file.name}") as answer:
                content = answer.read()
            atomic.write_file(file, partial(_put, content))
        if not file.exists():
            raise RuntimeError(f"{file} does not exist: set download=True.")
        self.data, self.targets = torch.load(file, weights_only=True)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.data[index].float().unsqueeze(0)
        if self.normalize is not None:
            image = (image - self.normalize[0]) / self.normalize[1]
        return image, int(self.targets[index])

    def __len__(self) -> int:
        return len(self.data)


def MNIST(*args: Any, **kwargs: Any) -> Dataset[Any]:
    """Return the data set: torchvision's where that is installed, else ``FetchedMNIST``; the arguments are those of both."""
    if package_available("torchvision"):
        from torchvision import datasets  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415  # optional

        found: Dataset[Any] = datasets.MNIST(*args, **kwargs)
        return found
    return FetchedMNIST(*args, **kwargs)


class MNISTDataModule(LightningDataModule):
    """MNIST in three splits.

    Args:
        data_dir: Where the files are.
        val_split: So many of the training images are for validation.
        num_workers: Of each loader.
        normalize: Normalize to [-1, 1] (with torchvision).
        seed: Kept; the split has a seed of its own.
        batch_size: Images in a batch.
    """

    name = "mnist"

    def __init__(
        self,
        data_dir: str = "./data",
        val_split: int = 5000,
        num_workers: int = 16,
        normalize: bool = False,
        seed: int = 42,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        self.data_dir, self.val_split, self.num_workers = data_dir, val_split, num_workers
        self.normalize, self.seed, self.batch_size = normalize, seed, batch_size

    @property
    def num_classes(self) -> int:
        """Ten."""
        return 10

    @property
    def default_transforms(self) -> Callable[..., Any] | None:
        """From images to tensors, normalized if asked for; None without torchvision."""
        if not package_available("torchvision"):
            return None
        from torchvision import transforms  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415  # optional

        steps = [transforms.ToTensor()]
        if self.normalize:
            steps.append(transforms.Normalize(mean=(0.5,), std=(0.5,)))
        composed: Callable[..., Any] = transforms.Compose(steps)
        return composed

    def _data(self, train: bool, download: bool = False) -> Any:
        transform = self.default_transforms
        return MNIST(self.data_dir, train=train, download=download, **({"transform": transform} if transform else {}))

    def prepare_data(self) -> None:
        for train in (True, False):
            self._data(train, download=True)

    def setup(self, stage: str) -> None:
        data = self._data(train=True)
        parts = [len(data) - self.val_split, self.val_split]
        generator = torch.Generator().manual_seed(42)
        self.dataset_train, self.dataset_val = random_split(data, parts, generator=generator)

    def _loader(self, data: Any, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            data,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.dataset_train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.dataset_val)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(self._data(train=False))

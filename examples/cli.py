# SPDX-License-Identifier: Apache-2.0
"""A command line of a model, its data and the Trainer: ``pip install 'leyden[cli]'``.

python examples/cli.py fit --model.hidden 32 --optimizer.lr 0.02
python examples/cli.py fit --print_config > run.yaml     # a config to edit: fit --config run.yaml
python examples/cli.py test --ckpt_path FILE             # a checkpoint of a fit
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as L


class Spirals(L.LightningDataModule):
    """Points of two spirals, one class each.

    Args:
        points: How many.
        batch_size: Points of one batch.
    """

    def __init__(self, points: int = 512, batch_size: int = 64) -> None:
        super().__init__()
        self.points, self.batch_size = points, batch_size

    def loader(self, seed: int, shuffle: bool) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        label = torch.randint(2, (self.points,), generator=generator)
        turn = 6 * torch.rand(self.points, generator=generator)
        angle = turn + torch.pi * label
        points = torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1) / 6
        return DataLoader(TensorDataset(points, label), batch_size=self.batch_size, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(0, shuffle=True)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(1, shuffle=False)


class Classifier(L.LightningModule):
    """Says which spiral a point is of.

    Args:
        hidden: Width of the two hidden layers.
    """

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers = [torch.nn.Linear(2, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, hidden), torch.nn.ReLU()]
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(hidden, 2))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        points, label = batch
        loss = torch.nn.functional.cross_entropy(self.net(points), label)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        points, label = batch
        self.log("test_accuracy", (self.net(points).argmax(1) == label).float().mean())


class CLI(L.LightningCLI):
    """Tests what it has trained."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_optimizer_args(torch.optim.Adam)
        parser.set_defaults({"optimizer.lr": 0.01})

    def after_fit(self) -> None:
        result = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        print(f"test_accuracy {result[0]['test_accuracy']:.3f}")


if __name__ == "__main__":
    CLI(Classifier, Spirals, trainer_defaults={"max_epochs": 15, "enable_progress_bar": False, "accelerator": "cpu"})

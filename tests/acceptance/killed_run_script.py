# SPDX-License-Identifier: Apache-2.0
"""A run that may be killed at any moment and started again: what a user would write, with ``ckpt_path="last"``.

    python killed_run_script.py ROOT --steps 300

Writes ``steps`` (a byte for each batch, of all its processes) and, at the end, ``weights.pt`` to ROOT.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import leyden as L
from leyden.callbacks import LearningRateMonitor, ModelCheckpoint
from leyden.loggers import CSVLogger, TensorBoardLogger


class Samples(Dataset):
    """Samples with random augmentation."""

    def __init__(self, size: int, augment: bool) -> None:
        self.size, self.augment = size, augment

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.sin(torch.arange(8.0) * (index + 1))
        return (x + 0.1 * torch.randn(8) if self.augment else x), x.sum()


class Net(L.LightningModule):
    """Dropout, values on step and on epoch, a schedule that steps with the optimizer, validation inside the epoch."""

    def __init__(self, root: Path, pause: float) -> None:
        super().__init__()
        self.save_hyperparameters({"rate": 0.01})
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 1))
        self.steps, self.pause = root / "steps", pause

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        with open(self.steps, "ab", buffering=0) as file:
            file.write(b".")
        time.sleep(self.pause)
        loss = nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        if batch_idx % 4 == 3:
            self.log("now_and_then", loss.sqrt())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.rate)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.02, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loggers(kind: str, root: Path) -> Any:
    """Return what is given as ``Trainer(logger=...)``."""
    if kind == "named":
        return [CSVLogger(root, version="mine"), TensorBoardLogger(root, version="mine")]
    return {
        "default": True,
        "both": [CSVLogger(root), TensorBoardLogger(root)],
        "none": False,
    }[kind]


def main(arguments: list[str] | None = None) -> None:
    """Train up to the last step, from the last checkpoint if there is one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.005)
    parser.add_argument("--logger", default="both", choices=("default", "both", "named", "none"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    L.seed_everything(3, workers=True, verbose=False)
    trainer = L.Trainer(
        max_steps=given.steps, default_root_dir=given.root, logger=loggers(given.logger, given.root), accelerator="cpu",
        callbacks=[
            ModelCheckpoint(every_n_train_steps=given.every),
            *([LearningRateMonitor()] if given.logger != "none" else []),
        ],
        val_check_interval=7, log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = Net(given.root, given.pause)
    train = DataLoader(
        Samples(52, True), batch_size=4, shuffle=True, num_workers=given.workers,
        persistent_workers=False, multiprocessing_context="fork" if given.workers else None,
    )  # fmt: skip
    trainer.fit(model, train, DataLoader(Samples(8, False), batch_size=4), ckpt_path="last")
    torch.save(model.state_dict(), given.root / "weights.pt")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""A training that the tests run in jobs and, to compare, in their own process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import leyden


class Net(leyden.LightningModule):
    """Small, but with everything that a resume must bring back: dropout, shuffling, momentum, a schedule."""

    def __init__(self, hparams: Any) -> None:
        super().__init__()
        self.options = hparams
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.options.pause:
            (Path(self.options.folder) / "begun").touch()
            time.sleep(self.options.pause)
        return (self.net(batch[0]) ** 2).mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.options.lr)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def fit(hparams: Any, callbacks: list[Any], ckpt_path: Path | None, cluster: Any = None) -> tuple[Net, leyden.Trainer]:
    """Train for three epochs of 20 batches, two to an update; given a ``cluster``, as one did in 2019."""
    leyden.seed_everything(1, verbose=False)
    model = Net(hparams)
    loader = DataLoader(TensorDataset(torch.randn(80, 4)), batch_size=4, shuffle=True, num_workers=hparams.data_workers)
    if cluster is not None:
        experiment = leyden.Experiment(hparams.folder, name="exp", version=hparams.hpc_exp_number)
        trainer = leyden.Trainer(
            experiment=experiment, cluster=cluster, max_nb_epochs=3, accumulate_grad_batches=2, progress_bar=False,
            print_weights_summary=False, enable_early_stop=False, nb_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(model, loader)
        return model, trainer
    trainer = leyden.Trainer(
        max_epochs=3, accumulate_grad_batches=2, callbacks=callbacks, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    return model, trainer

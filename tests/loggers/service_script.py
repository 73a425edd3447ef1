# SPDX-License-Identifier: Apache-2.0
"""Trains with the logger of a real service that is on this machine only: an epoch, then another one from the checkpoint."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from leyden import LightningModule, Trainer
from leyden.loggers import CometLogger, MLFlowLogger, WandbLogger


class Model(LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2)


def make(service: str, folder: str) -> Any:
    if service == "wandb":
        return WandbLogger(save_dir=folder, offline=True, project="p")
    if service == "comet":
        return CometLogger(online=False, offline_directory=folder, project="p")
    if service == "mlflow":
        return MLFlowLogger("e", save_dir=folder, tracking_uri=None, log_model=True)
    return MLFlowLogger("e", tracking_uri=service, log_model="all")


def main(service: str, folder: str, epochs: str, checkpoint: str) -> None:
    logger = make(service, folder)
    trainer = Trainer(
        max_epochs=int(epochs), logger=logger, log_every_n_steps=1, default_root_dir=folder, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Model(), ckpt_path=checkpoint or None)
    answer = {"version": logger.version, "checkpoint": trainer.checkpoint_callback.best_model_path}
    if isinstance(logger, MLFlowLogger):
        run = logger.experiment.get_run(logger.run_id)
        answer["steps"] = [each.step for each in logger.experiment.get_metric_history(logger.run_id, "loss")]
        answer["status"], answer["params"] = run.info.status, run.data.params
        answer["artifacts"] = [each.path for each in logger.experiment.list_artifacts(logger.run_id)]
    print(json.dumps(answer))


if __name__ == "__main__":
    os.environ.update({"WANDB_SILENT": "true", "COMET_LOGGING_CONSOLE": "error"})
    main(*sys.argv[1:])

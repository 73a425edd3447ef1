# SPDX-License-Identifier: Apache-2.0
"""Train with Leyden or Lightning, from the beginning or from a checkpoint of either, and print what came of it.

``python lightning_checkpoint_script.py leyden|lightning.pytorch EPOCHS FOLDER [CHECKPOINT]`` leaves ``last.ckpt`` in the
folder and prints JSON. The recorded checkpoint in ``recorded`` was made by
``python lightning_checkpoint_script.py lightning.pytorch 2 recorded``.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader


def run(framework: str, epochs: int, folder: str, checkpoint: str | None = None) -> dict[str, Any]:
    """Train a small regression, without any random order; return losses, rates and the final weights."""
    L: Any = importlib.import_module(framework)
    callbacks = importlib.import_module(f"{framework}.callbacks")

    class Model(L.LightningModule):  # type: ignore[name-defined, misc, unused-ignore]
        def __init__(self, width: int = 3, rate: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))
            self.losses: list[float] = []
            self.rates: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = ((self.net(batch) - batch.sum(1, keepdim=True)) ** 2).mean()
            self.losses.append(loss.item())
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", (self.net(batch) ** 2).mean())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.rate)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]

    torch.manual_seed(1)
    model = Model()
    data = torch.linspace(-1, 1, 24).reshape(12, 2)
    trainer = L.Trainer(
        max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        callbacks=[
            callbacks.ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=0),
            callbacks.EarlyStopping("val_loss", patience=50),
        ],
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=4), DataLoader(data[:4]), ckpt_path=checkpoint)
    return {
        "losses": model.losses,
        "rates": model.rates,
        "epoch": trainer.current_epoch,
        "step": trainer.global_step,
        "patience": trainer.early_stopping_callback.wait_count,
        "best": trainer.early_stopping_callback.best_score.item(),
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    which, count, where, *rest = sys.argv[1:]
    print(json.dumps({"result": run(which, int(count), where, *rest)}))

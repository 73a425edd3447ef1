# SPDX-License-Identifier: Apache-2.0
"""The import lines of Lightning 1.x, where the same things were in other modules."""

import json

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks.base import Callback
from pytorch_lightning.core.lightning import LightningModule
from pytorch_lightning.loggers.base import LightningLoggerBase, rank_zero_experiment
from pytorch_lightning.profiler import SimpleProfiler
from pytorch_lightning.trainer.supporters import CombinedLoader
from pytorch_lightning.utilities import MisconfigurationException
from pytorch_lightning.utilities.distributed import rank_zero_only
from pytorch_lightning.utilities.seed import seed_everything
from torch.utils.data import DataLoader


class Rows(LightningLoggerBase):
    def __init__(self):
        super().__init__()
        self.rows = []

    name, version = "rows", 0

    @property
    @rank_zero_experiment
    def experiment(self):
        return self.rows

    @rank_zero_only
    def log_metrics(self, metrics, step):
        self.rows.append((step, dict(metrics)))

    @rank_zero_only
    def log_hyperparams(self, params):
        pass


class Epochs(Callback):
    epochs = 0

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs += 1


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch["x"]) - 1).pow(2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


seed_everything(7)
assert issubclass(MisconfigurationException, Exception)
logger, epochs = Rows(), Epochs()
loader = CombinedLoader({"x": DataLoader(torch.randn(40, 2), batch_size=8)})
trainer = pl.Trainer(
    max_epochs=2,
    logger=logger,
    callbacks=[epochs],
    profiler=SimpleProfiler(),
    log_every_n_steps=1,
    enable_checkpointing=False,
)
trainer.fit(Model(), loader)

print(
    json.dumps(
        {
            "loss": trainer.callback_metrics["loss"].item(),
            "rows": [step for step, row in logger.rows if "loss" in row],
            "epochs": epochs.epochs,
        }
    )
)

# SPDX-License-Identifier: Apache-2.0
"""A data module, a schedule per step, gradient clipping, a callback with state, and a run that goes on from a checkpoint."""

import json

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.types import EVAL_DATALOADERS, STEP_OUTPUT, TRAIN_DATALOADERS
from torch.utils.data import DataLoader, TensorDataset


class Sines(pl.LightningDataModule):
    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        x = torch.linspace(-3, 3, 128).unsqueeze(1)
        self.data = TensorDataset(x, torch.sin(x))

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        return DataLoader(self.data, batch_size=self.hparams.batch_size)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        return DataLoader(self.data, batch_size=50)


class Net(pl.LightningModule):
    def __init__(self, width: int):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(1, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))

    def training_step(self, batch, batch_idx) -> STEP_OUTPUT:
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.net(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss}

    def validation_step(self, batch, batch_idx) -> STEP_OUTPUT:
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.net(x), y)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.05, total_steps=self.trainer.estimated_stepping_batches
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Counter(Callback):
    def __init__(self, stop_after: int = 0):
        self.batches, self.stop_after = 0, stop_after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        trainer.should_stop = self.batches == self.stop_after

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state_dict):
        self.batches = state_dict["batches"]


@rank_zero_only
def report(**values):
    print(json.dumps(values))


pl.seed_everything(3, workers=True)
quiet = {"logger": False, "enable_checkpointing": False, "gradient_clip_val": 0.5, "max_epochs": 8}
first = pl.Trainer(callbacks=[Counter(stop_after=32)], **quiet)
first.fit(Net(width=12), datamodule=Sines())
first.save_checkpoint("half.ckpt")
counter = Counter()
second = pl.Trainer(callbacks=[counter], **quiet)
model = Net(width=12)
second.fit(model, datamodule=Sines(), ckpt_path="half.ckpt")
(metrics,) = second.validate(model, datamodule=Sines(), verbose=False)
report(
    loss=metrics["val_loss"],
    first=first.callback_metrics["val_loss"].item(),
    batches=counter.batches,
    steps=[first.global_step, second.global_step],
    rate=second.optimizers[0].param_groups[0]["lr"],
)

# SPDX-License-Identifier: Apache-2.0
"""Cells of a notebook, which the tests run one after the other in one session, as a kernel does; ``next`` tells them apart."""

# ruff: noqa: I001

import json
import os
import sys
import pathlib
import threading
import time

import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import Callback

FOLDER = sys.argv[1]
torch.manual_seed(0)
x = torch.randn(32, 4)
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4)
scale = lambda value: value * 1.0  # noqa: E731  # a lambda is what a notebook has

# next


class Net(L.LightningModule):
    """Defined in a cell, as is all that it holds."""

    def __init__(self, wait=False):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.activation = lambda value: scale(value)
        self.wait = wait

        class Local(torch.nn.Module):
            def forward(self, value):
                return value

        self.local = Local()

    def training_step(self, batch, batch_idx):
        if self.wait:
            pathlib.Path(FOLDER, f"waits{self.global_rank}").touch()
            time.sleep(0.05)
        loss = (self.activation(self.local(self.layer(batch[0]))) - batch[1]).square().mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Counts(Callback):
    """Its state comes back."""

    def __init__(self):
        self.batches, self.pid, self.kind = 0, 0, None

    def on_train_batch_end(self, trainer, *_):
        self.batches, self.pid, self.kind = self.batches + 1, os.getpid(), Net


# next
if os.environ.get("BUSY"):  # a thread of the user's own: the kernel cannot be copied
    threading.Thread(target=threading.Event().wait, name="busy", daemon=True).start()
counts, net = Counts(), Net()
before = net.layer.weight.detach().clone()
trainer = L.Trainer(
    accelerator="cpu",
    devices=2,
    strategy="ddp_notebook",
    max_epochs=1,
    callbacks=[counts],
    logger=True,
    default_root_dir=FOLDER,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(net, loader)
first = {
    "moved": not torch.equal(before, net.layer.weight),
    "steps": trainer.global_step,
    "batches": counts.batches,
    "elsewhere": counts.pid != os.getpid(),
    "same class": counts.kind is Net,
    "loss": float(trainer.callback_metrics["loss"]),
}
# next
net.wait = True
trainer.fit_loop.max_epochs = 1000
trainer.fit(net, loader)  # until somebody presses Ctrl-C
interrupted = {"interrupted": trainer.interrupted, "steps": trainer.global_step}
# next
net.wait = False
trainer.fit_loop.max_epochs = trainer.current_epoch + 2
trainer.fit(net, loader)
loss = float(trainer.callback_metrics["loss"])
with open(os.path.join(FOLDER, "cells.json"), "w") as file:
    json.dump(
        {
            "first": first,
            "interrupted": interrupted,
            "steps": trainer.global_step,
            "batches": counts.batches,
            "loss": loss,
            "folders": sorted(os.listdir(os.path.join(FOLDER, "leyden_logs"))),
        },
        file,
    )

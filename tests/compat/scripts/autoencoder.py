# SPDX-License-Identifier: Apache-2.0
"""The first tutorial: an autoencoder, its training step, one optimizer."""

import json

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

L.seed_everything(1)
images = torch.rand(320, 1, 8, 8)

encoder = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
decoder = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 64))


class LitAutoEncoder(L.LightningModule):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def training_step(self, batch, batch_idx):
        x = batch.view(batch.size(0), -1)
        loss = nn.functional.mse_loss(self.decoder(self.encoder(x)), x)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


autoencoder = LitAutoEncoder(encoder, decoder)
trainer = L.Trainer(limit_train_batches=8, max_epochs=3, logger=False, enable_checkpointing=False)
trainer.fit(model=autoencoder, train_dataloaders=DataLoader(images, batch_size=32, shuffle=True))

print(json.dumps({"loss": trainer.callback_metrics["train_loss"].item(), "steps": trainer.global_step}))

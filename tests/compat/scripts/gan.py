# SPDX-License-Identifier: Apache-2.0
"""A GAN with manual optimization: two optimizers, each toggled, each stepped by hand."""

import json

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader


class GAN(pl.LightningModule):
    def __init__(self, latent_dim: int = 4, lr: float = 2e-3):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(latent_dim, 16), nn.LeakyReLU(0.2), nn.Linear(16, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1), nn.Sigmoid())

    def adversarial_loss(self, y_hat, y):
        return nn.functional.binary_cross_entropy(y_hat, y)

    def training_step(self, batch):
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(batch.shape[0], self.hparams.latent_dim).type_as(batch)
        valid, fake = torch.ones(batch.size(0), 1), torch.zeros(batch.size(0), 1)

        self.toggle_optimizer(optimizer_g)
        g_loss = self.adversarial_loss(self.discriminator(self.generator(z)), valid)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)

        self.toggle_optimizer(optimizer_d)
        real_loss = self.adversarial_loss(self.discriminator(batch), valid)
        fake_loss = self.adversarial_loss(self.discriminator(self.generator(z).detach()), fake)
        d_loss = (real_loss + fake_loss) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)

    def configure_optimizers(self):
        betas = (0.5, 0.999)
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=self.hparams.lr, betas=betas)
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=self.hparams.lr, betas=betas)
        return [opt_g, opt_d], []


pl.seed_everything(4)
points = torch.randn(256, 2) * 0.3 + torch.tensor([1.0, -1.0])
trainer = pl.Trainer(accelerator="auto", devices=1, max_epochs=3, logger=False, enable_checkpointing=False)
trainer.fit(GAN(), DataLoader(points, batch_size=32, shuffle=True))

print(
    json.dumps(
        {
            "loss": trainer.callback_metrics["g_loss"].item(),
            "d_loss": trainer.callback_metrics["d_loss"].item(),
            "steps": trainer.global_step,
        }
    )
)

# SPDX-License-Identifier: Apache-2.0
"""Two optimizers that take turns, by hand: a generator learns to draw points of a ring, a discriminator to tell them apart."""

import math

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L


def network(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, outputs)
    )


class GAN(L.LightningModule):
    def __init__(self, noise: int = 4, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False  # training_step says when which optimizer steps
        self.generator, self.discriminator = network(noise, 2), network(2, 1)

    def forward(self, count: int) -> torch.Tensor:
        return self.generator(torch.randn(count, self.hparams.noise, device=self.device))

    def judge(self, points: torch.Tensor, real: bool) -> torch.Tensor:
        said = self.discriminator(points)
        return nn.functional.binary_cross_entropy_with_logits(said, torch.full_like(said, float(real)))

    def training_step(self, batch, batch_idx):
        (points,) = batch
        optimizer_g, optimizer_d = self.optimizers()

        self.toggle_optimizer(optimizer_d)  # nothing of the generator gets a gradient meanwhile
        loss_d = self.judge(points, True) + self.judge(self(len(points)).detach(), False)
        optimizer_d.zero_grad()
        self.manual_backward(loss_d)
        optimizer_d.step()
        self.untoggle_optimizer(optimizer_d)

        self.toggle_optimizer(optimizer_g)
        loss_g = self.judge(self(len(points)), True)
        optimizer_g.zero_grad()
        self.manual_backward(loss_g)
        optimizer_g.step()
        self.untoggle_optimizer(optimizer_g)

        self.log_dict({"generator": loss_g, "discriminator": loss_d}, prog_bar=True)

    def configure_optimizers(self):
        def adam(net: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.Adam(net.parameters(), self.hparams.lr, betas=(0.5, 0.9))

        return adam(self.generator), adam(self.discriminator)


def main() -> None:
    L.seed_everything(1, verbose=False)
    angles = torch.rand(4096) * 2 * math.pi
    ring = torch.stack([angles.cos(), angles.sin()], 1) + 0.05 * torch.randn(4096, 2)
    model = GAN()
    trainer = L.Trainer(accelerator="cpu", max_epochs=20, logger=False, enable_checkpointing=False)
    trainer.fit(model, DataLoader(TensorDataset(ring), 128, shuffle=True))
    with torch.no_grad():
        radii = model(2000).norm(dim=1)
    print(f"radius of drawn points {float(radii.mean()):.3f}, of the ring 1")


if __name__ == "__main__":
    main()

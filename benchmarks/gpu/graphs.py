# SPDX-License-Identifier: Apache-2.0
"""A model that is bound by the launches of its kernels: eager against ``Trainer(cuda_graphs=True)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from contest import Table, contest

LAYERS, WIDTH, BATCH = 24, 128, 32


class OnDevice:
    """``steps`` batches of (32, 128) that lie on the GPU already."""

    def __init__(self, steps: int) -> None:
        self._few = [(torch.randn(BATCH, WIDTH, device="cuda"), torch.randn(BATCH, 1, device="cuda")) for _ in range(8)]
        self._steps = steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self._few[index % 8] for index in range(self._steps))

    def __len__(self) -> int:
        return self._steps


def network() -> nn.Module:
    """24 small layers, each with a norm: some hundred kernels of a few microseconds in a step."""
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


def by_hand(steps: int, folder: str) -> Callable[[], None]:
    """The eager loop that keeps its losses on the device."""
    net, batches = network().cuda(), OnDevice(steps)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def run() -> None:
        losses = []
        for x, y in batches:
            loss = nn.functional.mse_loss(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())

    return run


def with_leyden(steps: int, folder: str, **arguments: Any) -> Callable[[], None]:
    """The same in a Trainer, which logs the loss of each step."""
    import leyden as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    trainer = L.Trainer(
        accelerator="cuda", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, gradient_clip_val=1.0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **arguments,
    )  # fmt: skip
    module, batches = Module(), OnDevice(steps)
    return lambda: trainer.fit(module, batches)


def measure(steps: int, rounds: int) -> Table:
    """Let all run by turns."""
    return contest(
        "CUDA graphs on a model bound by launches",
        f"{LAYERS} layers of width {WIDTH}, batches of {BATCH} on the device, AdamW, clipping; {steps} steps, {rounds}"
        " rounds; ratios of times. The aim is at most 0.5 for the last row.",
        {
            "an eager loop by hand": by_hand,
            "leyden": with_leyden,
            "leyden, cuda_graphs=True": lambda steps, folder: with_leyden(steps, folder, cuda_graphs=True),
        },
        steps,
        rounds,
    )

# SPDX-License-Identifier: Apache-2.0
"""What the trainer costs on a GPU: a small step against a hand-written loop that reads its loss back, or does not.

On a GPU the loop that calls ``loss.item()`` at each step waits for the device each time; a trainer that stores the loss
and reads it when a row is due may be faster than that loop. Both loops are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from contest import Table, contest

WIDTH, BATCH = 1024, 256


class BatchesOnDevice:
    """An iterable of ``steps`` batches of shape (256, 1024) that already lie on the GPU: 8 tensors, over and over."""

    def __init__(self, steps: int) -> None:
        self._few = [torch.randn(BATCH, WIDTH, device="cuda") for _ in range(8)]
        self._steps = steps

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self._few[index % 8] for index in range(self._steps))

    def __len__(self) -> int:
        return self._steps


def network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(WIDTH, WIDTH),
        torch.nn.ReLU(),
        torch.nn.Linear(WIDTH, WIDTH),
        torch.nn.ReLU(),
        torch.nn.Linear(WIDTH, 10),
    )


def loss_of(net: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return net(batch).pow(2).mean()  # type: ignore[no-any-return]


def by_hand(steps: int, *, wait: bool) -> Callable[[], None]:
    batches, net = BatchesOnDevice(steps), network().cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def run() -> None:
        losses: list[Any] = []
        for batch in batches:
            loss = loss_of(net, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item() if wait else loss.detach())

    return run


def with_leyden(steps: int, folder: str, *, log: bool) -> Callable[[], None]:
    import leyden as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss = loss_of(self.net, batch)
            if log:
                self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = L.Trainer(
        accelerator="cuda",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module, batches = Module(), BatchesOnDevice(steps)
    return lambda: trainer.fit(module, batches)


def measure(steps: int, rounds: int) -> Table:
    """Let all run by turns."""
    return contest(
        "The cost of a small step",
        f"Three layers of width {WIDTH}, batches of {BATCH} on the device, SGD; {steps} steps, {rounds} rounds; ratios of"
        " times. The first loop waits for the device at each step, to read its loss; the second does not.",
        {
            "a loop with loss.item() each step": lambda steps, folder: by_hand(steps, wait=True),
            "a loop that keeps the loss on the device": lambda steps, folder: by_hand(steps, wait=False),
            "leyden, self.log": lambda steps, folder: with_leyden(steps, folder, log=True),
            "leyden, nothing logged": lambda steps, folder: with_leyden(steps, folder, log=False),
        },
        steps,
        rounds,
        warm=200,
    )

# SPDX-License-Identifier: Apache-2.0
"""What the trainer costs on a GPU: a small step against a hand-written loop that reads its loss back, or does not.

    PYTHONPATH=src python3 benchmarks/gpu/overhead.py [--steps 2000] [--rounds 5]

On a GPU the loop that calls ``loss.item()`` at each step waits for the device each time; a trainer that stores the loss
and reads it when a row is due may be faster than that loop. Both loops are shown.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

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


def seconds(run: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="batches in one run")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no CUDA GPU, so nothing was measured.")
        return
    warnings.simplefilter("ignore")
    table: dict[str, Callable[[int, str], Callable[[], None]]] = {
        "a loop with loss.item() each step": lambda steps, folder: by_hand(steps, wait=True),
        "a loop that keeps the loss on the device": lambda steps, folder: by_hand(steps, wait=False),
        "leyden, self.log": lambda steps, folder: with_leyden(steps, folder, log=True),
        "leyden, nothing logged": lambda steps, folder: with_leyden(steps, folder, log=False),
    }
    times: dict[str, list[float]] = {name: [] for name in table}
    with tempfile.TemporaryDirectory() as folder:
        for prepare in table.values():
            seconds(prepare(200, folder))
        for _ in range(options.rounds):
            for name, prepare in table.items():
                times[name].append(seconds(prepare(options.steps, folder)))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {options.steps} steps, {options.rounds} rounds")
    waiting, keeping = list(times.values())[:2]
    for name, mine in times.items():
        to_waiting = statistics.median(a / b for a, b in zip(mine, waiting, strict=True))
        to_keeping = statistics.median(a / b for a, b in zip(mine, keeping, strict=True))
        step = statistics.median(mine) / options.steps * 1e6
        print(
            f"{name:<42} {step:7.1f} us/step  {to_waiting:5.2f} to the loop that waits  {to_keeping:5.2f} to the other"
        )


if __name__ == "__main__":
    main()

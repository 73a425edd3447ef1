# SPDX-License-Identifier: Apache-2.0
"""A step of ``Trainer(compile=True)`` against a hand-written loop around ``torch.compile``: the GPT of part (d).

    python benchmarks/compiled.py [--steps 30] [--rounds 5] [--threads 1] [--small]

Both compile network and loss together with inductor, and record the loss of each step. The two take turns; what is compared
are the steps alone, each from the moment at which a batch is drawn to that at which the next one is, less the first five of a
run: compiling takes place there. Printed are the steps of each run that nobody disturbed (the 5 % quantile) and the median
of their ratios.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

import leyden as L
from harness import machine
from workloads import Workload, gpt

WARM = 5


class Timed:
    """A loader that notes when each of its batches is drawn."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.moments = loader, list[float]()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.moments.append(time.perf_counter())
            yield batch

    @property
    def step(self) -> float:
        """Seconds of a step that nobody disturbed."""
        moments = self.moments[WARM:]
        steps = sorted(after - before for before, after in zip(moments, moments[1:], strict=False))
        return steps[len(steps) // 20]


def by_hand(work: Workload) -> float:
    """Return the seconds of a step of the loop that anybody writes."""
    network, loader = work.network(), Timed(work.loader())
    optimizer = work.make_optimizer(network.parameters())

    @torch.compile
    def forward(inputs: Any, targets: Any) -> Any:
        return work.loss(network(inputs), targets)

    losses = []
    for inputs, targets in loader:
        loss = forward(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return loader.step


def with_trainer(work: Workload) -> float:
    """Return the seconds of a step of a compiled fit."""

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = work.network()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            inputs, targets = batch
            loss = work.loss(self.net(inputs), targets)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return work.make_optimizer(self.parameters())

    loader = Timed(work.loader())
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    L.Trainer(accelerator="cpu", max_epochs=1, compile=True, **quiet).fit(Module(), loader)
    return loader.step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--small", action="store_true", help="one layer of width 32: what a step costs beside the model"
    )
    options = parser.parse_args()
    logging.getLogger("leyden").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    work = gpt(options.steps, **({"layers": 1, "width": 32} if options.small else {}))
    ways: list[Callable[[Workload], float]] = [by_hand, with_trainer]
    print(f"{machine()}\n{work.name}: {work.text}")
    ratios = []
    for round_ in range(options.rounds):
        torch.manual_seed(round_)
        # each round begins with the other one: what the machine does besides hits both alike
        found = {way: way(work) for way in (ways if round_ % 2 else ways[::-1])}
        ratios.append(found[with_trainer] / found[by_hand])
        print(
            f"by hand {found[by_hand] * 1e3:8.2f} ms   leyden {found[with_trainer] * 1e3:8.2f} ms   {ratios[-1]:.3f}",
            flush=True,
        )
    print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})")


if __name__ == "__main__":
    main()

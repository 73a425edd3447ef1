# SPDX-License-Identifier: Apache-2.0
"""What the trainer costs: a tiny step under leyden and under installed peers, as a ratio to a hand-written loop.

    python benchmarks/overhead.py [--steps 5000] [--rounds 5] [--only leyden] [--json results.json]

The step is so small (``Linear(32, 2)``, a batch of 4 that is already in memory, SGD, one CPU thread) that hardly
anything but the framework is measured; on a real model the same microseconds vanish. What is timed is one whole call of
``fit`` over an epoch of ``--steps`` batches, its set-up and tear-down included, and nothing else: no construction, no
imports. All take turns within a round, each right after a run of the loop that it is compared with; the median ratio of
the rounds is printed, with the smallest and the largest beside it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Prepared = Callable[[], None]
"""A run that is ready to be timed."""


class BatchesInMemory:
    """An iterable of ``steps`` batches of shape (4, 32) that were made beforehand: 64 tensors, over and over."""

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        few = [torch.randn(4, 32, generator=generator) for _ in range(64)]
        self._batches = [few[index % len(few)] for index in range(steps)]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def loss_of(layer: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return layer(batch).pow(2).mean()  # type: ignore[no-any-return]


# --- by hand ------------------------------------------------------------------------------------------------------


def by_hand(steps: int, folder: str, *, record: bool) -> Prepared:
    """The loop that anybody writes; with ``record`` it keeps ``loss.item()`` of each step."""
    batches, layer = BatchesInMemory(steps), torch.nn.Linear(32, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)

    def run() -> None:
        losses = []
        for batch in batches:
            loss = loss_of(layer, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if record:
                losses.append(loss.item())

    return run


def with_accelerate(steps: int, folder: str) -> Prepared:
    """The same loop through ``accelerate``'s objects."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    layer = torch.nn.Linear(32, 2)
    layer, optimizer = accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), lr=0.01))
    batches = BatchesInMemory(steps)

    def run() -> None:
        losses = []
        for batch in batches:
            loss = loss_of(layer, batch)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())

    return run


# --- by a trainer: the same script for every framework that has Lightning's API --------------------------------------


def with_trainer(
    steps: int, folder: str, *, name: str, log: bool = True, every: int = 50, attach: bool = False
) -> Prepared:
    """Fit on the framework ``name`` (``"leyden"`` or ``"lightning.pytorch"``).

    Args:
        steps: Batches in the one epoch.
        folder: Where logs and checkpoints go.
        name: What to import.
        log: Whether the step calls ``self.log``.
        every: ``log_every_n_steps``.
        attach: Whether ModelCheckpoint, EarlyStopping, LearningRateMonitor and CSVLogger take part.
    """
    L = importlib.import_module(name)
    callbacks = importlib.import_module(f"{name}.callbacks")
    loggers = importlib.import_module(f"{name}.loggers")

    class Module(L.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(32, 2)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss = loss_of(self.layer, batch)
            if log:
                self.log("loss", loss, batch_size=4)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    parts: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    if attach:
        parts = {
            "logger": loggers.CSVLogger(folder),
            "callbacks": [
                callbacks.ModelCheckpoint(monitor="loss"),
                callbacks.EarlyStopping("loss", check_on_train_epoch_end=True),
                callbacks.LearningRateMonitor("step"),
            ],
        }
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        log_every_n_steps=every,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **parts,
    )
    module, batches = Module(), BatchesInMemory(steps)
    return lambda: trainer.fit(module, batches)


Prepare = Callable[[int, str], Prepared]


def contenders() -> tuple[dict[str, Prepare], dict[str, tuple[str, Prepare]]]:
    """Return the hand-written loops by name, and by name each framework with the loop that it is compared with."""

    def trainer(name: str, **options: Any) -> Prepare:
        return lambda steps, folder: with_trainer(steps, folder, name=name, **options)

    recorded, bare = "a loop with loss.item() each step", "a loop that records nothing"
    loops: dict[str, Prepare] = {
        recorded: lambda steps, folder: by_hand(steps, folder, record=True),
        bare: lambda steps, folder: by_hand(steps, folder, record=False),
    }
    frameworks = {
        "leyden, self.log": (recorded, trainer("leyden")),
        "leyden, self.log, a row each step": (recorded, trainer("leyden", every=1)),
        "leyden, nothing logged": (bare, trainer("leyden", log=False)),
        "leyden, self.log, 3 callbacks, csv": (recorded, trainer("leyden", attach=True)),
        "leyden, the same, a row each step": (recorded, trainer("leyden", attach=True, every=1)),
    }
    if importlib.util.find_spec("accelerate"):
        frameworks["accelerate, loss.item()"] = (recorded, with_accelerate)
    if importlib.util.find_spec("lightning"):
        frameworks["lightning, self.log"] = (recorded, trainer("lightning.pytorch"))
        frameworks["lightning, self.log, 3 callbacks, csv"] = (recorded, trainer("lightning.pytorch", attach=True))
    return loops, frameworks


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what frameworks say about themselves out of the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def seconds(prepare: Prepare, steps: int) -> float:
    """Prepare a run, then time it alone."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(steps, folder)
        gc.collect()
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin


def measure(steps: int, rounds: int, only: str) -> list[dict[str, Any]]:
    """Run every contender once a round, each right after the loop that it is compared with; return a row for each."""
    loops, frameworks = contenders()
    frameworks = {name: row for name, row in frameworks.items() if only in name}
    for prepare in [*loops.values(), *(prepare for _, prepare in frameworks.values())]:
        seconds(prepare, min(steps, 300))  # what is done only once in a process
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in frameworks}
    for _ in range(rounds):
        for name, (loop, prepare) in frameworks.items():
            pairs[name].append((seconds(loops[loop], steps), seconds(prepare, steps)))
    rows = []
    for name, (loop, _) in frameworks.items():
        ratios = [mine / theirs for theirs, mine in pairs[name]]
        rows.append(
            {
                "name": name,
                "against": loop,
                "us_per_step": statistics.median(mine for _, mine in pairs[name]) / steps * 1e6,
                "us_per_step_of_loop": statistics.median(theirs for theirs, _ in pairs[name]) / steps * 1e6,
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
            }
        )
    return rows


def machine() -> str:
    """Describe the machine in one line."""
    return (
        f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} thread"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000, help="batches in one run")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender")
    parser.add_argument("--only", default="", help="only the frameworks whose row contains this")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with quiet():
        rows = measure(options.steps, options.rounds, options.only)
    print(f"{machine()}; {options.steps} steps, median of {options.rounds} rounds")
    print(f"{'':<40} us/step  loop's   ratio  (least, most)  to")
    for row in rows:
        spread = f"({row['least']:.2f}, {row['most']:.2f})"
        times = f"{row['us_per_step']:8.1f} {row['us_per_step_of_loop']:7.1f}"
        print(f"{row['name']:<40}{times}  {row['ratio']:6.2f}  {spread:<13}  {row['against']}")
    if options.json:
        described = {"machine": machine(), "steps": options.steps, "rounds": options.rounds, "rows": rows}
        options.json.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""How long a save holds up the training, written at once and behind the training, and the memory that it takes.

    python benchmarks/checkpoint.py [--megabytes 200] [--saves 15] [--threads 1] [--batch-size 32] [--folder DIR]

One fit trains a model whose weights and Adam state are ``--megabytes`` together, and saves by turns synchronously and
asynchronously, with quiet steps in between. The stall of a save is the time from its beginning to the end of the first
step at whose end the file is complete, less what as many steps take when nothing is saved (the mean of the quiet steps
before and after it): the call itself, and all by which steps are slower while the file is written. Printed are medians,
with the smallest and the largest, and their ratio.

The memory is that of fresh processes: the most that one which saves ever held, beyond one which only trains (Linux).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import leyden as L
from harness import machine, quiet
from leyden.callbacks import Callback
from leyden.checkpoint_io import AsyncCheckpointIO, TorchCheckpointIO

QUIET_STEPS = 8
STEPS_AFTER = 3  # a synchronous save leaves cold caches behind: these steps are part of it, too


class Wide(L.LightningModule):
    """Layers of a million weights each; with the two moments of Adam, 12 MB of state for each layer."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        layers = max(1, round(megabytes * 1e6 / (3 * 4 * 1024 * 1025)))
        self.layers = torch.nn.ModuleList(torch.nn.Linear(1024, 1024) for _ in range(layers))

    @property
    def nbytes(self) -> int:
        """Bytes of weights and moments."""
        return 3 * sum(parameter.nbytes for parameter in self.parameters())

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Update every weight in place."""
        for layer in self.layers:
            batch = torch.relu(layer(batch))
        return batch.pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, which keeps two numbers for each weight."""
        return torch.optim.Adam(self.parameters(), lr=1e-5)


class Saves(Callback):
    """Saves by turns in each way, and measures; stops when each way has had its turns."""

    def __init__(self, folder: str, saves: int, ways: dict[str, Any]) -> None:
        self.folder, self.ways, self.left = folder, ways, [name for _ in range(saves) for name in ways]
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        self.row: dict[str, Any] = {}
        self.quiet: list[float] = []
        self.way, self.steps, self.began, self.call, self.last = "", 0, 0.0, 0.0, 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Have staging memory and files there before anything is measured: the first save of each way does not count."""
        self.left = [*self.ways, *self.left]
        self.last = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note how long the step took; begin or end a measurement."""
        now = time.perf_counter()
        if self.way:
            self.steps += 1
            if self.steps >= STEPS_AFTER and not self.ways[self.way].is_writing:
                self.row = {"took": now - self.began, "call": self.call, "steps": self.steps, "before": self.quiet}
                self.rows[self.way].append(self.row)
                self.way, self.quiet = "", []
        else:
            self.quiet.append(now - self.last)
        if not self.way and len(self.quiet) >= QUIET_STEPS:
            if self.row:
                usual = statistics.mean([*self.row.pop("before"), *self.quiet])
                self.row |= {"step": usual, "stall": self.row["took"] - self.row["steps"] * usual}
            if not self.left:
                trainer.should_stop = True
                return
            self.begin(trainer)
        self.last = time.perf_counter()

    def begin(self, trainer: Any) -> None:
        """Save."""
        self.way, self.steps = self.left.pop(0), 0
        trainer.strategy.checkpoint_io = self.ways[self.way]
        self.began = time.perf_counter()
        trainer.save_checkpoint(f"{self.folder}/{self.way}.ckpt")
        self.call = time.perf_counter() - self.began


class AtOnce(TorchCheckpointIO):
    """The ordinary way."""

    is_writing = False


def train(model: Wide, steps: int, *callbacks: Callback, batch_size: int = 32, plugins: Any = None) -> None:
    """Run a fit."""
    batch = torch.randn(1, 1024)
    trainer = L.Trainer(
        max_epochs=1, callbacks=list(callbacks), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", plugins=plugins,
    )  # fmt: skip
    rows = batch.expand(steps * batch_size, 1024)
    trainer.fit(model, train_dataloaders=torch.utils.data.DataLoader(rows, batch_size=batch_size))


def stalls(megabytes: int, saves: int, folder: str, batch_size: int = 32) -> dict[str, list[dict[str, Any]]]:
    """Return for each way what its saves took, in seconds."""
    measured = Saves(folder, saves, {"sync": AtOnce(), "async": AsyncCheckpointIO()})
    train(Wide(megabytes), 10**6, measured, batch_size=batch_size)
    return {name: rows[1:] for name, rows in measured.rows.items()}


def peak(megabytes: int, way: str, folder: str) -> int:
    """Return the most memory, in bytes, that a fresh process held that saved three times in the given way."""
    command = [sys.executable, __file__, "--megabytes", str(megabytes), "--peak", way, "--folder", folder]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def train_for_peak(megabytes: int, way: str, folder: str) -> int:
    """What that process does."""

    class Every(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if way != "none" and batch_idx % 4 == 3:
                trainer.save_checkpoint(f"{folder}/{way}.ckpt")

    train(Wide(megabytes), 14, Every(), plugins=AsyncCheckpointIO() if way == "async" else None)
    # not getrusage, which begins with the peak of the process that started this one
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200, help="size of the state")
    parser.add_argument("--saves", type=int, default=15, help="saves in each way")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--batch-size", type=int, default=32, help="1: hardly anything but memory traffic")
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the results there, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, quiet():
        if options.peak:
            print(train_for_peak(options.megabytes, options.peak, folder))
            return
        state = Wide(options.megabytes).nbytes
        rows = stalls(options.megabytes, options.saves, folder, options.batch_size)
        base = peak(options.megabytes, "none", folder)
        memory = {way: (peak(options.megabytes, way, folder) - base) / state for way in ("sync", "async")}
    stall = {way: summary([row["stall"] for row in rows[way]]) for way in rows}
    call = {way: summary([row["call"] for row in rows[way]]) for way in rows}
    usual = statistics.median(row["step"] for row in rows["async"])
    print(f"{machine()}\nstate {state / 1e6:.0f} MB, {options.threads} thread(s), a step {usual * 1000:.0f} ms")
    for way in rows:
        for name, value in (("stall", stall[way]), ("call itself", call[way])):
            print(
                f"{way:>6} {name:<12} {value['median'] * 1000:7.1f} ms"
                f"  ({value['least'] * 1000:.1f}, {value['most'] * 1000:.1f})"
            )
        print(f"{way:>6} memory       {memory[way]:7.2f} x the state")
    ratio = stall["async"]["median"] / stall["sync"]["median"]
    print(f"stall, asynchronous to synchronous: {ratio:.2f}")
    if options.json:
        results = {"state": state, "stall": stall, "call": call, "memory": memory, "ratio": ratio, "rows": rows}
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

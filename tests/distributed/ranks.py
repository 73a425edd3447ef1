# SPDX-License-Identifier: Apache-2.0
"""Runs a function on several ranks: real processes, forked from this one, that meet over gloo on 127.0.0.1.

A forked process has all imports already, so that a test takes a second. The launchers themselves are tested by scripts.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DistributedDataParallel imports it, once here rather than in each process

import leyden as L
from leyden.runtime import collective
from leyden.runtime.world import OURS, World


def on_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 90.0) -> list[Any]:
    """Return what ``function(*args)`` returned on each rank; fail with the traceback of the first that raised."""
    world = World(size=size, local_size=size, port=collective.serve())
    with tempfile.TemporaryDirectory() as folder:
        gate = collective.Gate()
        worlds = [replace(world, rank=rank, local_rank=rank) for rank in range(size)]
        children = [_fork(each, Path(folder), gate, function, args) for each in worlds]
        gate.open()
        _wait(children, timeout)
        outcomes = [_outcome(Path(folder) / str(rank)) for rank in range(size)]
    failed = [(when, rank, text) for rank, (when, text, _) in enumerate(outcomes) if text is not None]
    if failed:
        _, rank, text = min(failed)
        raise AssertionError(f"rank {rank} failed first:\n{text}")
    return [result for _, _, result in outcomes]


def _fork(
    world: World, folder: Path, gate: collective.Gate, function: Callable[..., Any], args: tuple[Any, ...]
) -> int:
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons: this process may have threads
        pid = os.fork()
    if pid:
        return pid
    text, result = None, None
    faulthandler.register(signal.SIGQUIT, file=open(folder / f"stack{world.rank}", "w"), all_threads=True)  # noqa: SIM115
    gate.wait()
    try:
        os.environ.update({**world.environment(world.local_rank), OURS: "spawn"})
        torch.set_num_threads(1)
        result = function(*args)
    except BaseException:
        text = traceback.format_exc()
    written = folder / f"{world.rank}.part"
    written.write_bytes(pickle.dumps((time.time(), text, result)))
    written.rename(folder / str(world.rank))
    os._exit(0 if text is None else 1)


def _wait(children: list[int], timeout: float) -> None:
    until, waiting = time.monotonic() + timeout, list(children)
    while waiting and time.monotonic() < until:
        waiting = [pid for pid in waiting if os.waitpid(pid, os.WNOHANG)[0] == 0]
        time.sleep(0.01)
    for pid in waiting:
        os.kill(pid, signal.SIGQUIT)
    time.sleep(0.5 if waiting else 0.0)
    for pid in waiting:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def _outcome(path: Path) -> tuple[float, str | None, Any]:
    if not path.exists():
        stack = path.with_name(f"stack{path.name}").read_text()  # where it stood when its time was up
        return time.time(), f"rank {path.name} ended, or was ended, without a result\n{stack}", None
    outcome: tuple[float, str | None, Any] = pickle.loads(path.read_bytes())
    return outcome


def make_trainer(devices: Any = 2, **arguments: Any) -> L.Trainer:
    """A Trainer on the CPU that writes and shows nothing."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "devices": devices,
    }  # fmt: skip
    return L.Trainer(**{**quiet, **arguments})


class Net(L.LightningModule):
    """A small regression that records which samples it saw, its losses and learning rates."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.lr = lr
        self.layer = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
        self.samples: list[list[int]] = []
        self.evaluated: list[int] = []
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.norms: list[float] = []

    def loss(self, batch: Any) -> torch.Tensor:
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.samples.append(batch[2].tolist())
        self.losses.append(loss.item())
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        self.norms.append(torch.stack([g.square().sum() for g in grads]).sum().sqrt().item())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)
        total = int(min(self.trainer.estimated_stepping_batches, 1000))  # infinity for a stream
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total), "interval": "step"}
        ]


class Judged(Net):
    """The same, with validation, test and prediction."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated += batch[2].tolist()
        self.log("val", self.loss(batch))
        self.log("count", float(len(batch[0])), reduce_fx="sum")

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch[2]


class Broken(Net):
    """Fails on rank 1, in the third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1 and batch_idx == 2:
            raise ValueError("broken on rank 1")
        return super().training_step(batch, batch_idx)


def data(count: int) -> torch.utils.data.TensorDataset:
    """``count`` samples: four features, their sum, and the number of the sample."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, 4, generator=generator)
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True), torch.arange(count))

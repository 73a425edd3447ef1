# SPDX-License-Identifier: Apache-2.0
"""A plan against real processes: what each of them has of weights, gradients and optimizer state, and what travels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from ranks import make_trainer, on_ranks

KINDS = {"allreduce": "all_reduce", "all_reduce": "all_reduce", "broadcast": "broadcast"} | {
    "allgather": "all_gather", "all_gather": "all_gather", "_allgather_base": "all_gather",
    "all_gather_into_tensor": "all_gather", "_reduce_scatter_base": "reduce_scatter", "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
}  # fmt: skip
"""What the profiler calls exchanges over gloo, and what a plan calls them."""


class Net(L.LightningModule):
    """Four blocks of 0.6 MB between two small layers, with running statistics."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(10, 390)
        self.blocks = nn.ModuleList(nn.Linear(390, 390) for _ in range(4))
        self.norm = nn.BatchNorm1d(390) if norm else nn.Identity()
        self.last = nn.Linear(390, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.first(batch[0])
        for block in self.blocks:
            x = block(x).relu()
        loss: Tensor = self.last(self.norm(x)).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


class Count(L.Callback):
    """Counts all exchanges of this process in four batches in the middle of the fit, and weighs what it has."""

    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU])
        self.kinds: dict[str, int] = {}
        self.weights = self.gradients = self.optimizer = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            self.profile.start()

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step != 6:
            return
        held = [*pl_module.parameters(), *pl_module.buffers()]
        self.weights = sum(_bytes(tensor) for tensor in held)
        self.gradients = sum(_bytes(p.grad) for p in pl_module.parameters() if p.grad is not None)
        values = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        self.optimizer = sum(_bytes(value) for value in values)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 7:
            self.profile.stop()
            for event in self.profile.events():
                place, _, kind = event.name.partition(":")
                if place == "gloo" and event.device_type == DeviceType.CPU:
                    self.kinds[KINDS.get(kind, kind)] = self.kinds.get(KINDS.get(kind, kind), 0) + 1


def _bytes(tensor: Any) -> int:
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(tensor.numel() * tensor.element_size())


def _fit(strategy: Any, norm: bool, accumulate: int) -> Any:
    count = Count()
    trainer = make_trainer(strategy=strategy, max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[count])
    trainer.fit(Net(norm), DataLoader(TensorDataset(torch.randn(64, 10)), 2))
    return count.kinds, count.weights, count.gradients, count.optimizer


def _planned(norm: bool, accumulate: int, strategy: str) -> dict[str, Any]:
    plan = make_trainer(1, accumulate_grad_batches=accumulate).plan(Net(norm), devices=2)
    return next(row for row in plan.rows if row["strategy"] == strategy)


def _agrees(row: dict[str, Any], found: Any, accumulate: int) -> None:
    kinds, weights, gradients, optimizer = found
    assert {kind: count * 4 // accumulate for kind, count in row["collectives"].items()} == kinds
    assert (row["weights"], row["gradients"], row["optimizer"]) == (weights, gradients, optimizer)


def test_framework_collectives_of_an_ordinary_ddp_step_beyond_the_gradients_are_none() -> None:
    for found in on_ranks(2, _fit, "ddp", False, 1):
        _agrees(_planned(False, 1, "ddp"), found, 1)
        assert found[0] == {"all_reduce": 4 * 2}  # those of DistributedDataParallel itself, in two buckets


def test_ddp_with_running_statistics_and_accumulation_is_as_planned() -> None:
    for found in on_ranks(2, _fit, "ddp", True, 2):
        _agrees(_planned(True, 2, "ddp"), found, 2)

# SPDX-License-Identifier: Apache-2.0
"""A plan against real processes: what each of them has of weights, gradients and optimizer state, and what travels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.strategies.fsdp import FSDPStrategy
from ranks import make_trainer, on_ranks

KINDS = {
    "c10d::allreduce_": "all_reduce", "c10d::broadcast_": "broadcast", "c10d::allgather_": "all_gather",
    "c10d::_allgather_base_": "all_gather", "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
}  # fmt: skip
"""What the profiler calls exchanges, those of C++ included, and what a plan calls them."""


class Block(nn.Module):
    """Two layers one behind the other, which can be split."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(390, 390), nn.Linear(390, 390)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())  # type: ignore[no-any-return]


class Net(L.LightningModule):
    """Two blocks of 1.2 MB between two small layers, with running statistics (``"norm"``) or optimizers (``"two"``)."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = kind
        self.first = nn.Linear(10, 390)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.BatchNorm1d(390) if kind == "norm" else nn.Identity()
        self.last = nn.Linear(390, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.first(batch[0])
        for block in self.blocks:
            x = block(x)
        loss: Tensor = self.last(self.norm(x)).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        if self.kind == "two":
            return [torch.optim.Adam(self.blocks.parameters()), torch.optim.SGD(self.last.parameters(), 0.1)]
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
        if batch_idx == 6:  # gradients of the update before are still there
            held = [*pl_module.parameters(), *pl_module.buffers()]
            self.weights = sum(_bytes(tensor) for tensor in held)
            self.gradients = sum(_bytes(p.grad) for p in pl_module.parameters() if p.grad is not None)
            states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
            values = [value for state in states for value in state.values() if value is not None]
            self.optimizer = sum(_bytes(value) for value in values)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 7:
            self.profile.stop()
            for event in self.profile.events():
                if event.name.startswith("c10d::"):
                    kind = KINDS.get(event.name, event.name)
                    self.kinds[kind] = self.kinds.get(kind, 0) + 1


def _bytes(tensor: Any) -> int:
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(tensor.numel() * tensor.element_size())


STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "fsdp": lambda: "fsdp",
    "fsdp (SHARD_GRAD_OP)": lambda: FSDPStrategy(sharding_strategy="SHARD_GRAD_OP"),
    "tensor_parallel": lambda: "tensor_parallel",
}
"""The rows of a plan, and the strategies that they are about."""


CASES = [
    ("ddp", "", 1), ("ddp", "norm", 2), ("fsdp", "", 1), ("fsdp", "", 2), ("fsdp (SHARD_GRAD_OP)", "", 1),
    ("fsdp (SHARD_GRAD_OP)", "", 2), ("tensor_parallel", "", 1), ("ddp", "two", 1),
]  # fmt: skip
"""Row, kind of module, and the length of a window of accumulation."""


def _fit() -> list[Any]:
    found = []
    for row, kind, accumulate in CASES:
        count = Count()
        arguments = {"accumulate_grad_batches": accumulate, "callbacks": [count]}
        trainer = make_trainer(strategy=STRATEGIES[row](), max_epochs=1, **arguments)
        trainer.fit(Net(kind), DataLoader(TensorDataset(torch.randn(32, 10)), 2))
        found.append((count.kinds, count.weights, count.gradients, count.optimizer))
    return found


def test_framework_collectives_of_a_step_and_the_bytes_on_each_rank_are_those_of_the_plan() -> None:
    ranks = on_ranks(2, _fit)
    counted = []
    for case, (row, kind, accumulate) in enumerate(CASES):
        arguments: dict[str, Any] = {"accumulate_grad_batches": accumulate}
        plan = make_trainer(1, **arguments).plan(Net(kind), devices=2, batch=[torch.randn(2, 10)])
        planned = next(each for each in plan.rows if each["strategy"] == row)
        counted.append(planned["collectives"])
        for rank in ranks:
            assert rank[case][0] == {name: n * 4 // accumulate for name, n in planned["collectives"].items()}, CASES[
                case
            ]
        for size, name in enumerate(("weights", "gradients", "optimizer"), start=1):
            # of chunks that are not equal, the largest
            assert planned[name] == max(rank[case][size] for rank in ranks), (CASES[case], name)
    # under ddp nothing but the gradients: DistributedDataParallel's own two buckets, and the statistics of each batch
    assert counted[:2] == [{"all_reduce": 2}, {"all_reduce": 2, "broadcast": 2}]
    assert counted[2:4] == [{"all_gather": 5, "reduce_scatter": 3}, {"all_gather": 10, "reduce_scatter": 3}]
    assert counted[4:6] == [{"all_gather": 3, "reduce_scatter": 3}, {"all_gather": 6, "reduce_scatter": 3}]
    # each block has one forward and one backward; between the first layer and the last activations are gathered
    assert counted[6] == {"all_reduce": 5, "all_gather": 2}
    assert counted[7] == {"all_gather": 2, "all_reduce": 2}  # several optimizers: right before each steps

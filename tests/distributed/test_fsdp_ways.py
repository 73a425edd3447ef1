# SPDX-License-Identifier: Apache-2.0
"""``strategy="fsdp"``: modules as people write them, and ranks without a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from leyden.errors import MisconfigurationException
from leyden.strategies.fsdp import FSDPStrategy
from ranks import Net, data, make_trainer, on_ranks


class Pair(nn.Module):
    """Two layers and a weight of its own, called in another order than they are written down."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))
        self.second, self.first = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.second(torch.tanh(self.first(x)))


class Tangled(Net):
    """Calls its layers in another order than they are written down, one twice, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.leave, self.never = nn.Linear(6, 1), nn.Linear(7, 2)
        self.outer, self.inner, self.enter = Pair(), Pair(), nn.Linear(4, 6)
        self.layer = None
        self.skips = False

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.inner(self.outer(self.inner(self.enter(x)))))

    def loss(self, batch: Any) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.skips and self.global_rank == 1 and batch_idx >= 4:
            return None
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Batches(Dataset[Any]):
    """What is in a list."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def batches() -> list[Any]:
    return [data(40)[4 * i : 4 * i + 4] for i in range(10)]


def run(uneven: str) -> Tensor:
    """Six batches on rank 0 and four on rank 1, which skips further ones unless it does not have them."""
    strategy = FSDPStrategy(auto_wrap_policy={nn.Linear, Pair}, uneven=uneven)
    trainer = make_trainer(strategy=strategy, max_epochs=2, use_distributed_sampler=False)
    mine = batches()[:6] if strategy.global_rank == 0 else batches()[6:]
    if uneven == "stop" and strategy.global_rank == 1:
        mine += mine[:2]
    module = Tangled()
    module.skips = uneven == "stop"
    trainer.fit(module, DataLoader(Batches(mine), batch_size=None), DataLoader(Batches(batches()[:2]), batch_size=None))
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


@pytest.mark.parametrize("uneven", ["join", "stop"])
def test_d4_a_rank_without_a_batch_calls_the_layers_of_its_last_step(uneven: str) -> None:
    module = Tangled()
    optimizer = module.configure_optimizers()
    for _ in range(2):
        for step in range(6):
            together = batches()[step : step + 1] + (batches()[6 + step : 7 + step] if step < 4 else [])
            # a rank that skips counts with gradients of 0; one that has no batch does not count
            shares = len(together) if uneven == "join" else 2
            optimizer.zero_grad()
            (sum(module.loss(batch) for batch in together) / shares).backward()
            optimizer.step()
    wanted = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    for values in on_ranks(2, run, uneven):
        assert torch.allclose(values, wanted, atol=1e-6)


class Penalised(Tangled):
    """Adds a penalty on all parameters to its loss."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + sum(p.square().sum() for p in self.parameters())


class Whole(Tangled):
    """Steps by an optimizer that works on all parameters at once."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


def explained(made: Any) -> str:
    trainer = make_trainer(strategy=FSDPStrategy(auto_wrap_policy={nn.Linear}), max_epochs=1)
    try:
        trainer.fit(made(), DataLoader(data(8), 2), DataLoader(data(2), 1))
    except (RuntimeError, MisconfigurationException) as error:
        return str(error)
    return ""


def test_what_is_not_possible_with_shares_of_weights_is_explained() -> None:
    assert all("self.parameters()" in said and "weight_decay" in said for said in on_ranks(2, explained, Penalised))
    assert all("LBFGS" in said and "strategy='ddp'" in said for said in on_ranks(2, explained, Whole))

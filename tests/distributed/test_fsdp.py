# SPDX-License-Identifier: Apache-2.0
"""``strategy="fsdp"``: each process has a share of the weights, and the numbers are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import leyden as L
from leyden.strategies.fsdp import FSDPStrategy
from ranks import data, make_trainer, on_ranks


class Block(nn.Module):
    """A layer that repeats."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Deep(L.LightningModule):
    """Blocks between two layers of their own, with weights of every kind that layers can have."""

    def __init__(self, optimizer: str = "sgd", width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.kind = optimizer
        self.enter = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.leave = nn.Linear(width, 1)
        self.scale = nn.Parameter(torch.tensor(1.5))  # a scalar, which cannot be shared out
        self.shift = nn.Parameter(torch.zeros(3))  # used as it is, by no layer
        self.register_buffer("seen", torch.zeros(()))
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rates: list[float] = []
        self.evaluated: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x) * self.scale + self.shift.sum()

    def loss(self, batch: Any) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.seen += 1
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.losses.append(loss.item())
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated += batch[2].tolist()
        self.log("val", self.loss(batch))
        self.log("count", float(len(batch[0])), reduce_fx="sum")

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.cat([self(batch[0]), batch[2][:, None]], 1)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        norm = self.trainer.strategy.clip_gradients(
            optimizer, gradient_clip_val or 1e9, gradient_clip_algorithm or "norm"
        )
        if norm is not None:
            assert not isinstance(norm, DTensor)
            self.norms.append(norm.item())

    def configure_optimizers(self) -> Any:
        if self.kind == "adam":
            optimizer: Any = torch.optim.Adam(self.parameters(), 0.01)
        else:
            optimizer = torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.004, 50), "interval": "step"}
        ]


def by_blocks(**arguments: Any) -> FSDPStrategy:
    return FSDPStrategy(auto_wrap_policy={Block}, **arguments)


def weights(module: nn.Module) -> Tensor:
    assert not any(isinstance(p, DTensor) for p in module.parameters())
    return torch.cat([p.detach().reshape(-1).float() for p in module.parameters()])


def train(devices: int, strategy: str, kind: str, options: dict[str, Any], made: Any = Deep) -> Any:
    """Fit 20 global batches of 8 samples in 4 epochs, with validation; return all its numbers."""
    L.seed_everything(11, verbose=False)
    module, loader = made(kind), DataLoader(data(40), 8 // devices, shuffle=True)
    named: Any = by_blocks() if strategy == "blocks" else strategy
    trainer = make_trainer(devices, strategy=named, max_epochs=4, log_every_n_steps=1, **options)
    trainer.fit(module, loader, DataLoader(data(13), 3))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    rows = [dict(row) for row in trainer.history]
    return module.losses, module.norms, module.rates, weights(module), metrics, rows, float(module.seen)


def same(one: Any, ranks: list[Any], tolerance: float = 1e-5) -> None:
    """Compare the numbers of one process with those of several."""
    losses, norms, rates, values, metrics, rows, seen = one
    means = [sum(step) / len(ranks) for step in zip(*(rank[0] for rank in ranks), strict=True)]
    assert means == pytest.approx(losses, abs=tolerance)  # F1
    for rank in ranks:
        assert rank[1] == pytest.approx(norms, abs=tolerance)  # F2
        assert rank[2] == rates  # SC3
        assert torch.allclose(rank[3], values, atol=tolerance)
        assert rank[4] == pytest.approx(metrics, abs=tolerance)  # M1, M5
        assert rank[6] == seen
        for row, theirs in zip(rows, rank[5], strict=True):
            assert theirs == pytest.approx(row, abs=tolerance)


CASES = [
    pytest.param("sgd", {}, id="sgd"),
    pytest.param("adam", {}, id="adam"),
    pytest.param("sgd", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}, id="accumulated and clipped"),
    pytest.param("adam", {"accumulate_grad_batches": 3, "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
                 id="a short window, clipped by value"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_f1_f2_f4_sc3_m1_m5_ddp_and_fsdp_give_the_numbers_of_one_process(kind: str, options: dict[str, Any]) -> None:
    one = train(1, "auto", kind, options)
    assert len(one[0]) == 20
    for strategy in ("ddp", "fsdp", "blocks"):
        same(one, on_ranks(2, train, 2, strategy, kind, options))

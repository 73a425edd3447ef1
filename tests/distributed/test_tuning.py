# SPDX-License-Identifier: Apache-2.0
"""Searches of several processes: all find the same, and what is too large for one is too large for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import leyden as L
from leyden.errors import MisconfigurationException
from leyden.tuning import Tuner
from ranks import data, make_trainer, on_ranks


class Module(L.LightningModule):
    """Its losses differ by rank, and only rank 1 runs out of memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.lr, self.batch_size = 0.1, 4
        self.layer = torch.nn.Linear(4, 1)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_rank == 1 and len(batch[0]) > 20:
            raise RuntimeError("CUDA error: out of memory")
        loss = (self.layer(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)

    def train_dataloader(self) -> Any:
        return DataLoader(data(256), batch_size=self.batch_size)


def rate(threshold: float | None) -> Any:
    L.seed_everything(1, verbose=False)
    module, trainer = Module(), make_trainer(max_epochs=2, strategy="ddp")
    found = Tuner(trainer).lr_find(module, num_training=40, early_stop_threshold=threshold, max_lr=10.0)
    assert found is not None
    module.losses.clear()
    module.lr = 0.05
    trainer.fit(module)
    return found.results, found.suggestion(), module.losses, module.layer.weight.tolist()


def without() -> Any:
    L.seed_everything(1, verbose=False)
    module, trainer = Module(), make_trainer(max_epochs=2, strategy="ddp")
    module.lr = 0.05
    trainer.fit(module)
    return module.losses, module.layer.weight.tolist()


def test_all_ranks_find_the_same_rate_and_train_as_without() -> None:
    first, second = on_ranks(2, rate, None)
    assert len(first[0]["loss"]) == 40
    assert first[:2] == second[:2]
    assert [first[2:], second[2:]] == on_ranks(2, without)


def test_all_ranks_stop_where_the_loss_diverges() -> None:
    first, second = on_ranks(2, rate, 4.0)
    assert 2 < len(first[0]["loss"]) < 40
    assert first[:2] == second[:2]


def size(strategy: str, mode: str) -> Any:
    module, trainer = Module(), make_trainer(max_epochs=1, strategy=strategy)
    found = Tuner(trainer).scale_batch_size(module, mode=mode, margin=0.0)
    trainer.fit(module)
    return found, module.batch_size, len(module.losses) > 0


def test_what_is_too_large_for_one_rank_is_too_large_for_all() -> None:
    assert on_ranks(2, size, "ddp", "power") == [(16, 16, True)] * 2


@pytest.mark.slow
def test_all_ranks_search_between_the_last_two_sizes() -> None:
    assert on_ranks(2, size, "ddp", "binsearch") == [(20, 20, True)] * 2


def refused() -> str:
    with pytest.raises(MisconfigurationException) as error:
        size("fsdp", "power")
    return str(error.value)


def test_where_a_step_takes_all_ranks_it_is_refused() -> None:
    assert "FSDPStrategy takes all processes for each step" in on_ranks(2, refused)[0]

# SPDX-License-Identifier: Apache-2.0
"""Under ``strategy="ddp"``: what its wrapper does not average by itself, and what evaluations are of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import leyden as L
from ranks import Net, data, make_trainer, on_ranks


class ByHand(Net):
    """Steps every second batch, and clips before; the third time it adds to the gradients in between."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.losses.append(loss.item())
        if batch_idx % 2:
            self.clip_gradients(optimizer, 0.2, "norm")
            if batch_idx == 5:
                self.manual_backward(self.loss(batch))
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


class Frozen(Net):
    """Begins with its first layer frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer[0].requires_grad_(False)


class Searching(Net):
    """Goes as far as a line search over the loss says."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), max_iter=4, line_search_fn="strong_wolfe")


class Turn(L.Callback):
    """Lets the first layer require gradients, or not, from the second epoch on."""

    def __init__(self, on: bool) -> None:
        self.on = on

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            module.layer[0].requires_grad_(self.on)


class Normed(Net):
    """Has a batch norm, and notes its statistics in each validation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer.insert(1, torch.nn.BatchNorm1d(5))
        self.statistics: list[list[float]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.statistics.append([*self.layer[1].running_mean.tolist(), *self.layer[1].running_var.tolist()])


def statistics(strategy: Any) -> Any:
    L.seed_everything(5, verbose=False)
    module = Normed()
    trainer = make_trainer(2, strategy=strategy, max_epochs=3, val_check_interval=3)
    trainer.fit(module, DataLoader(data(48), 4, shuffle=True), DataLoader(data(8), 4))
    return module.statistics


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_m1_an_evaluation_is_of_one_model_on_all_ranks(strategy: str) -> None:
    first, second = on_ranks(2, statistics, strategy)
    assert first == second
    assert first[-1] != first[-2]
    if strategy == "fsdp":
        assert first == on_ranks(2, statistics, "ddp")[0]  # to the last bit: rank 0 goes on with its own


def trained(devices: int, made: Any, strategy: str, turn: bool | None) -> Any:
    L.seed_everything(5, verbose=False)
    module = made()
    callbacks = [] if turn is None else [Turn(turn)]
    trainer = make_trainer(devices, strategy=strategy, max_epochs=3, callbacks=callbacks)
    trainer.fit(module, DataLoader(data(48), 8 // devices, shuffle=True))
    return module.losses, torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def compare(made: Any, strategy: str, turn: bool | None) -> None:
    losses, values = trained(1, made, "auto", turn)
    ranks = on_ranks(2, trained, 2, made, strategy, turn)
    assert [sum(step) / 2 for step in zip(*(rank[0] for rank in ranks), strict=True)] == pytest.approx(losses, abs=1e-5)
    for rank in ranks:
        assert torch.allclose(rank[1], values, atol=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_f2_by_hand_gradients_are_clipped_by_the_norm_of_their_mean(strategy: str) -> None:
    compare(ByHand, strategy, None)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_f1_what_is_frozen_at_first_is_averaged_from_when_it_is_not(strategy: str) -> None:
    compare(Frozen, strategy, True)


def test_f1_what_is_frozen_in_the_middle_of_a_run() -> None:
    compare(Net, "ddp_find_unused_parameters_true", False)
    with pytest.raises(AssertionError, match=r"no part .*: layer\.0\.weight, layer\.0\.bias.* frozen in the middle"):
        on_ranks(2, trained, 2, Net, "ddp", False)


def test_f1_an_optimizer_that_goes_by_the_loss_does_the_same_on_all_ranks() -> None:
    losses, _ = trained(1, Searching, "auto", None)
    first, second = on_ranks(2, trained, 2, Searching, "ddp", None)
    assert torch.equal(first[1], second[1])
    means = [(one + other) / 2 for one, other in zip(first[0], second[0], strict=True)]
    assert means[:12] == pytest.approx(losses[:12], abs=1e-4)  # later on rounding decides where a search ends

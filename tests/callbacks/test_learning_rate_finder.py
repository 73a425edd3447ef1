# SPDX-License-Identifier: Apache-2.0
"""The finders as callbacks: a run begins with what they find, at other moments too."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from leyden.callbacks.rate_search import LRFinder


class Net(L.LightningModule):
    def __init__(self, limit: int = 10**6) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.lr, self.batch_size, self.limit = 0.1, 4, limit
        self.layer = torch.nn.Linear(4, 1)
        self.sizes: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if len(batch[0]) > self.limit:
            raise RuntimeError("CUDA error: out of memory")
        self.sizes.append(len(batch[0]))
        return (self.layer(batch[0]) - 1).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(64, 4)), batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Watch(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.steps.append(trainer.global_step)


class Rates(LearningRateFinder):
    def on_fit_start(self, *args: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch in (0, 2):
            self.lr_find(trainer, pl_module)
            pl_module.found.append(len(self.optimal_lr.results["lr"]))  # type: ignore[union-attr]


class Sizes(BatchSizeFinder):
    def on_fit_start(self, *args: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.scale_batch_size(trainer, pl_module)
            pl_module.sizes.clear()


def trainer(*callbacks: Any, **arguments: Any) -> L.Trainer:
    given: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 3, "enable_progress_bar": False, "logger": False,
        "enable_model_summary": False, "enable_checkpointing": False, "callbacks": list(callbacks),
        "limit_val_batches": 0,
    }  # fmt: skip
    return L.Trainer(**{**given, **arguments})


def test_finders_come_first() -> None:
    made = trainer(Watch(), LearningRateFinder(), BatchSizeFinder())
    assert [type(each).__name__ for each in made.callbacks[:2]] == ["LearningRateFinder", "BatchSizeFinder"]


def test_the_fit_goes_on_with_the_rate_that_was_found() -> None:
    finder, watch, net = LearningRateFinder(num_training_steps=40, early_stop_threshold=None), Watch(), Net()
    trainer(watch, finder).fit(net)
    assert finder.optimal_lr is not None
    assert net.lr == finder.optimal_lr.suggestion() != 0.1
    assert watch.rates == [net.lr] * 48
    assert watch.steps == list(range(48))


def test_rates_at_milestones() -> None:
    watch, net = Watch(), Net()
    net.found = []  # type: ignore[assignment]
    trainer(watch, Rates(num_training_steps=14, early_stop_threshold=None, min_lr=1e-4)).fit(net)
    assert net.found == [14, 14]  # type: ignore[comparison-overlap]
    assert watch.steps == list(range(48))


def test_early_stopping_at_a_milestone_goes_by_the_losses_of_that_test() -> None:
    net = Net()
    net.found = []  # type: ignore[assignment]
    trainer(Rates(num_training_steps=16, min_lr=1e-9, max_lr=1e-7, update_attr=False, early_stop_threshold=50.0)).fit(
        net
    )
    assert net.found == [16, 16]  # type: ignore[comparison-overlap]


def test_a_fit_begins_with_the_batch_size_that_was_found() -> None:
    finder, net = BatchSizeFinder(), Net(20)
    made = trainer(finder, max_epochs=1)
    made.fit(net)
    assert finder.optimal_batch_size == net.batch_size == made.train_dataloader.batch_size == 16
    assert net.sizes[-4:] == [16] * 4


def test_a_batch_size_at_a_milestone() -> None:
    net = Net(20)
    trainer(Sizes()).fit(net)
    assert net.sizes == [16] * 8


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_an_evaluation_goes_on_with_the_batch_size_that_was_found(method: str) -> None:
    finder, net = BatchSizeFinder(steps_per_trial=1), Net(20)
    made = trainer(finder, limit_val_batches=1.0)
    result = getattr(made, method)(net)
    assert finder.optimal_batch_size == 16
    assert net.sizes[-4:] == [16] * 4
    if method == "predict":
        assert len(result) == 4


def test_outside_of_a_run_there_is_nothing_to_rehearse() -> None:
    with pytest.raises(ValueError, match="inside a run only"):
        trainer().rehearsal()


# --------------------------------------------------------------------------------------------- what was found


def found(losses: list[float]) -> LRFinder:
    finder = LRFinder("exponential", 1e-6, 1.0, len(losses))
    finder.take([10.0 ** (number - len(losses)) for number in range(len(losses))], losses, len(losses) - 1)
    return finder


def test_the_steepest_descent_is_suggested() -> None:
    finder = found([5.0, 4.9, 4.8, 1.0, 0.9, 0.9])
    steep = torch.gradient(torch.tensor(finder.results["loss"]), spacing=[torch.tensor(finder.results["lr"])])[0]
    assert finder.suggestion(0, 0) == finder.results["lr"][int(steep.argmin())]


def test_points_that_are_no_numbers_are_passed_over() -> None:
    finder = found([5.0, float("nan"), 4.8, 1.0, float("inf"), 0.9])
    assert finder.suggestion(0, 1) in (finder.results["lr"][0], finder.results["lr"][2], finder.results["lr"][3])
    assert found([1.0, float("nan"), 1.0]).suggestion(1, 1) is None


def test_a_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    figure = found([5.0, 4.9, 4.8, 1.0, 0.9, 0.9] * 4).plot(suggest=True)
    [axes] = figure.axes
    assert (axes.get_xscale(), axes.get_xlabel(), len(axes.lines)) == ("log", "Learning rate", 2)
    import matplotlib.pyplot as plt

    mine = plt.figure().subplots()
    assert found([1.0, 2.0]).plot(ax=mine) is mine.figure
    plt.close("all")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ValueError, match=r"pip install 'leyden\[plots\]'"):
        found([1.0]).plot()

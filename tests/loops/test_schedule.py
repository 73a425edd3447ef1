# SPDX-License-Identifier: Apache-2.0
"""When learning-rate schedules step: by update and by epoch, every n-th time, on the value of a metric, or by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

import leyden as L
from leyden.errors import MisconfigurationException


class Net(L.LightningModule):
    """Halves its rate whenever the schedule steps; notes the rate that each batch is trained with."""

    def __init__(self, make: Any = None, **given: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.make, self.given = make or (lambda optimizer: ExponentialLR(optimizer, 0.5)), given
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.layer(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 1.0)

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make(optimizer), **self.given}}

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(4, 1))

    def val_dataloader(self) -> Any:
        return DataLoader(torch.ones(1, 1))


def trainer(**settings: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(**{"max_epochs": 3, "accelerator": "cpu", "num_sanity_val_steps": 0, **quiet, **settings})


def drops(net: Net) -> list[int]:
    """Return the batches (counted over epochs) ahead of which the rate was halved."""
    return [
        i
        for i in range(1, len(net.rates))
        for _ in range(round(torch.tensor(net.rates[i - 1] / net.rates[i]).log2().item()))
    ]


@pytest.mark.parametrize(
    ("given", "settings", "expected"),
    [
        ({}, {}, [4, 8]),
        ({"interval": "epoch", "frequency": 2}, {"max_epochs": 4}, [8]),
        ({"interval": "step"}, {"max_epochs": 1}, [1, 2, 3]),
        ({"interval": "step", "frequency": 3}, {}, [3, 7, 11]),
        ({"interval": "step"}, {"accumulate_grad_batches": 2}, [2, 4, 6, 8, 10]),
        ({"interval": "step"}, {"accumulate_grad_batches": 3}, [3, 4, 7, 8, 11]),
        ({"interval": "epoch"}, {"accumulate_grad_batches": 3}, [4, 8]),
        ({"interval": "step"}, {"max_epochs": -1, "max_steps": 3}, [1, 2]),
        ({"interval": "epoch"}, {"limit_train_batches": 1}, [1, 2]),
    ],
)
def test_a_schedule_steps_where_its_interval_says(given: Any, settings: Any, expected: list[int]) -> None:
    net = Net(**given)
    trainer(**settings).fit(net)
    assert drops(net) == expected


def test_an_epoch_that_was_cut_short_does_not_step_the_schedule() -> None:
    net = Net()
    made = trainer(max_epochs=-1, max_steps=6)
    made.fit(net)
    assert drops(net) == [4]
    assert made.lr_scheduler_configs[0].scheduler.last_epoch == 1


def plateau(optimizer: Any) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


def test_a_plateau_steps_on_the_value_of_its_metric() -> None:
    net = Net(plateau, monitor="val_loss")
    trainer(max_epochs=4).fit(net)
    assert drops(net) == [8, 12]  # the first value is the best


def test_a_plateau_by_step_uses_the_last_validation() -> None:
    net = Net(plateau, monitor="val_loss", interval="step", frequency=2)
    trainer(max_epochs=2, val_check_interval=2).fit(net)
    assert drops(net) == [4, 6]


def test_a_plateau_on_a_value_of_the_training_epoch() -> None:
    class Logs(Net):
        def on_train_epoch_end(self) -> None:
            self.log("late", 1.0)

    net = Logs(plateau, monitor="late")
    trainer(limit_val_batches=0).fit(net)
    assert drops(net) == [8]


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_missing_monitor_is_an_error_with_what_is_there(interval: str) -> None:
    net = Net(plateau, monitor="val_los", interval=interval, frequency=4 if interval == "step" else 1)
    with pytest.raises(
        MisconfigurationException, match=r"monitors 'val_los'.*\['val_loss'\].*'val_loss'.*'strict': False"
    ):
        trainer().fit(net)


def test_a_missing_monitor_that_may_be_missing_is_a_warning() -> None:
    net = Net(plateau, monitor="other", strict=False)
    with pytest.warns(RuntimeWarning, match="monitors 'other'.*The step is skipped"):
        trainer(max_epochs=1).fit(net)
    assert drops(net) == []


class Foreign:
    """A scheduler that owes nothing to torch."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.calls = optimizer, []  # type: ignore[var-annotated]

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: Any) -> None:
        self.calls = state["calls"]


def test_lr_scheduler_step_decides_how_any_scheduler_steps() -> None:
    class Own(Net):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.calls.append((self.trainer.global_step, metric))

    net = Own(Foreign, interval="step", frequency=2)
    made = trainer(max_epochs=1)
    made.fit(net)
    assert made.lr_scheduler_configs[0].scheduler.calls == [(2, None), (4, None)]


def test_lr_scheduler_step_gets_the_metric_of_a_monitor() -> None:
    class Own(Net):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.calls.append(float(metric))

    net = Own(Foreign, reduce_on_plateau=True, monitor="val_loss")
    made = trainer()
    made.fit(net)
    assert made.lr_scheduler_configs[0].scheduler.calls == [1.0] * 3


def test_a_skipped_batch_is_still_a_step() -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    net = Skips(interval="step")
    trainer(max_epochs=1).fit(net)
    assert drops(net) == [1, 2, 3]


def test_by_hand_schedules_step_when_the_user_says_so() -> None:
    class Manual(Net):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            if batch_idx == 2:
                self.lr_schedulers().step()

    net = Manual(interval="step")
    net.automatic_optimization = False
    trainer(max_epochs=2).fit(net)
    assert drops(net) == [3, 7]


def test_lr_schedulers_is_none_one_or_a_list() -> None:
    seen: list[Any] = []

    class Looks(Net):
        count = 0

        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=1.0)
            return [optimizer], [StepLR(optimizer, 1) for _ in range(self.count)]

        def on_train_start(self) -> None:
            seen.append(self.lr_schedulers())

    for count in range(3):
        net = Looks()
        net.count = count
        trainer(max_epochs=1, limit_train_batches=1).fit(net)
    assert seen[0] is None
    assert isinstance(seen[1], StepLR)
    assert [type(schedule) for schedule in seen[2]] == [StepLR, StepLR]

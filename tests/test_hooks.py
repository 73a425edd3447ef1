# SPDX-License-Identifier: Apache-2.0
"""The table of hooks, and what is told of methods that look like one."""

from __future__ import annotations

from typing import Any

import pytest

import leyden as L
from leyden.callbacks import BasePredictionWriter
from leyden.hooks import misspelt


def told(base: type, kind: str, **methods: Any) -> dict[str, str]:
    owner = type("Mine", (base,), methods)()
    root = next(cls for cls in (L.LightningModule, L.Callback, L.LightningDataModule) if issubclass(base, cls))
    return dict(misspelt(owner, kind, root))


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("on_train_epochs_end", "on_train_epoch_end"),
        ("train_step", "training_step"),
        ("val_step", "validation_step"),
        ("validation_dataloader", "val_dataloader"),
        ("train_dataloaders", "train_dataloader"),
        ("configure_optimizer", "configure_optimizers"),
        ("on_train_begin", "on_train_start"),
        ("validation_step_end", "on_validation_batch_end"),
        ("on_keyboard_interrupt", "on_exception"),
    ],
)
def test_a_method_that_nothing_calls_gets_the_right_name(name: str, right: str) -> None:
    assert told(L.LightningModule, "M", **{name: lambda self: None}) == {name: f" Did you mean {right!r}?"}


@pytest.mark.parametrize(
    "name",
    ["shared_step", "model_step", "eval_step", "generator_step", "log_step", "step", "_train_step", "train_loader"],
)
def test_methods_of_ones_own_are_left_alone(name: str) -> None:
    assert told(L.LightningModule, "M", **{name: lambda self: None}) == {}


def test_a_helper_that_other_methods_call_is_no_hook() -> None:
    class Base(L.LightningModule):
        def make_dataloader(self) -> None: ...

        def train_step(self) -> None: ...

        def valid_step(self) -> None: ...

        def on_train_epoch_done(self) -> None: ...

        @property
        def loss(self) -> Any:
            return [self.valid_step() for _ in range(2)]

    class Derived(Base):
        def train_dataloader(self) -> Any:
            return self.make_dataloader()

        def training_step(self, batch: Any) -> Any:
            def inner() -> None:
                self.train_step()

            return inner()

    assert [name for name, _ in misspelt(Derived(), "M", L.LightningModule)] == ["on_train_epoch_done"]


def test_the_verbs_of_our_own_callbacks_are_no_mistakes() -> None:
    def write(self: Any, *args: Any) -> None: ...

    assert told(BasePredictionWriter, "C", write_on_batch_end=write, write_on_epoch_end=write) == {}

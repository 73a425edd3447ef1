# SPDX-License-Identifier: Apache-2.0
"""The contexts of a precision of the user's own are entered for each step, whatever the strategy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from torch.utils.data import DataLoader

from leyden.precision import Precision
from ranks import Judged, data, make_trainer, on_ranks


class _Noting(Precision):
    def __init__(self) -> None:
        self.seen: list[str] = []

    @contextlib.contextmanager
    def train_step_context(self) -> Iterator[None]:
        self.seen.append("train")
        yield

    @contextlib.contextmanager
    def val_step_context(self) -> Iterator[None]:
        self.seen.append("val")
        yield


def _seen(strategy: str) -> list[str]:
    precision = _Noting()
    trainer = make_trainer(strategy=strategy, plugins=[precision], max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(Judged(), DataLoader(data(8), 2), DataLoader(data(4), 2))
    return precision.seen


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_each_step_enters_its_own_context(strategy: str) -> None:
    assert on_ranks(2, _seen, strategy) == [["train", "train", "val"]] * 2


def test_one_process_of_several_devices_enters_them_too() -> None:
    assert _seen("dp") == ["train"] * 4 + ["val"] * 2

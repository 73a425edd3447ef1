# SPDX-License-Identifier: Apache-2.0
"""Tests of BasePredictionWriter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from leyden.callbacks import BasePredictionWriter
from leyden.callbacks.prediction_writer import WriteInterval
from leyden.errors import MisconfigurationException


class Writer(BasePredictionWriter):
    def __init__(self, interval):
        super().__init__(interval)
        self.written = []

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        self.written.append((prediction, batch_indices, batch, batch_idx, dataloader_idx))

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        self.written.append((predictions, batch_indices))


def predict(trainer, writer):
    trainer.predict_loop = SimpleNamespace(
        current_batch_indices=[4, 5], epoch_batch_indices=[[[4, 5]]], predictions=["p"]
    )
    writer.on_predict_batch_end(trainer, None, "p", "b", 2, 1)
    writer.on_predict_epoch_end(trainer, None)


@pytest.mark.parametrize("interval", ["batch", "epoch", "batch_and_epoch"])
def test_when_it_writes(interval, make_trainer):
    writer = Writer(interval)
    predict(make_trainer(), writer)
    batch, epoch = ("p", [4, 5], "b", 2, 1), (["p"], [[[4, 5]]])
    assert writer.written == {"batch": [batch], "epoch": [epoch], "batch_and_epoch": [batch, epoch]}[interval]
    unused = {"batch": {"on_predict_epoch_end"}, "epoch": {"on_predict_batch_end"}, "batch_and_epoch": set()}[interval]
    assert writer.unused_hooks(make_trainer()) == unused


def test_a_writer_that_writes_nothing_is_told_what_to_override(make_trainer):
    for interval in ("batch", "epoch"):
        with pytest.raises(NotImplementedError, match=f"write_on_{interval}_end"):
            predict(make_trainer(), BasePredictionWriter(interval))


def test_bad_interval():
    with pytest.raises(MisconfigurationException, match=r"'batches'.*Did you mean 'batch'\?"):
        BasePredictionWriter("batches")
    assert BasePredictionWriter().interval is WriteInterval.BATCH

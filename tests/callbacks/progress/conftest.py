# SPDX-License-Identifier: Apache-2.0
"""A trainer that only counts, a clock that is set by hand, and the hooks of a fit in their order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from leyden.callbacks.progress import engine, rows
from leyden.types import TrainerFn, TrainerState

INF = float("inf")


class FakeTrainer:
    """What a bar may ask of a trainer. Calls ``hook`` before each event, so that tests can let time pass."""

    def __init__(self, batches=4, max_epochs=2, val=(), fn=TrainerFn.FITTING):
        self.state = TrainerState()
        self.state.fn = fn
        self.is_global_zero = True
        self.num_training_batches = batches
        self.num_val_batches = self.num_test_batches = self.num_predict_batches = list(val)
        self.num_sanity_val_batches = [min(2, number) for number in val]
        self.max_epochs, self.max_steps = max_epochs, -1
        self.current_epoch = self.global_step = 0
        self.accumulate_grad_batches = self.batches_per_update = 1
        self.check_val_every_n_epoch = 1
        self.enable_validation = bool(val)
        self.sanity_checking = False
        self.loggers = []
        self.lightning_module = object()
        self.metrics = {}
        self.asked = 0
        self.after_batch = lambda: None

    testing = property(lambda self: self.state.fn is TrainerFn.TESTING)
    predicting = property(lambda self: self.state.fn is TrainerFn.PREDICTING)

    @property
    def progress_bar_metrics(self):
        self.asked += 1
        return dict(self.metrics)

    def evaluate(self, bar, stage="validation", batches=None):
        batches = self.num_val_batches if batches is None else batches
        module = self.lightning_module
        getattr(bar, f"on_{stage}_start")(self, module)
        for loader, number in enumerate(batches):
            for index in range(number if number != INF else 3):
                self.after_batch()
                getattr(bar, f"on_{stage}_batch_end")(self, module, None, None, index, loader)
        getattr(bar, f"on_{stage}_end")(self, module)

    def epoch(self, bar, first=0):
        module = self.lightning_module
        bar.on_train_epoch_start(self, module)
        for index in range(first, self.num_training_batches if self.num_training_batches != INF else 5):
            self.after_batch()
            bar.on_train_batch_end(self, module, None, None, index)
        if self.num_val_batches:
            self.evaluate(bar)
        bar.on_train_epoch_end(self, module)
        self.current_epoch += 1

    def fit(self, bar):
        module = self.lightning_module
        bar.setup(self, module, "fit")
        if self.num_val_batches:
            self.sanity_checking = True
            bar.on_sanity_check_start(self, module)
            self.evaluate(bar, batches=self.num_sanity_val_batches)
            bar.on_sanity_check_end(self, module)
            self.sanity_checking = False
        bar.on_train_start(self, module)
        for _ in range(self.max_epochs):
            self.epoch(bar)
        bar.on_train_end(self, module)
        bar.teardown(self, module, "fit")

    def run(self, bar, fn, stage):
        """Run validate, test or predict."""
        self.state.fn = fn
        bar.setup(self, self.lightning_module, str(fn))
        self.evaluate(bar, stage)
        bar.teardown(self, self.lightning_module, str(fn))


@pytest.fixture
def fake_trainer():
    return FakeTrainer


@pytest.fixture
def clock(monkeypatch):
    """The clock that the bars read: ``clock.now`` seconds, ``clock.reads`` times read."""
    clock = SimpleNamespace(now=100.0, reads=0)

    def monotonic():
        clock.reads += 1
        return clock.now

    for module in (engine, rows):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=monotonic))
    return clock

# SPDX-License-Identifier: Apache-2.0
"""Tests of LearningRateMonitor; the names are those that Lightning 2.6.6 gave for the same optimizers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn, optim

from leyden.callbacks import LearningRateMonitor
from leyden.callbacks.learning_rate_monitor import is_row_due
from leyden.errors import MisconfigurationException


def weights():
    return [nn.Parameter(torch.zeros(1))]


def sgd(lr=0.1):
    return optim.SGD(weights(), lr=lr, momentum=0.9, weight_decay=0.01)


def two_groups():
    return optim.SGD([{"params": weights()}, {"params": weights(), "lr": 0.5}], lr=0.1)


def scheduled(optimizer, name=None, interval="epoch"):
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1)
    return SimpleNamespace(scheduler=scheduler, name=name, interval=interval)


@pytest.fixture
def train(make_trainer, make_logger):
    """Start training with the given optimizers, and return the trainer and the rows of its logger."""

    def start(callback, optimizers, configs=(), every=1):
        trainer = make_trainer([callback])
        trainer.loggers, trainer.log_every_n_steps = [make_logger(None)], every
        trainer.optimizers, trainer.lr_scheduler_configs = list(optimizers), list(configs)
        trainer.call("on_train_start")
        return trainer, trainer.loggers[0].rows

    return start


def cases():
    a, b, c = sgd(), sgd(), sgd()
    yield [a], [], ["lr-SGD"]
    yield [a, b], [], ["lr-SGD", "lr-SGD-1"]
    yield [a, b], [scheduled(b)], ["lr-SGD", "lr-SGD-1"]
    yield [a, b, c], [scheduled(c, "mine"), scheduled(b)], ["mine", "lr-SGD", "lr-SGD-1"]
    yield [a, b, c], [scheduled(a), scheduled(b), scheduled(c, "z")], ["lr-SGD", "lr-SGD-1", "z-1"]
    yield [a], [scheduled(a), scheduled(a)], ["lr-SGD", "lr-SGD-1"]
    yield [two_groups(), optim.Adam(weights())], [], ["lr-SGD/pg1", "lr-SGD/pg2", "lr-Adam"]
    head = optim.AdamW([{"params": weights(), "name": "head"}, {"params": weights()}])
    yield [head], [], ["lr-AdamW/head", "lr-AdamW/pg2"]
    yield [optim.AdamW([{"params": weights(), "name": "head"}])], [], ["lr-AdamW/head"]


@pytest.mark.parametrize(("optimizers", "configs", "names"), list(cases()))
def test_names(optimizers, configs, names, train):
    callback = LearningRateMonitor(logging_interval="step")
    trainer, rows = train(callback, optimizers, configs)
    trainer.call("on_train_batch_start", None, 0)
    assert list(rows[0][0]) == names == list(callback.lrs)


def test_values_follow_the_optimizer_and_reach_the_metrics(train):
    optimizer = sgd()
    callback = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    trainer, rows = train(callback, [optimizer])
    trainer.call("on_train_batch_start", None, 0)
    optimizer.param_groups[0]["lr"] = 0.05
    trainer.batches_that_stepped = 1
    trainer.call("on_train_batch_start", None, 1)
    expected = {"lr-SGD": 0.05, "lr-SGD-momentum": 0.9, "lr-SGD-weight_decay": 0.01}
    assert rows == [({**expected, "lr-SGD": 0.1}, 0), (expected, 1)]
    assert callback.lrs == {"lr-SGD": [0.1, 0.05]}
    assert callback.last_momentum_values == {"lr-SGD-momentum": 0.9}
    assert callback.last_weight_decay_values == {"lr-SGD-weight_decay": 0.01}
    assert {name: pytest.approx(float(value)) for name, value in trainer.callback_metrics.items()} == expected


def test_momentum_of_adam_and_of_none(train):
    rprop = optim.Rprop(weights(), lr=0.1)
    callback = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
    with pytest.warns(RuntimeWarning, match="no momentum"):
        trainer, rows = train(callback, [optim.Adam(weights(), betas=(0.7, 0.9)), rprop])
    trainer.call("on_train_batch_start", None, 0)
    assert rows[0][0]["lr-Adam-momentum"] == 0.7
    assert rows[0][0]["lr-Rprop-momentum"] == rows[0][0]["lr-Rprop-weight_decay"] == 0


@pytest.mark.parametrize(
    ("interval", "at_epoch", "at_step"),
    [
        (None, ["lr-SGD", "lr-SGD-2"], ["lr-SGD-1", "lr-SGD-2"]),
        ("epoch", ["lr-SGD", "lr-SGD-1", "lr-SGD-2"], None),
        ("step", None, ["lr-SGD", "lr-SGD-1", "lr-SGD-2"]),
    ],
)
def test_interval(interval, at_epoch, at_step, train):
    a, b, c = sgd(), sgd(), sgd()
    trainer, rows = train(
        LearningRateMonitor(interval), [a, b, c], [scheduled(a, interval="epoch"), scheduled(b, interval="step")]
    )
    trainer.call("on_train_epoch_start")
    assert ([list(row) for row, _ in rows] or [None]) == [at_epoch]
    rows.clear()
    trainer.call("on_train_batch_start", None, 0)
    assert ([list(row) for row, _ in rows] or [None]) == [at_step]


def test_rows_are_due_as_the_other_metrics_are(train):
    trainer, rows = train(LearningRateMonitor("step"), [sgd()], every=3)
    for step in range(7):
        trainer.batches_that_stepped = step
        trainer.call("on_train_batch_start", None, step)
    assert [step for _, step in rows] == [2, 5]
    trainer.should_stop = True
    assert is_row_due(trainer)
    trainer.log_every_n_steps = 0
    assert not is_row_due(trainer)


def test_groups_that_are_added_later(train):
    optimizer = sgd()
    callback = LearningRateMonitor("step", log_momentum=True)
    trainer, rows = train(callback, [optimizer])
    trainer.call("on_train_batch_start", None, 0)
    optimizer.add_param_group({"params": weights(), "lr": 0.7})
    trainer.call("on_train_batch_start", None, 1)
    assert callback.lrs == {"lr-SGD/pg1": [0.1, 0.1], "lr-SGD/pg2": [0.7]}
    assert rows[1][0]["lr-SGD/pg2"] == 0.7


def test_a_rate_that_is_a_tensor_is_logged_as_a_number(train):
    callback = LearningRateMonitor("step")
    optimizer = optim.SGD(weights(), lr=torch.tensor(0.5))
    trainer, rows = train(callback, [optimizer])
    trainer.call("on_train_batch_start", None, 0)
    optimizer.param_groups[0]["lr"].fill_(0.25)
    trainer.call("on_train_batch_start", None, 1)
    assert callback.lrs == {"lr-SGD": [0.5, 0.25]}
    assert type(rows[0][0]["lr-SGD"]) is float


def test_groups_of_one_name(train):
    optimizer = optim.SGD([{"params": weights(), "name": "x"}, {"params": weights(), "name": "x"}], lr=0.1)
    with pytest.raises(MisconfigurationException, match="lr-SGD has more than one group named 'x'"):
        train(LearningRateMonitor(), [optimizer])


def test_no_logger(make_trainer):
    trainer = make_trainer([callback := LearningRateMonitor()])
    with pytest.raises(MisconfigurationException, match="has no logger"):
        callback.on_train_start(trainer, None)
    trainer.fast_dev_run = True
    trainer.fit()


def test_bad_interval():
    with pytest.raises(MisconfigurationException, match=r"'steps'.*Did you mean 'step'\?"):
        LearningRateMonitor("steps")


def test_hooks_that_are_not_needed(make_trainer, make_logger):
    class Mine(LearningRateMonitor):
        def on_train_batch_start(self, *args, **kwargs): ...

    trainer = make_trainer()
    both = {"on_train_batch_start", "on_train_epoch_start"}
    assert LearningRateMonitor().unused_hooks(trainer) == both
    trainer.loggers = [make_logger(None)]
    assert LearningRateMonitor().unused_hooks(trainer) == frozenset()
    assert LearningRateMonitor("epoch").unused_hooks(trainer) == {"on_train_batch_start"}
    assert LearningRateMonitor("step").unused_hooks(trainer) == {"on_train_epoch_start"}
    assert Mine("epoch").unused_hooks(trainer) == frozenset()
    trainer.log_every_n_steps = 0
    assert LearningRateMonitor().unused_hooks(trainer) == {"on_train_batch_start"}


def test_no_optimizer_outlives_its_fit(train):
    import gc
    import weakref

    optimizer = sgd()
    alive = weakref.ref(optimizer)
    callback = LearningRateMonitor("step")
    trainer, _ = train(callback, [optimizer])
    trainer.call("on_train_batch_start", None, 0)
    gc.collect()
    del trainer, optimizer, _
    gc.collect()
    assert alive() is None
    assert callback.lrs == {"lr-SGD": [0.1]}


def test_a_prefix_stands_ahead_of_every_name(train):
    monitor = LearningRateMonitor(log_momentum=True, log_weight_decay=True, log_key_prefix="optim/")
    trainer, rows = train(monitor, [sgd()])
    trainer.call("on_train_epoch_start")
    names = ["optim/lr-SGD", "optim/lr-SGD-momentum", "optim/lr-SGD-weight_decay"]
    assert [list(row) for row, _ in rows] == [names]
    assert list(monitor.lrs) == names[:1]

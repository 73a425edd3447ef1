# SPDX-License-Identifier: Apache-2.0
"""Tests of EarlyStopping."""

from __future__ import annotations

import math

import pytest
import torch

from leyden.callbacks import EarlyStopping
from leyden.callbacks.early_stopping import EarlyStoppingReason
from leyden.errors import MisconfigurationException
from leyden.types import TrainerFn


def logs(values, when="validation", name="val"):
    """Return the ``metrics`` of a stand-in Trainer that logs ``values``, one at each ``when``."""
    rest = iter(values)
    return lambda moment, trainer: {name: next(rest)} if moment == when else {}


@pytest.mark.parametrize(
    ("arguments", "values", "epochs", "reason"),
    [
        ({"patience": 2}, [5, 4, 4, 4, 3], 4, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({"patience": 1}, [5, 4, 3, 2, 1], 5, EarlyStoppingReason.NOT_STOPPED),
        ({"patience": 2, "mode": "max"}, [1, 2, 3, 3, 3], 5, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({"patience": 1, "min_delta": 1.0}, [5, 4, 3, 2, 1], 2, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({"patience": 1, "min_delta": 0.5}, [5, 4, 3, 2, 1], 5, EarlyStoppingReason.NOT_STOPPED),
        ({}, [5, math.nan, 3, 2, 1], 2, EarlyStoppingReason.NON_FINITE_METRIC),
        ({}, [math.inf, 4, 3, 2, 1], 1, EarlyStoppingReason.NON_FINITE_METRIC),
        ({"check_finite": False}, [5, math.nan, 3, 2, 1], 5, EarlyStoppingReason.NOT_STOPPED),
        ({"stopping_threshold": 3}, [5, 4, 3, 2, 1], 4, EarlyStoppingReason.STOPPING_THRESHOLD),
        ({"divergence_threshold": 6}, [5, 6, 7, 2, 1], 3, EarlyStoppingReason.DIVERGENCE_THRESHOLD),
        ({"divergence_threshold": 3, "mode": "max"}, [5, 4, 2, 2, 1], 3, EarlyStoppingReason.DIVERGENCE_THRESHOLD),
    ],
)
def test_when_and_why_it_stops(arguments, values, epochs, reason, make_trainer):
    callback = EarlyStopping("val", **arguments)
    trainer = make_trainer([callback], epochs=5, metrics=logs(map(float, values)))
    trainer.fit()
    assert (trainer.current_epoch, callback.stopping_reason) == (epochs, reason)
    stopped = reason is not EarlyStoppingReason.NOT_STOPPED
    assert callback.stopped_epoch == (epochs - 1 if stopped else 0)
    assert (callback.stopping_reason_message is not None) is stopped
    assert trainer.should_stop is stopped


def test_patience_counts_checks_not_epochs(make_trainer):
    callback = EarlyStopping("val", patience=3)
    trainer = make_trainer([callback], epochs=9, val_check_interval=0.25, metrics=logs([1.0] * 40))
    trainer.fit()
    assert (trainer.global_step, callback.wait_count) == (4, 3)


@pytest.mark.parametrize(
    ("trainer_arguments", "asked", "at"),
    [
        ({}, None, "epoch"),
        ({"val_check_interval": 0.5}, None, "validation"),
        ({"check_val_every_n_epoch": 2}, None, "validation"),
        ({"val_check_interval": 0.5}, True, "epoch"),
        ({}, False, "validation"),
        ({"val_check_interval": 0.5, "val_batches": 0}, None, "epoch"),
    ],
)
def test_moment_of_the_check(trainer_arguments, asked, at, make_trainer):
    callback = EarlyStopping("m", patience=99, check_on_train_epoch_end=asked)
    values = {"validation": 1.0, "epoch": 0.5}
    trainer = make_trainer(
        [callback], epochs=2, metrics=lambda when, trainer: {"m": values.get(when, 2.0)}, **trainer_arguments
    )
    trainer.fit()
    assert float(callback.best_score) == values[at]


def test_reused_with_another_trainer_decides_anew(make_trainer):
    callback = EarlyStopping("m")
    callback.setup(make_trainer(val_check_interval=0.5), None, "fit")
    callback.setup(make_trainer(), None, "fit")
    assert callback._check_on_train_epoch_end is True


def test_missing_metric(make_trainer):
    trainer = make_trainer([EarlyStopping("val_loss")], metrics=logs([1.0] * 9, name="val/loss"))
    with pytest.raises(RuntimeError, match=r"logged so far: 'val/loss'. Did you mean 'val/loss'\?"):
        trainer.fit()
    trainer = make_trainer([EarlyStopping("val_loss", strict=False)])
    trainer.fit()
    assert trainer.current_epoch == 2
    trainer = make_trainer([EarlyStopping("val_loss", strict=False, verbose=True)])
    with pytest.warns(RuntimeWarning, match="logged so far: nothing"):
        trainer.fit()


def test_it_keeps_quiet_outside_of_training(make_trainer):
    trainer = make_trainer([EarlyStopping("nope")], sanity=True, epochs=0)
    trainer.fit()
    trainer = make_trainer([EarlyStopping("nope")])
    trainer.fast_dev_run = True
    trainer.fit()
    trainer = make_trainer([EarlyStopping("nope", check_on_train_epoch_end=False)])
    trainer.state.fn = TrainerFn.VALIDATING
    trainer.call("on_validation_end")


def test_all_processes_stop_together(make_trainer):
    callback = EarlyStopping("val")
    trainer = make_trainer([callback], metrics=logs([1.0] * 9))
    trainer.strategy.reduce_boolean_decision = lambda decision, all=True: not all  # another process has to stop
    trainer.fit()
    assert (trainer.should_stop, trainer.current_epoch) == (True, 1)


def test_it_never_takes_back_a_stop(make_trainer):
    trainer = make_trainer([EarlyStopping("val")], epochs=1, metrics=logs([1.0]))
    trainer.should_stop = True
    trainer.callback_metrics["val"] = torch.tensor(1.0)
    trainer.call("on_train_epoch_end")
    assert trainer.should_stop


def test_state(make_trainer):
    callback = EarlyStopping("val", patience=2)
    make_trainer([callback], epochs=5, metrics=logs([3.0, 2.0, 2.0, 2.0])).fit()
    state = callback.state_dict()
    assert callback.state_key == "EarlyStopping{'monitor': 'val', 'mode': 'min'}"
    assert list(state) == [
        "wait_count",
        "stopped_epoch",
        "best_score",
        "patience",
        "stopping_reason",
        "stopping_reason_message",
    ]
    other = EarlyStopping("val")
    other.load_state_dict(state)
    assert other.state_dict() == state
    del state["stopping_reason"], state["stopping_reason_message"]
    other.load_state_dict(state)
    assert other.stopping_reason is EarlyStoppingReason.NOT_STOPPED


def test_verbose_speaks_on_each_process_or_on_the_first(make_trainer, caplog, capsys):
    def run(**arguments):
        caplog.clear()
        trainer = make_trainer([EarlyStopping("val", verbose=True, **arguments)], epochs=1, metrics=logs([1.0]))
        trainer.world_size, trainer.global_rank = arguments.pop("world", 2), 1
        with caplog.at_level("INFO", logger="leyden"):
            trainer.fit()
        return caplog.text + capsys.readouterr().err

    assert "[rank: 1] val = 1 improved" in run()
    assert "[rank: 1]" not in run(log_rank_zero_only=True)


def test_best_score_is_a_copy(make_trainer):
    shared = torch.tensor(2.0)
    callback = EarlyStopping("val", patience=9)
    trainer = make_trainer([callback])
    trainer.callback_metrics["val"] = shared
    callback.setup(trainer, None, "fit")
    callback.on_train_epoch_end(trainer, None)
    shared.fill_(5.0)
    assert float(callback.best_score) == 2.0


def test_bad_mode():
    with pytest.raises(MisconfigurationException, match=r"mode='maxx'.*Did you mean 'max'\?"):
        EarlyStopping("val", mode="maxx")
    assert EarlyStopping.monitors

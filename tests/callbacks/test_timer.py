# SPDX-License-Identifier: Apache-2.0
"""Tests of Timer, by a clock that only moves when it is told to."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest

from leyden.callbacks import Timer
from leyden.callbacks.timer import Interval
from leyden.errors import MisconfigurationException
from leyden.types import RunningStage


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def tick(clock):
    """The metrics of a stand-in Trainer in which a batch takes a second and a validation ten."""

    def metrics(when, trainer):
        clock[0] += {"batch": 1, "validation": 10}.get(when, 0)
        return {}

    return metrics


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        ("01:02:03:04", 93784),
        (" 00:00:00:22 ", 22),
        (timedelta(minutes=1), 60),
        ({"weeks": 4, "days": 2}, 2592000),
        (None, None),
    ],
)
def test_durations(duration, seconds):
    assert Timer(duration).time_remaining() == seconds


@pytest.mark.parametrize("arguments", [{"duration": "6:00"}, {"duration": {"houres": 1}}, {"interval": "batch"}])
def test_bad_arguments(arguments):
    with pytest.raises(MisconfigurationException, match=str(next(iter(arguments)))):
        Timer(**arguments)


@pytest.mark.parametrize(("interval", "steps"), [("step", 5), (Interval.epoch, 8)])
def test_it_stops_in_time(interval, steps, make_trainer, tick):
    timer = Timer(timedelta(seconds=15), interval)
    trainer = make_trainer([timer], epochs=9, metrics=tick)
    trainer.fit()  # 4 batches, a validation, 4 batches, a validation
    assert (trainer.global_step, trainer.should_stop) == (steps, True)


def test_times_of_the_stages(make_trainer, tick, clock):
    timer = Timer()
    assert timer.time_elapsed() == 0
    assert timer.start_time() is None
    trainer = make_trainer([timer], metrics=tick)
    trainer.fit()
    assert (timer.time_elapsed(), timer.time_elapsed("validate"), timer.time_elapsed("test")) == (28, 10, 0)
    assert (timer.start_time("train"), timer.end_time(RunningStage.TRAINING)) == (100, 128)
    assert timer.time_remaining() is None
    trainer.call("on_test_start")
    clock[0] += 7
    assert timer.time_elapsed("test") == 7
    trainer.call("on_test_end")
    clock[0] += 7
    assert timer.time_elapsed("test") == 7
    assert timer.end_time("test") == 135


def test_a_second_fit_is_measured_from_its_own_start(make_trainer, tick, clock):
    timer = Timer(timedelta(seconds=30))
    make_trainer([timer], metrics=tick).fit()
    clock[0] += 1000
    trainer = make_trainer([timer], metrics=tick, epochs=9)
    trainer.call("on_train_start")
    assert timer.time_elapsed() == 0
    trainer.fit()
    assert timer.time_elapsed() >= 30


def test_resume_counts_what_was_used_before(make_trainer, tick, caplog, capsys):
    first = Timer(timedelta(seconds=40))
    make_trainer([first], metrics=tick).fit()
    state = first.state_dict()
    assert state["time_elapsed"]["train"] == 28
    assert set(state["time_elapsed"]) == {"train", "sanity_check", "validate", "test", "predict"}
    second = Timer(timedelta(seconds=40))
    second.load_state_dict(state)
    assert (second.time_elapsed(), second.time_elapsed("validate"), second.time_remaining()) == (28, 0, 12)
    trainer = make_trainer([second], metrics=tick, epochs=9)
    trainer.fit()
    assert (trainer.global_step, second.time_elapsed()) == (
        5,
        43,
    )  # looked at after each batch, not after the validation
    used_up = Timer(timedelta(seconds=10))
    used_up.load_state_dict(state)
    trainer = make_trainer([used_up])
    with caplog.at_level("INFO", logger="leyden"):
        trainer.call("on_fit_start")
    assert trainer.should_stop
    assert "0:00:28 elapsed" in caplog.text + capsys.readouterr().err
    used_up.load_state_dict({})
    assert used_up.time_elapsed() == 0


def test_rank_zero_decides(make_trainer, clock):
    trainer = make_trainer([timer := Timer(timedelta(seconds=5), verbose=False)])
    trainer.world_size = 2
    trainer.strategy.broadcast = lambda obj, src=0: (True, 1)
    trainer.call("on_train_start")
    trainer.call("on_train_batch_end", None, None, 0)
    assert trainer.should_stop
    assert timer.time_elapsed() == 0


def test_hooks_that_are_not_needed(make_trainer):
    both = {"on_train_batch_end", "on_train_epoch_end"}
    assert Timer().unused_hooks(make_trainer()) == both
    assert Timer({"hours": 1}).unused_hooks(make_trainer()) == {"on_train_epoch_end"}
    assert Timer({"hours": 1}, "epoch").unused_hooks(make_trainer()) == {"on_train_batch_end"}

    class Mine(Timer):
        def on_train_batch_end(self, *args, **kwargs): ...

    assert Mine().unused_hooks(make_trainer()) == {"on_train_epoch_end"}

# SPDX-License-Identifier: Apache-2.0
"""Recorder: rows reach every logger in order, from one thread at a time; nothing is lost, swallowed or left behind."""

from __future__ import annotations

import contextlib
import gc
import threading
import traceback
import weakref
from pathlib import Path

import pytest
import torch

from leyden.errors import LeydenWarning
from leyden.loggers import CSVLogger, Logger, Recorder, TensorBoardLogger
from leyden.loggers import recorder as recorder_module


class Listing(Logger):
    name = "listing"
    version = 0

    def __init__(self):
        self.rows = []
        self.calls = []
        self.threads = set()

    def log_metrics(self, metrics, step=None):
        self.threads.add(threading.current_thread())
        self.rows.append((step, metrics))

    def log_hyperparams(self, params, *args, **kwargs):
        self.calls.append("log_hyperparams")

    def save(self):
        self.calls.append("save")

    def finalize(self, status):
        self.calls.append(f"finalize {status}")


class Failing(Listing):
    def __init__(self, at):
        super().__init__()
        self.at = at
        self.error = RuntimeError(f"no room at {at}")

    def log_metrics(self, metrics, step=None):
        if step == self.at:
            raise self.error
        super().log_metrics(metrics, step)


class Gated(Listing):
    """Cannot write until its gate is opened: a logger that is slow, without a clock in the test."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.entered = threading.Event()

    def log_metrics(self, metrics, step=None):
        self.entered.set()
        assert self.gate.wait(30)
        super().log_metrics(metrics, step)


def ours():
    return [thread for thread in threading.enumerate() if thread.name == "leyden-recorder"]


@pytest.fixture(autouse=True)
def no_thread_left():
    yield
    assert ours() == []


def test_rows_arrive_in_order_at_every_logger():
    first, second = Listing(), Listing()
    recorder = Recorder([first, second])
    for step in range(2500):
        recorder.put({"loss": torch.tensor(step / 2), "epoch": 1}, step)
    recorder.flush()
    expected = [(step, {"loss": step / 2, "epoch": 1}) for step in range(2500)]
    assert first.rows == second.rows == expected
    assert type(first.rows[0][1]["loss"]) is float
    recorder.close("success")
    assert len(first.rows) == 2500


def test_close_writes_saves_finalizes_and_ends_the_thread():
    logger = Listing()
    recorder = Recorder([logger])
    recorder.put({"a": 1.0}, 0)
    assert len(ours()) == 1
    assert ours()[0].daemon
    recorder.close("success")
    assert ours() == []
    assert logger.rows == [(0, {"a": 1.0})]
    assert logger.calls[-2:] == ["save", "finalize success"]


def test_without_rows_no_thread_starts():
    logger = Listing()
    recorder = Recorder([logger])
    assert ours() == []
    recorder.flush()
    recorder.close("success")
    assert logger.calls == ["save", "finalize success"]


def test_without_loggers_nothing_happens():
    recorder = Recorder([])
    recorder.put({"a": 1.0}, 0)
    assert ours() == []
    recorder.flush()
    recorder.close("success")


def test_a_recorder_can_be_used_again_after_close():
    logger = Listing()
    recorder = Recorder([logger])
    for step in range(3):
        recorder.put({"a": 1.0}, step)
        recorder.close("success")
    assert [step for step, _ in logger.rows] == [0, 1, 2]
    assert logger.calls.count("finalize success") == 3


def test_a_recorder_whose_close_was_interrupted_can_be_used_again(monkeypatch):
    logger = Gated()
    recorder = Recorder([logger])
    recorder.put({"loss": 1.0}, 0)
    assert logger.entered.wait(30)
    join = threading.Thread.join
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", lambda thread, timeout=None: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            recorder.close("failed")
    logger.gate.set()
    for step in (1, 2, 3):
        recorder.put({"loss": 1.0}, step)
    recorder.close("success")
    assert [step for step, _ in logger.rows] == [0, 1, 2, 3]
    for thread in ours():
        join(thread, 30)


def test_rows_are_written_and_saved_without_flush(monkeypatch):
    monkeypatch.setattr(recorder_module, "_WAIT_S", 0.001)
    monkeypatch.setattr(recorder_module, "_SAVE_EVERY_S", 0.0)
    saved = threading.Event()

    class Telling(Listing):
        def save(self):
            saved.set()

    logger = Telling()
    recorder = Recorder([logger])
    recorder.put({"a": 1.0}, 0)
    assert saved.wait(30)
    assert logger.rows == [(0, {"a": 1.0})]
    assert threading.main_thread() not in logger.threads
    recorder.close("success")


def test_H2_a_slow_logger_does_not_hold_up_put_until_the_queue_is_full():
    slow = Gated()
    recorder = Recorder([slow], capacity=100)
    for step in range(100):
        recorder.put({"a": 1.0}, step)
    assert slow.rows == [], "100 rows were taken while the logger could not write one"
    blocked = threading.Thread(target=lambda: [recorder.put({"a": 1.0}, step) for step in range(100, 300)])
    blocked.start()
    assert slow.entered.wait(30)
    blocked.join(0.1)
    assert blocked.is_alive(), "the queue is bounded"
    slow.gate.set()
    blocked.join(30)
    recorder.close("success")
    assert [step for step, _ in slow.rows] == list(range(300))


def test_a_full_queue_keeps_the_order():
    logger = Listing()
    recorder = Recorder([logger], capacity=2)
    for step in range(500):
        recorder.put({"a": 1.0}, step)
    recorder.close("success")
    assert [step for step, _ in logger.rows] == list(range(500))


@pytest.mark.parametrize("where", ["put", "flush", "close"])
def test_an_error_of_a_logger_comes_back_as_it_is(where):
    bad, good = Failing(at=1), Listing()
    recorder = Recorder([bad, good])
    for step in range(3):
        recorder.put({"a": 1.0}, step)
    with pytest.raises(RuntimeError) as caught:
        if where == "put":
            while True:
                recorder.put({"a": 1.0}, 3)
        elif where == "flush":
            recorder.flush()
        else:
            recorder.close("success")
    assert caught.value is bad.error
    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "log_metrics" in frames, "the traceback leads to the logger"
    if where != "close":
        recorder.put({"a": 1.0}, 4)
    recorder.close("failed")  # and it is raised once
    assert [step for step, _ in bad.rows] == [0]
    assert [step for step, _ in good.rows][:3] == [0, 1, 2]
    assert good.rows[-1][0] == (2 if where == "close" else 4)
    assert "finalize failed" in bad.calls
    assert "finalize failed" in good.calls


def test_a_logger_that_failed_gets_the_rows_of_the_next_run():
    bad = Failing(at=0)
    recorder = Recorder([bad])
    for step in (0, 1):
        recorder.put({"a": 1.0}, step)
        with pytest.raises(RuntimeError) if step == 0 else contextlib.nullcontext():
            recorder.close("success")
    assert [step for step, _ in bad.rows] == [1]


def test_errors_of_several_loggers_all_come_back():
    first, second = Failing(at=0), Failing(at=0)
    recorder = Recorder([first, second])
    recorder.put({"a": 1.0}, 0)
    with pytest.raises(RuntimeError) as caught:
        recorder.flush()
    assert caught.value is first.error
    with pytest.raises(RuntimeError) as caught:
        recorder.flush()
    assert caught.value is second.error
    recorder.close("failed")


def test_errors_at_close_beyond_the_first_are_warnings():
    first, second = Failing(at=0), Failing(at=0)
    recorder = Recorder([first, second])
    recorder.put({"a": 1.0}, 0)
    with pytest.warns(LeydenWarning, match="no room at 0"), pytest.raises(RuntimeError) as caught:
        recorder.close("success")
    assert caught.value is first.error


def test_Q3_errors_do_not_replace_an_exception_that_is_on_its_way_out():
    bad = Failing(at=0)
    recorder = Recorder([bad])
    recorder.put({"a": 1.0}, 0)
    with pytest.warns(LeydenWarning, match="(?s)A logger raised.*log_metrics.*no room at 0"):
        recorder.close("failed", reraise=False)
    assert bad.calls == ["save", "finalize failed"]


@pytest.mark.parametrize("verb", ["save", "finalize"])
def test_an_error_at_the_end_does_not_keep_the_other_loggers_from_ending(verb):
    class Broken(Listing):
        pass

    def fail(*args):
        raise OSError("gone")

    broken, good = Broken(), Listing()
    setattr(broken, verb, fail)
    recorder = Recorder([broken, good])
    recorder.put({"a": 1.0}, 0)
    with pytest.raises(OSError, match="gone"):
        recorder.close("success")
    assert good.calls[-1] == "finalize success"
    assert good.rows == [(0, {"a": 1.0})]


def test_even_an_exit_on_the_thread_is_not_lost():
    class Leaving(Listing):
        def log_metrics(self, metrics, step=None):
            raise SystemExit(3)

    recorder = Recorder([Leaving()])
    recorder.put({"a": 1.0}, 0)
    with pytest.raises(SystemExit):
        recorder.close("success")


def test_a_logger_that_is_not_threadsafe_is_served_at_once_by_the_caller():
    class Direct(Listing):
        threadsafe = False

    direct, queued = Direct(), Listing()
    recorder = Recorder([direct, queued])
    for step in range(3):
        recorder.put({"a": torch.tensor(1.5)}, step)
        assert direct.rows[-1] == (step, {"a": 1.5})
    recorder.flush()
    recorder.close("success")
    assert direct.threads == {threading.current_thread()}
    assert [step for step, _ in queued.rows] == [0, 1, 2]
    assert direct.calls == ["save", "save", "finalize success"]


def test_only_loggers_that_are_not_threadsafe_need_no_thread():
    class Direct(Listing):
        threadsafe = False

    recorder = Recorder([Direct()])
    recorder.put({"a": 1.0}, 0)
    assert ours() == []
    recorder.close("success")


def test_each_logger_gets_a_row_of_its_own():
    class Greedy(Listing):
        def log_metrics(self, metrics, step=None):
            super().log_metrics(dict(metrics), step)
            metrics.clear()

    greedy, other = Greedy(), Listing()
    recorder = Recorder([greedy, other])
    row = {"a": torch.tensor(1.0)}
    recorder.put(row, 0)
    recorder.close("success")
    assert other.rows == greedy.rows == [(0, {"a": 1.0})]
    assert list(row) == ["a"]


def test_after_flush_the_thread_touches_no_logger(monkeypatch):
    monkeypatch.setattr(recorder_module, "_WAIT_S", 0.001)
    monkeypatch.setattr(recorder_module, "_SAVE_EVERY_S", 0.0)
    logger = Listing()
    recorder = Recorder([logger])
    for step in range(200):
        recorder.put({"a": 1.0}, step)
    recorder.flush()
    before = len(logger.calls)
    ours()[0].join(0.05)
    assert len(logger.calls) == before
    recorder.close("success")


def test_users_may_call_their_loggers_meanwhile(tmp_path):
    csv_logger, board = (
        CSVLogger(tmp_path, name="csv", flush_logs_every_n_steps=7),
        TensorBoardLogger(tmp_path, name="tb"),
    )
    recorder = Recorder([csv_logger, board], capacity=50)
    for step in range(400):
        recorder.put({"a": float(step)}, step)
        csv_logger.log_metrics({"a": -1.0}, step)
        board.experiment.add_scalar("mine", step, step)
        if step % 50 == 0:
            csv_logger.save()
    recorder.close("success")
    lines = Path(csv_logger.experiment.metrics_file_path).read_text().split()[1:]
    assert len(lines) == 800
    assert [line for line in lines if not line.startswith("-1.0")] == [f"{float(step)},{step}" for step in range(400)]


def test_E1_nothing_is_kept_after_close():
    gc.collect()
    gc.disable()
    try:
        logger, bad = Listing(), Failing(at=1)
        recorder = Recorder([logger, bad])
        for step in range(3):
            recorder.put({"a": torch.tensor(1.0)}, step)
        with contextlib.suppress(RuntimeError):
            recorder.close("success")
        bad.error = None
        gone = [weakref.ref(recorder), weakref.ref(logger), weakref.ref(bad)]
        del recorder, logger, bad
        assert [ref() for ref in gone] == [None, None, None]
    finally:
        gc.enable()

# SPDX-License-Identifier: Apache-2.0
"""The thread beside the loop: ranks stop after the same batch, learn of a failure, and agree without a collective."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore

from leyden.errors import CheckpointError
from leyden.signals import Interrupt
from leyden.strategies import hang, watch, where
from leyden.strategies.board import Board
from leyden.strategies.hang import Hang
from leyden.strategies.watch import Watch


class _Rank:
    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.interrupt, self.batches, self.left = Interrupt(lambda _: None), 0, list[int]()
        self.watch = Watch(store, "run", rank, size, self.interrupt, lambda: self.batches, self.left.append)


@pytest.fixture
def ranks(monkeypatch: Any) -> Iterator[Callable[[int], list[_Rank]]]:
    made: list[_Rank] = []
    monkeypatch.setattr(watch, "PERIOD", 0.01)

    def make(size: int, present: int | None = None) -> list[_Rank]:
        store = HashStore()
        made.extend(_Rank(store, rank, size) for rank in range(size if present is None else present))
        return made

    yield make
    for one in made:
        one.watch.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "leyden-watch"]


def _until(true: Callable[[], Any]) -> None:
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_all_end_after_the_last_batch_that_any_of_them_can_be_in(ranks: Any) -> None:
    zero, one, two = ranks(3)
    zero.batches, one.batches, two.batches = 7, 8, 7
    one.interrupt.number = signal.SIGTERM
    one.interrupt._ask()
    _until(lambda: all(rank.interrupt.received for rank in (zero, one, two)))
    for rank in (zero, one, two):
        assert [rank.watch.ends_after(batch) for batch in (7, 8, 9)] == [False, False, True]
        assert rank.interrupt.number == signal.SIGTERM


def test_an_error_of_one_rank_that_ends_the_run_is_that_of_all(ranks: Any) -> None:
    zero, one = ranks(2)
    error = CheckpointError("no space left")
    zero.interrupt.fail(error)
    _until(lambda: one.interrupt.received)
    assert zero.interrupt.exception() is error
    assert "ended by rank 0: no space left" in str(one.interrupt.exception())
    assert isinstance(one.interrupt.exception(), CheckpointError)


def test_a_rank_that_does_not_answer_is_named(ranks: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(watch, "BOUND", 0.2)
    monkeypatch.setattr(watch, "GRACE", 60.0)
    zero, _ = ranks(3, 2)
    zero.interrupt._ask()
    with pytest.raises(RuntimeError, match="rank 2 has not answered"):
        zero.watch.ends_after(1)


def test_d5_a_failure_is_told_to_all_and_ends_those_that_hang(ranks: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(watch, "GRACE", 0.1)
    zero, one, two = ranks(3)
    assert one.watch.failed(ValueError("broken")) is None
    assert "rank 1 of 3: ValueError: broken" in (two.watch.failed(KeyError("later")) or "")
    _until(lambda: zero.left)
    assert (zero.left, one.left) == ([1], [])
    told = capsys.readouterr().err
    assert "rank 0 of 3 ends, because another one has failed: rank 1 of 3: ValueError: broken" in told
    assert "rank 0 waits here, " in told  # D5
    assert "test_d5_a_failure_is_told_to_all" in told


def test_one_that_leaves_the_run_in_time_is_left_alone(ranks: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(watch, "GRACE", 5.0)
    zero, one = ranks(2)
    one.watch.failed(ValueError("broken"))
    time.sleep(0.1)
    zero.watch.close()
    assert zero.left == []


def test_unanimous_is_what_all_ask_and_nothing_else(ranks: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(watch, "PATIENCE", 0.2)
    zero, one = ranks(2)
    assert not zero.watch.unanimous("stop/3")
    assert not one.watch.unanimous("stop/3")  # too late
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda rank: rank.watch.unanimous("stop/4"), (zero, one))) == [True, True]


def test_t2_who_waits_for_whom_is_said_once_and_nobody_runs_out_of_time(
    ranks: Any, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(watch, "NOTICE", 0.1)
    zero, one, two = ranks(3)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(rank.watch.gather, "prepare_data()") for rank in (one, two)]
        time.sleep(0.4)
        assert not any(one.done() for one in waiting)
        pool.submit(zero.watch.gather, "prepare_data()").result(timeout=30)
        for one in waiting:
            one.result(timeout=30)
    told = capsys.readouterr().err
    assert told.count("leyden: ranks 1 and 2 wait for prepare_data() on rank 0, for 0 s so far.") == 1


def test_t2_those_that_wait_learn_of_a_failure(ranks: Any) -> None:
    zero, one = ranks(2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(one.watch.gather, "prepare_data()")
        zero.watch.failed(ValueError("no data"))
        with pytest.raises(RuntimeError, match=r"Rank 1 waited for prepare_data\(\).*rank 0 of 2: ValueError: no data"):
            waiting.result(timeout=30)


def test_what_ranks_tell_each_other_is_heard_from_those_that_tell(ranks: Any) -> None:
    zero, one, _ = ranks(3)
    with ThreadPoolExecutor(2) as pool:
        heard = list(pool.map(lambda rank: rank.watch.hear("x", f"by {rank.watch.rank}", 0.5), (zero, one)))
    assert heard == [{0: "by 0", 1: "by 1"}] * 2


def test_d5_one_that_is_stopped_or_holds_on_to_python_is_not_lost() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    board = Board(HashStore(), "run")
    words = where.home().split()
    there = " ".join([*words[:3], str(process.pid), where._began(process.pid) or ""])
    board.write("home/1", there)

    def lost() -> str | None:
        watched = Hang(board, 0, 2, where.Where(), 1800.0)
        now = time.monotonic()
        watched._open, watched._heard = (1, now), {1: now - 400.0}
        return watched._judge(now)

    assert where.is_there(where.home())
    assert lost() is None
    process.communicate()
    assert not where.is_there(there)
    assert "rank 1 of 2 has not answered for 300 s" in (lost() or "")


def test_d5_a_process_that_was_stopped_has_not_missed_rank_0(ranks: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(watch, "GRACE", 0.1)
    monkeypatch.setattr(hang, "SILENCE", 1.0)
    _, one = ranks(2)
    one.watch.pace = 60.0
    time.sleep(0.1)  # the first thread sleeps now
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 10000.0)  # as after a SIGSTOP of hours
    time.sleep(0.6)
    assert one.watch._failed is None
    monkeypatch.setattr(hang, "is_there", lambda _: False)
    _until(lambda: one.left)  # if nobody answers from then on either, and rank 0 is not there
    assert "rank 0 has not answered" in (one.watch._failed or "")

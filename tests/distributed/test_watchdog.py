# SPDX-License-Identifier: Apache-2.0
"""D5: ranks that hang. All end, each prints its stacks and its last event, and one says who is behind and who waits."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from leyden.runtime import collective
from leyden.strategies import DDPStrategy, hang, watch
from ranks import Judged, Net, data, make_trainer, on_ranks


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What people have time to read takes less of it here."""
    monkeypatch.setattr(watch, "GRACE", 0.3)
    monkeypatch.setattr(watch, "NOTICE", 0.3)
    monkeypatch.setattr(hang, "ANSWER", 3.0)


class _Hangs(Judged):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def stay(self, where: str) -> None:
        if where == self.where and self.global_rank == 1:
            while True:
                time.sleep(0.01)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 3:
            self.stay("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking and batch_idx == 1:
            self.stay("validation_step")
        super().validation_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.stay("on_train_epoch_end")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.stay("on_save_checkpoint")


class _Locked(Dataset[Any]):
    """A worker that waits for a lock that nobody opens."""

    def __init__(self, rank: int) -> None:
        self.samples, self.locked = data(40), rank == 1

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        if self.locked and index >= 20:
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
        return self.samples[index]


def _ends(size: int, function: Any, *args: Any, capfd: Any) -> str:
    """Run it on ranks that do not come to an end by themselves; return what they printed.

    The ranks are ended each by its own watch: one that is ended a little later may see its exchange broken off before.
    """
    with pytest.raises(AssertionError, match="ended, or was ended, without a result|Connection closed by peer"):
        on_ranks(size, function, *args, timeout=60)
    return str(capfd.readouterr().err)


def _strategy(seconds: float = 1.0) -> DDPStrategy:
    return DDPStrategy(hang_timeout=timedelta(seconds=seconds), timeout=timedelta(seconds=60))


def _hangs(where: str, size: int) -> None:
    module = _Hangs(where)
    trainer = make_trainer(size, strategy=_strategy(), max_epochs=2)
    trainer.fit(module, DataLoader(data(40), 2), DataLoader(data(12), 2))


_PLACES = ["validation_step", "on_train_epoch_end"]


def test_d5_a_rank_that_hangs_in_a_step_ends_all_and_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    told = _ends(3, _hangs, "training_step", 3, capfd=capfd)
    assert "leyden: rank 1 of 3 hangs, and ranks 0 and 2 wait: nothing has happened for 1 s." in told
    assert "rank 1 is behind: in training, epoch 0, batch 3: in _Hangs.training_step() (test_watchdog.py:" in told or (
        "rank 1 is behind: in training, epoch 0, batch 3: in training_step() (test_watchdog.py:" in told
    )
    for rank in (0, 2):
        assert f"rank {rank} waits: in training, epoch 0, batch 3: in backward" in told
    for rank in range(3):
        assert f"leyden: rank {rank} of 3, 1 s after its last event, in training, epoch 0, batch 3: " in told
        ended = f"leyden: rank {rank} of 3 ends, because another one has failed: rank 1 of 3 hangs" in told
        left = f"leyden: what rank {rank} says comes after another failure: rank 1 of 3 hangs" in told
        assert ended or left
    assert told.count("Thread 'MainThread':") == 3
    assert "in stay\n    time.sleep(0.01)" in told  # the stack of the one that is behind


@pytest.mark.parametrize("where", [pytest.param(one, marks=pytest.mark.slow) for one in _PLACES])
def test_d5_a_rank_that_hangs_in_a_hook_is_named(where: str, capfd: pytest.CaptureFixture[str]) -> None:
    told = _ends(2, _hangs, where, 2, capfd=capfd)
    assert "leyden: rank 1 of 2 hangs, and rank 0 waits: nothing has happened for 1 s." in told
    assert f"{where}() (test_watchdog.py:" in told
    assert "rank 0 waits: in " in told
    assert "waits in the exchange 'all_gather'" in told
    assert "in validation, batch 1 after epoch 0, batch 10" in told or where != "validation_step"


def _locked() -> None:
    trainer = make_trainer(strategy=_strategy(), max_epochs=1)
    trainer.fit(Net(), DataLoader(_Locked(trainer.global_rank), 2, num_workers=1))


def test_d5_a_worker_that_hangs_shows_its_stack(capfd: pytest.CaptureFixture[str]) -> None:
    told = _ends(2, _locked, capfd=capfd)
    assert "rank 1 of 2 hangs, and rank 0 waits" in told
    assert "rank 1 is behind: in training, epoch 0, batch " in told
    assert "waits for data from the workers of a DataLoader" in told
    assert "which this rank has started: S (sleeping)" in told
    assert "in __getitem__" in told  # the worker's own stack, line by line as faulthandler prints it


class _Busy(Net):
    """Rank 1 goes on with something of its own, so that it does not hang; rank 0 waits for it all the time."""

    def on_train_start(self) -> None:
        if self.global_rank == 0:
            self.trainer.strategy.barrier()
        while self.global_rank == 1:
            self.trainer.fit_loop.validation.batch_idx += 1
            time.sleep(0.02)


def _late() -> Any:
    strategy = DDPStrategy(timeout=timedelta(seconds=2))
    try:
        make_trainer(strategy=strategy, max_epochs=1).fit(_Busy(), DataLoader(data(12), 2))
    except RuntimeError:
        collective.part()
        raise


def test_d5_the_time_out_of_an_exchange_leads_to_the_same_report(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="(?s)rank 0 failed first.*Timed out waiting"):
        on_ranks(2, _late, timeout=60)
    told = capfd.readouterr().err
    assert "leyden: rank 1 of 2 does not come, and rank 0 waits: rank 0 waits in the exchange 'barrier' in " in told
    assert "whose time was up" in told
    assert "rank 1 is behind: in training, epoch 0, batch 0: in " in told
    assert "leyden: rank 1 of 2, " in told
    assert "time.sleep(0.02)" in told  # its stack


class _Prepares(Net):
    def prepare_data(self) -> None:
        time.sleep(2.5)


def _prepared() -> Any:
    module = _Prepares()
    strategy = DDPStrategy(timeout=timedelta(seconds=1), hang_timeout=timedelta(seconds=1))
    trainer = make_trainer(3, strategy=strategy, max_epochs=1)
    trainer.fit(module, DataLoader(data(12), 2))
    return trainer.global_step


def test_t2_prepare_data_may_take_as_long_as_it_likes_and_one_line_says_who_waits(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert on_ranks(3, _prepared) == [2, 2, 2]
    told = capfd.readouterr().err
    assert "leyden: ranks 1 and 2 wait for _Prepares.prepare_data() on rank 0, for 0 s so far." in told
    assert told.count("so far") == 1


class _Breaks(Net):
    def prepare_data(self) -> None:
        raise ConnectionError("no way to the data")


def _broken() -> Any:
    began = time.monotonic()
    try:
        make_trainer(max_epochs=1).fit(_Breaks(), DataLoader(data(12), 2))
    except Exception as error:
        return str(error), time.monotonic() - began < 30
    return None


def test_t2_what_fails_there_is_told_to_those_that_wait() -> None:
    (first, _), (second, soon) = on_ranks(2, _broken)
    assert first == "no way to the data"
    assert second.startswith(
        "Rank 1 waited for _Breaks.prepare_data() of other ranks; one failed: rank 0 of 2: Connection"
    )
    assert soon


def _slow_but_alive() -> Any:
    """All ranks take long for a batch, more than the limit, and nobody waits for anybody: that is no hang."""
    module = _Slow()
    make_trainer(strategy=_strategy(0.6), max_epochs=1).fit(module, DataLoader(data(12), 6))
    return len(module.samples)


class _Slow(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(1.5)
        return super().training_step(batch, batch_idx)


def test_d5_ranks_that_all_compute_for_long_do_not_hang() -> None:
    assert on_ranks(2, _slow_but_alive) == [1, 1]

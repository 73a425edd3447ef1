# SPDX-License-Identifier: Apache-2.0
"""The wait for data is measured over the first steps of some epochs, said once where it is much, and then costs nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from leyden.data import wait
from leyden.data.wait import HostClock, Waits, remedy


class Clock(HostClock):
    """A device that is behind the host, or not; moments are what a test says."""

    def __init__(self, late: int = 0) -> None:
        self.now, self.late = 0.0, late

    def stamp(self) -> Any:
        return self.now * 1e9

    def passed(self, moment: Any) -> bool:
        self.late -= 1
        return self.late < 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic_ns", lambda: round(made.now * 1e9))
    return made


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(wait, "rank_zero_info", lines.append)
    return lines


class Source:
    """Batches that take a while to come; notes how they are asked for."""

    def __init__(self, clock: Clock, batches: int, seconds: float) -> None:
        self.clock, self.left, self.seconds, self.ended = clock, batches, seconds, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self.left:
            self.ended += 1
            raise StopIteration
        self.left -= 1
        self.clock.now += self.seconds
        return self.left


def epoch(waits: Waits, source: Source, step: float) -> int:
    count = 0
    for _ in waits.around(source):
        source.clock.now += step
        count += 1
    return count


def test_much_waiting_is_said_once(clock: Clock, said: list[str]) -> None:
    waits = Waits(clock, lambda: "Do this.")
    assert epoch(waits, Source(clock, 200, 0.03), 0.07) == 200
    assert said == ["Trainer.fit: 30% of 50 steps was waiting for data (1.5 of 5.0 s). Do this."]
    source = Source(clock, 3, 0.03)
    assert waits.around(source) is source  # nothing is between any more
    assert epoch(waits, source, 0.07) == 3
    assert len(said) == 1


@pytest.mark.parametrize(
    ("seconds", "step"), [(0.03, 0.3), (0.0, 0.1), (0.002, 0.001)], ids=["a small share", "none", "of a tiny time"]
)
def test_what_is_fine_is_not_said_and_looked_at_three_times(
    clock: Clock, said: list[str], seconds: float, step: float
) -> None:
    waits = Waits(clock, lambda: "")
    for number in range(3):
        source = Source(clock, 70, seconds)
        assert waits.around(iter(())) is not source
        assert waits.times == 3 - number
        assert epoch(waits, source, step) == 70
    assert waits.around(source) is source
    assert said == []


def test_a_wait_that_begins_in_a_later_epoch_is_said(clock: Clock, said: list[str]) -> None:
    waits = Waits(clock, lambda: "")
    epoch(waits, Source(clock, 60, 0.0), 0.1)
    epoch(waits, Source(clock, 60, 0.1), 0.1)
    assert len(said) == 1
    assert said[0].startswith("Trainer.fit: 50% of 50 steps")


def test_short_epochs_are_put_together_and_what_is_between_them_does_not_count(clock: Clock, said: list[str]) -> None:
    waits = Waits(clock, lambda: "")
    for _ in range(8):
        assert epoch(waits, Source(clock, 10, 0.1), 0.1) == 10
        clock.now += 100.0  # a validation, say
    assert len(said) == 1
    assert said[0].startswith("Trainer.fit: 50% of 50 steps")


def test_the_first_steps_of_a_fit_do_not_count(clock: Clock, said: list[str]) -> None:
    waits = Waits(clock, lambda: "")
    slow = Source(clock, 2, 9.0)
    fast = Source(clock, 100, 0.0)
    for _ in waits.around(chain(slow, fast)):
        clock.now += 0.1
    assert said == []


def test_only_the_first_batches_pass_through_and_an_end_is_asked_for_once(clock: Clock, said: list[str]) -> None:
    waits = Waits(clock, lambda: "")
    source = Source(clock, 500, 0.0)
    iterator = waits.around(source)
    for _ in range(60):
        next(iterator)
    assert waits.waits == []
    assert waits.times == 2
    source = Source(clock, 5, 0.0)
    assert epoch(waits, source, 0.1) == 5
    assert source.ended == 1
    assert said == []


def test_a_device_that_is_behind_has_work_and_nothing_waits_for_it(said: list[str], clock: Clock) -> None:
    for late, expected in ((3, 1), (99, 0)):
        device = Clock(late)
        waits = Waits(device, lambda: "")

        class Both(Source):
            """What the host waits for, the device waits for too."""

            def __next__(self) -> Any:
                found = super().__next__()
                device.now = clock.now  # noqa: B023  # used in this turn of the loop only
                return found

        epoch(waits, Both(clock, 100, 0.1), 0.1)
        assert len(said) == expected
        said.clear()


def test_an_error_of_the_data_is_passed_on(clock: Clock) -> None:
    def fails() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    iterator = Waits(clock, lambda: "").around(fails())
    assert next(iterator) == 1
    with pytest.raises(ValueError, match="broken"):
        next(iterator)


def test_no_batch_is_kept_alive(clock: Clock) -> None:
    import gc
    import weakref

    iterator = Waits(clock, lambda: "").around(torch.zeros(2) for _ in range(9))
    seen = weakref.ref(next(iterator))
    gc.collect()
    assert seen() is None


def _loader(workers: int = 0, data: Any = None) -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(4)) if data is None else data, num_workers=workers)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("loaders", "cores", "wanted", "expected"),
    [
        ([_loader()], 4, None, "There are 4 cores to use: DataLoader(num_workers=…), or Trainer(num_workers='auto')"),
        ([_loader()], 1, None, "There is only 1 core to use, so that workers would not help: make the data set faster"),
        ([_loader()], 4, "auto", "workers were measured to be no faster: make the data set faster"),
        ([_loader()], 4, 0, "workers are ruled out by Trainer(num_workers=0)"),
        (
            [_loader(1), _loader(1)],
            8,
            None,
            "It has 2 workers, and 8 cores to use: take more (num_workers=…, or Trainer",
        ),
        ([_loader(2)], 8, "auto", "take more (num_workers=…), a higher prefetch_factor"),
        ([_loader(2)], 2, None, "It has 2 workers, and no more than 2 cores to use: make the data set faster"),
        ([_loader(1)], 1, None, "It has 1 worker, and no more than 1 core to use"),
        ([_loader(0, Stream())], 4, None, "(an iterable data set has to share its samples among them)"),
        # nobody measures these
        ([_loader(0, Stream())], 4, None, "share its samples among them)."),
        ([_loader(0, Stream())], 4, "auto", "There are 4 cores to use: DataLoader(num_workers=…) (an"),
        ([_loader(1, Stream())], 4, None, "take more (num_workers=…) (an iterable"),
        ([[1, 2], range(3)], 4, None, "The batches come from list, range: make it faster, or let a DataLoader with"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*worker processes in total:UserWarning")
def test_the_remedy_depends(loaders: list[Any], cores: int, wanted: Any, expected: str) -> None:
    assert expected in remedy(loaders, cores, wanted)

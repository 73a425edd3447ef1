# SPDX-License-Identifier: Apache-2.0
"""Workers that are kept give what new ones give, are kept only where that is known, and end when they are released."""

from __future__ import annotations

import functools
import gc
import os
import random
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate, get_worker_info

from leyden.data.feed import Feed
from leyden.data.kept import can_keep

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*worker processes in total:UserWarning"),
]
SCALE = 1.0


class Draws(Dataset):
    """Each sample is what all generators say, and what the data set and its module are set to."""

    def __init__(self, size: int = 12) -> None:
        self.size, self.level, self.rng = size, 0, np.random.default_rng(0)
        self.weights = torch.zeros(size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        drawn = [torch.rand(1).item(), random.random(), np.random.rand(), self.rng.random()]
        scale = SCALE * float(os.environ.get("LEYDEN_TEST_SCALE", "1"))
        return torch.tensor([index, (self.level + 1) * scale, self.weights[index], *drawn], dtype=torch.float64)


class Counts(Draws):
    def __getitem__(self, index: int) -> Tensor:
        self.level += 1
        return super().__getitem__(index)


class Caches(Draws):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, Tensor] = {}

    def __getitem__(self, index: int) -> Tensor:
        if index not in self.cache:
            self.cache[index] = super().__getitem__(index)
        return self.cache[index]


@functools.lru_cache
def _remembered(index: int) -> float:
    return torch.rand(1).item()


class CachesElsewhere(Draws):
    """What it remembers is in a cache of a function."""

    def __getitem__(self, index: int) -> Tensor:
        return super().__getitem__(index) + _remembered(index)


class Writes(Draws):
    def __getitem__(self, index: int) -> Tensor:
        self.weights[index] += 1
        return super().__getitem__(index)


class Careless(Sampler[int]):
    """Draws when its iterator is made and while it is gone through, and counts how often it was asked."""

    def __init__(self, size: int = 12) -> None:
        self.size, self.asked = size, 0

    def __iter__(self) -> Iterator[int]:
        self.asked += 1
        first = torch.rand(1).item() + random.random()

        def samples() -> Iterator[int]:
            for _ in range(self.size):
                yield int((first + torch.rand(1).item() + np.random.rand()) * 1e6 + self.asked) % self.size

        return samples()

    def __len__(self) -> int:
        return self.size


def noisy_collate(samples: list[Tensor]) -> Tensor:
    return default_collate(samples) + torch.rand(1)


class Remembers:
    """A collate function with a memory."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, samples: list[Tensor]) -> Tensor:
        self.seen += 1
        return default_collate(samples) + self.seen


def seeds(worker_id: int) -> None:
    random.seed(torch.initial_seed())


def seeds_all(worker_id: int, first: int = 0) -> None:
    seed = torch.initial_seed() % 2**32 + first
    np.random.seed(seed)
    random.seed(seed)
    torch.set_num_threads(1)


def sets(worker_id: int) -> None:
    get_worker_info().dataset.level = worker_id + 1


def seed_all() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def passes(
    make: Callable[[], DataLoader],
    keep: bool,
    seeding: str = "batch",
    change: Any = None,
    take: int = 99,
    count: int = 3,
) -> tuple[list[Any], int]:
    """Go through a loader some times; return all that was seen, and how often workers were started."""
    seed_all()
    loader = make()
    feed = Feed(loader, seeding, 3, keep)
    seen: list[Any] = []
    pids = set()
    for number in range(count):
        feed.key, feed.passes = ("train", 0, number, 0), 0
        if change is not None and number == 1:
            change(loader)
        iterator = iter(feed)
        pids.add(tuple(worker.pid for worker in iterator._workers))
        batches = [batch for _, batch in zip(range(take), iterator, strict=False)]
        seen.append([batch.tolist() for batch in batches])
        seen.append((torch.rand(1).item(), random.random(), float(np.random.rand())))  # what a step draws
    feed.release()
    return seen, len(pids)


def loader(data: Any = Draws, **more: Any) -> Callable[[], DataLoader]:
    def make() -> DataLoader:
        made = {name: part() if isinstance(part, type) else part for name, part in more.items()}
        return DataLoader(data(), **{"batch_size": 2, "num_workers": 1, "multiprocessing_context": "fork", **made})

    return make


def shuffled(data: Any = Draws, **more: Any) -> Callable[[], DataLoader]:
    return loader(data, shuffle=True, **more)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children() if child.name() == "pt_data_worker"}


@pytest.mark.parametrize(
    "make",
    [
        shuffled(), loader(), loader(sampler=Careless), shuffled(collate_fn=noisy_collate), shuffled(batch_size=None),
        shuffled(worker_init_fn=seeds, num_workers=2),
        shuffled(worker_init_fn=functools.partial(seeds_all, first=1)),
        lambda: shuffled(generator=torch.Generator().manual_seed(3))(),
        shuffled(drop_last=True, batch_size=5, num_workers=3),
    ],
    ids=["shuffled", "in order", "careless sampler", "collate", "single", "init", "partial init", "generator", "drop last"],
)  # fmt: skip
def test_I3_kept_workers_change_nothing(make: Any) -> None:
    plain, started = passes(make, False)
    kept, once = passes(make, True)
    assert kept == plain
    assert (started, once) == (3, 1)


@pytest.mark.parametrize("make", [shuffled(), loader(sampler=Careless)], ids=["shuffled", "careless sampler"])
def test_I3_nor_where_samples_have_streams_of_their_own(make: Any) -> None:
    plain, _ = passes(make, False, "sample")
    assert passes(make, True, "sample") == (plain, 1)


@pytest.mark.parametrize("take", [0, 1, 4])
def test_I3_kept_workers_that_have_something_left_to_do_change_nothing(take: int) -> None:
    plain, _ = passes(shuffled(), False, take=take)
    kept, once = passes(shuffled(), True, take=take)
    assert kept == plain
    assert once == 1


def test_the_main_process_draws_what_a_hand_written_loop_draws() -> None:
    seed_all()
    made = shuffled()()
    for _ in range(3):
        order = [batch[:, 0].tolist() for batch in made]
    end = torch.rand(1).item(), random.random(), float(np.random.rand())
    seed_all()
    made = shuffled()()
    feed = Feed(made, "batch", 0, True)
    for _ in range(3):
        ours = [batch[:, 0].tolist() for batch in feed]
    feed.release()
    assert (ours, (torch.rand(1).item(), random.random(), float(np.random.rand()))) == (order, end)


def _scale(_: Any) -> None:
    globals()["SCALE"] = 3.0


CHANGES: dict[str, Any] = {
    "set_epoch": lambda made: setattr(made.dataset, "level", 5),
    "in place": lambda made: made.dataset.weights.add_(1),
    "past its version": lambda made: made.dataset.weights.data.add_(1),
    "new tensor": lambda made: setattr(made.dataset, "weights", torch.ones(12)),
    "collate": lambda made: setattr(made, "collate_fn", noisy_collate),
    "another sampler": lambda made: object.__setattr__(made, "batch_sampler", [[3, 1], [2, 0]]),
    "batches of another size": lambda made: setattr(made.batch_sampler, "batch_size", 3),
    "global": _scale,
    "environment": lambda made: os.environ.update(LEYDEN_TEST_SCALE="7"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_I3_what_changes_in_the_main_process_reaches_the_workers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for keep in (False, True):
        monkeypatch.setitem(globals(), "SCALE", 1.0)
        monkeypatch.setenv("LEYDEN_TEST_SCALE", "1")
        found.append(passes(shuffled(), keep, change=CHANGES[name], count=2))
    (plain, _), (kept, started) = found
    assert kept == plain
    # where a batch sampler is asked anew for its size, the workers need not know
    assert started == (1 if name == "batches of another size" else 2)


@pytest.mark.parametrize(
    "make",
    [
        shuffled(Counts), shuffled(Caches), shuffled(CachesElsewhere), shuffled(Writes), shuffled(collate_fn=Remembers),
        shuffled(worker_init_fn=sets),
    ],
    ids=["counter", "cache", "function with a cache", "tensor", "collate", "init"],
)  # fmt: skip
@pytest.mark.parametrize("take", [99, 1])
def test_I3_workers_that_remember_are_not_kept(make: Any, take: int) -> None:
    plain, _ = passes(make, False, take=take, count=2)
    kept, started = passes(make, True, take=take, count=2)
    assert kept == plain
    assert started == 2


def test_data_that_is_other_in_each_pass_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    from leyden.data import kept

    reads: list[int] = []
    real = kept.fingerprint.read
    monkeypatch.setattr(kept.fingerprint, "read", lambda *given: reads.append(os.getpid()) or real(*given))
    made = shuffled(batch_size=12)()
    feed = Feed(made, "batch", 0, True)
    for number in range(6):
        made.dataset.level = number
        feed.key, feed.passes = ("train", 0, number, 0), 0
        (batch,) = feed
        assert set(batch[:, 1].tolist()) == {number + 1.0}
    feed.release()
    assert len(reads) == 6  # one for the first pass, two for each of two others, and the one that ends it


def test_data_that_cannot_be_known_is_loaded_by_new_workers() -> None:
    class Opens(Draws):
        def __init__(self) -> None:
            super().__init__()
            self.stream = iter([1, 2])

    assert passes(shuffled(Opens), True, count=2) == (passes(shuffled(Opens), False, count=2)[0], 2)


def test_a_data_set_that_asks_for_the_seed_of_its_worker_is_loaded_by_new_ones() -> None:
    class Asks(Draws):
        def __getitem__(self, index: int) -> Tensor:
            return torch.tensor([index, get_worker_info().seed])

    assert passes(shuffled(Asks), True, count=2) == (passes(shuffled(Asks), False, count=2)[0], 2)


@pytest.mark.parametrize("seeding", ["worker", "torch"])
def test_workers_whose_chance_depends_on_them_are_not_kept(seeding: str) -> None:
    assert passes(shuffled(), True, seeding, count=2)[1] == 2


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


class Own(DataLoader):
    def __iter__(self) -> Any:
        return super().__iter__()


def test_which_loaders_can_be_kept() -> None:
    assert can_keep(loader()())
    for other in (
        DataLoader(Draws()), loader(persistent_workers=True)(), loader(timeout=5)(), [1, 2],
        Own(Draws(), num_workers=1, multiprocessing_context="fork"), loader(in_order=False)(),
    ):  # fmt: skip
        assert not can_keep(other)
    feed = Feed(DataLoader(Stream(), num_workers=1, multiprocessing_context="fork"), "batch", 0, True)
    iterator = iter(feed)
    assert len(list(iterator)) == 4
    assert not iterator._persistent_workers


def test_workers_end_with_the_release_and_with_the_last_reference() -> None:
    before = children()
    made = shuffled()()
    feed = Feed(made, "batch", 0, True)
    list(feed)
    assert len(children() - before) == 1
    assert made._iterator is None  # the user's own stays as it is
    assert len(list(made)) == 6
    feed.release()
    assert children() == before
    list(feed)
    gone = weakref.ref(feed)
    gc.disable()
    try:
        del feed
        assert gone() is None
        assert children() == before
    finally:
        gc.enable()


def test_a_worker_that_has_died_in_between_is_replaced() -> None:
    made = shuffled()()
    feed = Feed(made, "batch", 0, True)
    iterator = iter(feed)
    list(iterator)
    worker = iterator._workers[0]
    former = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises an error where it can
    try:
        os.kill(worker.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while worker.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(list(feed)) == 6
    finally:
        signal.signal(signal.SIGCHLD, former)
        feed.release()


@pytest.mark.slow
def test_with_workers_that_are_spawned() -> None:
    make = shuffled(multiprocessing_context="spawn", num_workers=1)
    plain, _ = passes(make, False, count=2)
    assert passes(make, True, count=2) == (plain, 1)

# SPDX-License-Identifier: Apache-2.0
"""A feed iterates like the loader itself, leaves it as it is, and goes on in the middle of a pass without loading."""

from __future__ import annotations

import gc
import random
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler

import leyden
from leyden.data.feed import Feed, Indices, Pass

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
FORK = {"num_workers": 1, "multiprocessing_context": "fork"}


class Noisy(Dataset):
    def __init__(self, size: int = 10) -> None:
        self.size, self.asked = size, []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        self.asked.append(index)
        return torch.tensor([float(index), torch.rand(1).item(), random.random(), float(np.random.rand())])


def feed(loader: Any, seeding: str = "batch", seed: int = 0) -> Feed:
    made = Feed(loader, seeding, seed)
    made.key = ("train", 0, 0, 0)
    return made


def seed_all() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def order(batches: Any) -> list[list[float]]:
    return [batch[:, 0].tolist() for batch in batches]


LOADERS = {
    "plain": lambda: DataLoader(Noisy(), batch_size=3),
    "shuffle": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True),
    "generator": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(4)),
    "replacement": lambda: DataLoader(Noisy(), 3, sampler=RandomSampler(range(10), True, 40)),
    "distributed": lambda: DataLoader(Noisy(), 2, sampler=DistributedSampler(Noisy(), 2, 1)),
    "workers": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True, **FORK),
    "kept": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True, persistent_workers=True, **FORK),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_main_process_draws_what_a_hand_written_loop_draws(kind: str) -> None:
    ends = []
    for by_hand in (True, False):
        seed_all()
        loader = LOADERS[kind]()
        iterated = loader if by_hand else feed(loader)
        batches = [list(iterated) for _ in range(2)]
        inside = "workers" if loader.num_workers else "main"
        seen = [order(b) for b in batches] if inside == "workers" else [[x.tolist() for x in b] for b in batches]
        ends.append((seen, torch.rand(1).item(), random.random(), float(np.random.rand())))
    assert ends[0] == ends[1]


def test_torchs_own_seeding_of_workers_can_be_had() -> None:
    seen = []
    for wrap in (lambda loader: loader, lambda loader: feed(loader, "torch")):
        seed_all()
        seen.append([batch.tolist() for batch in wrap(LOADERS["workers"]())])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("done", [0, 2])
def test_a_pass_goes_on_in_its_middle_without_loading_what_is_done(kind: str, done: int) -> None:
    seed_all()
    whole = feed(LOADERS[kind]())
    iterator = iter(whole)
    for _ in range(done):
        next(iterator)
    state = whole.run.plain(whole.changed) if whole.run else {}
    torch.rand(3)  # what a step draws
    live = torch.get_rng_state()
    rest = [batch.tolist() for batch in iterator]
    seed_all()
    torch.rand(7)
    again = feed(LOADERS[kind]())
    again.resume = (Pass.of(state), done)
    iterator = iter(again)
    torch.set_rng_state(live)
    if not again.workers:
        random.seed(1)
        np.random.seed(1)
        for _ in range(3 * done if kind != "distributed" else 2 * done):
            random.random()
            np.random.rand()
    assert [batch.tolist() for batch in iterator] == rest
    if not again.workers:
        assert again.loader.dataset.asked == whole.loader.dataset.asked[-len(again.loader.dataset.asked) :]
        assert len(again.loader.dataset.asked) == sum(len(batch) for batch in rest)


def test_the_users_loader_stays_as_it_is() -> None:
    loader = LOADERS["shuffle"]()
    before = dict(vars(loader))
    made = feed(loader)
    iterator = iter(made)
    next(iterator)
    assert vars(loader) == before
    assert not isinstance(loader.batch_sampler, Indices)
    assert len(list(loader)) == 4  # the user's own pass, in the middle of ours
    assert len(list(iterator)) == 3


def test_workers_that_are_kept_stay_with_the_users_loader_and_end_with_it() -> None:
    loader = LOADERS["kept"]()
    list(feed(loader))
    workers = list(loader._iterator._workers)
    list(feed(loader))  # of a second run
    assert list(loader._iterator._workers) == workers
    assert sorted(x for batch in loader for x in batch[:, 0].tolist()) == list(range(10))  # by hand, after the runs
    gone = weakref.ref(loader._iterator)
    del loader
    gc.collect()
    assert gone() is None
    assert not any(worker.is_alive() for worker in workers)


def test_workers_that_somebody_else_started_are_started_anew() -> None:
    loader = LOADERS["kept"]()
    list(loader)
    theirs = loader._iterator
    made = feed(loader)
    assert len(list(made)) == 4
    assert loader._iterator is not theirs
    assert made.why_not() is None


def test_what_a_subclass_counts_on_itself_is_kept() -> None:
    class Counts(DataLoader):
        count = 0

        def __iter__(self) -> Any:
            self.count += 1
            return super().__iter__()

    loader = Counts(Noisy(), batch_size=5)
    made = feed(loader)
    for _ in range(3):
        list(made)
    made.settle()
    assert loader.count == 3


def test_a_batch_costs_no_call_of_ours() -> None:
    made = feed(DataLoader(Noisy(60), batch_size=2, shuffle=True))
    iterator = iter(made)
    next(iterator)
    calls = []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_filename) if event == "call" else None)
    try:
        for _ in range(20):
            next(iterator)
    finally:
        sys.setprofile(None)
    ours = str(Path(leyden.__file__).parent)
    assert calls
    assert not [name for name in calls if name.startswith(ours)]


class Journal:
    """A batch sampler that draws for each batch."""

    def __init__(self, draws: int = 8) -> None:
        self.draws = draws

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.draws):
            yield torch.randint(10, (2,)).tolist()

    def __len__(self) -> int:
        return self.draws


def test_only_draws_between_which_others_drew_are_written_down() -> None:
    made = feed(DataLoader(Noisy(), batch_sampler=Journal()))
    for _ in made:
        pass  # the data set draws in between
    assert made.run is not None
    assert sorted(made.run.journal) == list(range(1, 8))
    assert all(set(state) == {"torch"} for state in made.run.journal.values())
    quiet = feed(DataLoader(list(range(10)), batch_sampler=Journal()))
    list(quiet)
    assert quiet.run is not None
    assert quiet.run.journal == {}


def test_an_attribute_that_a_sampler_never_changed_is_not_put_back() -> None:
    class Sized(Journal):
        def __init__(self, draws: int) -> None:
            super().__init__(draws)
            self.rounds = 0

        def __iter__(self) -> Iterator[list[int]]:
            self.rounds += 1
            return super().__iter__()

    made = feed(DataLoader(Noisy(), batch_sampler=Sized(3)))
    list(made)
    state = made.now()
    other = feed(DataLoader(Noisy(), batch_sampler=Sized(5)))
    other.put_now(state)
    assert other.loader.batch_sampler.rounds == 1
    assert other.loader.batch_sampler.draws == 5

# SPDX-License-Identifier: Apache-2.0
"""What is left of an epoch in other hands: turns have the batches of ranks that are gone, shares begin where others stood."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from leyden.data.feed import Feed, Pass
from leyden.data.reshare import Layout, Move, items_of, left_of, replicas_of
from leyden.data.sharding import Turns, agree, share, share_of, share_shuffled


def _agreed(loaders: list[Any]) -> list[Any]:
    for loader in loaders:
        part = share_of(loader)
        assert part is not None
        agree([part], lambda states: states)
    return loaders


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("size", "turns"), [(1, 2), (1, 4), (2, 2), (2, 3), (3, 2)])
@pytest.mark.parametrize("count", [1, 5, 8, 13, 37])
def test_turns_have_the_batches_of_those_whose_places_they_take(
    count: int, size: int, turns: int, drop_last: bool
) -> None:
    loader = DataLoader(list(range(count)), 3, drop_last=drop_last)
    before = [list(one) for one in _agreed([share(loader, rank, size * turns, True) for rank in range(size * turns)])]
    for rank, shared in enumerate(_agreed([share(loader, rank, size, True, turns) for rank in range(size)])):
        assert isinstance(shared.batch_sampler, Turns)
        expected = [before[rank + turn * size][place] for place in range(len(before[0])) for turn in range(turns)]
        assert [batch.tolist() for batch in shared] == [batch.tolist() for batch in expected]
        assert len(shared) == len(expected)


@pytest.mark.parametrize("turns", [1, 2])
def test_whole_batches_are_shared_out_in_turns_and_padded_for_all(turns: int) -> None:
    batches = [[0], [1, 2], [3, 4, 5], [6], [7, 8]]
    loader = DataLoader(list(range(9)), batch_sampler=batches)
    ranks = _agreed([share(loader, rank, 2, True, turns) for rank in (0, 1)])
    found = [batch.tolist() for pair in zip(*ranks, strict=True) for batch in pair]
    assert found == [*batches, *batches[: (-5) % (2 * turns)]]
    assert [len(one) for one in ranks] == [len(found) // 2] * 2


@pytest.mark.parametrize("base", [0, 1, 4, 8, 11, 12, 40])
@pytest.mark.parametrize("size", [1, 3])
def test_a_pass_begins_behind_what_others_had(base: int, size: int) -> None:
    loader = DataLoader(list(range(12)), 2, shuffle=True)
    torch.manual_seed(3)
    (whole,) = _agreed([share(loader, 0, 1, True)])
    order = [int(i) for batch in whole for i in batch]
    torch.manual_seed(3)
    ranks = _agreed([share(loader, rank, size, True) for rank in range(size)])
    for one in ranks:
        share_of(one).base = base  # type: ignore[union-attr]
    lengths = [len(one) for one in ranks]
    found = [[batch.tolist() for batch in one] for one in ranks]
    assert lengths == [len(batches) for batches in found]
    seen = [i for batches in found for batch in batches for i in batch]
    assert set(order[base:]) <= set(seen)
    assert len(seen) == -(-len(order[base:]) // size) * size
    assert share_of(ranks[0]).base == 0  # type: ignore[union-attr]  # the next pass has all


def test_a_shuffle_by_the_epoch_is_the_one_of_distributed_samplers() -> None:
    data = list(range(11))
    for epoch in (0, 2):
        for rank in range(2):
            shared = share_shuffled(DataLoader(data, 2), rank, 2, 7)
            part: Any = share_of(shared)
            part.sampler.set_epoch(epoch)
            agree([part], lambda states: states)
            theirs: Any = DistributedSampler(data, 2, rank, seed=7)
            theirs.set_epoch(epoch)
            assert list(shared.batch_sampler.sampler) == list(theirs)


@pytest.mark.parametrize(
    ("former", "now", "batch_idx", "kept", "back", "batches"),
    [
        (Layout(4), Layout(2, 2), 3, True, 0, 6),
        (Layout(2, 2), Layout(4), 6, True, 0, 3),
        (Layout(2, 2), Layout(1, 4), 3, True, 0, 6),
        (Layout(4), Layout(3), 3, False, 0, 3),
        (Layout(2, 2), Layout(3), 6, False, 0, 3),
        (Layout(2, 2, 1), Layout(4), 7, True, 1, 3),  # the seventh was half of an update
        (Layout(2, 2, 2), Layout(3, 1), 7, False, 3, 2),  # updates of two times two batches
        (Layout(1), Layout(4), 5, False, 0, 5),
    ],
)
def test_batches_are_counted_anew(
    former: Layout, now: Layout, batch_idx: int, kept: bool, back: int, batches: int
) -> None:
    move = Move(former, now, 0, batch_idx)
    assert (move.kept, move.back, move.batches(batch_idx)) == (kept, back, batches)


def test_an_update_that_cannot_be_taken_over_is_begun_anew() -> None:
    assert Move(Layout(4, 1, 2), Layout(2, 2, 2), 0, 3, redo=True).batches(3) == 4
    assert Move(Layout(4, 1, 2), Layout(3, 1, 2), 0, 3, redo=True).batches(3) == 2


def test_one_process_becomes_two_in_the_order_that_it_had_drawn() -> None:
    samples = list(range(20))
    own = torch.Generator().manual_seed(1)
    feed = Feed(DataLoader(samples, 2, sampler=RandomSampler(samples, generator=own)))
    iterator = iter(feed)
    done = [int(i) for _ in range(3) for i in next(iterator)]
    assert feed.run is not None
    saved = feed.run.plain(feed.changed)
    rest = [int(i) for batch in iterator for i in batch]
    found = []
    for rank in (0, 1):
        loader = DataLoader(samples, 2, sampler=RandomSampler(samples, generator=torch.Generator()))
        shared = Feed(share(loader, rank, 2, True))
        run = Pass.of(saved)
        assert Move(Layout(1), Layout(2), rank, 3).go_on(shared, run, 3, {"items": 2}, "training") == 0
        assert left_of(shared, 0, float("inf")) == 4
        assert left_of(shared, 0, 2) == 1  # of two batches of both, one and a half is done
        shared.resume = run, 0
        found.append([int(i) for batch in shared for i in batch])
    assert [i for pair in zip(*found, strict=True) for i in pair] == rest
    assert sorted(done + rest) == samples


def test_what_a_batch_takes_of_the_order() -> None:
    samples = list(range(8))
    assert items_of(DataLoader(samples, 3)) == 3
    assert (
        items_of(DataLoader(samples, batch_size=None)) == items_of(DataLoader(samples, batch_sampler=[[0], [1]])) == 1
    )
    assert items_of([1, 2]) == 0
    assert replicas_of(DataLoader(samples, 2, sampler=DistributedSampler(samples, 3, 0))) == 3
    assert replicas_of(DataLoader(samples, 2)) is None

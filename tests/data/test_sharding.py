# SPDX-License-Identifier: Apache-2.0
"""The shares of an index stream: as DistributedSampler's in training, each sample once in evaluation, for any sampler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)  # fmt: skip

from leyden.data import sharding
from leyden.data.loaders import set_epoch
from leyden.data.sharding import agree, can_be_shared, share, share_of


def _shares(loader: Any, size: int, pads: bool) -> list[Any]:
    loaders = [share(loader, rank, size, pads) for rank in range(size)]
    for shared in loaders:
        part = share_of(shared)
        assert part is not None
        agree([part], lambda states: states)
    return loaders


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 13])
def test_training_has_the_batches_of_a_distributed_sampler(count: int, size: int, drop_last: bool) -> None:
    data = list(range(count))
    for rank, shared in enumerate(_shares(DataLoader(data, 2, drop_last=drop_last), size, True)):
        sampler: Any = DistributedSampler(data, size, rank, shuffle=False)
        expected = DataLoader(data, 2, sampler=sampler, drop_last=drop_last)
        assert [batch.tolist() for batch in shared] == [batch.tolist() for batch in expected]
        assert len(shared) == len(expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 13])
def test_evaluation_has_each_sample_once(count: int, size: int) -> None:
    seen = []
    for shared in _shares(DataLoader(list(range(count)), 2), size, False):
        batches = [batch.tolist() for batch in shared]
        assert len(batches) == len(shared)
        seen += [index for batch in batches for index in batch]
    assert sorted(seen) == list(range(count))


class _Lengths(Sampler[list[int]]):
    """Batches of several sizes, drawn from a generator of its own, without a length."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(11, generator=self.generator).tolist()
        yield from (order[:1], order[1:3], order[3:6], order[6:10], order[10:])


def test_batches_of_a_sampler_of_the_users_own_go_whole_in_turn() -> None:
    sampler = _Lengths()
    loader = DataLoader(list(range(11)), batch_sampler=sampler)
    whole = list(_Lengths())
    first, second = _shares(loader, 2, True)
    assert [batch.tolist() for batch in first] == [whole[0], whole[2], whole[4]]
    sampler.generator.manual_seed(3)
    agree([share_of(second)], lambda states: states)  # type: ignore[list-item]
    assert [batch.tolist() for batch in second] == [whole[1], whole[3], whole[0]]
    set_epoch(first, 4)
    assert sampler.epoch == 4
    with pytest.raises(TypeError, match="len"):
        len(first)


def test_the_order_is_that_of_one_process_and_leaves_no_trace_of_its_own(monkeypatch: Any) -> None:
    """Whatever other ranks have drawn: they draw from the state of rank 0, a piece at a time."""
    data = list(range(20))
    torch.manual_seed(5)
    alone = [[int(i) for batch in DataLoader(data, 4, shuffle=True) for i in batch] for _ in range(2)]
    after = torch.rand(1)
    monkeypatch.setattr(sharding, "AHEAD", 7)
    torch.manual_seed(5)
    zero = share(DataLoader(data, 4, shuffle=True), 0, 2, True)
    one = share(DataLoader(data, 4, shuffle=True), 1, 2, True)
    for epoch in range(2):
        state = share_of(zero).now()  # type: ignore[union-attr]
        share_of(zero).begin(state)  # type: ignore[union-attr]
        share_of(one).begin(state)  # type: ignore[union-attr]
        mine = [int(i) for batch in zero for i in batch]
        own = torch.get_rng_state()
        torch.manual_seed(99)
        before = torch.get_rng_state()
        theirs = []
        for batch in one:
            theirs += batch.tolist()
            torch.rand(1)
        assert not torch.equal(before, torch.get_rng_state())
        torch.set_rng_state(own)
        assert [index for pair in zip(mine, theirs, strict=True) for index in pair] == alone[epoch]
    assert torch.equal(torch.rand(1), after)


def test_a_pass_begins_again_from_its_state() -> None:
    loader = share(DataLoader(list(range(9)), 2, shuffle=True), 1, 2, True)
    part = share_of(loader)
    assert part is not None
    agree([part], lambda states: states)
    state = part.state_dict()
    first = [batch.tolist() for batch in loader]
    assert [batch.tolist() for batch in loader] != first
    part.load_state_dict(state)
    assert [batch.tolist() for batch in loader] == first


class _Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def test_what_cannot_or_must_not_be_shared_out_is_left_alone() -> None:
    data = list(range(4))
    own: Any = DistributedSampler(data, 2, 0)
    for loader in (
        [1, 2], DataLoader(_Stream()), DataLoader(data, sampler=own),
        DataLoader(data, batch_sampler=BatchSampler(own, 2, False)),
    ):  # fmt: skip
        assert not can_be_shared(loader)
        assert share(loader, 0, 2, True) is loader
        assert share_of(loader) is None


def test_the_users_loader_stays_as_it_is() -> None:
    loader = DataLoader(list(range(4)), 2, shuffle=True)
    batches, sampler = loader.batch_sampler, loader.sampler
    shared = share(loader, 0, 2, True)
    assert shared is not loader
    assert loader.batch_sampler is batches
    assert loader.sampler is sampler
    assert isinstance(batches, BatchSampler)
    assert isinstance(batches.sampler, RandomSampler)
    assert not can_be_shared(shared)
    single = share(DataLoader(list(range(5)), batch_size=None), 1, 2, False)
    assert [int(item) for item in single] == [1, 3]
    assert isinstance(single.sampler.sampler, SequentialSampler)

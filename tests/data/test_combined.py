# SPDX-License-Identifier: Apache-2.0
"""CombinedLoader: the four modes, any nesting, limits, state; the same draws in the same order as Lightning's."""

from __future__ import annotations

import copy
import itertools
import pickle
import weakref
from collections import OrderedDict, defaultdict, namedtuple

import pytest
import torch
from torch.utils.data import DataLoader

from leyden.data import CombinedLoader
from leyden.errors import CheckpointError, MisconfigurationException

Pair = namedtuple("Pair", "x y")


def batches(loader):
    return [batch for batch, _, _ in loader]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [("a", 0), ("b", 1)]),
        ("max_size", [("a", 0), ("b", 1), (None, 2), (None, 3), (None, 4)]),
        ("max_size_cycle", [("a", 0), ("b", 1), ("a", 2), ("b", 3), ("a", 4)]),
    ],
)
def test_modes_that_draw_together(mode, expected):
    loader = CombinedLoader({"l": iter_again("ab"), "n": range(5)}, mode)
    assert len(loader) == len(expected)
    for _ in range(2):
        assert list(loader) == [({"l": x, "n": y}, i, 0) for i, (x, y) in enumerate(expected)]


class iter_again:
    """An iterable that is no container of numbers or words (which would be data)."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)

    def __len__(self):
        return len(self.items)


def test_sequential():
    loader = CombinedLoader([range(2), range(0), iter_again("ab")], "sequential")
    assert len(loader) == 4
    for _ in range(2):
        assert list(loader) == [(0, 0, 0), (1, 1, 0), ("a", 0, 2), ("b", 1, 2)]


def test_sequential_opens_one_at_a_time():
    opened = []

    class Opens:
        def __init__(self, name):
            self.name = name

        def __iter__(self):
            opened.append(self.name)
            return iter(range(2))

    iterator = iter(CombinedLoader([Opens("a"), Opens("b")], "sequential"))
    assert opened == ["a"]
    next(iterator), next(iterator)
    assert opened == ["a"]
    next(iterator)
    assert opened == ["a", "b"]


def test_iterators_are_made_by_iter():
    """A DataLoader draws from torch's generator when it is opened: when that happens is part of a run's randomness."""
    torch.manual_seed(0)
    iter(CombinedLoader([DataLoader(range(3), shuffle=True)] * 2))
    drawn = torch.rand(1)
    torch.manual_seed(0)
    iter(DataLoader(range(3), shuffle=True)), iter(DataLoader(range(3), shuffle=True))
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize(
    "structure",
    [
        range(2),
        [range(2), range(3)],
        (range(2),),
        {"a": range(2), "b": [range(2), {"c": range(2)}]},
        Pair(range(2), [range(2)]),
        OrderedDict(b=range(2), a=range(2)),
        defaultdict(list, {"a": range(2)}),
    ],
)
def test_batches_have_the_structure_of_the_iterables(structure):
    first = batches(CombinedLoader(structure))[0]
    zeros = CombinedLoader(structure)
    zeros.flattened = [0] * len(zeros.flattened)
    assert first == zeros.iterables
    assert type(first) is (int if isinstance(structure, range) else type(structure))


def test_lists_of_numbers_and_words_are_data():
    assert batches(CombinedLoader([1, 2, 3])) == [1, 2, 3]
    assert batches(CombinedLoader({"a": [1, 2], "b": ["x", "y"]})) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size", "sequential"])
def test_nothing(mode):
    assert list(CombinedLoader([], mode)) == []
    assert len(CombinedLoader([], mode)) == 0


@pytest.mark.parametrize(
    ("mode", "limits", "expected"),
    [
        ("sequential", 2, 4),
        ("sequential", [1, float("inf")], 6),
        ("sequential", [0, 1], 1),
        ("min_size", 2, 2),
        ("max_size", [1, 4], 4),
        ("max_size_cycle", [3, 1], 3),
    ],
)
def test_limits_count(mode, limits, expected):
    loader = CombinedLoader([range(3), range(5)], mode)
    loader.limits = limits
    assert len(loader) == expected
    assert isinstance(loader.limits, list)
    loader.limits = None
    assert len(loader) == {"sequential": 8, "min_size": 3}.get(mode, 5)


def test_sequential_stops_by_its_limits():
    loader = CombinedLoader([range(3), range(3), range(5)], "sequential")
    loader.limits = [1, 0, 2]
    assert list(loader) == [(0, 0, 0), (0, 0, 2), (1, 1, 2)]
    loader = CombinedLoader([itertools.count(), range(5)], "sequential")
    loader.limits = [2, 1]
    assert list(loader) == [(0, 0, 0), (1, 1, 0), (0, 0, 1)]


def test_wrong_limits():
    with pytest.raises(MisconfigurationException, match=r"limits=\[1\] has 1 entries for 2"):
        CombinedLoader([range(2), range(2)]).limits = [1]


def test_unknown_mode():
    with pytest.raises(MisconfigurationException, match="mode='max_cycle'.*'min_size'.*Did you mean"):
        CombinedLoader([], "max_cycle")


@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "sequential"])
def test_no_length(mode):
    loader = CombinedLoader([range(2), (i for i in range(3))], mode)
    with pytest.raises(TypeError, match=f"mode='{mode}'.*generator"):
        len(loader)
    loader.limits = 5
    assert len(loader) == {"sequential": 7}.get(mode, 5)
    assert len(CombinedLoader([range(2), (i for i in range(3))], "min_size")) == 2


def test_next_needs_iter():
    loader = CombinedLoader([range(2)])
    with pytest.raises(RuntimeError, match=r"Call iter\(\)"):
        next(loader)
    iter(loader)
    assert next(loader) == ([0], 0, 0)
    loader.reset()
    with pytest.raises(RuntimeError, match=r"Call iter\(\)"):
        next(loader)


def test_samplers_in_structure():
    a, b = DataLoader(range(4)), DataLoader(range(4), shuffle=True)
    loader = CombinedLoader({"a": a, "b": [b, range(3)]})
    assert loader.sampler == {"a": a.sampler, "b": [b.sampler, None]}
    assert loader.batch_sampler == {"a": a.batch_sampler, "b": [b.batch_sampler, None]}


def test_flattened_replaces():
    loader = CombinedLoader({"a": range(1), "b": [range(2)]})
    loader.flattened = [range(5), range(6)]
    assert loader.iterables == {"a": range(5), "b": [range(6)]}
    assert len(loader) == 5
    with pytest.raises(MisconfigurationException, match="has 2 iterables; it cannot be set to 1"):
        loader.flattened = [range(1)]


class Counts:
    def __init__(self):
        self.at = 0

    def __iter__(self):
        return iter(range(3))

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_states():
    a, b = Counts(), Counts()
    a.at, b.at = 1, 2
    states = CombinedLoader([a, range(3), b]).state_dicts()
    assert states == [{"at": 1}, {"at": 2}]
    c, d = Counts(), Counts()
    other = CombinedLoader([c, d])
    other.load_state_dicts(states)
    assert (c.at, d.at) == (1, 2)
    other.load_state_dicts([])
    assert (c.at, d.at) == (1, 2)
    with pytest.raises(CheckpointError, match="states of 1 data loaders, but 2 here"):
        other.load_state_dicts(states[:1])


def test_copies_and_pickles_while_iterating():
    loader = CombinedLoader([DataLoader(range(3))])
    iter(loader)
    for other in (copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        assert len(batches(other)) == 3


def test_batches_are_not_kept():
    """The batch before may not stay in memory while the next one is made."""

    class Batch:
        pass

    for mode in ("min_size", "sequential"):
        iterator = iter(CombinedLoader([(Batch() for _ in range(3))], mode))
        batch = next(iterator)[0]
        ref = weakref.ref(batch[0] if isinstance(batch, list) else batch)
        del batch
        assert ref() is None


def test_reset_stops_persistent_workers():
    inner = DataLoader(
        torch.arange(4), num_workers=1, persistent_workers=True, multiprocessing_context="fork", batch_size=2
    )
    loader = CombinedLoader([inner], "sequential")
    list(loader)
    workers = list(inner._iterator._workers)
    assert all(w.is_alive() for w in workers)
    loader.reset()
    for w in workers:
        w.join(10)
    assert not any(w.is_alive() for w in workers)
    assert len(list(loader)) == 2
    loader.reset()

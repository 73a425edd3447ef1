# SPDX-License-Identifier: Apache-2.0
"""Gives each process its share of a loader, by wrapping the stream of indices that the user's sampler draws.

All ranks draw the same order, from the random state of rank 0, and each takes every ``world_size``-th of it: samples where
torch's own BatchSampler makes the batches, whole batches where a batch sampler of the user's own does. Nothing is built
anew: the loader is a copy of the user's with the wrapped sampler in its place.

- In training every rank gets as many samples: the first ones come once more at the end, as with DistributedSampler.
- In evaluation every sample comes once; some ranks have one more than others, or none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from leyden.data.generators import Streams, find, plain, raw

AHEAD = 4096
"""How many items a sampler draws at a time; torch's own draw all random numbers of a pass with the first."""


class Sharded:
    """The share of one rank in what a sampler draws.

    ``begin`` says, on all ranks, from which random state the next pass draws. No pass exchanges anything by itself: how
    many passes a rank begins, when, and in which thread, is its own affair.

    Args:
        sampler: The user's: of indices, or of batches of them.
        rank: Whose share.
        size: How many ranks there are.
        pads: Whether all ranks get as many items.
        loader: The loader; its generator is one that the sampler may draw from.
        turns: Of how many ranks each takes the place, one after the other: what is padded is padded for all of them.
    """

    draws_apart = True
    """What it draws leaves no trace in the generators that others use too."""

    def __init__(self, sampler: Any, rank: int, size: int, pads: bool, loader: Any, turns: int = 1) -> None:
        self.sampler, self.rank, self.size, self.pads = sampler, rank, size, pads
        self.whole = size * turns
        # by the names that these generators have where the samples of a loader are not shared out
        name = "batch_sampler" if sampler is loader.batch_sampler else "sampler"
        self.streams = Streams(find({name: sampler, "generator": loader.generator}))
        self.base = 0
        """How many items of the order the next pass leaves out, since other processes have had them."""
        self._generator = loader.generator
        self._keeps_workers = loader.num_workers > 0 and loader.persistent_workers
        self._passes = 0
        self._state: dict[str, Any] | None = None
        self._seeded = False
        """Whether the number that the loader draws for its workers is drawn already, in this state."""

    def now(self) -> dict[str, Any]:
        """Return the random state of this rank, as plain data."""
        return plain(self.streams.now())

    def begin(self, state: Mapping[str, Any]) -> None:
        """Let the next pass draw from ``state``, which is rank 0's."""
        self._state, self._seeded, self.base = raw(state), False, 0

    def state_dict(self) -> dict[str, Any]:
        """Return what the next pass draws from, as plain data."""
        state = None if self._state is None else plain(self._state)
        return {"state": state, "passes": self._passes, "base": self.base, "seeded": self._seeded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
        self._state = None if state["state"] is None else raw(state["state"])
        self._passes, self.base, self._seeded = state["passes"], state.get("base", 0), state.get("seeded", False)

    def __iter__(self) -> Iterator[Any]:
        return islice(self.items(), self.rank, None, self.size)

    def items(self) -> Iterator[Any]:
        """Yield what all ranks share out in this pass, with what comes once more at its end."""
        base, self.base = self.base, 0
        place, first = 0, list[Any]()
        for item in self._drawn():
            if len(first) < self.whole:
                first.append(item)
            place += 1
            if place > base:
                yield item
        if self.pads and place > base:
            for extra in range(-(place - base) % self.whole):
                yield first[extra % len(first)]

    def _drawn(self) -> Iterator[Any]:
        """Yield what the sampler draws from the state that all ranks share, a piece at a time."""
        streams, sampler = self.streams, self.sampler
        # the loader draws a random number for its workers before the first index, unless it keeps them
        seeds = not (self._keeps_workers and self._passes) and not self._seeded
        self._passes += 1
        self._seeded = False
        if _torchs(sampler):
            next(iter(sampler), None)  # so that this rank's own generators go on as those of a single process would
        drawn: Iterator[Any] | None = None
        state = self._state
        while True:
            own = streams.now()
            if state is not None:
                streams.put(state)
            if drawn is None:
                if seeds:
                    torch.empty((), dtype=torch.int64).random_(generator=self._generator)
                drawn = iter(sampler)
                items = list(islice(drawn, AHEAD))
                self._state = state = streams.now()  # where another pass goes on, if nobody says otherwise
            else:
                items = list(islice(drawn, AHEAD))
                state = streams.now()
            # generators that the sampler or the loader holds are this loader's alone, and go on
            streams.put({name: value for name, value in own.items() if name not in streams.held})
            yield from items
            if len(items) < AHEAD:
                return

    def __len__(self) -> int:
        left = max(len(self.sampler) - self.base, 0)
        if self.pads:
            return -(-left // self.whole) * self.whole // self.size
        return len(range(self.rank, left, self.size))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "sampler" not in vars(self):
            raise AttributeError(name)
        return getattr(self.sampler, name)


class SharedOrder(Sharded, DistributedSampler[Any]):
    """The share of one rank in what a DistributedSampler of one process draws, for programs that look for one of several."""

    def __init__(self, sampler: Any, rank: int, size: int, pads: bool, loader: Any, turns: int = 1) -> None:
        Sharded.__init__(self, sampler, rank, size, pads, loader, turns)
        vars(self).update(vars(DistributedSampler(sampler.dataset, size, rank, sampler.shuffle, sampler.seed)))

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins: another order is drawn for it."""
        self.epoch = epoch
        self.sampler.set_epoch(epoch)


class Turns(BatchSampler):
    """The batches of a rank that takes the places of several, one after the other: each as that rank would have had it.

    Args:
        batches: The loader's own.
        samples: The share of the rank in what its sampler draws.
    """

    draws_apart = True

    def __init__(self, batches: BatchSampler, samples: Sharded) -> None:
        self.sampler: Any = samples
        self.batch_size, self.drop_last = batches.batch_size, batches.drop_last

    def __iter__(self) -> Iterator[list[Any]]:
        samples, size = self.sampler, self.batch_size
        items = samples.items()
        while together := list(islice(items, size * samples.whole)):
            for place in range(samples.rank, samples.whole, samples.size):
                batch = together[place :: samples.whole]
                if len(batch) == size or not self.drop_last:
                    yield batch

    def __len__(self) -> int:
        turns = self.sampler.whole // self.sampler.size
        samples = len(self.sampler) // turns
        return int(turns * (samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)))


def share(loader: Any, rank: int, size: int, pads: bool, turns: int = 1) -> Any:
    """Return the share of ``rank`` in a loader: a copy of it; the loader itself where it cannot or must not be shared out.

    Left alone are loaders whose sampler knows ranks already (it has ``num_replicas`` and ``rank``), data sets that are
    iterated over, and everything that is no DataLoader.

    Args:
        loader: The user's.
        rank: Whose share.
        size: How many ranks there are.
        pads: Whether all ranks get as many samples (training), or each sample comes once (evaluation).
        turns: Of how many ranks each takes the place; only where it ``pads``.
    """
    return _shared(loader, rank, size, pads, turns) if can_be_shared(loader) else loader


def _shared(loader: Any, rank: int, size: int, pads: bool, turns: int) -> Any:
    copied = copy.copy(loader)
    # past DataLoader's guard, which would have the user build the loader anew; the copy starts workers of its own
    object.__setattr__(copied, "_iterator", None)
    batches = loader.batch_sampler
    if batches is None:
        object.__setattr__(copied, "sampler", Sharded(loader.sampler, rank, size, pads, loader, turns))
    elif type(batches) is BatchSampler:
        kind = SharedOrder if isinstance(batches.sampler, DistributedSampler) else Sharded
        own, samples = copy.copy(batches), kind(batches.sampler, rank, size, pads, loader, turns)
        own.sampler = samples
        object.__setattr__(copied, "sampler", samples)
        object.__setattr__(copied, "batch_sampler", own if turns == 1 else Turns(batches, samples))
    else:
        # whole batches: the next ones in the order are those of the ranks whose places are taken
        object.__setattr__(copied, "batch_sampler", Sharded(batches, rank, size, pads, loader, turns))
    return copied


def share_shuffled(loader: Any, rank: int, size: int, seed: int, turns: int = 1, shuffle: bool = True) -> Any:
    """Return the share of ``rank`` in a loader as Lightning's: shuffled by ``seed`` and the epoch, also where it was not.

    ``shuffle=False`` shares out the samples in the order of the data set.
    A loader whose sampler is none of torch's plain two is shared out like any other.
    """
    batches, sampler = loader.batch_sampler, loader.sampler
    if type(batches) is BatchSampler and type(sampler) in (SequentialSampler, RandomSampler):
        loader, own = copy.copy(loader), copy.copy(batches)
        own.sampler = DistributedSampler(loader.dataset, 1, 0, shuffle, seed)  # for one: the whole order of an epoch
        object.__setattr__(loader, "sampler", own.sampler)
        object.__setattr__(loader, "batch_sampler", own)
        return _shared(loader, rank, size, True, turns)
    return share(loader, rank, size, pads=True, turns=turns)


def share_of(loader: Any) -> Sharded | None:
    """Return what shares out the samples of a loader; None if nothing does."""
    parts = (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    return next((part for part in parts if isinstance(part, Sharded)), None)


class Deal(NamedTuple):
    """How the samples of a loader are dealt out."""

    rank: int
    """Which share this is: the n-th of it is the one at place ``rank + n * size`` of the whole."""
    size: int
    """Among how many they are dealt out."""
    batch_size: int | None
    """Samples of a batch where samples are dealt out; None where whole batches are."""
    total: int | None = None
    """How many there are in all, where what comes after them is padding; None where nothing does."""


def deal_of(loader: Any) -> Deal | None:
    """Return how the samples of a loader are dealt out; None where they are not, or nobody knows how."""
    share, batches = share_of(loader), getattr(loader, "batch_sampler", None)
    if share is not None:
        return Deal(share.rank, share.size, None if batches is None or batches is share else int(batches.batch_size))
    sampler = getattr(loader, "sampler", None)
    if type(sampler) is not DistributedSampler or type(batches) is not BatchSampler:
        return None
    whole: Any = sampler.dataset
    return Deal(sampler.rank, sampler.num_replicas, batches.batch_size, len(whole))


def agree(shares: list[Sharded], broadcast: Callable[[Any], Any]) -> None:
    """Let the coming passes of all ranks draw from the random state of rank 0, in one exchange."""
    states = broadcast([one.now() for one in shares])
    for one, state in zip(shares, states, strict=True):
        one.begin(state)


def can_be_shared(loader: Any) -> bool:
    """Whether a loader has an order of samples that nobody has shared out yet."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    batches = loader.batch_sampler
    parts = [loader.sampler, batches, getattr(batches, "sampler", None)]
    if any(isinstance(part, Sharded) for part in parts):
        return False
    return not any(hasattr(part, "num_replicas") and hasattr(part, "rank") for part in parts)


def _torchs(sampler: Any) -> bool:
    return type(sampler).__module__.startswith("torch.utils.data.")


__all__ = [
    "AHEAD", "Deal", "Sharded", "Turns", "agree", "can_be_shared", "deal_of", "share", "share_of", "share_shuffled",
]  # fmt: skip

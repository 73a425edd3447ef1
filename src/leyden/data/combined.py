# SPDX-License-Identifier: Apache-2.0
"""``CombinedLoader``: several loaders, in any nesting of dicts, lists and tuples, drawn from as one."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, TypeAlias

from leyden.data.loaders import length, stop_workers
from leyden.errors import CheckpointError, MisconfigurationException, did_you_mean
from leyden.types import Stateful

Limits: TypeAlias = list[int | float] | None
Step: TypeAlias = tuple[Any, int, int]
"""A batch (or a list of batches, one a loader), its index, and the index of the loader it came from."""


class _Together:
    """Draws from all loaders at once; here until the first is exhausted (``min_size``).

    The iterators are made with the object, not with the first batch: a DataLoader draws a random number then.
    """

    def __init__(self, loaders: list[Any], limits: Limits) -> None:
        self.loaders = loaders
        self.iterators = [iter(loader) for loader in loaders]
        self.index = 0
        self.starts = [0] * len(loaders)
        """The index of the first batch that was drawn from each iterator: not 0 where a loader has started again."""
        self.consumed = [False] * len(loaders)

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        if not self.iterators:
            raise StopIteration
        batches = self.draw()
        self.index += 1
        return batches, self.index - 1, 0

    def draw(self) -> list[Any]:
        return [next(iterator) for iterator in self.iterators]

    @staticmethod
    def count(lengths: list[int | float], limits: Limits) -> int | float:
        counts: list[int | float] = [*lengths, *(limits or ())]
        return min(counts)


class _Longest(_Together):
    """Draws until the longest is exhausted (``max_size``); the others give None from their end on."""

    def draw(self) -> list[Any]:
        nothing = object()
        batches = [next(iterator, nothing) for iterator in self.iterators]
        if all(batch is nothing for batch in batches):
            raise StopIteration
        return [None if batch is nothing else batch for batch in batches]

    @staticmethod
    def count(lengths: list[int | float], limits: Limits) -> int | float:
        return max(_limited(lengths, limits))


class _Cycle(_Longest):
    """Draws until the longest is exhausted (``max_size_cycle``); the others start again."""

    def draw(self) -> list[Any]:
        batches = []
        for i, loader in enumerate(self.loaders):
            try:
                batches.append(next(self.iterators[i]))
            except StopIteration:
                self.consumed[i] = True
                if all(self.consumed):
                    raise
                self.iterators[i], self.starts[i] = iter(loader), self.index
                batches.append(next(self.iterators[i]))
        return batches


class _Sequential:
    """Draws from one loader after the other (``sequential``), with at most one iterator, and its workers, at a time."""

    def __init__(self, loaders: list[Any], limits: Limits) -> None:
        self.loaders = loaders
        self.limits = limits
        self.position = 0
        self.open()

    def open(self) -> None:
        """Start on the loader at ``position``."""
        self.index = 0
        self.iterator = iter(self.loaders[self.position]) if self.position < len(self.loaders) else iter(())

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        while self.position < len(self.loaders):
            if self.limits is None or self.index < self.limits[self.position]:
                try:
                    batch = next(self.iterator)
                except StopIteration:
                    pass
                else:
                    self.index += 1
                    return batch, self.index - 1, self.position
            self.position += 1
            self.open()
        raise StopIteration

    @staticmethod
    def count(lengths: list[int | float], limits: Limits) -> int | float:
        return sum(_limited(lengths, limits))


def _limited(lengths: list[int | float], limits: Limits) -> list[int | float]:
    return lengths if limits is None else [min(pair) for pair in zip(lengths, limits, strict=True)]


class CombinedLoader:
    """Several iterables of batches as one; iterating yields ``(batch, batch_idx, dataloader_idx)``.

    ``iterables`` is one iterable, or dicts, lists and tuples of them, nested as you like. ``mode`` says how:

    - ``"min_size"``: one batch of each, until the shortest is exhausted;
    - ``"max_size_cycle"``: one batch of each, until the longest is exhausted, the others starting again;
    - ``"max_size"``: the same, but an exhausted one gives None;
    - ``"sequential"``: one iterable after the other; ``batch_idx`` starts again with each.

    ``batch`` has the structure of ``iterables``, with a batch in place of each; in ``"sequential"`` it is one batch.
    A ``dataloader_idx`` other than 0 occurs in ``"sequential"`` only.
    """

    _MODES: ClassVar[dict[str, type[_Together] | type[_Sequential]]] = {
        "min_size": _Together,
        "max_size_cycle": _Cycle,
        "max_size": _Longest,
        "sequential": _Sequential,
    }

    def __init__(self, iterables: Any, mode: str = "min_size") -> None:
        if mode not in self._MODES:
            raise MisconfigurationException(
                f"CombinedLoader(mode={mode!r}) is unknown. Use one of {', '.join(map(repr, self._MODES))}."
                f"{did_you_mean(str(mode), self._MODES)}"
            )
        self._iterables = iterables
        self._flattened = list(_flatten(iterables))
        self._mode = mode
        self._limits: Limits = None
        self._iterator: _Together | _Sequential | None = None

    @property
    def mode(self) -> str:
        """How the iterables are combined."""
        return self._mode

    @property
    def iterables(self) -> Any:
        """The iterables, in the structure they were given in."""
        return self._iterables

    @property
    def flattened(self) -> list[Any]:
        """The iterables as a flat list. May be set, to replace each by another: the structure stays."""
        return self._flattened

    @flattened.setter
    def flattened(self, flattened: Iterable[Any]) -> None:
        flattened = list(flattened)
        if len(flattened) != len(self._flattened):
            raise MisconfigurationException(
                f"CombinedLoader.flattened has {len(self._flattened)} iterables; it cannot be set to {len(flattened)}."
            )
        self._iterables = _unflatten(self._iterables, iter(flattened))
        self._flattened = flattened

    @property
    def sampler(self) -> Any:
        """The samplers of the iterables (None where there is none), in their structure."""
        return self._structured([getattr(loader, "sampler", None) for loader in self._flattened])

    @property
    def batch_sampler(self) -> Any:
        """The batch samplers of the iterables (None where there is none), in their structure."""
        return self._structured([getattr(loader, "batch_sampler", None) for loader in self._flattened])

    @property
    def limits(self) -> Limits:
        """The number of batches to draw at most, for each of ``flattened``; None for all.

        May be set, to a list or to one number for all. ``len`` counts with it; of the modes, only ``"sequential"``
        stops by it while iterating.
        """
        return self._limits

    @limits.setter
    def limits(self, limits: int | float | list[int | float] | None) -> None:
        if isinstance(limits, (int, float)):
            limits = [limits] * len(self._flattened)
        elif limits is not None and len(limits) != len(self._flattened):
            raise MisconfigurationException(
                f"CombinedLoader.limits={limits!r} has {len(limits)} entries for {len(self._flattened)} iterables. "
                "Give one each, or one number."
            )
        self._limits = limits

    def __iter__(self) -> CombinedLoader:
        return self.begin(self._flattened)

    def begin(self, iterables: list[Any]) -> CombinedLoader:
        """Begin to iterate, like ``iter``, but draw from ``iterables``, one in the place of each of ``flattened``."""
        self._iterator = self._MODES[self._mode](iterables, self._limits)
        return self

    def place(self) -> dict[str, Any]:
        """Return which loaders have started again, and when; empty where none can."""
        if not isinstance(self._iterator, _Together):
            return {}
        return {"starts": list(self._iterator.starts), "consumed": list(self._iterator.consumed)}

    def put_place(self, place: dict[str, Any], index: int) -> None:
        """Go on at ``index`` from what ``place`` returned; the iterables have begun where they stood then."""
        if isinstance(self._iterator, _Together):
            self._iterator.index = index
            if place:
                self._iterator.starts, self._iterator.consumed = list(place["starts"]), list(place["consumed"])

    def __next__(self) -> Step:
        if self._iterator is None:
            raise RuntimeError("Call iter() on the CombinedLoader before next().")
        batch, batch_idx, dataloader_idx = next(self._iterator)
        if self._mode != "sequential":
            batch = self._structured(batch)
        return batch, batch_idx, dataloader_idx

    def __len__(self) -> int:
        """Return the number of batches; TypeError if it depends on an iterable that has no length."""
        lengths = [length(loader) for loader in self._flattened]
        count = self._MODES[self._mode].count(lengths, self._limits)
        if count == math.inf:
            unknown = [type(x).__name__ for x, n in zip(self._flattened, lengths, strict=True) if n == math.inf]
            raise TypeError(
                f"CombinedLoader(mode={self._mode!r}) has no length, since these of its iterables have none: "
                f"{', '.join(unknown)}."
            )
        return int(count)

    def reset(self) -> None:
        """Forget the position and stop the workers of all iterables, persistent ones too."""
        self._iterator = None
        for loader in self._flattened:
            stop_workers(loader)

    def state_dicts(self) -> list[dict[str, Any]]:
        """Return the states of those iterables that have ``state_dict`` and ``load_state_dict``."""
        return [loader.state_dict() for loader in self._flattened if isinstance(loader, Stateful)]

    def load_state_dicts(self, states: list[dict[str, Any]]) -> None:
        """Load what :meth:`state_dicts` returned; nothing if it was empty."""
        stateful = [loader for loader in self._flattened if isinstance(loader, Stateful)]
        if states and len(states) != len(stateful):
            raise CheckpointError(
                f"The checkpoint holds the states of {len(states)} data loaders, but {len(stateful)} here take one. "
                "Resume with the loaders that the checkpoint was written with."
            )
        if states:
            for loader, state in zip(stateful, states, strict=True):
                loader.load_state_dict(state)

    def _structured(self, values: list[Any]) -> Any:
        return _unflatten(self._iterables, iter(values))

    def __getstate__(self) -> dict[str, Any]:
        # the iterator of a DataLoader with workers can be neither copied nor pickled
        return {**self.__dict__, "_iterator": None}


def _children(tree: Any) -> Iterable[Any] | None:
    """Return what ``tree`` contains if it is a container of iterables; a container of numbers or words is data."""
    if isinstance(tree, (dict, OrderedDict, defaultdict)) and type(tree) in (dict, OrderedDict, defaultdict):
        children = list(tree.values())
    elif type(tree) in (list, tuple) or (isinstance(tree, tuple) and hasattr(tree, "_fields")):
        children = list(tree)
    else:
        return None
    return None if all(isinstance(child, (int, float, str)) for child in children) else children


def _flatten(tree: Any) -> Iterator[Any]:
    children = _children(tree)
    if children is None:
        yield tree
    else:
        for child in children:
            yield from _flatten(child)


def _unflatten(like: Any, values: Iterator[Any]) -> Any:
    """Return the structure of ``like`` with ``values`` in place of its iterables."""
    children = _children(like)
    if children is None:
        return next(values)
    built = [_unflatten(child, values) for child in children]
    if isinstance(like, dict):
        items = zip(like, built, strict=True)
        return defaultdict(like.default_factory, items) if isinstance(like, defaultdict) else type(like)(items)
    return type(like)(*built) if hasattr(like, "_fields") else type(like)(built)

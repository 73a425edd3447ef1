# SPDX-License-Identifier: Apache-2.0
"""One loader as the loops draw from it: it remembers how its order of samples came about, and can go on in the middle.

A ``DataLoader`` over a map-style data set is iterated over by way of a copy whose batch sampler is ours: it passes on
what the user's sampler draws, and writes down the state of the random generators right before the first draw. To go on
after k batches it sets the generators to that state, lets the sampler draw k times, and drops the indices: no sample is
loaded for it. Ordinary batches pass through it without a Python call.
"""

from __future__ import annotations

import copy
import inspect
import weakref
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, count, islice, repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from leyden.data.generators import Streams, differs, digest, find, plain, raw
from leyden.data.samplers import attributes, draws_often, only, parts
from leyden.data.sharding import Sharded
from leyden.data.whole import Plan, Whole
from leyden.runtime.ranks import rank_zero_only, rank_zero_warn
from leyden.types import Stateful

JOURNAL = 1024
"""How many draws of a sampler that keeps drawing random numbers are remembered, with some kB of state each."""
_END = object()


@dataclass
class Pass:
    """One iteration over a loader: all that is needed to begin it again and to go on in its middle."""

    begin: dict[str, Any] | None = None
    """Generators before the iterator was made; None if that is not known."""
    parts: list[Any] = field(default_factory=list)
    """States of the samplers at that moment."""
    first: dict[str, Any] | None = None
    """Generators before the sampler's first draw."""
    journal: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By number of the draw: generators before it, where somebody else had used them since the draw before."""
    forgotten: bool = False
    """Whether the journal was longer than what is kept."""
    warm: bool = False
    """Whether the workers were already there."""
    seed: int = 0
    """From which the streams of the workers, or of the samples, follow."""
    number: int = 0
    """Which iteration over this loader it is in its epoch."""
    mark: int | None = None
    """A fingerprint of the first indices, to notice an order that is not the same."""
    share: dict[str, Any] | None = None
    """State of what shares the samples out, as plain data; None where nothing does."""

    def plain(self, changed: list[set[str]]) -> dict[str, Any]:
        """Return it as plain data, with those attributes of samplers that ``changed``."""
        return {
            "begin": None if self.begin is None else plain(self.begin),
            "parts": [only(state, names) for state, names in zip(self.parts, changed, strict=True)],
            "first": None if self.first is None else plain(self.first),
            "journal": {number: plain(state) for number, state in self.journal.items()},
            **{name: getattr(self, name) for name in ("forgotten", "warm", "seed", "number", "mark", "share")},
        }

    @staticmethod
    def of(state: Mapping[str, Any]) -> Pass:
        """Return the pass that ``plain`` was called on."""
        found = Pass(**state)
        found.begin = None if found.begin is None else raw(found.begin)
        found.first = None if found.first is None else raw(found.first)
        found.journal = {int(number): raw(generators) for number, generators in found.journal.items()}
        return found


class Indices:
    """Stands in a DataLoader for its batch sampler (or sampler): hands on what that one draws, by way of the feed.

    It refers to the feed weakly: workers end with the last reference to their iterator, and a circle would keep them.
    """

    def __init__(self, sampler: Any, feed: Feed) -> None:
        self.sampler = sampler
        self.refer(feed)

    def refer(self, feed: Feed) -> None:
        """Hand on by way of ``feed`` from here on."""
        self.feed = weakref.ref(feed)

    def __iter__(self) -> Iterator[Any]:
        feed = self.feed()
        return iter(self.sampler) if feed is None else feed.draw(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "sampler" not in vars(self):
            raise AttributeError(name)
        return getattr(self.sampler, name)


class Feed:
    """Iterates over one loader; ``iter(feed)`` is a pass.

    Args:
        loader: The user's, which stays as it is.
        seeding: How random numbers in workers come about: ``"batch"``, ``"sample"`` (then ``seed`` is the run's),
            ``"worker"`` (Lightning's ``seed_everything(workers=True)``) or ``"torch"`` (as torch does).
        seed: The run's, for ``"sample"``.
        keep: Whether workers are kept for the next pass, where that changes nothing; ``release`` ends them.

    Attributes:
        how: ``"indices"``, ``"sequence"``: can go on anywhere; ``"state"``: the loader can; ``"dataset"``: its data set
            can; ``"drop"``: batches are fetched and dropped.
        key: What the seeds of a pass depend on; the loops set it.
        run: The pass that was begun last.
        resume: What the next pass goes on from: a Pass, and the number of batches that are done.
        warm: Whether the workers are to be taken as running already, though they are not.
        whole: Reads batches of data in memory as a whole, where that gives the same; None where it is not to.
    """

    def __init__(self, loader: Any, seeding: str = "torch", seed: int = 0, keep: bool = False) -> None:
        self.loader, self.seeding, self.seed = loader, seeding, seed
        self.how = _how(loader)
        shares = (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
        self.share: Sharded | None = next((each for each in shares if isinstance(each, Sharded)), None)
        self.key: tuple[Any, ...] = ()
        self.data_rank: int | None = None
        """Which share of the data this is: processes that work on one batch draw the same. None: each process has its own."""
        self.run: Pass | None = None
        self.passes = 0
        self.resume: tuple[Pass, int] | None = None
        self.warm = False
        self.parts = parts(loader, self.how)
        self.changed: list[set[str]] = [set() for _ in self.parts]
        self._former = [attributes(part) for part in self.parts]
        ordering = {name: _unwrapped(getattr(loader, name, None)) for name in ("generator", "sampler", "batch_sampler")}
        using = {name: getattr(loader, name, None) for name in ("dataset", "collate_fn")}
        self.streams = Streams(find({**ordering, **using}))
        self._journals = self.how == "indices" and draws_often(loader)
        self._skip = 0
        self._first: dict[str, Any] | None = None
        self._live: dict[str, Any] | None = None
        self._mute = False
        self._undo: dict[str, Any] | None = None
        self._used = False
        self._alone: bool | None = None
        self._begun: Iterator[Any] | None = None
        self.whole: Whole | None = None
        self._plan: Plan | None = None
        self._copy: Any = None
        self._in_main: Any = None
        self._kept: Any = None
        if keep and self.how == "indices" and seeding in ("batch", "sample") and loader.num_workers:
            from leyden.data.kept import Kept, can_keep  # noqa: PLC0415  # only runs with workers need it

            self._kept = Kept() if can_keep(loader) else None
        if seeding == "sample" and isinstance(loader, DataLoader) and loader.num_workers == 0:
            from leyden.data.workers import InMain  # noqa: PLC0415  # only runs that ask for streams of samples need it

            ordered = {id(generator) for generator in find(ordering, apart=loader.dataset).values()}
            held = [generator for generator in find(using).values() if id(generator) not in ordered]
            self._in_main = InMain(self.streams, held)

    # ------------------------------------------------------------------ a pass

    def __iter__(self) -> Iterator[Any]:
        self.settle()
        resume, self.resume = self.resume, None
        loader = self.loader
        kept = self.workers > 0 and loader.persistent_workers
        alive = kept and getattr(loader, "_iterator", None) is not None
        run, done = resume or (Pass(number=self.passes, warm=self.warm or alive), 0)
        self.passes = run.number + 1
        live = None
        if run.begin is None:
            run.begin, run.parts = self.streams.now(), self.states()
            run.share = None if self.share is None else self.share.state_dict()
            run.seed = self._seed(run.begin, run.number)
        else:
            live = self.streams.now()
            self.streams.put(run.begin)
            self.put_states(run.parts)
            self._put_share(run.share)
        self.run, self._skip, self._first, self._live = run, done, run.first, None
        self._used, self._undo = False, None
        # workers that are kept from one pass to the next cost a random number when they are started. Those of a resumed
        # run are started once more: that number is given back
        alone = self.seeding == "sample"  # nothing may depend on the workers then
        self._mute, self.warm = bool(kept and run.warm and not alive and not alone), False
        self._alone, self._begun = (alive, None) if alone else (None, None)
        if self.how == "sequence":
            return _from(loader, done)
        if not isinstance(loader, DataLoader):
            return _drop(iter(loader), done if self.how == "drop" else 0)
        if live is not None and self.how == "indices" and inspect.isgeneratorfunction(type(loader).__iter__):
            return self._late(done, live)
        iterator = self._open()
        if self.how == "drop" or (self.how == "indices" and not self._used):
            _drop(iterator, done)
        return iterator

    def _late(self, done: int, live: dict[str, Any]) -> Iterator[Any]:
        """Go on in a pass of a loader that makes its iterator only when the first batch is asked for."""
        assert self.run is not None
        self._live = self.streams.now()
        self.streams.put(self.run.begin or {})
        iterator = self._open()
        batch = next(iterator, _END)
        if not self._used:
            _drop(iterator, done - 1)
            self.streams.put(self._live)
            batch = next(iterator, _END) if done else batch
        if batch is not _END:
            yield batch
            yield from iterator

    def _open(self) -> Iterator[Any]:
        """Make the loader's own iterator, with our parts in the place of the loader's for as long as it uses them."""
        loader = self.loader
        start = self._start() if self.workers else None
        if self.how == "state":
            # one that keeps its own state is one with its iterator: it cannot be copied, but lends us a place for a moment
            own = getattr(loader, "worker_init_fn", None)
            if start is not None:
                loader.worker_init_fn = start
            try:
                iterator: Iterator[Any] = iter(loader)
            finally:
                if start is not None:
                    loader.worker_init_fn = own
        else:
            self._plan = None if self.whole is None or self.how != "indices" else self.whole.plan()
            copied = self._copy = self._dressed(start)
            iterator = iter(copied) if self._kept is None else self._kept.begin(loader, copied)
            self.settle()
            if self._plan is not None:
                plan, self._plan = self._plan, None
                return plan.batches(iterator)
        if start is not None:
            from leyden.data.workers import watch  # noqa: PLC0415  # only runs with workers need it

            watch(getattr(iterator, "_workers", ()))
        return iterator

    def _dressed(self, start: Any) -> Any:
        """Return a copy of the loader that iterates by way of this feed."""
        loader = self.loader
        kept = getattr(loader, "_iterator", None)
        if kept is not None:
            indices = getattr(kept, "_index_sampler", None)
            if isinstance(indices, Indices):
                indices.refer(self)  # workers of an earlier run
            elif self.how == "indices":
                from leyden.data.loaders import stop_workers  # noqa: PLC0415  # only if somebody else started workers

                stop_workers(loader)
        # a copy, not one built of guessed arguments: so it works for any subclass
        copied = copy.copy(loader)
        if self.how == "indices" or self.workers:
            name = "sampler" if loader.batch_sampler is None else "batch_sampler"
            # past DataLoader's guard, which would have the user build the loader anew
            object.__setattr__(copied, name, Indices(getattr(loader, name), self))
        if start is not None:
            copied.worker_init_fn = start
        if self._in_main is not None and self._plan is None:
            copied.collate_fn = self._in_main.around(loader.collate_fn)
        return copied

    def _start(self) -> Any:
        from leyden.data.workers import Start  # noqa: PLC0415  # only runs with workers need it

        own = self.loader.worker_init_fn
        return Start(own, self._rank() if self.seeding == "worker" and own is None else None)

    def _rank(self) -> int:
        return rank_zero_only.rank if self.data_rank is None else self.data_rank

    def settle(self) -> None:
        """Bring home what iterating has changed on the copy: the workers that are kept, attributes of a subclass."""
        copied = self._copy
        if copied is None:
            return
        own = vars(self.loader)
        if type(self.loader) is DataLoader:
            own["_iterator"] = copied._iterator  # noqa: SLF001  # where torch keeps its workers
            return
        for name, value in vars(copied).items():
            if name not in _DRESS and own.get(name, _END) is not value:
                own[name] = value

    def release(self) -> None:
        """Let go of the copy; what the user may see of it is brought home."""
        self.settle()
        self._copy = None
        if self._kept is not None:
            self._kept.stop()
        if self._in_main is not None:
            self._in_main.restore()

    @property
    def workers(self) -> int:
        """How many worker processes load the data."""
        return int(self.loader.num_workers) if isinstance(self.loader, DataLoader) else 0

    def _seed(self, begin: Mapping[str, Any], number: int) -> int:
        if self.seeding == "sample":
            return digest(self.seed, *self.key[:3], number)
        if self.seeding != "batch" or not self.workers:
            return 0
        states = [begin[name].numpy().tobytes() for name in ("torch", "generator") if name in begin]
        return digest(self._rank(), *self.key, number, *states)

    # ------------------------------------------------------------------ indices

    def draw(self, sampler: Any) -> Iterator[Any]:
        """Return the iterator over ``sampler`` that the loader gets."""
        if self._kept is not None and self._kept.asking:
            kept: Iterator[Any] = self._kept.drawn(self, sampler)
            return kept
        if self._mute:
            self._mute, self._undo = False, self.streams.now()
            return iter(())
        if self._undo is not None:
            self.streams.put(self._undo)
            self._undo = None
        self._used = True
        if self._begun is not None:
            return self._begun
        drawn = chain.from_iterable(self._parts_of(iter(sampler), self._plan is not None))
        if self._alone is not None:
            # the loader asks twice where it starts workers, and draws a seed unless it keeps them: once, and always
            self._begun = drawn
            if self._alone:
                torch.empty((), dtype=torch.int64).random_(generator=self.loader.generator)
        return drawn if self._plan is None else self._plan.share(drawn)

    def redraw(self, sampler: Any) -> Iterator[Any]:
        """Do what ``draw`` does, and before it what starting workers draws, for workers that are there already."""
        if self._alone is None:
            self.draw(sampler)
            torch.empty((), dtype=torch.int64).random_(generator=self.loader.generator)
        else:
            self._alone = True
        return self.draw(sampler)

    def _parts_of(self, drawn: Iterator[Any], whole: bool) -> Iterator[Iterator[Any]]:
        """Yield what is to be handed on, in one or more pieces; runs when the first index is asked for."""
        run = self.run
        assert run is not None
        first, self._first = self._first, None
        # without workers the first index is asked for when the first batch is: replaying must leave no trace then
        live, self._live = self._live, None
        if live is None and first is not None and not self.workers:
            live = self.streams.now()
        skip, self._skip = self._skip if self.how == "indices" else 0, 0
        if first is not None:
            self.streams.put(first)
        elif run.first is None and self.how == "indices":
            run.first = self.streams.now()
        if self._journals:
            drawn = _journaled(self.streams, run, drawn)
        if self.how == "indices":
            indices = next(drawn, _END)
            if indices is _END:
                return
            self._check(run, indices)
            _drop(drawn, skip - 1)
            if not skip:
                drawn = chain((indices,), drawn)
        ahead = self.workers * (getattr(self.loader, "prefetch_factor", None) or 0)
        if self.seeding in ("batch", "sample") and self.workers:
            from leyden.data import workers  # noqa: PLC0415  # only runs with workers need it

            samples = self.seeding == "sample" and self.how == "indices"
            kind = workers.NumberedSamples if samples else workers.Numbered
            drawn = map(kind, zip(drawn, repeat(run.seed), count(skip)))
        elif self._in_main is not None and self.how == "indices" and not whole:
            drawn = map(self._in_main, drawn, repeat(run.seed), count(skip))
        streams = self.streams
        del self  # this frame lives as long as the iterator, see Indices
        if live is not None:
            # what was drawn before the checkpoint, for workers to load, and what comes after it
            yield islice(drawn, ahead)
            streams.put(live)
        yield drawn

    def _check(self, run: Pass, indices: Any) -> None:
        """Take, or compare, the fingerprint of the first indices."""
        mark = zlib.crc32(repr(indices).encode())
        if run.mark is None:
            run.mark = mark
        elif run.mark != mark:
            rank_zero_warn(
                f"The samples of this epoch do not come in the order of the run that wrote the checkpoint: the"
                f" {type(self.loader).__name__} drew other indices from the same random state. The epoch goes on after as"
                " many batches as were done, so some samples of it come twice and others not at all. Resume with the same"
                " data set, sampler and batch size; a sampler with a memory of its own needs state_dict() and"
                " load_state_dict()."
            )

    # ------------------------------------------------------------------ state

    def states(self) -> list[Any]:
        """Return the states of the samplers that are not torch's own: what they say it is, or their plain attributes."""
        found: list[Any] = []
        for part, former, changed in zip(self.parts, self._former, self.changed, strict=True):
            if isinstance(part, Stateful):
                found.append({"state": copy.deepcopy(part.state_dict())})
            else:
                now = attributes(part)
                changed.update(name for name in now if name not in former or former[name] != now[name])
                found.append({"attributes": now})
        return found

    def put_states(self, states: list[Any]) -> None:
        """Put back what ``states`` returned, as far as it is known."""
        for part, state, changed in zip(self.parts, states, self.changed, strict=False):
            if "state" in state:
                if isinstance(part, Stateful):
                    part.load_state_dict(copy.deepcopy(state["state"]))
                continue
            for name, value in state["attributes"].items():
                object.__setattr__(part, name, copy.copy(value))
                changed.add(name)
            for name in state.get("absent", ()):
                vars(part).pop(name, None)
                changed.add(name)

    def own(self) -> Any:
        """Return the state of a loader or data set that keeps one, as of the batch that comes next; else None."""
        owner = self._owner()
        return None if owner is None else copy.deepcopy(owner.state_dict())

    def put_own(self, state: Any) -> None:
        """Put back what ``own`` returned."""
        owner = self._owner()
        if owner is not None and state is not None:
            owner.load_state_dict(state)

    def finish(self, state: Any) -> None:
        """End the pass that begins at ``state``, of which no batch is left: the next one is that of a new epoch.

        A loader that begins the new one itself has given a batch of it, and is put back.
        """
        if state is not None and next(iter(self.loader), _END) is not _END:
            self.put_own(state)

    def put_end(self, state: Any) -> None:
        """Put back what ``own`` returned at the end of an epoch."""
        self.put_own(state)
        if state is not None and self.how == "state" and isinstance(self.loader, DataLoader):
            # it makes an iterator that is at its end first, and then the one of the next epoch: two draws instead of one
            iter(self.loader)

    def _owner(self) -> Any:
        return {"state": self.loader, "dataset": getattr(self.loader, "dataset", None)}.get(self.how)

    def now(self) -> dict[str, Any]:
        """Return, as plain data, what must be put back wherever the loader stands."""
        self.settle()
        kept = self.workers > 0 and self.loader.persistent_workers
        parts = self.states()
        return {
            "held": plain(self.streams.of_held()),
            "parts": [only(state, names) for state, names in zip(parts, self.changed, strict=True)],
            "share": None if self.share is None else self.share.state_dict(),
            "warm": self.warm or (kept and getattr(self.loader, "_iterator", None) is not None),
        }

    def put_now(self, state: Mapping[str, Any]) -> None:
        """Put back what ``now`` returned."""
        self.streams.put(state["held"])
        self.put_states(state["parts"])
        self._put_share(state.get("share"))
        self.warm = bool(state["warm"])

    def _put_share(self, state: Mapping[str, Any] | None) -> None:
        if self.share is not None and state is not None:
            self.share.load_state_dict(state)

    def why_not(self) -> str | None:
        """Say why a resume cannot go on where this pass stands without loading what is done, and what it does instead."""
        loader, name = self.loader, type(self.loader).__name__
        run = self.run
        if self.how == "indices" and self._used:
            if run is None or not run.forgotten:
                return None
            return (
                f"the sampler of the {name} draws random numbers again and again, and only its last {JOURNAL} draws are"
                " remembered. A resume goes on after as many batches, but its order may differ where later draws depend on"
                " earlier ones. A sampler with a generator of its own needs no memory"
            )
        drop = (
            "A resume fetches the batches that are done once more and drops them, in the order in which they then come"
        )
        if self.how == "indices":
            return f"the {name} does not draw from its sampler when it is iterated over. {drop}"
        if self.how != "drop":
            return None
        if hasattr(type(loader), "__next__"):
            return f"a {name} can be gone through only once and cannot be set to a place. {drop}"
        if not isinstance(loader, DataLoader):
            return f"the {name} has neither an index nor state_dict() and load_state_dict(). {drop}"
        data = type(loader.dataset).__name__
        if loader.num_workers and isinstance(loader.dataset, Stateful):
            return (
                f"the state of its iterable data set {data} is in the workers. Use num_workers=0, or torchdata's"
                f" StatefulDataLoader. {drop}"
            )
        return (
            f"its data set {data} is iterable, and has no state_dict() and load_state_dict(). Give it both (with"
            f" num_workers=0), or use torchdata's StatefulDataLoader. {drop}"
        )


_DRESS = ("sampler", "batch_sampler", "worker_init_fn", "collate_fn")
"""What is ours on the copy of a loader."""


def _unwrapped(part: Any) -> Any:
    """Return the user's own sampler: what is in it has the same name whether its samples are shared out or not."""
    while vars(type(part)).get("draws_apart"):
        part = part.sampler
    return part


def _how(loader: Any) -> str:
    if isinstance(loader, Stateful):
        return "state"
    if isinstance(loader, DataLoader):
        if not isinstance(loader.dataset, IterableDataset):
            return "indices"
        return "dataset" if loader.num_workers == 0 and isinstance(loader.dataset, Stateful) else "drop"
    kind = type(loader)
    indexed = hasattr(kind, "__getitem__") and not isinstance(loader, Mapping)
    plain_list = isinstance(loader, (list, tuple, range, Tensor))
    return "sequence" if indexed and (plain_list or not hasattr(kind, "__iter__")) else "drop"


def _from(loader: Any, done: int) -> Iterator[Any]:
    """Iterate over something with an index, from there on."""
    if not done or hasattr(type(loader), "__iter__"):
        return islice(iter(loader), done, None) if done else iter(loader)

    def by_index() -> Iterator[Any]:
        for index in count(done):
            try:
                item = loader[index]
            except IndexError:
                return
            yield item

    return by_index()


def _drop(iterator: Iterator[Any], count: int) -> Iterator[Any]:
    """Take ``count`` items and forget them."""
    for _ in range(count):
        next(iterator, None)
    return iterator


def _journaled(streams: Streams, run: Pass, drawn: Iterator[Any]) -> Iterator[Any]:
    """Hand on what a sampler draws that may draw random numbers each time, and write down from which state it did."""
    journal = run.journal
    replayed = dict(journal)
    expected = dict(run.first or {})
    for number in count():
        if number in replayed:
            streams.put(replayed[number])
        before = streams.now()
        indices = next(drawn, _END)
        if indices is _END:
            return
        after = streams.now()
        changed = [name for name in before if name not in after or differs(before[name], after[name])]
        if number not in replayed:
            # where nobody else has drawn in between, replaying comes by that state by itself
            state = {n: before[n] for n in changed if n not in expected or differs(before[n], expected[n])}
            if state:
                journal[number] = state
                if len(journal) > JOURNAL:
                    del journal[next(iter(journal))]
                    run.forgotten = True
        expected.update({name: after[name] for name in changed if name in after})
        yield indices

# SPDX-License-Identifier: Apache-2.0
"""Loaders as the loops need them: asked for once, checked, limited, and iterated with the end in sight."""

from __future__ import annotations

import copy
import inspect
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from torch import Tensor

from leyden.data.combined import CombinedLoader
from leyden.data.loaders import check_iterable, length, num_batches, why_empty, without_shuffle
from leyden.datamodule import LightningDataModule
from leyden.errors import MisconfigurationException, PossibleUserWarning
from leyden.hooks import is_written
from leyden.loops.profiled import measured_iterator
from leyden.loops.session import Session
from leyden.module import LightningModule
from leyden.runtime.ranks import rank_zero_only, rank_zero_warn
from leyden.runtime.seed import given_seed, rng_state, seeds_workers
from leyden.strategies.verbs import is_own
from leyden.types import TrainerFn

if TYPE_CHECKING:
    from leyden.data.position import Place, Supply
    from leyden.data.wait import Waits
    from leyden.loops.several.uneven import Uneven

_END = object()


class Lookahead:
    """Iterates one item ahead, so that ``last`` is True as soon as the last item has been handed out.

    ``cut`` is True then if it was the limit that ended it.

    Args:
        iterator: Where the items come from.
        limit: How many of them to take at most.
        place: Called ahead of each item, with the number of items before it.
        taken: How many of the limit have been taken already.
    """

    def __init__(
        self,
        iterator: Iterator[Any],
        limit: int | float = math.inf,
        place: Callable[[int], Place] | None = None,
        taken: int = 0,
    ) -> None:
        self._iterator, self._limit, self._place = iterator, limit, place
        self._items: list[Any] = []
        self._taken = taken
        self.last = self.cut = False
        self._places: deque[Place] = deque(maxlen=2)
        self._fetch()

    def _fetch(self) -> None:
        if self._place is not None:
            self._places.append(self._place(self._taken))
        try:
            if self._taken >= self._limit:
                self.cut = True
                raise StopIteration
            self._items.append(next(self._iterator))
            self._taken += 1
        except StopIteration:
            self.last = True

    def __iter__(self) -> Lookahead:
        return self

    def __next__(self) -> Any:
        if not self._items:
            raise StopIteration
        item = self._items.pop()
        self._fetch()
        return item

    def place(self, done: int) -> Place:
        """The place ahead of the item that comes next when ``done`` have been dealt with."""
        return next((place for place in self._places if place.drawn == done), self._places[-1])

    def close(self) -> None:
        """Let go of the iterator; where it stands is still known."""
        self._iterator, self._place, self._items = iter(()), None, []


class DataLoaderIter:
    """What a step gets for its parameter ``dataloader_iter``: it draws its batches itself, and moves them to the device.

    Iterating yields ``(batch, batch_idx, dataloader_idx)``.

    Attributes:
        batch: The batch that was drawn last; None before the first.
        fetched: How many have been drawn.
    """

    def __init__(
        self,
        triples: Iterator[tuple[Any, int, int]],
        limit: int | float = math.inf,
        drawn: Callable[[Any], None] | None = None,
        place: Callable[[int], Place] | None = None,
        taken: int = 0,
    ) -> None:
        self._triples, self._limit, self._drawn, self._here = triples, limit, drawn, place
        self._ahead: deque[tuple[Any, int, int]] = deque()
        self._places: deque[Place] = deque()
        self._asked = taken
        self.batch: Any = None
        self.fetched = taken

    def fill(self, count: int) -> bool:
        """Draw until ``count`` batches wait; return whether there are so many."""
        while len(self._ahead) < count:
            if self._asked == self._limit:
                return False
            place = self._here(self._asked) if self._here is not None else None
            try:
                self._ahead.append(next(self._triples))
            except StopIteration:
                self._limit = self._asked
                return False
            if place is not None:
                self._places.append(place)
            self._asked += 1
        return True

    @property
    def done(self) -> bool:
        """Whether no batch is left."""
        return not self.fill(1)

    @property
    def last(self) -> bool:
        """Whether at most one batch is left."""
        return not self.fill(2)

    def place(self, done: int) -> Place:
        """The place ahead of the batch that comes next, with the generators before each one that waits."""
        if not self._places:
            assert self._here is not None
            return replace(self._here(self._asked), ahead=[])
        return replace(self._places[0], ahead=[state for place in self._places for state in place.ahead])

    def __iter__(self) -> DataLoaderIter:
        return self

    def __next__(self) -> tuple[Any, int, int]:
        if self.done:
            raise StopIteration
        item = self._ahead.popleft()
        if self._places:
            self._places.popleft()
        self.batch = item[0]
        self.fetched += 1
        if self._drawn is not None:
            self._drawn(self.batch)
        return item

    def turns(self) -> Iterator[tuple[DataLoaderIter, int, int]]:
        """Yield this iterator, with the indices of the batch that comes next, as long as there is one."""
        while not self.done:
            yield self, *self._ahead[0][1:]

    def close(self) -> None:
        """Let go of the iterator; where it stands is still known."""
        self._triples = iter(())
        self._ahead.clear()


Ahead: TypeAlias = Union[Lookahead, DataLoaderIter, None]


def has_source(session: Session, prefix: str) -> bool:
    """Whether somebody provides loaders for ``prefix`` ("train", "val", "test", "predict")."""
    name = f"{prefix}_dataloader"
    return (
        session.sources.get(prefix) is not None
        or (session.datamodule is not None and is_written(session.datamodule, name, LightningDataModule))
        or is_written(session.module, name, LightningModule)
    )


def request(session: Session, prefix: str, mode: str) -> CombinedLoader:
    """Get the loaders of ``prefix`` from the entry point, the data module or the module, checked, as a CombinedLoader.

    Raises:
        TypeError: for a loader that cannot be iterated.
    """
    from leyden.loops.several import elastic  # noqa: PLC0415  # when a run begins, not when a script imports names

    name = f"{prefix}_dataloader"
    given = session.sources.get(prefix)
    if given is not None:
        loaders, source = given, f"{name}s" if prefix != "predict" else "dataloaders"
    elif session.datamodule is not None and is_written(session.datamodule, name, LightningDataModule):
        loaders, source = getattr(session.datamodule, name)(), f"{type(session.datamodule).__name__}.{name}()"
    else:
        loaders, source = getattr(session.module, name)(), f"{type(session.module).__name__}.{name}()"
    fn = str(session.trainer.state.fn)
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, mode)
    for loader in combined.flattened:
        check_iterable(loader, source, fn)
        if length(loader) == 0:
            raise MisconfigurationException(f"Trainer.{fn}(): {source} gave no batch: {why_empty(loader)}.")
    if not isinstance(loaders, Tensor) and any(isinstance(loader, Tensor) for loader in combined.flattened):
        rank_zero_warn(
            f"{source}: lists, tuples and dicts are taken for several loaders, and this {type(loaders).__name__} holds"
            " tensors, of which each row counts as a batch. Did you mean DataLoader(batches, batch_size=None)?",
            category=PossibleUserWarning,
        )
    overfit = session.config.overfit_batches
    if overfit > 0 and fn == "fit":
        combined.flattened = [without_shuffle(loader) for loader in combined.flattened]
    if prefix == "train":
        elastic.decide(session, combined)
    several = session.strategy.world_size > 1 or elastic.is_shared(session, prefix)
    if several and session.config.use_distributed_sampler:
        combined = shared(session, combined, prefix)
    if is_own(session.strategy, "process_dataloader"):
        combined = copy.copy(combined)
        combined.flattened = [session.strategy.process_dataloader(loader) for loader in combined.flattened]
    return combined


def shared(session: Session, combined: CombinedLoader, prefix: str) -> CombinedLoader:
    """Return loaders that give this process its share; the user's own stay as they are."""
    from leyden.data import sharding  # noqa: PLC0415  # only for several processes

    rank, size = session.strategy.data_rank, session.strategy.data_size
    turns = session.turns if prefix == "train" else 1
    mine = copy.copy(combined)
    shuffled = session.config.rule("shared_order") == "shuffled" and prefix == "train"
    padded = session.config.rule("shared_evaluation") == "padded" and prefix != "predict"
    mine.flattened = [
        sharding.share_shuffled(loader, rank, size, given_seed(), turns)
        if shuffled and not session.config.overfit_batches and sharding.can_be_shared(loader)
        else sharding.share(loader, rank, size, pads=prefix == "train" or padded, turns=turns)
        for loader in combined.flattened
    ]
    return mine


def limits(combined: CombinedLoader, stage: str, limit: int | float, argument: str) -> list[int | float]:
    """How many batches to take from each loader; infinity where a loader has no length."""
    return [num_batches(stage, length(loader), limit, argument) for loader in combined.flattened]


def nothing(session: Session, combined: CombinedLoader, counts: list[int | float]) -> bool:
    """Whether an evaluation has no batch at all; one that only other ranks have batches of is run, to meet them."""
    if sum(counts) > 0:
        return False
    if session.strategy.world_size > 1:
        from leyden.data import sharding  # noqa: PLC0415  # only for several processes

        shares = [sharding.share_of(loader) for loader in combined.flattened]
        config = session.config
        limit = {
            "validate": config.limit_val_batches,
            "fit": config.limit_val_batches,
            "test": config.limit_test_batches,
        }
        wanted = limit.get(str(session.trainer.state.fn), config.limit_predict_batches)
        return not (wanted and any(share is not None for share in shares))
    return True


def supply(session: Session, combined: CombinedLoader, prefix: str, step: Callable[..., Any]) -> Supply:
    """Return what the loops draw from: the loaders, with the workers and the random streams that they have in this run.

    ``step`` is what gets the batches.
    """
    from leyden.data.position import Supply  # noqa: PLC0415  # when a run begins, not when a script imports names

    former = session.supplies.pop(prefix, None)
    if former is not None:
        former.release()  # loaders that were asked for anew: the workers of the others end
    lightning = session.config.rule("worker_seeds") == "worker"
    if seeds_workers():
        seeding, seed = ("worker", 0) if lightning else ("sample", given_seed())
    else:
        seeding, seed = "torch" if lightning else "batch", 0
    loaders, fast = None, session.config.fast_data
    if session.config.num_workers is not None:
        from leyden.loops.workers import chosen  # noqa: PLC0415  # only where the Trainer says how many

        loaders = chosen(session, combined, prefix)
    shelf, keep = session.shelf(takes(step, "dataloader_iter")), fast and session.trainer.state.fn is TrainerFn.FITTING
    made = session.supplies[prefix] = Supply(combined, seeding, seed, fast, shelf, keep, loaders)
    shares = [feed.share for feed in made.feeds if feed.share is not None]
    if shares or session.strategy.world_size > 1:
        from leyden.data import sharding  # noqa: PLC0415  # only for several processes

        made.agree = partial(sharding.agree, shares, session.strategy.broadcast)
        if session.strategy.world_size > 1:
            for feed in made.feeds:
                feed.data_rank = session.strategy.data_rank
    return made


def _of_turns(loader: Any, limit: int | float, turns: int) -> int | float:
    """How many batches of a training loader an epoch takes; ``limit`` counts batches of all turns of a process as one."""
    count, argument = length(loader), "limit_train_batches"
    if isinstance(limit, int):
        return num_batches("train", count, limit * turns, argument)
    even = turns > 1 and count < math.inf and count % turns == 0
    return num_batches("train", count // turns, limit, argument) * turns if even else num_batches(
        "train", count, limit, argument
    )  # fmt: skip


def total(combined: CombinedLoader) -> int | float:
    """How many batches an epoch has; infinity if that is not known."""
    try:
        return len(combined)
    except (TypeError, NotImplementedError):
        return math.inf


class TrainingData:
    """The training loaders of a fit, asked for and checked, and the iterator over the batches of an epoch.

    Attributes:
        loader: The loaders, as they were given.
        supply: What batches are drawn from: the loaders, with the memory of how their order came about.
        num_batches: How many batches an epoch has; infinity if that is not known.
        sized: Whether the loaders have a length.
        layout: Among how many the data are shared out.
        epoch_batches: How many batches the epoch has that runs now: others, where other processes have begun it.
        load_rng: State of the random generators when the loaders were asked for.
        settled: Whether all processes have agreed on this; until then ``sized`` and ``num_batches`` are those of this one.
        told: The number of batches that somebody was told before; None if nobody has asked.
        iterator: Over the batches of an epoch that has not begun; None otherwise.
        ahead: What tells when the end is reached, where the loaders do not.

    Raises:
        MisconfigurationException: for a mode that cannot train.
    """

    def __init__(self, session: Session) -> None:
        from leyden.data.reshare import Layout  # noqa: PLC0415  # when a run begins, not when a script imports names

        limit = session.config.limit_train_batches
        self.load_rng = rng_state()
        self.loader = loader = request(session, "train", "max_size_cycle")
        if loader.mode == "sequential":
            raise MisconfigurationException(
                "CombinedLoader(mode='sequential') cannot train: use 'min_size', 'max_size' or 'max_size_cycle'."
            )
        self.sized = total(loader) < math.inf
        self.layout = Layout(session.strategy.data_size, session.turns, session.config.accumulate_grad_batches)
        loader.limits = [_of_turns(x, limit, session.turns) for x in loader.flattened]
        self.num_batches = total(loader)
        self.uneven: Uneven | None = None
        self.told: int | float | None = None
        self.epoch_batches = self.num_batches
        self.supply: Supply
        self.iterator: Iterator[Any] | None = None
        self.ahead: Ahead = None
        self.settled = False
        if session.strategy.world_size == 1:
            self.settle(session)

    def settle(self, session: Session, measure: Callable[[Session, int | float], None] | None = None) -> None:
        """Agree with the other processes on what an epoch is, once, where all come to it, and have it measured."""
        if self.settled:
            return
        if session.strategy.world_size > 1:
            from leyden.loops.several.uneven import Uneven  # noqa: PLC0415  # only for several processes

            self.uneven = uneven = Uneven(session, self.loader, self.told)
            self.sized, self.num_batches = uneven.sized, uneven.num_batches
            self.epoch_batches = self.num_batches
        self.supply = supply(session, self.loader, "train", session.module.training_step)
        self.settled = True
        if measure is not None:
            measure(session, self.num_batches)

    def foresee(self, session: Session) -> None:
        """Say how many batches an epoch will have, as far as it can be known before the processes have agreed."""
        if not self.settled:
            from leyden.loops.several.uneven import foreseen  # noqa: PLC0415  # only for several processes

            self.told = self.num_batches = foreseen(session, self.loader)

    def begin(self, session: Session, place: Place | None = None) -> None:
        """Begin an epoch, or go on at ``place``."""
        if place is None:
            self.epoch_batches = self.num_batches
        data, limit = self.supply, self.epoch_batches
        draws = takes(session.module.training_step, "dataloader_iter")
        data.began = 0 if place is None else place.began
        uneven = self.uneven if self.uneven is not None and (self.uneven.policy or not self.sized) else None
        if uneven is not None and uneven.policy in ("join", "pad") and draws:
            raise MisconfigurationException(
                f"DDPStrategy(uneven={uneven.policy!r}): ranks have other numbers of batches, or do not know how many, and"
                " training_step takes dataloader_iter: it draws its batches itself. Use uneven='stop'."
            )
        only = _same if data.single or draws else _only_batches
        iterator = only(data.iterate(place)) if uneven is None else uneven.around(data, place, only)
        taken, waiting = (0, []) if place is None else (place.drawn, place.ahead)
        if draws:
            triples = ((batch, i, 0) for i, batch in enumerate(iterator, taken)) if data.single else iterator
            source = DataLoaderIter(triples, limit, session.results.train.start_batch, self._here, taken)
            for count, state in enumerate(waiting, 1):
                data.streams.put(state)
                source.fill(count)
            iterator, self.ahead = (turn for turn, _, _ in source.turns()), source
        elif self.sized and not data.keeps_state and not (uneven is not None and uneven.looks_ahead):
            self.ahead = None  # one plain loader: its own iterator, with nothing of ours in between
        else:
            if waiting:
                data.streams.put(waiting[0])
            iterator = self.ahead = Lookahead(iterator, limit, self._here, taken)
            if uneven is not None and uneven.policy == "join":
                iterator = uneven.shared_out(iterator)
        if not draws and (waits := self._waits(session)) is not None:
            iterator = waits.around(iterator)
        if session.profiler is not None:
            iterator = measured_iterator(iterator, session.profiler, "[_TrainingEpochLoop].train_dataloader_next")
        self.iterator = iterator

    def _waits(self, session: Session) -> Waits | None:
        """What measures the waits for data in this fit; None where nobody wants to know, or where it cannot be known."""
        device, config = session.strategy.root_device, session.config
        if config.barebones or config.fast_dev_run or rank_zero_only.rank or device.type not in ("cpu", "cuda"):
            return None
        if session.waits is None:
            from leyden.data import wait  # noqa: PLC0415  # when a run begins, not when a script imports names
            from leyden.runtime.cores import cores  # noqa: PLC0415  # as above

            clock = wait.HostClock() if device.type == "cpu" else wait.DeviceClock(device)
            loaders = [feed.loader for feed in self.supply.feeds]
            session.waits = wait.Waits(clock, lambda: wait.remedy(loaders, cores(), config.num_workers))
        found: Waits = session.waits
        return found

    def _here(self, drawn: int) -> Place:
        place = self.supply.place(drawn)
        place.ahead = [self.supply.streams.now()]
        return place

    def take(self) -> tuple[Iterator[Any], Ahead]:
        """Hand over the iterator, an empty one if no epoch was begun, and what tells when its end is reached."""
        iterator, self.iterator = self.iterator or iter(()), None
        return iterator, self.ahead

    def place(self, done: int, inside: bool) -> Place | None:
        """Where the loaders stand when ``done`` batches are done; None unless ``inside`` an epoch, or one was begun."""
        if not inside and self.iterator is None:
            return None
        return self.supply.place(done) if self.ahead is None else self.ahead.place(done)

    def release(self) -> None:
        """Let go of iterators; where they stand is still known."""
        self.iterator = None
        if self.ahead is not None:
            self.ahead.close()
        if self.settled:
            self.supply.release()


def check_end(data: TrainingData | None, count: int, epoch: int) -> None:
    """Judge an epoch that ended after ``count`` batches, although more were announced.

    Raises:
        MisconfigurationException: when it had no batch at all.
    """
    assert data is not None
    kinds = ", ".join(sorted({type(loader).__name__ for loader in data.loader.flattened}))
    if count == 0:
        raise MisconfigurationException(
            f"The training data ({kinds}) gave no batch in epoch {epoch}. A generator can be gone through only once: pass"
            " an iterable that begins anew each time, such as a DataLoader or a list."
        )
    if data.sized and count != data.epoch_batches and not isinstance(data.ahead, DataLoaderIter):
        rank_zero_warn(
            f"The training data ({kinds}) announced {data.epoch_batches} batches but gave {count}. Correct its __len__, so"
            " that windows of accumulation and the progress bar fit."
        )


def remaining(iterator: Any) -> Iterator[Any]:
    """Yield what ``next(iterator)`` gives: a for loop over a CombinedLoader would begin anew, and draw random numbers."""
    while (item := next(iterator, _END)) is not _END:
        yield item


def _same(iterator: Iterator[Any]) -> Iterator[Any]:
    return iterator


def _only_batches(iterator: Iterator[tuple[Any, int, int]]) -> Iterator[Any]:
    for batch, _, _ in remaining(iterator):
        yield batch


def positional(step: Callable[..., Any]) -> int:
    """How many positional arguments ``step`` takes: 3 or more count as 3; ``*args`` as 2."""
    count = 0
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return 2
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            return max(count, 2)
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            count += 1
    return min(count, 3)


def takes(step: Callable[..., Any], name: str) -> bool:
    """Whether ``step`` has a parameter called ``name``."""
    try:
        return name in inspect.signature(step).parameters
    except (TypeError, ValueError):
        return False


def check_several(step: Callable[..., Any], name: str, loaders: int) -> None:
    """With several loaders a step must be able to tell them apart.

    Raises:
        MisconfigurationException: when it has no argument for the index.
    """
    if loaders < 2 or takes(step, "dataloader_idx") or takes(step, "dataloader_iter"):
        return
    kinds = [p.kind for p in inspect.signature(step).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds or positional(step) >= 3:
        return
    raise MisconfigurationException(
        f"There are {loaders} loaders, but {name}() has no argument dataloader_idx to tell them apart. Write"
        f" {name}(self, batch, batch_idx, dataloader_idx=0)."
    )

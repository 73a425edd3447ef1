# SPDX-License-Identifier: Apache-2.0
"""Loaders as the loops need them: asked for once, checked, limited, and iterated with the end in sight."""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from leyden.data.combined import CombinedLoader
from leyden.data.loaders import check_iterable, length, num_batches, set_epoch, why_empty, without_shuffle
from leyden.datamodule import LightningDataModule
from leyden.errors import MisconfigurationException, PossibleUserWarning
from leyden.hooks import is_written
from leyden.loops.session import Session
from leyden.module import LightningModule
from leyden.runtime.ranks import rank_zero_warn

_END = object()


class Lookahead:
    """Iterates one item ahead, so that ``last`` is True as soon as the last item has been handed out.

    Args:
        iterator: Where the items come from.
        limit: How many of them to take at most.
        state: Called ahead of each item; ``before`` is what it returned ahead of the item that comes next.
    """

    def __init__(
        self, iterator: Iterator[Any], limit: int | float = math.inf, state: Callable[[], Any] | None = None
    ) -> None:
        self._iterator, self._left, self._state = iterator, limit, state
        self._items: list[Any] = []
        self.last = False
        self.before: Any = None
        self._fetch()

    def _fetch(self) -> None:
        if self._state is not None:
            self.before = self._state()
        self._left -= 1
        try:
            if self._left < 0:
                raise StopIteration
            self._items.append(next(self._iterator))
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
    ) -> None:
        self._triples, self._limit, self._drawn = triples, limit, drawn
        self._ahead: deque[tuple[Any, int, int]] = deque()
        self._asked = 0
        self.batch: Any = None
        self.fetched = 0

    def _fill(self, count: int) -> bool:
        """Draw until ``count`` batches wait; return whether there are so many."""
        while len(self._ahead) < count:
            if self._asked == self._limit:
                return False
            try:
                self._ahead.append(next(self._triples))
            except StopIteration:
                self._limit = self._asked
                return False
            self._asked += 1
        return True

    @property
    def done(self) -> bool:
        """Whether no batch is left."""
        return not self._fill(1)

    @property
    def last(self) -> bool:
        """Whether at most one batch is left."""
        return not self._fill(2)

    def __iter__(self) -> DataLoaderIter:
        return self

    def __next__(self) -> tuple[Any, int, int]:
        if self.done:
            raise StopIteration
        item = self._ahead.popleft()
        self.batch = item[0]
        self.fetched += 1
        if self._drawn is not None:
            self._drawn(self.batch)
        return item

    def turns(self) -> Iterator[tuple[DataLoaderIter, int, int]]:
        """Yield this iterator, with the indices of the batch that comes next, as long as there is one."""
        while not self.done:
            yield self, *self._ahead[0][1:]


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
    return combined


def limits(combined: CombinedLoader, stage: str, limit: int | float, argument: str) -> list[int | float]:
    """How many batches to take from each loader; infinity where a loader has no length."""
    return [num_batches(stage, length(loader), limit, argument) for loader in combined.flattened]


def start_epoch(combined: CombinedLoader, epoch: int) -> None:
    """Tell all samplers which epoch begins."""
    for loader in combined.flattened:
        set_epoch(loader, epoch)


def total(combined: CombinedLoader) -> int | float:
    """How many batches an epoch has; infinity if that is not known."""
    try:
        return len(combined)
    except (TypeError, NotImplementedError):
        return math.inf


def train_iterator(
    combined: CombinedLoader, limit: int | float, sized: bool, drawn: Callable[[Any], None] | None
) -> tuple[Iterator[Any], Lookahead | DataLoaderIter | None]:
    """Iterate over at most ``limit`` training batches.

    The second value tells when the end is reached, where the loaders do not (``sized``). With ``drawn``, the step draws
    its batches itself, and ``drawn`` is told each of them.
    """
    single = len(combined.flattened) == 1 and combined.flattened[0] is combined.iterables
    if drawn is not None:
        triples = ((batch, i, 0) for i, batch in enumerate(iter(combined.flattened[0]))) if single else iter(combined)
        source = DataLoaderIter(triples, limit, drawn)
        return (turn for turn, _, _ in source.turns()), source
    # one plain loader: its own iterator, with nothing of ours in between
    iterator: Iterator[Any] = iter(combined.flattened[0]) if single else _only_batches(iter(combined))
    if sized:
        return iterator, None
    ahead = Lookahead(iterator, limit, combined.state_dicts if combined.state_dicts() else None)
    return ahead, ahead


def states(combined: CombinedLoader, ahead: Lookahead | DataLoaderIter | None) -> list[dict[str, Any]]:
    """The states of those loaders that keep one, as of the batch that comes next, even where one more has been taken."""
    if isinstance(ahead, Lookahead) and ahead.before:
        return list(ahead.before)
    return combined.state_dicts()


def check_end(combined: CombinedLoader | None, count: int, epoch: int, expected: int | float | None) -> None:
    """Judge an epoch that ended after ``count`` batches, although ``expected`` were announced (None: none were).

    Raises:
        MisconfigurationException: when it had no batch at all.
    """
    kinds = ", ".join(sorted({type(loader).__name__ for loader in combined.flattened})) if combined is not None else ""
    if count == 0:
        raise MisconfigurationException(
            f"The training data ({kinds}) gave no batch in epoch {epoch}. A generator can be gone through only once: pass"
            " an iterable that begins anew each time, such as a DataLoader or a list."
        )
    if expected is not None:
        rank_zero_warn(
            f"The training data ({kinds}) announced {expected} batches but gave {count}. Correct its __len__, so that"
            " windows of accumulation and the progress bar fit."
        )


def remaining(iterator: Any) -> Iterator[Any]:
    """Yield what ``next(iterator)`` gives: a for loop over a CombinedLoader would begin anew, and draw random numbers."""
    while (item := next(iterator, _END)) is not _END:
        yield item


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

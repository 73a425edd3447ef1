# SPDX-License-Identifier: Apache-2.0
"""Loaders as the loops need them: asked for once, checked, limited, and iterated with the end in sight."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

from leyden.data.combined import CombinedLoader
from leyden.data.loaders import check_iterable, length, num_batches, set_epoch, without_shuffle
from leyden.datamodule import LightningDataModule
from leyden.errors import MisconfigurationException
from leyden.hooks import is_written
from leyden.loops.session import Session
from leyden.module import LightningModule

_END = object()


class Lookahead:
    """Iterates one item ahead, so that ``done`` is True as soon as the last item has been handed out."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator
        self._items: list[Any] = []
        self.done = False
        self._fetch()

    def _fetch(self) -> None:
        try:
            self._items.append(next(self._iterator))
        except StopIteration:
            self.done = True

    def __iter__(self) -> Lookahead:
        return self

    def __next__(self) -> Any:
        if not self._items:
            raise StopIteration
        item = self._items.pop()
        self._fetch()
        return item


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


def train_iterator(combined: CombinedLoader, total: int | float) -> tuple[Iterator[Any], Lookahead | None]:
    """Iterate over training batches. Where ``total`` is not known, the second value tells when the end is reached."""
    single = len(combined.flattened) == 1 and combined.flattened[0] is combined.iterables
    # one plain loader: its own iterator, with nothing of ours in between
    iterator: Iterator[Any] = iter(combined.flattened[0]) if single else _only_batches(iter(combined))
    if total == math.inf:
        ahead = Lookahead(iterator)
        return ahead, ahead
    return iterator, None


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

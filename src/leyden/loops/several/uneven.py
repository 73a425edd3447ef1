# SPDX-License-Identifier: Apache-2.0
"""Training where ranks have other numbers of batches: an epoch ends with the first rank, or goes on until all are done.

``DDPStrategy(uneven=...)`` says which: ``"stop"``, ``"join"`` or ``"pad"``. Where all ranks know how many batches they have,
they tell each other once, and an epoch asks nothing; where one does not, all ask each other ahead of each batch.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from leyden.data.combined import CombinedLoader
from leyden.errors import MisconfigurationException, PossibleUserWarning
from leyden.loops.session import FORESEEN, Session
from leyden.optim import needs_closure
from leyden.runtime.ranks import rank_zero_warn

if TYPE_CHECKING:
    from leyden.data.position import Place, Supply
    from leyden.strategies.base import Strategy

_END = object()


class Uneven:
    """What the ranks of a fit have agreed on about their training loaders.

    Args:
        session: The run; the loaders' limits are set.
        loader: The training loaders of this rank; their limits are what an epoch takes of each on this rank.
        told: How many batches an epoch has by what somebody was told on this rank before; None if nobody was.

    Attributes:
        sized: Whether all ranks know how many batches they have.
        num_batches: How many batches an epoch has; infinity if nobody knows.
        policy: What is done in this fit: ``""`` where there is nothing to do, else as the strategy says.

    Raises:
        MisconfigurationException: where ``"join"`` is not possible, or ranks were told other numbers.
    """

    def __init__(self, session: Session, loader: CombinedLoader, told: int | float | None = None) -> None:
        self.session, strategy = session, session.strategy
        self.own = _total(loader)
        said = strategy.gather_objects((self.own, loader.limits, told))
        found = [(total, counts) for total, counts, _ in said]
        totals: list[int | float] = [total for total, _ in found]
        self.sized = max(totals) < math.inf
        self.fewest = min(totals)
        self.policy = "" if self.sized and all(row == found[0] for row in found) else strategy.uneven
        self.active: list[int] = []
        if self.policy not in ("join", "pad"):
            loader.limits = [min(column) for column in zip(*(row for _, row in found), strict=True)]
            self.num_batches = _total(loader)
            if self.sized and self.policy:
                _say_that_it_stops([row for _, row in found])
        else:
            self.num_batches = max(totals)
        _compare({rank: number for rank, (_, _, number) in enumerate(said) if number is not None}, self.num_batches)
        if self.policy == "join" and (reason := _why_not(session)):
            raise MisconfigurationException(
                f"DDPStrategy(uneven='join'): ranks have other numbers of batches, or do not know how many, and {reason}."
                " Use uneven='stop' or uneven='pad', or give all ranks as many batches."
            )

    @property
    def looks_ahead(self) -> bool:
        """Whether the loop must be told one batch ahead that an epoch ends."""
        return not self.sized or self.policy == "join"

    def around(self, supply: Supply, place: Place | None, unwrap: Callable[[Iterator[Any]], Iterator[Any]]) -> Any:
        """Begin an epoch, or go on at ``place``; yields batches, which ``unwrap`` takes out of what loaders yield.

        With ``"join"`` each comes with the number of ranks that have one, for ``shared_out``; it is None where this rank
        has none.
        """
        taken = 0 if place is None else place.drawn
        iterator = unwrap(supply.iterate(place))
        if self.policy == "join":
            return self._joined(iterator, taken)
        if self.policy == "pad":
            return self._padded(iterator, taken, supply, unwrap)
        return iterator if self.sized else in_step(iterator, self.session.strategy)

    def _joined(self, iterator: Iterator[Any], taken: int) -> Iterator[Any]:
        strategy = self.session.strategy
        active = strategy.world_size
        while True:
            item = next(iterator, _END) if taken < self.own else _END
            if taken >= self.fewest or not self.sized:
                active = int(strategy.gather_numbers(torch.tensor([float(item is not _END)])).sum())
                if not active:
                    return
            yield (None if item is _END else item), active
            taken += 1

    def _padded(
        self, iterator: Iterator[Any], taken: int, supply: Supply, unwrap: Callable[[Iterator[Any]], Iterator[Any]]
    ) -> Iterator[Any]:
        strategy, done = self.session.strategy, supply.began > 0
        while True:
            item = next(iterator, _END) if taken - supply.began < self.own else _END
            done = done or item is _END
            if not self.sized and strategy.reduce_boolean_decision(done):
                return
            if item is _END:
                if taken == supply.began:
                    raise MisconfigurationException(
                        f"DDPStrategy(uneven='pad'): the training data of rank {strategy.global_rank} gave no batch when"
                        " it was begun anew. A generator can be gone through only once: pass an iterable that begins anew"
                        " each time, such as a DataLoader or a list; or use uneven='join'."
                    )
                supply.began, iterator = taken, unwrap(supply.iterate())
                item = next(iterator, _END)
                if item is _END:
                    continue
            yield item
            taken += 1

    def shared_out(self, turns: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches of ``turns``, each when its time has come, with its share in the mean over all ranks."""
        opt, size = self.session.optimization, self.session.strategy.world_size
        exchange = opt.exchange
        opt.expects_none = True
        for batch, active in turns:
            opt.share = size / active
            opt.exchange = exchange if active == size else opt.exchange_with_idle
            yield batch
        opt.share, opt.exchange, opt.expects_none = 1.0, exchange, False


def in_step(iterator: Iterator[Any], strategy: Strategy) -> Iterator[Any]:
    """Iterate as long as all ranks have a next item, where nobody knows how many there are: all ask each time."""
    while strategy.reduce_boolean_decision((item := next(iterator, _END)) is not _END):
        yield item


def foreseen(session: Session, loader: CombinedLoader) -> int | float:
    """How many batches an epoch will have, before the ranks meet: by what this rank knows and others have told by now.

    No rank has to ask for it: one that asks alone hears nothing, and takes its own number.
    """
    from leyden.data import sharding  # noqa: PLC0415  # only for several processes

    own, strategy = _total(loader), session.strategy
    if all(sharding.share_of(each) is not None for each in loader.flattened):
        return own  # all ranks get as many
    mine = json.dumps([own, loader.limits])  # infinity too: no other program reads it
    rows: list[tuple[int | float, list[int | float]]] = [
        json.loads(text) for text in strategy.hear(FORESEEN, mine).values()
    ]
    if strategy.uneven != "stop":
        return max(total for total, _ in rows)
    whole = copy.copy(loader)
    whole.limits = [min(column) for column in zip(*(limits for _, limits in rows), strict=True)]
    return _total(whole)


def _compare(told: dict[int, int | float], agreed: int | float) -> None:
    """Judge what ``estimated_stepping_batches`` has said on some ranks, by rank, before all have agreed.

    Raises:
        MisconfigurationException: where ranks were told different numbers.
    """
    if all(number == agreed for number in told.values()):
        return
    text = (
        "Trainer.estimated_stepping_batches was asked before the ranks had agreed on their training loaders, and took so"
        f" many batches for an epoch, by rank: {told}; an epoch has {agreed}. Ask for it at the same place on all ranks."
    )
    if len(set(told.values())) > 1:
        raise MisconfigurationException(f"{text} Schedules that go by it would differ between ranks.")
    rank_zero_warn(text, category=PossibleUserWarning)


def _total(loader: CombinedLoader) -> int | float:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return math.inf


def _say_that_it_stops(found: list[list[int | float]]) -> None:
    rank_zero_warn(
        f"The training loaders have other numbers of batches on other ranks; by rank: {found}. An epoch has as many as"
        " the rank with the fewest: the rest is left out. DDPStrategy(uneven='join') or uneven='pad' uses all.",
        category=PossibleUserWarning,
    )


def _why_not(session: Session) -> str | None:
    """Why a rank cannot take part in a step without a batch of its own; None if it can."""
    module, strategy = session.module, session.strategy
    if (reason := strategy.why_no_join()) is not None:
        return reason
    if not module.automatic_optimization:
        return "under manual optimization a rank without a batch does not know which steps the others make"
    if session.hooks.optimizer_step or any(needs_closure(optimizer) for optimizer in strategy.optimizers):
        return "an optimizer, or the module's optimizer_step(), runs training_step itself, for which there is no batch"
    return None


__all__ = ["Uneven", "foreseen", "in_step"]

# SPDX-License-Identifier: Apache-2.0
"""What several processes tell each other about what was logged, and about when to stop, where they meet anyway.

They meet at the end of an epoch or of an evaluation loader, and after training batches that end with a row, a validation
or the epoch. There, all values travel in one collective: each rank gets the rows of all ranks and makes the same numbers of
them, to the last bit. An ordinary batch exchanges nothing here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from leyden.errors import MisconfigurationException, PossibleUserWarning
from leyden.loops.metric_state import metrics_of
from leyden.loops.several import same
from leyden.results import Results, Slot, Store
from leyden.runtime.ranks import rank_zero_warn
from leyden.strategies.base import Strategy

Name = tuple[Any, ...]
"""(hook, name, reduction, names and flags of its views, path of its metric object): the same on all ranks."""
_HEAD = 2  # names that not all know yet, batches behind the values
_PER = 3  # present, total, weight


class Across:
    """The meetings of one run.

    Args:
        strategy: Carries what is said.
        results: Where ``self.log`` stores.
        trainer: Whose ``should_stop`` all ranks agree on.
        synced_only: Whether epoch values are exchanged only where ``sync_dist=True`` was said.
    """

    def __init__(self, strategy: Strategy, results: Results, trainer: Any, synced_only: bool = False) -> None:
        self.strategy, self.results, self.trainer = strategy, results, trainer
        self.synced_only = synced_only
        self._names: dict[tuple[Any, ...], list[Name]] = {}
        """For each kind of meeting, the names that all ranks know, in their order."""
        self._values: dict[int, Tensor] = {}
        """By the id of a slot, what all ranks have agreed on at the last meeting of its kind."""
        self._told: set[Name] = set()
        self._wish = False
        """Whether this rank wants to stop, and could not say so yet."""
        self._again: dict[str, bool] = {}
        self._counted = list(range(strategy.world_size))
        """The ranks whose values count: one for each share of the data."""
        results.across = self.value

    def bound(self, hooks: Any, facts: list[tuple[str, str]]) -> None:
        """Learn, once for a run, who has which share of the data, and whether any rank does something when an epoch ends.

        Args:
            hooks: Of the run.
            facts: What must be the same on all ranks, see ``same``.

        Raises:
            MisconfigurationException: if it is not.
        """
        names = [f"on_{kind}_epoch_end" for kind in ("train", "validation", "test")]
        # one call of the hook of training is ours
        mine = [float(len(getattr(hooks, name)) > (name == names[0])) for name in names]
        numbers = [*mine, self.strategy.data_rank, same.digest(facts)]
        table = self.strategy.gather_numbers(torch.tensor(numbers, dtype=torch.float64))
        if (table[:, -1] != table[0, -1]).any():
            same.complain(self.strategy.gather_objects(facts))
        shares = table[:, -2].tolist()
        self._counted = sorted({share: rank for rank, share in reversed(list(enumerate(shares)))}.values())
        self._again = dict(zip(names, table[:, :-2].max(0).values.bool().tolist(), strict=True))

    def close(self) -> None:
        """The run is over."""
        self.results.across = None

    # ------------------------------------------------------------------ values

    def value(self, slot: Slot) -> Tensor | None:
        """The value of the epoch on which all ranks have agreed; None before they have met."""
        if not self._exchanged(slot):
            return slot.epoch_value()
        return self._values.get(id(slot))

    def _exchanged(self, slot: Slot) -> bool:
        return slot.metric is not None or not self.synced_only or slot.synced

    def after_hook(self, store: Store, name: str) -> None:
        """Agree on what was logged in the hook ``name`` at the end of an epoch, if anybody wrote it."""
        if self._again.get(name):
            self.epoch(store, 1)

    def epoch(self, store: Store, batches: int = 1) -> None:
        """Agree on the epoch values of everything that was logged for the loader that runs, or without one.

        Args:
            store: Where.
            batches: How many batches this rank had; one without any cannot have logged anything.
        """
        kind = ("train",) if store.training else ("eval", store.loader)
        slots = {
            _name(key, slot, self._metrics): slot
            for key, slot in store.slots.items()
            if slot.on_epoch and slot.loader == store.loader and self._exchanged(slot)
        }
        fresh = {name: slot for name, slot in slots.items() if slot.fresh}
        values = self._exchange(kind, fresh, lambda slot: (slot.total, slot.weight), batches)
        for name, value in values.items():
            slot = slots.get(name) or self._foreign(store, name)
            slot.fresh = True
            self._values[id(slot)] = value
        store.collected = None

    def step(self, store: Store) -> None:
        """Replace the values of the last step by those over all ranks, where ``sync_dist=True`` was said."""
        has = not store.passed_over
        slots = {
            _name(key, slot, {}): slot
            for key, slot in (store.slots.items() if has else ())
            if slot.fresh and slot.on_step and slot.synced and slot.metric is None and slot.last is not None
        }

        def last(slot: Slot) -> tuple[Any, Any]:
            return slot.last, 1 if slot.reduction == "mean" else 0

        for name, value in self._exchange(("step",), slots, last, int(has)).items():
            if name in slots:
                slots[name].last = value
        store.collected = None

    @property
    def _metrics(self) -> dict[int, str]:
        return {id(metric): path for path, metric in metrics_of(self.strategy.module).items()}

    def _exchange(
        self, kind: tuple[Any, ...], slots: dict[Name, Slot], read: Callable[[Slot], tuple[Any, Any]], batches: int
    ) -> dict[Name, Tensor]:
        known = self._names.setdefault(kind, [])
        table = self._rows(known, slots, read, batches)
        if table[:, 0].any():
            # somebody logs a name that not all know: from now on all do
            for new in self.strategy.gather_objects([name for name in slots if name not in known]):
                known.extend(name for name in new if name not in known)
            table = self._rows(known, slots, read, batches)
        values: dict[Name, Tensor] = {}
        for place, name in enumerate(known):
            present, total, weight = table[:, _HEAD + _PER * place : _HEAD + _PER * (place + 1)].unbind(1)
            if not present.any():
                continue
            self._report(name, present, table[:, 1])
            if present[self._counted].any():
                present, total, weight = present[self._counted], total[self._counted], weight[self._counted]
            slot = slots.get(name)
            if name[2] == "metric":
                value = self._metric(name, slot)
            else:
                value = _reduced(name[2], present.bool(), total, weight)
                like = slot.total if slot is not None and slot.total is not None else None
                dtype = like.dtype if like is not None else torch.get_default_dtype()
                value = value.to(device=self.strategy.root_device if like is None else like.device, dtype=dtype)
            values[name] = value
        return values

    def _rows(
        self, known: list[Name], slots: dict[Name, Slot], read: Callable[[Slot], tuple[Any, Any]], batches: int
    ) -> Tensor:
        """Exchange one row for each rank: its head, and three numbers for each name that all know."""
        flat: list[float] = [float(any(name not in known for name in slots)), float(batches)]
        for name in known:
            slot = slots.get(name)
            if slot is None or slot.metric is not None:
                flat += [float(slot is not None), 0.0, 0.0]
            else:
                total, weight = read(slot)
                flat += [float(total is not None), 0.0 if total is None else float(total), float(weight)]
        return self.strategy.gather_numbers(torch.tensor(flat, dtype=torch.float64))

    def _metric(self, name: Name, slot: Slot | None) -> Tensor:
        """The value of a metric object, which exchanges its state itself: on all ranks, also one that did not log it."""
        metric = slot.metric if slot is not None else dict(metrics_of(self.strategy.module)).get(name[-1])
        if metric is None:
            raise MisconfigurationException(
                f"self.log({name[1]!r}, ...) got a metric object on another rank, but not on rank"
                f" {self.strategy.global_rank}, where it cannot be found: make it an attribute of the module on all ranks."
            )
        with warnings.catch_warnings():
            if slot is None:
                warnings.simplefilter("ignore")  # torchmetrics says that this rank has not counted anything: it is so
            value = metric.compute()
        return value.detach() if isinstance(value, Tensor) else torch.tensor(value)

    def _foreign(self, store: Store, name: Name) -> Slot:
        """A slot for what only other ranks have logged."""
        hook, plain_name, reduction, (step_name, epoch_name, prog_bar, logger, suffix, only_zero), _ = name
        key = (hook, store.loader, plain_name, "foreign")
        slot = store.slots.get(key)
        if slot is None:
            slot = store.slots[key] = Slot(
                plain_name, prog_bar, logger, False, True, reduction, store.loader, suffix, None
            )
            slot.step_name, slot.epoch_name = step_name, epoch_name
            slot.synced, slot.rank_zero_only = True, only_zero
            if reduction == "metric":  # at the end of an epoch it is reset here as well
                slot.metric = metrics_of(self.strategy.module)[name[-1]]
        return slot

    def _report(self, name: Name, present: Tensor, batches: Tensor) -> None:
        """Say, once for each name, that some ranks have not logged it; those without a batch of an evaluation could not."""
        missing = [rank for rank, there in enumerate(present.tolist()) if not there and batches[rank]]
        if missing and name not in self._told and not name[3][-1]:
            self._told.add(name)
            there = [rank for rank in range(len(present)) if present[rank]]
            rank_zero_warn(
                f"self.log({name[1]!r}, ...) was called in {name[0]} on the ranks {there}, but not on {missing}: its value"
                " is that of the ranks that logged it, the others weigh nothing. Log the same names on all ranks, or say"
                f" self.log({name[1]!r}, ..., rank_zero_only=True).",
                category=PossibleUserWarning,
            )

    # ------------------------------------------------------------------ when to stop

    def after_batch(self, meet: bool, batch: int) -> None:
        """After a training batch that may end with more than an ordinary one does; with ``meet`` all ranks are here."""
        if meet:
            self.step(self.results.train)
            self.agree_to_stop()
        elif self.trainer.should_stop and (self._wish or not self.strategy.unanimous(f"stop/{batch}")):
            # all stop at once; if not all want to, it waits for the next meeting
            self.trainer.should_stop, self._wish = False, True

    def agree_to_stop(self) -> None:
        """Make ``trainer.should_stop`` true on all ranks if it is on any."""
        self.trainer.should_stop = self.strategy.reduce_boolean_decision(
            self.trainer.should_stop or self._wish, all=False
        )
        self._wish = False


def _name(key: tuple[Any, ...], slot: Slot, metrics: dict[int, str]) -> Name:
    hook, name = (key[1], key[3]) if key[0] == "resumed" else (key[0], key[2])
    suffix = slot.name != name
    views = (slot.step_name, slot.epoch_name, slot.prog_bar, slot.logger, suffix, slot.rank_zero_only)
    if slot.metric is not None:
        return hook, name, "metric", views, metrics.get(id(slot.metric), "")
    return hook, name, slot.reduction, views, ""


def _reduced(reduction: str, present: Tensor, total: Tensor, weight: Tensor) -> Tensor:
    total, weight = total[present], weight[present]
    if reduction == "mean":
        return total.sum() / weight.sum()
    return total.sum() if reduction == "sum" else total.min() if reduction == "min" else total.max()

# SPDX-License-Identifier: Apache-2.0
"""How much of the first steps was waiting for data, measured where the batches come from; one line says so if it is much.

Only the first batches of a few epochs pass through here; after them the loop draws from the iterator itself again.

On the CPU a wait is the time from asking for a batch to having it. On a GPU that time costs nothing as long as the device
has work: there a wait is the time in which the device had none, from the end of what it was given before the batch was
asked for to the moment at which the batch was there, by two events on its stream. Nothing waits for them: if the device
is far behind, it has work enough. Time of validations, checkpoints and callbacks counts as time of steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from leyden.data.loaders import why_own_workers
from leyden.runtime.ranks import rank_zero_info

STEPS = 50
"""Over how many steps the wait is measured."""
SHARE = 0.2
"""From which share of their time on it is worth a line."""
LEAST = 0.2
"""Seconds of waiting in those steps that are worth one: 4 ms a batch, less than which workers hardly save."""
_WARM = 3
"""So many steps of a fit are not counted: workers start, libraries are loaded."""
_LATE = 10
"""How many further batches the device may take to have done those that are measured."""
_TIMES = 3
"""How often it is measured."""


class HostClock:
    """Moments of this process.

    Attributes:
        stamp: A function that returns this moment.
    """

    stamp: Callable[..., Any] = staticmethod(time.monotonic_ns)

    def passed(self, moment: Any) -> bool:
        """Whether a moment has come."""
        return True

    def between(self, begin: Any, end: Any) -> float:
        """Return the seconds between two moments that have come."""
        return float(end - begin) / 1e9


class DeviceClock(HostClock):
    """Moments at which a GPU has done what it was given by then."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device)

    def stamp(self) -> Any:
        """Return this moment."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event

    def passed(self, moment: Any) -> bool:
        """Whether the device has come to it."""
        return bool(moment.query())

    def between(self, begin: Any, end: Any) -> float:
        """Return the seconds between two moments to which the device has come."""
        return float(begin.elapsed_time(end)) / 1e3


class Waits:
    """Measures the waits of one fit.

    Args:
        clock: Of the device that trains.
        remedy: Says what can be done; called only if there is something to say.
    """

    def __init__(self, clock: HostClock, remedy: Callable[[], str]) -> None:
        self.clock, self.remedy = clock, remedy
        self.times, self.warm, self.late = _TIMES, _WARM, _LATE
        self.spent = 0.0
        self.waits: list[tuple[Any, ...]] = []

    def around(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Return an iterator over the same batches, of which the first are measured as long as that is wanted."""
        return chain.from_iterable(_parts(_Part(iterator, self), iterator)) if self.times else iterator

    def enough(self) -> bool:
        """Judge the steps that are measured, unless the device is not there yet; return whether that is done."""
        if not self.clock.passed(self.waits[-1][1]):
            self.late -= 1
            if self.late:
                return False
            waited = 0.0
        else:
            waited = sum(self.clock.between(*wait) for wait in self.waits)
        share = waited / self.spent if self.spent else 0.0
        self.times -= 1
        if share > SHARE and waited >= LEAST:
            self.times = 0
            rank_zero_info(
                f"Trainer.fit: {min(share, 1.0):.0%} of {len(self.waits)} steps was waiting for data ({waited:.1f} of"
                f" {self.spent:.1f} s). {self.remedy()}"
            )
        self.waits, self.spent, self.late = [], 0.0, _LATE
        return True


class _Part:
    """The measured batches of one epoch."""

    def __init__(self, iterator: Iterator[Any], waits: Waits) -> None:
        self.iterator, self.waits = iterator, waits
        self.begun, self.wait = 0, tuple[Any, ...]()
        """When the batch of the step that is done now was asked for, and the two moments of its wait."""
        self.ended = False
        """Whether the iterator came to its end."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        waits, now = self.waits, time.monotonic_ns()
        if self.wait and len(waits.waits) < STEPS:  # the step that has just been done
            if waits.warm:
                waits.warm -= 1
            else:
                waits.waits.append(self.wait)
                waits.spent += (now - self.begun) / 1e9
        if len(waits.waits) == STEPS and waits.enough():
            raise StopIteration
        begin, self.begun = waits.clock.stamp(), now
        try:
            batch = next(self.iterator)
        except StopIteration:
            self.ended = True
            raise
        self.wait = (begin, waits.clock.stamp())
        return batch


def _parts(first: _Part, rest: Iterator[Any]) -> Iterator[Iterator[Any]]:
    yield first
    if not first.ended:  # one that has ended might begin anew
        yield rest


def remedy(loaders: list[Any], cores: int, wanted: Any) -> str:
    """Say what can be done about waiting for ``loaders``, with so many cores and ``Trainer(num_workers=wanted)``."""
    faster = "make the data set faster: prepare ahead of the training what is the same in each epoch"
    known = [loader for loader in loaders if isinstance(loader, DataLoader)]
    if not known:
        kinds = ", ".join(sorted({type(loader).__name__ for loader in loaders}))
        return f"The batches come from {kinds}: make it faster, or let a DataLoader with workers load them."
    workers = sum(loader.num_workers for loader in known)
    shares = " (an iterable data set has to share its samples among them)" * any(
        isinstance(loader.dataset, IterableDataset) for loader in known
    )
    measures = any(why_own_workers(loader) is None for loader in known)
    if workers:
        crew, room = _plural(workers, "worker"), _plural(cores, "core")
        ahead = "a higher prefetch_factor where only some batches are slow"
        if workers < cores:
            auto = "" if wanted == "auto" or not measures else ", or Trainer(num_workers='auto'), which measures"
            more = f"take more (num_workers=…{auto}){shares}"
            return f"It has {crew}, and {room} to use: {more}, {ahead}, or {faster}."
        return f"It has {crew}, and no more than {room} to use: {faster}, or try {ahead}."
    if cores == 1:
        return f"There is only 1 core to use, so that workers would not help: {faster}."
    if wanted in ("auto", 0) and measures:
        what = "were measured to be no faster" if wanted == "auto" else "are ruled out by Trainer(num_workers=0)"
        return f"The main process loads them, and workers {what}: {faster}."
    auto = ", or Trainer(num_workers='auto'), which measures how many" * measures
    return f"The main process loads them. There are {cores} cores to use: DataLoader(num_workers=…){shares}{auto}."


def _plural(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"

# SPDX-License-Identifier: Apache-2.0
"""How many workers a DataLoader is fastest with: measured in worker processes alone, so that it leaves no trace here.

The time of the main process is measured in a worker too, that of its own clock: a copy of the data set loads, and the
data set, its caches and open files, and all random generators of this process stay as they are. Samplers are not asked.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from statistics import median
from typing import Any

import torch

SECONDS = 2.0
"""How long a measurement takes, about; a data set that needs longer for a few samples takes longer."""
_PART = 0.25
"""Seconds for each number of workers."""
_BATCH = 0.04
"""Seconds that a batch may take while it is measured; of slower ones a part is loaded."""
_SLOW = 0.5
"""Seconds for one sample from which on nothing else is measured: each worker counts then."""
_SURE = 1.1
"""By what factor one number must be faster than another to count as faster."""
_PAYS = 2e-4
"""Seconds a batch that workers must save: what they cost the main process is of that size."""
_HANGS = 60.0
"""Seconds without a batch after which a measurement is given up."""


@dataclass
class Measured:
    """What was measured.

    Attributes:
        workers: The smallest number with which the loader is as fast as it gets.
        seconds: For a batch, by number of workers; 0 is the main process.
    """

    workers: int
    seconds: dict[int, float] = field(default_factory=dict)

    def __str__(self) -> str:
        found = [f"{_time(taken)} with {workers}" for workers, taken in self.seconds.items() if workers]
        return f"a batch takes {_time(self.seconds[0])} in the main process" + "".join(f", {text}" for text in found)


def measure(loader: Any, most: int, epoch: float = 0.1) -> Measured:
    """Measure with how many workers a DataLoader over a map-style data set is fastest.

    Args:
        loader: It, its data set and its sampler stay as they are.
        most: The largest number of workers.
        epoch: Seconds that one pass must take in the main process for workers to be worth a try.

    Raises:
        Exception: what the data set raises, or torch where a worker ended.
    """
    end = time.monotonic() + SECONDS
    size, batches = batch_size(loader), len(loader)
    keys = _keys(len(loader.dataset))
    part, alone = _alone(loader, size, keys)
    whole = (size or 1) / part
    if alone > _SLOW:
        return Measured(most if most > 1 else 0, {0: alone * whole})
    found = {0: alone}
    worth = alone * whole >= 2 * _PAYS and alone * whole * batches >= epoch
    for workers in _numbers(most) if worth else ():
        found[workers] = _together(loader, workers, part, keys)
        former = list(found.values())[-2]
        if (workers > 1 and found[workers] * _SURE > former) or time.monotonic() > end:
            break
    seconds = {workers: taken * whole for workers, taken in found.items()}
    best = min(seconds.values())
    chosen = next(workers for workers, taken in seconds.items() if taken <= best * _SURE)
    return Measured(chosen if seconds[0] - seconds[chosen] >= _PAYS else 0, seconds)


def batch_size(loader: Any) -> int | None:
    """Return the size of a batch, on average where the batch sampler does not say; None for a loader of single samples."""
    if loader.batch_sampler is None:
        return None
    size = getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) and size > 0 else max(1, round(len(loader.dataset) / max(1, len(loader))))


def _alone(loader: Any, size: int | None, keys: Iterator[int]) -> tuple[int, float]:
    """Return how many samples are loaded at once while measuring, and how long that takes without the way to here."""
    threads, begin = torch.get_num_threads(), time.monotonic()

    def tickets() -> Iterator[_Ticket]:
        for part in sizes:
            yield _Ticket(((next(keys) if size is None else list(islice(keys, part))), threads))

    sizes = [1] * 6 if size is None else [1, *(2**power for power in range(int(math.log2(size)) + 1)), *[size] * 5]
    taken: list[tuple[int, float]] = []
    with _Workers(loader, list(tickets()), 1, _Stopwatch(loader.collate_fn), prefetch=1) as results:
        for part, seconds in zip(sizes, results, strict=True):
            taken.append((part, float(seconds)))
            slow = seconds > _BATCH and (len(taken) > 1 or seconds > _SLOW)
            if slow or time.monotonic() - begin > 2 * _PART:
                break
    taken = taken[1:] or taken  # the first may have had to open files, or to import
    part = taken[-1][0]
    return part, median(seconds for other, seconds in taken if other == part)


def _together(loader: Any, workers: int, part: int, keys: Iterator[int]) -> float:
    """Return the seconds between two batches that arrive here from ``workers`` workers."""
    single = loader.batch_sampler is None
    ahead = 2 * workers
    indices = (next(keys) if single else list(islice(keys, part)) for _ in count())
    with _Workers(loader, indices, workers) as results:
        # what was loaded ahead while workers were started does not count
        for _ in range(ahead):
            next(results)
        begin = now = time.perf_counter()
        done = 0
        while done < ahead or now - begin < _PART:
            next(results)
            done, now = done + 1, time.perf_counter()
            if now - begin > 2 * _PART and done >= workers:
                break
    return (now - begin) / done


class _Ticket(tuple[Any, int]):
    """``(index, threads)``: on its way to a worker it becomes the index, and a clock starts where it arrives."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return _arrive, tuple(self)


_begun = 0.0


def _arrive(index: Any, threads: int) -> Any:
    global _begun  # of a process that loads one batch at a time
    torch.set_num_threads(threads)  # as many as the main process would have
    _begun = time.perf_counter()
    return index


class _Stopwatch:
    """Stands for a ``collate_fn``, the last that is done for a batch: returns how long it took in place of the batch."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> float:
        self.collate(samples)
        return time.perf_counter() - _begun


class _Workers:
    """Some workers of a copy of a loader, for the length of a block; gives an iterator over what they load."""

    def __init__(self, loader: Any, indices: Any, workers: int, collate: Any = None, prefetch: int = 2) -> None:
        from leyden.data.workers import Start, watch  # noqa: PLC0415  # only where something is measured

        copied = copy.copy(loader)
        # past DataLoader's guard, as for the copy of a feed
        vars(copied).update(
            num_workers=workers, prefetch_factor=prefetch, persistent_workers=False, timeout=loader.timeout or _HANGS,
            pin_memory=False, generator=torch.Generator(), _iterator=None, sampler=indices,
            batch_sampler=None if loader.batch_sampler is None else indices,
            worker_init_fn=Start(loader.worker_init_fn), collate_fn=collate or loader.collate_fn,
        )  # fmt: skip
        self.copied, self.watch = copied, watch

    def __enter__(self) -> Iterator[Any]:
        self.iterator: Any = self.copied._get_iterator()  # noqa: SLF001  # past whatever a subclass does with batches
        self.watch(self.iterator._workers)  # noqa: SLF001
        found: Iterator[Any] = self.iterator
        return found

    def __exit__(self, *_: object) -> None:
        self.iterator._shutdown_workers()  # noqa: SLF001  # torch has no public way


def _numbers(most: int) -> list[int]:
    """1, 2, 4 … and the largest."""
    return sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most} - {0})


def _keys(size: int) -> Iterator[int]:
    """Indices from all over the data set, none twice before each came once."""
    step = max(1, round(size * 0.618))
    while math.gcd(step, size) != 1:
        step += 1
    return (number * step % size for number in count())


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2g} ms" if seconds < 0.1 else f"{seconds:.2f} s"

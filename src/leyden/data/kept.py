# SPDX-License-Identifier: Apache-2.0
"""Worker processes that load for one pass over a loader after the other, where new ones would give the same batches.

A worker draws its random numbers for each batch anew (``data/workers.py``), so what is left by which an old worker could
differ from a new one is what its copy of the data set and of ``collate_fn`` is. Two readings (``data/fingerprint.py``)
tell: in the main process, whether the originals are what they were when the workers were started (``set_epoch``, a
curriculum); in each worker, as it begins another pass, whether its copies still are (a counter, a cache). If not, or if
it cannot be known, workers are started anew, as a DataLoader does by itself.

What starting workers costs in random numbers of the main process is drawn all the same.
"""

from __future__ import annotations

import functools
import multiprocessing.sharedctypes
import os
from collections.abc import Iterator
from itertools import chain
from types import FunctionType
from typing import Any

from torch.utils.data import DataLoader, MapDataPipe

from leyden.data import fingerprint
from leyden.data.fingerprint import Itself
from leyden.data.generators import find

_copies: dict[int, tuple[list[Any], list[Any], list[Any] | None, Any, int]] = {}
"""By worker process: what it loads from, the generators that are seeded for it, its first reading, where it tells, its
number."""
TIRES = 3
"""After how many passes in a row that each found other data no worker is kept any more: readings would be for nothing."""
_SAME, _CHANGED = 1, 2
_SEEDING = frozenset(
    "torch initial_seed manual_seed random seed numpy np int set_num_threads cv2 setNumThreads".split()  # noqa: SIM905
)
"""What a ``worker_init_fn`` may name that only seeds what is seeded for each batch anyway, or sets threads."""
_PASSING = ("_iterator", "_IterableDataset_len_called")


class ChangedError(Exception):
    """Workers are not what new ones would be."""


class Look:
    """Goes to a worker where torch sends it a seed for the next pass: there it compares, and nothing arrives."""

    def __reduce__(self) -> Any:
        return _compare, ()


class Kept:
    """The workers of one loader, from one pass to the next.

    Attributes:
        asking: Whether they have been asked how they stand, for a pass that is about to begin.
        off: Whether no worker is kept any more.
    """

    def __init__(self) -> None:
        self.asking = self.off = False
        self._iterator: Any = None
        self._changes = 0
        self._was: list[Any] | None = None
        self._seeded: list[Any] = []
        self._told: Any = None

    def begin(self, loader: Any, copied: Any) -> Iterator[Any]:
        """Return the iterator of the pass: that of the pass before, begun anew, or a new one.

        Args:
            loader: The user's.
            copied: The feed's copy of it, whose ``worker_init_fn`` is a ``Start``.
        """
        former = self._iterator
        if former is not None:
            same = self._read(loader) == self._was
            self._changes = 0 if same else self._changes + 1
            self.off = self._changes == TIRES
            if same and all(worker.is_alive() for worker in former._workers):  # noqa: SLF001
                self._told[:] = [0] * len(self._told)
                self.asking = True
                try:
                    former._reset(copied)  # noqa: SLF001  # as torch does where workers persist
                except ChangedError:
                    self.off = True
                else:
                    result: Iterator[Any] = former
                    return result
                finally:
                    self.asking = False
            self.stop()
        if self.off:
            return iter(copied)
        if not _only_seeds(loader.worker_init_fn):
            self.off = True
            return iter(copied)
        self._seeded = list(find({"dataset": loader.dataset}).values())
        self._was = self._read(loader)
        if self._was is None:
            self.off = True
            return iter(copied)
        copied.worker_init_fn.told = self._told = multiprocessing.sharedctypes.RawArray("b", loader.num_workers)
        iterator: Any = iter(copied)
        if getattr(iterator, "_shared_seed", 0) is None and getattr(iterator, "_persistent_workers", None) is False:
            # past torch's own switch, by which the main process would draw other random numbers
            iterator._persistent_workers = True  # noqa: SLF001
            iterator._shared_seed = Look()  # noqa: SLF001
            self._iterator = iterator
        begun: Iterator[Any] = iterator
        return begun

    def drawn(self, feed: Any, sampler: Any) -> Iterator[Any]:
        """Return the indices of a pass of ``feed``, which come only if the workers are what new ones would be."""
        return chain.from_iterable(self._late(feed, sampler))

    def _late(self, feed: Any, sampler: Any) -> Iterator[Iterator[Any]]:
        # torch asks for the first index when all workers have answered, and thereby done all that was left to do
        self.asking = False
        if any(told != _SAME for told in self._told):
            raise ChangedError
        indices = feed.redraw(sampler)
        del self, feed  # this frame lives as long as the iterator, which would keep itself
        yield indices

    def stop(self) -> None:
        """End the workers."""
        former, self._iterator, self._was = self._iterator, None, None
        if former is not None:
            former._shutdown_workers()  # noqa: SLF001  # torch has no public way

    def _read(self, loader: Any) -> list[Any] | None:
        """Read the originals, and how the loader is set; None where they cannot be known."""
        settings = [
            item for name, value in vars(loader).items() if name not in _PASSING for item in (name, Itself(value))
        ]
        try:
            deep = fingerprint.read([loader.dataset, loader.collate_fn, loader.worker_init_fn], self._seeded)
            return [*fingerprint.surroundings(), *settings, *deep]
        except fingerprint.UnknownError:
            return None


def can_keep(loader: Any) -> bool:
    """Whether workers of ``loader`` may be kept, as far as the loader goes: its data set and what it samples count too."""
    if not isinstance(loader, DataLoader) or not loader.num_workers or loader.persistent_workers:
        return False
    kind = type(loader)
    own = kind.__iter__ is not DataLoader.__iter__ or kind._get_iterator is not DataLoader._get_iterator  # noqa: SLF001
    # with a timeout, workers that still have something to do would count as hanging
    return (
        not own
        and not loader.timeout
        and getattr(loader, "in_order", True)
        and not isinstance(loader.dataset, MapDataPipe)
    )


def _only_seeds(own: Any) -> bool:
    """Whether a ``worker_init_fn`` has no effect that lasts beyond the first batch."""
    function = own.func if isinstance(own, functools.partial) else own
    return own is None or (
        isinstance(function, FunctionType) and _SEEDING.issuperset(fingerprint.names(function.__code__))
    )


# ---------------------------------------------------------------------------------------------- in a worker


def remember(told: Any, worker_id: int, dataset: Any, collate_fn: Any) -> None:
    """Take the first reading of what this worker loads from; it tells later in ``told[worker_id]``."""
    roots, seeded = [dataset, collate_fn], list(find({"dataset": dataset}).values())
    _copies[os.getpid()] = roots, seeded, _read(roots, seeded), told, worker_id


def _compare() -> None:
    found = _copies.get(os.getpid())
    if found is not None:
        roots, seeded, was, told, worker_id = found
        told[worker_id] = _SAME if was is not None and _read(roots, seeded) == was else _CHANGED


def _read(roots: list[Any], seeded: list[Any]) -> list[Any] | None:
    try:
        return [*fingerprint.surroundings(), *fingerprint.read(roots, seeded)]
    except fingerprint.UnknownError:  # such a worker is not kept, and loads as ever
        return None

# SPDX-License-Identifier: Apache-2.0
"""What the worker processes of a DataLoader are given: their streams of random numbers, and a shield against signals.

A worker's generators are seeded anew for each batch: what it draws is a function of the pass over the data and of the
number of the batch, not of the worker that happens to load it. So a pass that is resumed in its middle draws what it
would have drawn. With ``seed_everything(seed, workers=True)`` the same holds for each sample.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.sharedctypes
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from torch.utils.data import get_worker_info
from torch.utils.data._utils import worker as torchs_worker

from leyden.data import generators
from leyden.data.generators import Streams, digest
from leyden.runtime.seed import pl_worker_init_function

_leaving: dict[int, Any] = {}
"""By process: one byte, shared with its workers, that is set when the process is about to end."""
_processes: weakref.WeakSet[Any] = weakref.WeakSet()
"""The worker processes that this process has started."""
SHOW = int(signal.SIGRTMIN) + 11 if hasattr(signal, "SIGRTMIN") else 0
"""The signal at which a worker prints its stacks: one that nobody uses."""
_PATIENCE = 3.0
"""Seconds that workers have to end when the main process does."""
_held: dict[int, list[Any]] = {}
"""By worker process: the generators that its data set holds."""


class Numbered(tuple[Any, int, int]):
    """``(index, seed, number)``: on its way to a worker it becomes the index, and seeds the worker's generators.

    That happens where the worker takes it from its queue, right before it loads the batch.
    """

    __slots__ = ()

    def __reduce__(self) -> Any:
        return _arrive, tuple(self)


class NumberedSamples(Numbered):
    """The same, for a stream of random numbers of its own for each sample of the batch."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return _arrive_samples, tuple(self)


def _arrive(index: Any, seed: int, number: int) -> Any:
    generators.seed(digest(seed, number), _held_by_worker())
    return index


def _arrive_samples(index: Any, seed: int, number: int) -> Any:
    return seeded(index, seed, number, _held_by_worker())


def _held_by_worker() -> list[Any]:
    pid = os.getpid()
    if pid not in _held:
        info = get_worker_info()
        _held[pid] = [] if info is None else list(generators.find({"dataset": info.dataset}).values())
    return _held[pid]


class Samples(list[Any]):
    """The indices of one batch: each one that is taken out seeds the generators for its sample, the end for the batch."""

    seed: int
    number: int
    held: list[Any]

    def __iter__(self) -> Iterator[Any]:
        for index in super().__iter__():
            generators.seed(digest(self.seed, _plain(index)), self.held)
            yield index
        generators.seed(digest(self.seed, "batch", self.number), self.held)

    def __reduce__(self) -> Any:
        return list, (list(super().__iter__()),)


def seeded(index: Any, seed: int, number: int, held: list[Any]) -> Any:
    """Seed the generators for what comes next: one sample, or a batch, whose samples then seed them one by one."""
    several = isinstance(index, (list, tuple)) and not isinstance(index, str)
    generators.seed(digest(seed, "batch", number) if several else digest(seed, _plain(index)), held)
    if type(index) is not list:
        return index
    samples = Samples(index)
    samples.seed, samples.number, samples.held = seed, number, held
    return samples


def _plain(index: Any) -> Any:
    """The same number for an index of whatever type."""
    return int(index) if hasattr(index, "__index__") else str(index)


class InMain:
    """Streams for each sample where the main process loads the data: its own generators are put back after each batch."""

    def __init__(self, streams: Streams, held: list[Any]) -> None:
        self._streams, self._held = streams, held
        self._former: dict[str, Any] | None = None

    def __call__(self, index: Any, seed: int, number: int) -> Any:
        """Return what the loader is to fetch."""
        self.restore()
        self._former = self._streams.now()
        return seeded(index, seed, number, self._held)

    def restore(self) -> None:
        """Put the main process's generators back to where they were before the batch."""
        former, self._former = self._former, None
        if former is not None:
            self._streams.put(former)

    def around(self, collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return ``collate``, the last that is done for a batch, with the generators put back after it."""

        def collated(samples: Any) -> Any:
            try:
                return collate(samples)
            finally:
                self.restore()

        return collated


class Start:
    """The ``worker_init_fn`` of a run: the shield, then Lightning's seeding if it is wanted, then the user's own.

    Args:
        own: The user's; None for none.
        rank: Seed by ``pl_worker_init_function`` with this rank; None does not.

    Attributes:
        told: Where workers that may be kept tell how they stand; None for others.
    """

    def __init__(self, own: Callable[[int], Any] | None, rank: int | None = None) -> None:
        self.own, self.rank, self.leaving = own, rank, leaving()
        self.told: Any = None

    def __call__(self, worker_id: int) -> None:
        watch_the_parent()
        known = _known_to_torch()
        shield(self.leaving, known.get("done_event"))
        if self.told is not None and "collate_fn" in known:
            from leyden.data.kept import remember  # noqa: PLC0415  # only workers that may be kept

            remember(self.told, worker_id, known["dataset"], known["collate_fn"])
        with contextlib.suppress(Exception):  # where standard error is no file, nothing can be shown
            faulthandler.register(SHOW, all_threads=True)
        if self.rank is not None:
            pl_worker_init_function(worker_id, self.rank)
        if self.own is not None:
            self.own(worker_id)


def watch_the_parent() -> None:
    """Let torch's loop of this worker end when the process that started it has ended, however early that was.

    torch itself takes for the main process whatever its parent is when the loop begins. Where a run is killed while its
    workers start, that is the system's first process, and the worker would wait for ever.
    """
    parent = multiprocessing.parent_process()
    method = getattr(multiprocessing.current_process(), "_start_method", None) or multiprocessing.get_start_method()
    if parent is None or parent.pid is None or sys.platform == "win32" or method == "forkserver":
        return  # the parent of one that a server has forked is the server
    main = parent.pid

    class Watchdog(torchs_worker.ManagerWatchdog):
        def __init__(self) -> None:
            super().__init__()
            self.manager_pid = main

    torchs_worker.ManagerWatchdog = Watchdog  # type: ignore[misc]


def leaving() -> Any:
    """Return the byte that tells workers that this process is about to end, and see to it that it will."""
    pid = os.getpid()
    if pid not in _leaving:
        flag = _leaving[pid] = multiprocessing.sharedctypes.RawValue("b", 0)
        # ahead of the moment where multiprocessing terminates, and then waits for, all its daemons
        multiprocessing.util.Finalize(None, _leave, args=(flag,), exitpriority=100)
    return _leaving[pid]


def shown_by_signal() -> set[int]:
    """The worker processes that print their stacks when they get ``SHOW``."""
    return {process.pid for process in list(_processes) if SHOW and process.pid is not None and process.is_alive()}


def watch(processes: Iterable[Any]) -> None:
    """Note worker processes, so that none keeps this process from ending."""
    _processes.update(processes)


def _leave(flag: Any) -> None:
    """Tell the workers to end, and end those that hang in code that is not Python's and notice nothing."""
    flag.value = 1
    alive = [process for process in list(_processes) if process.is_alive()]
    for process in alive:
        process.terminate()
    until = time.monotonic() + _PATIENCE
    for process in alive:
        process.join(max(0.0, until - time.monotonic()))
    hanging = [process for process in alive if process.is_alive()]
    if hanging and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise an error for each
    for process in hanging:
        process.kill()


def _known_to_torch() -> dict[str, Any]:
    """Return what torch's worker knows: its data set, and the event by which it learns that it is not needed any more."""
    frame: FrameType | None = sys._getframe()  # noqa: SLF001  # torch hands it to the function that calls us, and to nobody else
    while frame is not None and frame.f_code.co_name != "_worker_loop":
        frame = frame.f_back
    return {} if frame is None else dict(frame.f_locals)


def shield(leaving: Any, done: Any = None) -> None:
    """Let this worker outlive the signals by which a scheduler asks a whole job to end: it is the main process that acts.

    SIGINT, SIGUSR1 and SIGUSR2 do nothing. The first SIGTERM does nothing, unless the main process is about to end
    (``leaving``) or gives up its workers (``done``, as it does where the garbage collector finds an iterator: the queue
    by which it would tell them is closed then); a second one ends the worker. Programs that it starts have the signals'
    defaults.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    received = False

    def terminate(number: int, _: Any) -> None:
        nonlocal received
        if leaving.value:
            os._exit(0)  # as torch's own handler does where the main process asks for it
        if received:
            os._exit(128 + number)
        received = True
        if done is not None:
            # beside this handler: what it interrupts may hold the event's lock
            threading.Thread(target=leave_if_done, daemon=True).start()

    def leave_if_done() -> None:
        if done.is_set():
            os._exit(0)

    for name, handler in (("SIGINT", _nothing), ("SIGUSR1", _nothing), ("SIGUSR2", _nothing), ("SIGTERM", terminate)):
        number = getattr(signal, name, None)
        if number is not None:
            signal.signal(number, handler)
            if hasattr(signal, "siginterrupt"):
                signal.siginterrupt(number, False)


def _nothing(number: int, _: Any) -> None:
    """Take a signal and go on. A handler, unlike SIG_IGN, is not handed on to programs that the worker starts."""

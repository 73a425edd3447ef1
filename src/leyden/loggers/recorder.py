# SPDX-License-Identifier: Apache-2.0
"""Feed all loggers of a run from one background thread, so that a training step never waits for a disk or a network."""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from threading import Event, Lock, Thread
from typing import Any

from torch import Tensor

from leyden.errors import LeydenWarning
from leyden.runtime.ranks import rank_zero_warn
from leyden.types import LoggerView

_WAIT_S = 0.2
_SAVE_EVERY_S = 2.0
_ROWS_AT_ONCE = 64

_Row = tuple[Mapping[str, Any], int]


class Recorder:
    """Takes the rows of a run and hands them, in order, to every logger.

    ``put`` appends to a queue and returns. The thread looks at the queue every 0.2 s, or when it is half full, and
    writes all rows that it finds: a wake-up for each row would cost the training loop more than the row itself. Rows
    that were written are saved (``logger.save``) after 2 s at the latest.

    Whoever writes holds the pen, a lock: the thread, or the caller of ``flush`` and ``close``, or of ``put`` when the
    queue is full. So a logger is called from one thread at a time, and after ``flush`` the thread touches no logger
    until the next ``put``: the moment for the Trainer's other calls, such as ``log_hyperparams``.
    A process forked while the thread writes inherits a locked pen; it must not use the recorder, and none does.

    An exception that a logger raises is raised again, as it is, by the next ``put``, ``flush`` or ``close``. That
    logger gets no more rows; the others do.

    Args:
        loggers: anything with the verbs of :class:`~leyden.types.LoggerView`. Those with a false ``threadsafe`` are
            served by ``put`` itself.
        capacity: the number of rows that may wait; ``put`` blocks while there are as many.
    """

    def __init__(self, loggers: Iterable[LoggerView], capacity: int = 1000) -> None:
        self._loggers: Sequence[LoggerView] = tuple(loggers)
        self._direct = tuple(logger for logger in self._loggers if not getattr(logger, "threadsafe", True))
        self._queued = tuple(logger for logger in self._loggers if getattr(logger, "threadsafe", True))
        self._capacity = max(1, capacity)
        self._wake_at = max(1, capacity // 2)
        self._queue: deque[_Row] = deque()
        self._errors: deque[BaseException] = deque()
        self._failed: set[int] = set()
        self._pen = Lock()
        self._wake = Event()
        self._over = Event()
        self._unsaved = False
        self._thread: Thread | None = None

    def put(self, metrics: Mapping[str, Tensor | float], step: int) -> None:
        """Record one row: numbers or 0-d tensors on the CPU, at ``step``. The mapping must not be changed later."""
        if self._queued:
            queue = self._queue
            queue.append((metrics, step))
            if len(queue) >= self._wake_at:
                self._crowded()
            if self._thread is None:
                self._start()
        for logger in self._direct:
            logger.log_metrics(metrics=_as_numbers(metrics), step=step)
        if self._errors:
            raise self._errors.popleft()

    def flush(self) -> None:
        """Return when every row is written and saved; until the next ``put`` the loggers may be called directly."""
        self.settle()
        for logger in self._direct:
            logger.save()
        if self._errors:
            raise self._errors.popleft()

    def settle(self) -> None:
        """Return when every row is written and saved, as ``flush``; an exception of a logger waits for the next ``put``."""
        with self._pen:
            while self._queue:
                self._write(_ROWS_AT_ONCE)
            self._save()

    def close(self, status: str, *, reraise: bool = True) -> None:
        """Flush, end the thread, and finalize each logger with ``status``. A later ``put`` starts anew.

        Args:
            status: ``"success"`` or ``"failed"``.
            reraise: False where an exception of the user's is on its way out, which a logger's must not replace: the
                loggers' exceptions are then given as warnings.
        """
        if self._thread is not None:
            self._over.set()
            self._wake.set()
            try:
                self._thread.join()
            finally:
                # a Ctrl-C may end the wait; the thread then ends by itself, and rows of another run get one of their own
                self._thread = None
        with self._pen:
            while self._queue:
                self._write(_ROWS_AT_ONCE)
            for logger in self._loggers:
                try:
                    logger.save()
                    logger.finalize(status)
                except BaseException as error:
                    self._errors.append(error)
            self._unsaved = False
        self._failed.clear()
        first = self._errors.popleft() if self._errors and reraise else None
        while self._errors:
            text = "".join(traceback.format_exception(self._errors[0])).rstrip()
            self._errors.popleft()
            rank_zero_warn(f"A logger raised an exception while the run ended:\n{text}", category=LeydenWarning)
        if first is not None:
            try:
                raise first
            finally:
                del first  # or the exception and this frame would keep each other, and the loggers, alive

    def _start(self) -> None:
        for logger in self._queued:
            # what a logger has put off until there is a row: here, for workers may be forked while the thread imports
            _ = getattr(logger, "experiment", None)
        self._over = Event()  # each thread has its own
        self._thread = Thread(target=self._run, args=(self._over,), name="leyden-recorder", daemon=True)
        self._thread.start()

    def _run(self, over: Event) -> None:
        saved_at = time.monotonic()
        closing = False
        while not closing:
            self._wake.wait(_WAIT_S)
            self._wake.clear()
            closing = over.is_set()  # read before the queue: what was put before close is written
            while self._queue:
                with self._pen:
                    self._write(_ROWS_AT_ONCE)
            if self._unsaved and time.monotonic() - saved_at >= _SAVE_EVERY_S:
                with self._pen:
                    self._save()
                saved_at = time.monotonic()

    def _crowded(self) -> None:
        """The queue is at least half full: wake the thread, and while it is over-full, wait or help."""
        self._wake.set()
        while len(self._queue) > self._capacity and not self._errors:
            # one row at a time, so that a slow logger holds up the caller no longer than it must
            if self._pen.acquire(timeout=0.01):
                try:
                    self._write(1)
                finally:
                    self._pen.release()

    def _write(self, num_rows: int) -> None:
        """Hand up to ``num_rows`` rows from the queue to the queued loggers. The caller holds the pen."""
        queue = self._queue
        try:
            rows = [queue.popleft() for _ in range(min(num_rows, len(queue)))]
            rows = [(_as_numbers(metrics), step) for metrics, step in rows]
        except BaseException as error:
            self._errors.append(error)
            return
        self._unsaved = True
        for index, logger in enumerate(self._queued):
            if index in self._failed:
                continue
            try:
                for metrics, step in rows:
                    # a copy for each, since loggers add to it, rename and remove
                    logger.log_metrics(metrics=dict(metrics), step=step)
            except BaseException as error:
                self._note(error, index)

    def _save(self) -> None:
        """Save the queued loggers, if they got rows since the last time. The caller holds the pen."""
        if not self._unsaved:
            return
        self._unsaved = False
        for index, logger in enumerate(self._queued):
            if index not in self._failed:
                try:
                    logger.save()
                except BaseException as error:
                    self._note(error, index)

    def _note(self, error: BaseException, index: int) -> None:
        """Keep what the queued logger at ``index`` raised for the main thread, and give that logger no more rows."""
        self._errors.append(error)
        if not isinstance(error, KeyboardInterrupt):  # Ctrl-C during a flush is not the fault of the logger
            self._failed.add(index)


def _as_numbers(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    # the values are on the CPU: .item() waits for no device
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}

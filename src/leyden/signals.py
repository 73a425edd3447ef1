# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C during fit: the first one is noted and acted on between two steps, the second one acts at once."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """A context manager that takes SIGINT over for its duration, in the main thread only.

    ``received`` becomes True at the first signal; a second one raises KeyboardInterrupt where the program stands. The
    former handler is back afterwards. A handler of the user's own is left alone.
    """

    def __init__(self) -> None:
        self.received = False
        self.error: BaseException | None = None
        self._former: Any = None

    def fail(self, error: BaseException) -> None:
        """Let the run end with ``error`` at the end of this batch; from any thread."""
        self.error = error
        self.received = True

    def __enter__(self) -> Interrupt:
        # signals can only be handled in the main thread, and somebody else's handler is theirs
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._former = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        with contextlib.suppress(Exception):  # a signal may come in the middle of another print
            print("\nStopping after this step. Press Ctrl-C again to stop at once.", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)
            self._former = None

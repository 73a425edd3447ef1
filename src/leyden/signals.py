# SPDX-License-Identifier: Apache-2.0
"""Signals that end a run: the first is noted and answered between two batches, the second one acts at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn

from leyden.errors import SIGTERMException

_WARNINGS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
STOPS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM, *_WARNINGS)
"""The signals that end a run. SIGUSR1 and SIGUSR2 are how schedulers say that SIGTERM will come; Windows lacks them."""


class AnswersSignals:
    """Base of what has a handler of its own that answers a signal for good: a run leaves that signal to it."""


class Interrupt:
    """A context manager that takes the signals that end a run over for its duration, in the main thread only.

    The handler sets flags and saves nothing. The loop reads ``received`` at the end of each batch, where everything
    is whole, and calls ``answer``. A second signal leaves at once: SIGINT raises KeyboardInterrupt where the program
    stands, the others do what the system does by default. One that follows SIGUSR1 or SIGUSR2 for the first time is
    no second one: they say that SIGTERM will come, and then it comes.

    Handlers that were there before are called as well, and are back afterwards. A signal that is ignored stays ignored,
    one with a handler outside of Python (``faulthandler.register``) is left alone, and so is one that is answered by an
    ``AnswersSignals``. In a forked process the handlers that were there before act, as if there were no run; a worker of a
    DataLoader does nothing.

    With several processes, all must stop after the same batch, and no ordinary batch may pay for the agreement. So it is
    the strategy that turns "asked" into ``received``, by the function that this gets. One process decides at once.
    Several do it beside the loop: a thread in each looks at ``asked`` and, in the launcher's key-value store (on the CPU,
    no collective), at what the others were asked. Each then sets ``received`` and answers with the last batch that its
    loop can be in; the highest answer is the last batch of all (``strategies/watch.py``). Who reads ``received`` in a loop
    asks ``Strategy.ends_after`` as well, and between loops ``Strategy.agree_on``.

    Args:
        asked: Called in the handler when this process is asked to stop; None sets ``received``.

    Attributes:
        asked: Whether this process was asked to stop, by a signal or by ``fail``.
        received: Whether the run stops at the end of this batch.
        answered: Whether the loop has raised what the run ends with, between two batches.
        forced: Whether a second signal ended the run where it stood.
        number: The first signal, None if there was none.
        outer: The one of the run in whose hook this one runs, which will answer the same signals.
    """

    def __init__(self, asked: Callable[[Interrupt], None] | None = None) -> None:
        self.asked = self.received = self.answered = self.forced = False
        self.number: int | None = None
        self.error: BaseException | None = None
        self.outer: Interrupt | None = None
        self._on_asked = asked
        self._seen: set[int] = set()
        self._former: dict[int, Any] = {}
        self._children: tuple[Any, Any] | None = None  # the handler of SIGCHLD that was there, and the one in its place
        self._below: int | None = None
        self._pid = 0  # of the process that the handlers are for; 0 is none

    @property
    def terminates(self) -> bool:
        """Whether a signal asked the process to end, rather than a person to stop the run."""
        return self.number is not None and self.number != signal.SIGINT

    def fail(self, error: BaseException) -> None:
        """Let the run end with ``error`` at the end of this batch; from any thread. The first error counts."""
        if self.error is None:
            self.error = error
        self._ask()

    def exception(self) -> BaseException:
        """What the run ends with: the error that ``fail`` got, or the exception that stands for the signal."""
        if self.error is not None:
            return self.error
        return SIGTERMException() if self.terminates else KeyboardInterrupt()

    def answer(self) -> NoReturn:
        """Raise ``exception()``; to be called where everything is whole, so that a checkpoint can be saved."""
        self.answered = True
        raise self.exception()

    def _ask(self) -> None:
        self.asked = True
        if self._on_asked is None:
            self.received = True
        else:
            self._on_asked(self)

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is not threading.main_thread():
            return self  # signals can only be handled in the main thread
        self._pid = os.getpid()
        for number in STOPS:
            former = signal.getsignal(number)
            owner = getattr(former, "__self__", None)
            foreign = former is None or (former is signal.SIG_DFL and _below_python(number) is not None)
            if foreign or former is signal.SIG_IGN or isinstance(owner, AnswersSignals):
                continue
            if isinstance(owner, Interrupt):
                self.outer = owner
            self._former[number] = former
            signal.signal(number, self._note)
            self._below = _below_python(number)
        if self.outer is not None and self.outer.received:
            self.number, self.received = self.outer.number, True
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        former = self._former[number]
        if os.getpid() != self._pid:
            if not _starts_worker(frame):
                _act(former, number, frame)
            return
        first = number not in self._seen and self._seen.issubset(_WARNINGS)
        self._seen.add(number)
        if first:
            if self.number is None:
                self.number = number
            self._pardon_workers()
            self._ask()
            if number == signal.SIGINT:
                with contextlib.suppress(Exception):  # a signal may come in the middle of another print
                    print(
                        "\nStopping after this step. Press Ctrl-C again to stop at once.", file=sys.stderr, flush=True
                    )
        if callable(former) and former is not signal.default_int_handler:
            former(number, frame)
        if not first:
            self.forced = True
            _act(signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL, number, frame)

    def _pardon_workers(self) -> None:
        """From now on, no worker that the signal ends too raises an error in the middle of a step, as torch has it."""
        former = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        if getattr(former, "__module__", "") != "torch.utils.data._utils.signal_handling":
            return

        def pardon(number: int, frame: FrameType | None) -> None:
            with contextlib.suppress(RuntimeError):
                former(number, frame)  # type: ignore[operator,misc]  # it is torch's function

        self._children = former, pardon
        signal.signal(signal.SIGCHLD, pardon)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._on_asked = None  # it keeps the strategy alive, and with it the module
        if self._pid != os.getpid():
            return
        if self._children is not None:
            former, pardon = self._children
            if signal.getsignal(signal.SIGCHLD) is pardon:
                signal.signal(signal.SIGCHLD, former)
            self._children = None
        self._pid = 0  # whoever still has the handler, because he chained it, gets what was there before
        for number, former in self._former.items():
            # a handler that was installed during the run is somebody else's, and stays
            if signal.getsignal(number) == self._note and _below_python(number) == self._below:
                signal.signal(number, former)


def _act(former: Any, number: int, frame: FrameType | None) -> None:
    """Do what would have been done with a signal if no run had taken it over."""
    if callable(former):
        former(number, frame)
        return
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # the first process of a container has no default action


def _starts_worker(frame: FrameType | None) -> bool:
    """Whether this is a DataLoader's worker, which ends when the main process does: a fork keeps the callers' frames."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.data.dataloader" and frame.f_code.co_name == "__init__":
            return True
        frame = frame.f_back
    return False


def _below_python(number: int) -> int | None:
    """Return the address of the handler that the system calls, which Python's own table may not know; None is none."""
    import ctypes  # noqa: PLC0415  # whoever runs a Trainer has it, through torch; a search does without

    try:
        getsig = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_int)(("PyOS_getsig", ctypes.pythonapi))
    except AttributeError:  # not CPython
        return None
    address: int | None = getsig(number)
    return address

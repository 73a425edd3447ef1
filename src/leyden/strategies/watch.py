# SPDX-License-Identifier: Apache-2.0
"""What a process does beside its loop, so that several stop together: a thread that looks at the launcher's key-value store.

Nothing of it costs an ordinary batch anything, and none of it is a collective: it works while the loop waits in one.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from leyden.errors import CheckpointError
from leyden.signals import Interrupt

PERIOD = 0.1
"""Seconds between two looks at the store."""
GRACE = 5.0
"""Seconds that a process has to leave a run by itself when another one has failed."""
ANSWER = 10.0
"""Seconds after which a process that does not answer counts as gone."""
PATIENCE = 2.0
"""Seconds that a rank waits for the others to say, after the same batch, what it says."""


class Watch:
    """Tells the other ranks of a run what happened to this one, and this one what happened to them.

    A rank that is asked to stop (by a signal, say) writes that down; the thread of each rank then answers with the last
    batch that its loop can be in, and the highest of these is the last batch of all. A rank that fails writes that down
    too; the others then have ``GRACE`` seconds to leave the run, which those do by themselves whose exchange is broken off;
    those that wait for ever are ended.

    Args:
        store: The key-value store of the processes.
        name: Of the run: the same on all ranks, and of no other run.
        rank: Of this process.
        size: How many processes there are.
        interrupt: Of the run.
        batches: Returns how many batches the loop has done.
        leave: Ends this process, with an exit code.
    """

    def __init__(
        self,
        store: Any,
        name: str,
        rank: int,
        size: int,
        interrupt: Interrupt,
        batches: Callable[[], int],
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self.store, self.name, self.rank, self.size = store, name, rank, size
        self.interrupt, self.batches, self.leave = interrupt, batches, leave
        self._last: int | None = None
        self._answered = False
        self._since = 0.0
        self._lock = threading.Lock()  # two questions that belong together, two threads
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="leyden-watch", daemon=True)
        self._thread.start()

    def ends_after(self, batch: int) -> bool:
        """Whether the run ends after batch ``batch``, the one that this rank has just done; waits for what others answer.

        Raises:
            RuntimeError: if one does not.
        """
        if self._last is None:
            until, bounds = time.monotonic() + ANSWER, self._bounds()
            while None in bounds:
                if time.monotonic() > until:
                    raise RuntimeError(
                        f"The run was to end after this batch, but rank {bounds.index(None)} has not answered for"
                        f" {ANSWER:g} s: it is gone, or hangs."
                    )
                time.sleep(PERIOD / 4)
                bounds = self._bounds()
            self._last = max(bound for bound in bounds if bound is not None)
        return batch >= self._last

    def _bounds(self) -> list[int | None]:
        """The last batch that each rank can be in; None for one that has not answered yet."""
        answers = [self._read(f"bound/{rank}") for rank in range(self.size)]
        return [None if answer is None else int(answer) for answer in answers]

    def unanimous(self, about: str) -> bool:
        """Whether all ranks ask this, at the same point; those that do get the same answer, and wait ``PATIENCE`` at most."""
        votes, result = f"{self.name}/{about}/votes", f"{self.name}/{about}/result"
        with self._lock:
            if self.store.add(votes, 1) == self.size:
                self.store.compare_set(result, "", "yes")
        until = time.monotonic() + PATIENCE
        while (answer := self._read(f"{about}/result")) is None:
            if time.monotonic() > until:
                with self._lock:  # whichever comes first, "yes" or "no", is the answer for all
                    self.store.compare_set(result, "", "no")
            time.sleep(PERIOD / 10)
        return answer == "yes"

    def failed(self, error: BaseException) -> str | None:
        """Say that this rank leaves the run with ``error``; return what another one has said before, if one has."""
        said = f"rank {self.rank} of {self.size}: {type(error).__name__}: {_first_line(error)}"
        with contextlib.suppress(Exception):  # the store may be gone, with rank 0
            first = self._read("failed")
            if first is None:
                self._write("failed", said)
            elif not first.startswith(f"rank {self.rank} "):
                return first
        return None

    def close(self) -> None:
        """Stop to look."""
        self._over.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=ANSWER)

    def _read(self, key: str) -> str | None:
        with self._lock:
            key = f"{self.name}/{key}"
            return self.store.get(key).decode() if self.store.check([key]) else None

    def _write(self, key: str, value: str) -> None:
        with self._lock:
            self.store.set(f"{self.name}/{key}", value)

    # ------------------------------------------------------------------ the thread

    def _look(self) -> None:
        while not self._over.wait(PERIOD):
            try:
                self._answer()
                failed = self._read("failed") or self._silent()
            except Exception as error:
                if self._over.is_set():
                    return
                failed = f"rank 0 cannot be reached any more ({_first_line(error)})"
            if failed is not None:
                self._wait_and_end(failed)
                return

    def _answer(self) -> None:
        """Ask the others to stop, if this rank was asked; answer, if any was."""
        interrupt = self.interrupt
        if self._answered:
            return
        asked = self._read("asked")
        if asked is None and interrupt.asked:
            error = f"rank {self.rank}: {interrupt.error}" if interrupt.error is not None else ""
            asked = f"{interrupt.number or 0}:{error}"
            self._write("asked", asked)
        if asked is None:
            return
        number, _, error = asked.partition(":")
        if interrupt.number is None and number != "0":
            interrupt.number = int(number)
        if interrupt.error is None and error:
            interrupt.error = CheckpointError(f"The run was ended by {error}")
        # first the flag, then the count: the loop may have looked at the flag just before, and is one further then
        interrupt.received = True
        self._write(f"bound/{self.rank}", str(self.batches() + 1))
        self._answered, self._since = True, time.monotonic()

    def _silent(self) -> str | None:
        """Say which rank has not answered for too long, if one has not: the loop may wait for it in an exchange."""
        if not self._answered or time.monotonic() < self._since + ANSWER:
            return None
        bounds = self._bounds()
        self._since = float("inf")
        return f"rank {bounds.index(None)} of {self.size} does not answer" if None in bounds else None

    def _wait_and_end(self, failed: str) -> None:
        if failed.startswith(f"rank {self.rank} ") or self._over.wait(GRACE):
            return
        with contextlib.suppress(Exception):
            print(
                f"\nleyden: rank {self.rank} of {self.size} ends, because another one has failed: {failed}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            main = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001  # no other way
            print(f"leyden: rank {self.rank} waits here:", file=sys.stderr)
            traceback.print_stack(main, file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        self.leave(1)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]

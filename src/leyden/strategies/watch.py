# SPDX-License-Identifier: Apache-2.0
"""What a process does beside its loop, so that several stop together: a thread that looks at the launcher's key-value store.

Nothing of it costs an ordinary batch anything, and none of it is a collective: it works while the loop waits in one.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from leyden.errors import CheckpointError
from leyden.runtime.collective import guard
from leyden.signals import Interrupt
from leyden.strategies.board import Board, first_line, ranks_in_words, tell
from leyden.strategies.hang import ANSWER, Hang, is_timeout
from leyden.strategies.where import Where

PERIOD = 0.1
"""Seconds between two looks at the store."""
GRACE = 5.0
"""Seconds that a process has to leave a run by itself when another one has failed."""
PATIENCE = 2.0
"""Seconds that a rank waits for the others to say, after the same batch, what it says."""
BOUND = 60.0
"""Seconds that a rank has to say after which batch it can stop: it may hold on to Python just then, in a long call to C."""
NOTICE = 30.0
"""Seconds that ranks wait for work that only some do, before they say so."""


class Watch:
    """Tells the other ranks of a run what happened to this one, and this one what happened to them.

    A rank that is asked to stop (by a signal, say) writes that down; the thread of each rank then answers with the last
    batch that its loop can be in, and the highest of these is the last batch of all. A rank that fails writes that down
    too; the others then have ``GRACE`` seconds to leave the run, which those do by themselves whose exchange is broken off;
    those that wait for ever are ended.

    A rank that has not moved for ``limit`` seconds asks all where they stand. If none has moved, and one waits for another
    in an exchange, that is the end of the run: each rank prints its stacks, and one says who is behind.

    Args:
        store: The key-value store of the processes.
        name: Of the run: the same on all ranks, and of no other run.
        rank: Of this process.
        size: How many processes there are.
        interrupt: Of the run.
        batches: Returns how many batches the loop has done.
        leave: Ends this process, with an exit code.
        limit: After how many seconds without any event ranks that wait for one that hangs are ended.
        where: Tells what this process does.
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
        limit: float = math.inf,
        where: Where | None = None,
    ) -> None:
        self.board, self.rank, self.size = Board(store, name), rank, size
        self.interrupt, self.batches, self.leave = interrupt, batches, leave
        self.where = Where() if where is None else where
        self.pace = PERIOD * max(1.0, size / 64)  # all look at one store
        self._last: int | None = None
        self._answered = False
        self._since = 0.0
        self._gathered = 0
        self._over, self._wake = threading.Event(), threading.Event()
        self._failed: str | None = None
        self._said: str | None = None
        """What this rank has to say of its own failure; the thread says it: the way to the store may be cut."""
        self._told = threading.Event()
        self._hang = Hang(self.board, rank, size, self.where, limit)
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._look, name="leyden-watch", daemon=True)
        self._thread.start()
        self._second = threading.Thread(target=self._watch_the_store, name="leyden-watch-store", daemon=True)
        if rank:
            self._second.start()
            guard(self._second, self._stop)
        guard(self._thread, self._stop)

    def ends_after(self, batch: int) -> bool:
        """Whether the run ends after batch ``batch``, the one that this rank has just done; waits for what others answer.

        Raises:
            RuntimeError: if one does not.
        """
        if self._last is None:
            until, bounds = time.monotonic() + BOUND, self._bounds()
            while None in bounds:
                if time.monotonic() > until:
                    raise RuntimeError(
                        f"The run was to end after this batch, but rank {bounds.index(None)} has not answered for"
                        f" {BOUND:g} s: it is gone, or hangs."
                    )
                time.sleep(PERIOD / 4)
                bounds = self._bounds()
            self._last = max(bound for bound in bounds if bound is not None)
        return batch >= self._last

    def _bounds(self) -> list[int | None]:
        """The last batch that each rank can be in; None for one that has not answered yet."""
        answers = [self.board.read(f"bound/{rank}") for rank in range(self.size)]
        return [None if answer is None else int(answer) for answer in answers]

    def unanimous(self, about: str, patience: float = PATIENCE) -> bool:
        """Whether all ranks ask this, at the same point; those that do get the same answer, and wait ``patience`` at most.

        They wait no longer than until another rank is known to have gone on.
        """
        votes, result = f"{about}/votes", f"{about}/result"
        if self.board.add(votes, 1) == self.size:
            self.board.first(result, "yes")
        began, here = time.monotonic(), self._hang.place()
        asks = began + PATIENCE
        while (answer := self.board.read(result)) is None:
            now = time.monotonic()
            if now > began + patience:
                self.board.first(result, "no")  # whichever comes first, "yes" or "no", is the answer for all
            elif now > asks:
                asks = now + PATIENCE
                if self._hang.others_are_further(here):
                    self.board.first(result, "no")
            time.sleep(PERIOD / 10)
        return answer == "yes"

    def announce(self, about: str) -> None:
        """Say that this rank is going to ``hear`` about it: the others then wait for what it tells."""
        self.board.write(f"{about}/comes/{self.rank}", "1")

    def hear(self, about: str, mine: str, seconds: float = PATIENCE) -> dict[int, str]:
        """Tell the others ``mine``; return, by rank, what those have told that did so within ``seconds``, or announced it."""
        self.board.write(f"{about}/{self.rank}", mine)
        until = time.monotonic() + seconds
        while True:
            found = {rank: self.board.read(f"{about}/{rank}") for rank in range(self.size)}
            missing = [rank for rank, text in found.items() if text is None]
            late = time.monotonic() > until and not any(self.board.read(f"{about}/comes/{rank}") for rank in missing)
            if not missing or late or self._failed is not None:
                return {rank: text for rank, text in found.items() if text is not None}
            time.sleep(PERIOD / 2)

    def gather(self, about: str) -> None:
        """Wait, as long as it takes, until all ranks have come here; say once in a while who waits for whom.

        Raises:
            RuntimeError: when a rank has failed meanwhile.
        """
        self._hang.patient = True
        self._gathered += 1  # all ranks come to the same places in the same order
        key = f"gather{self._gathered}"
        try:
            self.board.write(f"{key}/{self.rank}", "1")
            self.board.add(key, 1)
            began, notice = time.monotonic(), NOTICE
            while True:
                if self.board.add(key) >= self.size:
                    return
                if self._failed is not None:
                    raise RuntimeError(
                        f"Rank {self.rank} waited for {about} of other ranks; one failed: {self._failed}"
                    )
                if (waited := time.monotonic() - began) >= notice:
                    notice = waited + 20 * NOTICE
                    self._say_who_waits(key, about, waited)
                time.sleep(min(PERIOD / 2, max(waited / 20, 0.001)))
        finally:
            self._hang.patient = False

    def _say_who_waits(self, key: str, about: str, waited: float) -> None:
        here = [rank for rank in range(self.size) if self.board.read(f"{key}/{rank}") is not None]
        if here and here[0] == self.rank:
            missing = [rank for rank in range(self.size) if rank not in here]
            tell(
                f"leyden: {ranks_in_words(here)} {'wait' if len(here) > 1 else 'waits'} for {about} on"
                f" {ranks_in_words(missing)}, for {waited:.0f} s so far. It has all the time that it needs.\n"
            )

    def failed(self, error: BaseException) -> str | None:
        """Say that this rank leaves the run with ``error``; return what another one has said before, if one has.

        Where ``error`` is an exchange whose time is up, all ranks say where they stand.
        """
        late = is_timeout(error)
        self._said = f"rank {self.rank} of {self.size}: {type(error).__name__}: {first_line(error)}"
        if late and self._failed is None:
            self._hang.suspect(error)
        self._wake.set()
        self._told.wait(ANSWER)
        if late:
            self._hang.shown.wait(ANSWER)
        first = self._failed
        return None if first is None or first.startswith(f"rank {self.rank} ") else first

    def close(self) -> None:
        """Stop to look."""
        self._stop()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=ANSWER)
        if self.rank and threading.current_thread() is not self._second:
            self._second.join(timeout=ANSWER)

    def _stop(self) -> None:
        self._over.set()
        self._wake.set()

    # ------------------------------------------------------------------ the thread

    def _look(self) -> None:
        until: float | None = None
        while not self._over.is_set():
            self._wake.wait(self.pace)
            self._wake.clear()
            if self._over.is_set():
                break
            try:
                failed = self._round()
            except Exception as error:
                if self._over.is_set():
                    return
                failed = f"rank 0 cannot be reached any more ({first_line(error)})"
            self._looked = now = time.monotonic()
            if failed is None:
                continue
            self._failed = self._failed or failed
            self._told.set()
            verdict = self._hang.known()
            if verdict is not None and not self._hang.shown.is_set():
                self._hang.show(verdict)
                until = time.monotonic() + GRACE
            elif until is None and failed != self._said:  # one that has failed itself leaves by itself
                until = now + GRACE
            if until is not None and now >= until:
                self._end(self._failed)
                return
        with contextlib.suppress(Exception):
            self.board.write(f"left/{self.rank}", "1")

    def _round(self) -> str | None:
        """One look at the store; return what has failed, if anything has."""
        self._answer()
        lost = self._hang.look()
        if self._said is not None and not self._told.is_set() and not self._hang.pending:
            return self.board.first("failed", self._said)
        return self.board.read("failed") or lost or self._silent()

    def _watch_the_store(self) -> None:
        """End a process that rank 0, which keeps the store, does not answer any more: the first thread waits for it."""
        hang = self._hang
        step, seen, waited = min(hang.silence / 4, 1.0), self._looked, 0.0
        while not self._over.wait(step):
            if self._looked != seen:
                seen, waited = self._looked, 0.0
                continue
            waited += step  # not what the clock says: a process that was stopped has not listened
            if waited <= hang.silence or not self._thread.is_alive():
                continue
            if hang.keeps_the_store() and waited <= hang.limit:
                continue  # it is stopped, or busy beyond measure
            failed = (
                f"rank 0 has not answered for {waited:.0f} s: its machine is gone, the way to it is cut, or it hangs"
            )
            self._failed = self._failed or failed
            self._told.set()
            hang.shown.set()
            if not self._over.wait(GRACE):
                self._end(failed)
            return

    def _answer(self) -> None:
        """Ask the others to stop, if this rank was asked; answer, if any was."""
        interrupt = self.interrupt
        if self._answered:
            return
        asked = self.board.read("asked")
        if asked is None and interrupt.asked:
            error = f"rank {self.rank}: {interrupt.error}" if interrupt.error is not None else ""
            asked = f"{interrupt.number or 0}:{error}"
            self.board.write("asked", asked)
        if asked is None:
            return
        number, _, error = asked.partition(":")
        if interrupt.number is None and number != "0":
            interrupt.number = int(number)
        if interrupt.error is None and error:
            interrupt.error = CheckpointError(f"The run was ended by {error}")
        # first the flag, then the count: the loop may have looked at the flag just before, and is one further then
        interrupt.received = True
        self.board.write(f"bound/{self.rank}", str(self.batches() + 1))
        self._answered, self._since = True, time.monotonic()

    def _silent(self) -> str | None:
        """Say which rank has not answered for too long, if one has not: the loop may wait for it in an exchange."""
        if not self._answered or time.monotonic() < self._since + BOUND:
            return None
        bounds = self._bounds()
        self._since = float("inf")
        return f"rank {bounds.index(None)} of {self.size} does not answer" if None in bounds else None

    def _end(self, failed: str) -> None:
        """End this process: its loop has not left the run in time."""
        with contextlib.suppress(Exception):
            text = f"\nleyden: rank {self.rank} of {self.size} ends, because another one has failed: {failed}\n"
            if self._hang.verdict is None:
                event, _ = self.where.told()
                main = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001  # no other way
                text += f"leyden: rank {self.rank} waits here, {event}:\n{''.join(traceback.format_stack(main))}"
            tell(text)
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            for child in multiprocessing.active_children():
                child.kill()  # a worker that hangs does not notice that its parent is gone
        self.leave(1)

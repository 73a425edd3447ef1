# SPDX-License-Identifier: Apache-2.0
"""How the ranks of a run find out that they wait for one that hangs, which one that is, and where the others wait.

A rank that has not moved for so long asks all where they stand; if none has moved, and one waits for another in an exchange,
that is the end of the run. Nobody writes anything as long as the run goes on.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from typing import Any

from leyden.strategies.board import Board, first_line, ranks_in_words, tell
from leyden.strategies.where import Where, activity, exchanges, home, is_there, stacks, workers

ANSWER = 10.0
"""Seconds after which a process that does not answer counts as gone."""
SILENCE = 300.0
"""Seconds of silence after which a rank, or the store, counts as lost: its machine is gone, or the way to it."""
SHOW = 2.5
"""Seconds that a rank waits for the others to show where they stand: whoever ends first may take them with it."""


class Hang:
    """How a watch finds that the ranks wait for one that does not come, and what it says of it.

    Args:
        board: Where ranks write.
        rank: Of this process.
        size: How many processes there are.
        where: Tells what this process does.
        limit: After how many seconds without any event a run is ended whose ranks wait for one that hangs.

    Attributes:
        patient: Whether this rank waits for work that may take as long as it likes.
        verdict: What was found, once it is.
        shown: Set when this rank has said where it stands.
    """

    def __init__(self, board: Board, rank: int, size: int, where: Where, limit: float) -> None:
        self.board, self.rank, self.size, self.where = board, rank, size, where
        self.limit = limit - min(1.0, limit / 20) if limit < math.inf else limit  # ahead of the time-out of an exchange
        self.silence = min(SILENCE, max(limit, ANSWER))
        self.patient = False
        self.verdict: str | None = None
        self.shown = threading.Event()
        self._marker: tuple[Any, ...] = ()
        self._moved = time.monotonic()
        self._seen = 0
        """The number of the last inquiry that this rank has answered."""
        self._open: tuple[int, float] | None = None
        """The number of the inquiry that this rank has made, and until when it waits for answers."""
        self._next = 0.0
        self._heard: dict[int, float] = {}
        self._homes: dict[int, str] = {}
        self._looked = time.monotonic()
        self._pinged = time.monotonic()
        self._error: str | None = None
        """In words, which exchange of this rank has run out of time."""
        self._where: tuple[str, str] | None = None
        """Where this rank stood then."""

    @property
    def pending(self) -> bool:
        """Whether this rank has yet to learn where the others stand, and to show it."""
        return self._error is not None and self.verdict is None

    def suspect(self, error: BaseException) -> None:
        """An exchange of this rank has failed by ``error``, for want of time: ask the others where they stand."""
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        doing, exchange = activity(None if trace is None else trace.tb_frame)
        self._where = self.where.stage() + doing, exchange
        self._error = f"rank {self.rank} {doing}, whose time was up ({first_line(error)})"
        self._next = 0.0

    def look(self) -> str | None:
        """Answer who asks, ask if this rank stands still, and return which rank is lost, if one is."""
        now = time.monotonic()
        if now - self._looked > max(self.silence / 4, 1.0):  # this process was stopped, or starved: nobody was heard
            self._moved, self._open = now, None
            self._heard.clear()
        self._looked = now
        if self.rank not in self._homes:
            self._homes[self.rank] = home()
            self.board.write(f"home/{self.rank}", self._homes[self.rank])
        self._home(0)  # while the store, which rank 0 may keep, answers
        marker = self.where.marker()
        if marker != self._marker:
            self._marker, self._moved = marker, now
        asked = self.board.add("inquiry")
        if asked > self._seen:
            self._seen = asked
            self.board.write(f"answer/{self.rank}", json.dumps(self._answer(asked, now)))
            self.known()
        if self._open is not None:
            return self._judge(now)
        stands = not self.patient and now - self._moved >= self.limit
        pings = self.rank == 0 and now - self._pinged >= self.silence / 4
        if (now >= self._next and (stands or self.pending)) or pings:
            self._pinged = now
            self._open = self.board.add("inquiry", 1), now + min(ANSWER, max(self.silence / 4, 1.0))
        return None

    def _home(self, rank: int) -> str | None:
        if rank not in self._homes and (text := self.board.read(f"home/{rank}")) is not None:
            self._homes[rank] = text
        return self._homes.get(rank)

    def keeps_the_store(self) -> bool:
        """Whether rank 0 is a process of this machine that is there, whether or not it answers."""
        return is_there(self._homes.get(0))

    def place(self) -> list[int]:
        """How far this rank is: epoch, batches, exchanges; those of other ranks can be compared with it."""
        return [*self.where.position(), exchanges()]

    def others_are_further(self, here: list[int]) -> bool:
        """Whether a rank is known to be further than ``here``; asks all, and looks at what they have answered so far."""
        self.board.add("inquiry", 1)
        texts = [self.board.read(f"answer/{rank}") for rank in range(self.size) if rank != self.rank]
        return any(json.loads(text)["at"] > here for text in texts if text is not None)

    def known(self) -> str | None:
        """The verdict, if any rank has come to one."""
        if self.verdict is None:
            with contextlib.suppress(Exception):
                self.verdict = self.board.read("hang")
        return self.verdict

    def _answer(self, number: int, now: float) -> dict[str, Any]:
        event, exchange = self._where or self.where.told()
        still = math.inf if self._error is not None else now - self._moved
        return {
            "number": number, "still": min(still, 1e9), "patient": self.patient, "event": event, "exchange": exchange,
            "at": self.place(), "error": self._error,
        }  # fmt: skip

    def _judge(self, now: float) -> str | None:
        """Look at the answers to this rank's inquiry."""
        assert self._open is not None
        number, until = self._open
        answers: dict[int, dict[str, Any]] = {}
        gone: set[int] = set()
        for rank in range(self.size):
            text = self.board.read(f"answer/{rank}")
            found = None if text is None else json.loads(text)
            if found is not None and found["number"] >= number:
                answers[rank], self._heard[rank] = found, now
            elif self.board.read(f"left/{rank}") is not None:
                gone.add(rank)
                self._heard[rank] = now
        if len(answers) + len(gone) < self.size and now < until:
            return None
        self._open, self._next = None, now + min(max(self.limit / 4, 1.0), 60.0)
        verdict = verdict_on(answers, gone, self.size, self.limit, self.rank, self._error is not None)
        if verdict is not None and (self._error is not None or now - self._moved >= self.limit):
            self.verdict = self.board.first("hang", verdict)
            self.board.first("failed", self.verdict.splitlines()[0])
            return None
        lost = [rank for rank in range(self.size) if now - self._heard.setdefault(rank, now) > self.silence]
        # one of this machine that is there may be stopped, or hold on to Python: that is a hang, if it is anything
        if self.rank == 0 and (lost := [rank for rank in lost if not is_there(self._home(rank))]):
            return self.board.first(
                "failed",
                f"{ranks_in_words(lost)} of {self.size} {'have' if len(lost) > 1 else 'has'} not answered for"
                f" {self.silence:g} s: the process or its machine is gone, the way to it is cut, or it hangs in code that"
                " does not let go of Python",
            )
        return None

    def show(self, verdict: str) -> None:
        """Print where this rank stands, and on the first rank what was found; wait until all have done so."""
        event, _ = self._where or self.where.told()
        still = time.monotonic() - self._moved
        text = f"\nleyden: rank {self.rank} of {self.size}, {still:.0f} s after its last event, {event}\n"
        if self._error is None:  # else its traceback says it
            with contextlib.suppress(Exception):
                text += stacks() + workers()
        if self.rank == 0:
            text = f"\nleyden: {verdict}\n{text}"
        tell(text)
        with contextlib.suppress(Exception):
            self.board.write(f"shown/{self.rank}", "1")
            until = time.monotonic() + SHOW
            while time.monotonic() < until:
                if all(self.board.read(f"shown/{rank}") is not None for rank in range(self.size)):
                    break
                time.sleep(0.05)
        self.shown.set()


def verdict_on(
    answers: dict[int, dict[str, Any]], gone: set[int], size: int, limit: float, asker: int, late: bool
) -> str | None:
    """Say who is behind and where the others wait, in words; None if this is no hang.

    Args:
        answers: By rank.
        gone: The ranks that have left the run.
        size: How many ranks there are.
        limit: How many seconds without an event are too many.
        asker: The rank that asked.
        late: Whether an exchange of the asker has run out of time already.
    """
    silent = [rank for rank in range(size) if rank not in answers and rank not in gone]
    # clocks of threads: who asked was the first to stand still for so long
    moving = [rank for rank, one in answers.items() if one["patient"] or one["still"] < 0.9 * limit - 1.0]
    waiting = [rank for rank, one in answers.items() if one["exchange"] or one["error"]]
    counts = {tuple(one["at"]) for one in answers.values()}
    if not late and (moving or not (waiting or len(counts) > 1)):
        return None
    # the least far of those that wait in no exchange; or of all, where exchanges do not fit together
    candidates = [rank for rank in answers if rank not in waiting] or list(answers)
    last = min((tuple(answers[rank]["at"]) for rank in candidates), default=())
    behind = [rank for rank in candidates if tuple(answers[rank]["at"]) == last]
    behind = ([] if len(behind) == len(answers) else behind) + sorted(gone) + silent
    waiting = [rank for rank in answers if rank not in behind]
    lines = []
    for rank in range(size):
        if rank in answers:
            one = answers[rank]
            still = f", for {one['still']:.0f} s" if one["still"] < 1e9 else ", until its time was up"
            lines.append(f"  rank {rank} {'is behind' if rank in behind else 'waits'}: {one['event']}{still}")
        elif rank in gone:
            lines.append(f"  rank {rank} is behind: it has left the run")
        else:
            lines.append(f"  rank {rank} is behind: it does not answer (its process is gone, or holds on to Python)")
    if not behind:
        head = f"all {size} ranks wait in exchanges that do not fit together"
    else:
        one_is = len(behind) == 1
        how = ("does not come" if one_is else "do not come") if late else "hangs" if one_is else "hang"
        head = f"{ranks_in_words(sorted(behind))} of {size} {how}"
        head += f", and {ranks_in_words(waiting)} {'wait' if len(waiting) > 1 else 'waits'}" if waiting else ""
    since = f"nothing has happened for {limit:.0f} s" if not late else f"{answers[asker]['error']}"
    return f"{head}: {since}.\n" + "\n".join(lines)


def is_timeout(error: BaseException) -> bool:
    """Whether ``error`` is that of an exchange whose time was up; torch has no class of its own for it."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return any(part in text for part in ("timed out waiting", "application timeout", "collective operation timeout"))

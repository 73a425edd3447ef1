# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a run write for each other into their key-value store, under the name of the run; no collective."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Any


class Board:
    """The part of a store that belongs to one run; any thread may use it.

    Args:
        store: The key-value store of the processes.
        name: Of the run: the same on all ranks, and of no other run.
    """

    def __init__(self, store: Any, name: str) -> None:
        self.store, self.name = store, name
        self._lock = threading.Lock()  # two questions that belong together, two threads

    def read(self, key: str) -> str | None:
        """Return what stands there; None if nothing does."""
        with self._lock:
            key = f"{self.name}/{key}"
            return self.store.get(key).decode() if self.store.check([key]) else None

    def write(self, key: str, value: str) -> None:
        """Write, over whatever stands there."""
        with self._lock:
            self.store.set(f"{self.name}/{key}", value)

    def first(self, key: str, value: str) -> str:
        """Write ``value`` unless somebody was first; return what stands there then."""
        with self._lock:
            found: bytes = self.store.compare_set(f"{self.name}/{key}", "", value)
        return found.decode()

    def add(self, key: str, amount: int = 0) -> int:
        """Add to a number; return the sum."""
        with self._lock:
            return int(self.store.add(f"{self.name}/{key}", amount))


def ranks_in_words(ranks: list[int]) -> str:
    """``rank 3``, ``ranks 1 and 3``, ``ranks 1 to 7``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def first_line(error: BaseException) -> str:
    """The first line of what ``error`` says, at most 300 characters of it."""
    return (str(error).strip().splitlines() or [""])[0][:300]


def tell(text: str) -> None:
    """Write to standard error, whatever becomes of it."""
    with contextlib.suppress(Exception):
        sys.stderr.write(text)  # in one piece: several processes write to one terminal
        sys.stderr.flush()

# SPDX-License-Identifier: Apache-2.0
"""What a progress display shows: one row of numbers for each loop that runs, and the plain way to show it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from torch import Tensor

LOOK_EVERY = 32
"""At most so many batches pass between two looks at the clock."""


class Row:
    """The progress of one loop over one loader. Times are in seconds of ``time.monotonic``.

    Args:
        description: What runs, for example ``"Epoch 3/10"``.
        total: Number of batches; infinite if unknown.
        loader: Index of the loader that feeds the loop.
        main: Whether the row stands for the job itself; sanity checks and validation within fit are asides.
        next_look: The count of batches at which the clock is looked at next.
    """

    __slots__ = (
        "description",
        "done",
        "elapsed",
        "loader",
        "main",
        "metrics",
        "next_look",
        "skipped",
        "started",
        "total",
    )

    def __init__(
        self, description: str = "", total: float = math.inf, loader: int = 0, main: bool = True, next_look: float = 0
    ) -> None:
        self.description = description
        self.total = total
        self.loader = loader
        self.main = main
        self.next_look = next_look
        self.done = 0
        self.skipped: int | None = None
        """Batches that ran before this process began to count, those of a resumed epoch; None before the first look."""
        self.started = time.monotonic()
        self.elapsed = 0.0
        self.metrics: Mapping[str, Any] = {}

    @property
    def finite_total(self) -> int | None:
        """The number of batches, or None if it is unknown; never less than were done."""
        return max(int(self.total), self.done) if math.isfinite(self.total) else None

    @property
    def rate(self) -> float | None:
        """Batches per second since the start, or None if there is nothing to go by."""
        counted = self.done - (self.skipped or 0)
        return counted / self.elapsed if counted > 0 and self.elapsed > 0 else None

    @property
    def remaining_s(self) -> float | None:
        """Seconds to go at the present rate, or None if unknown."""
        total, rate = self.finite_total, self.rate
        return (total - self.done) / rate if total is not None and rate else None

    def look(self, now: float, at_least: int = 1) -> None:
        """Take the time, and set the batch at which to do so next, given that redraws are 0.1 s apart or more."""
        self.elapsed = now - self.started
        self.next_look = self.done + max(min(int((self.rate or 0) * 0.025), LOOK_EVERY), at_least)

    def pause(self, seconds: float) -> None:
        """Take the time that something else ran out of the account."""
        self.started += seconds


def format_clock(seconds: float | None) -> str:
    """Return ``MM:SS`` or ``H:MM:SS``; ``?`` for None."""
    if seconds is None:
        return "?"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute:02}:{second:02}"


def format_rate(rate: float | None) -> str:
    """Return a rate with three to four digits: ``0.25it/s``, ``47.5it/s``, ``1234it/s``; ``?it/s`` for None."""
    if rate is None:
        return "?it/s"
    digits = 2 if rate < 10 else 1 if rate < 1000 else 0
    return f"{rate:.{digits}f}it/s"


def format_metric(value: Any, float_format: str = ".3f") -> str:
    """Return the text of a metric: floats by the format, but never a small number as zero; the rest by ``str``."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, float):
        return str(value)
    text = format(value, float_format)
    if value != 0 and math.isfinite(value) and _reads_as_zero(text):
        return f"{value:.2e}"
    return text


def _reads_as_zero(text: str) -> bool:
    return not any(digit in text for digit in "123456789")


class PlainDisplay:
    """Plain lines for logs and files: one when a loop has ended, and one every ten seconds while it runs.

    Args:
        stream: Where to write; None means ``sys.stdout`` as it is at the time of writing.
    """

    interval_s = 10.0
    draws_at_start = False
    keeps = True

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def draw(self, rows: Sequence[Row]) -> None:
        """Write the row of the innermost loop."""
        self._write(rows[-1])

    def keep(self, row: Row) -> None:
        """Write the row of a loop that has ended."""
        if row.main:
            self._write(row)

    def _write(self, row: Row) -> None:
        total = "?" if row.finite_total is None else str(row.finite_total)
        to_go = "" if row.done == row.finite_total else f"<{format_clock(row.remaining_s)}"
        elapsed = f"{row.elapsed:.1f}s" if row.elapsed < 60 else format_clock(row.elapsed)
        metrics = "".join(f" {name}={format_metric(value, '.3g')}" for name, value in row.metrics.items())
        self.print(
            f"{row.description}: {row.done}/{total} [{elapsed}{to_go}, {format_rate(row.rate)}]{metrics}", flush=True
        )

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print what somebody else has to say without disturbing the display."""
        print(*args, **{"file": self._stream, **kwargs})

    def close(self) -> None:
        """End the display; nothing of it stays active."""


def kind_of_output(stream: TextIO | None) -> str:
    """Return what writing to a stream leads to: ``"terminal"``, ``"notebook"`` or ``"plain"``.

    Only the stream and ``TERM`` are looked at, never what is installed. The output of a notebook kernel is known by
    its class; Spyder's, of the same family, shows no displays that update, and gets plain lines.
    """
    modules = {cls.__module__.partition(".")[0] for cls in type(stream).__mro__}
    if "spyder_kernels" in modules:
        return "plain"
    if "ipykernel" in modules:
        return "notebook"
    try:
        terminal = stream is not None and stream.isatty()
    except (AttributeError, ValueError):  # something else than a file, or one that was closed
        terminal = False
    return "terminal" if terminal and os.environ.get("TERM", "") not in ("dumb", "unknown") else "plain"

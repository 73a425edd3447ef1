# SPDX-License-Identifier: Apache-2.0
"""A bar of one line that is written over and over, in the format that tqdm has made familiar; tqdm is not needed."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, TextIO

from leyden.callbacks.progress.base import in_fit
from leyden.callbacks.progress.engine import HIGHEST_RATE, Display, DrawnProgressBar
from leyden.callbacks.progress.rows import (
    PlainDisplay,
    Row,
    format_clock,
    format_metric,
    format_rate,
    kind_of_output,
)
from leyden.errors import LeydenWarning
from leyden.types import TrainerView


def _has_tqdm() -> bool:
    return find_spec("tqdm") is not None


def _holder(kind: str) -> Any:
    def get(self: TQDMProgressBar) -> Any:
        if kind not in self.bars:
            raise TypeError(
                f"{type(self).__name__} has no {kind} bar now: it is made when that loop begins, for subclasses and with"
                " semantics='lightning', where the package tqdm is installed."
            )
        return self.bars[kind]

    def put(self: TQDMProgressBar, bar: Any) -> None:
        self.bars[kind] = bar

    return property(get, put, doc=f"The tqdm object of the {kind} loop. Raises TypeError before there is one.")


class TQDMProgressBar(DrawnProgressBar):
    """Shows progress on stderr as one line: ``Epoch 1/3:  40%|████      | 40/100 [00:03<00:05, 10.8it/s, loss=0.12]``.

    It draws by itself, and plain lines where stderr is neither a terminal nor a notebook. A subclass, and a run with
    ``semantics="lightning"``, gets objects of the package tqdm where that is installed: they are made by ``init_train_tqdm``,
    ``init_validation_tqdm``, ``init_sanity_tqdm``, ``init_test_tqdm`` and ``init_predict_tqdm``, for you to override, and
    are at hand as ``train_progress_bar`` and so on while the loop runs.

    Args:
        refresh_rate: Draw at most once in so many batches (and ten times a second at most); 0 switches the bar off.
        process_position: Draw so many lines further down, below bars of somebody else.
        leave: Leave the line of each epoch behind; otherwise the next epoch is drawn over it.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hooks = sorted(name for name in vars(cls) if name.startswith("init_") and name.endswith("_tqdm"))
        if hooks and not _has_tqdm():
            warnings.warn(
                f"{cls.__name__}.{hooks[0]} will not be called: the package tqdm is not installed. Install it, or override"
                " the *_description properties or get_metrics() instead.",
                category=LeydenWarning,
                stacklevel=2,
            )

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__(batches_per_look=max(refresh_rate, 1))
        self._refresh_rate = refresh_rate
        self._process_position = process_position
        self._leave = leave
        self.bars: dict[str, Any] = {}
        """The tqdm objects by what they show: ``"train"``, ``"validation"``, ``"test"``, ``"predict"``."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "bars": {}}

    @property
    def refresh_rate(self) -> int:
        """Batches between two draws, at least."""
        return self._refresh_rate

    @property
    def process_position(self) -> int:
        """Lines that the bar is drawn further down."""
        return self._process_position

    @property
    def is_enabled(self) -> bool:
        """Whether the bar shows anything."""
        return self._enabled and self._refresh_rate > 0

    def make_display(self, trainer: TrainerView) -> Display:
        """Return the display that suits stderr as it is now, or tqdm's where its objects are asked for."""
        lightning = getattr(getattr(trainer, "config", None), "semantics", "leyden") == "lightning"
        if (lightning or type(self) is not TQDMProgressBar) and _has_tqdm():
            from leyden.callbacks.progress.tqdm_objects import TqdmDisplay  # noqa: PLC0415  # optional

            self.bars = {}
            return TqdmDisplay(self, trainer, self._leave)
        if kind_of_output(sys.stderr) == "plain":
            return PlainDisplay(sys.stderr)
        return LineDisplay(sys.stderr, self._process_position, self._leave)

    # ------------------------------------------------------------------ objects of tqdm

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
    """tqdm's format of a line."""

    def init_sanity_tqdm(self) -> Any:
        """Return the tqdm object of the sanity check; override it for another."""
        return self._tqdm(self.sanity_check_description, leave=False)

    def init_train_tqdm(self) -> Any:
        """Return the tqdm object of training; override it for another."""
        return self._tqdm(self.train_description, leave=True, smoothing=0)

    def init_validation_tqdm(self) -> Any:
        """Return the tqdm object of a validation, below that of training where there is one; override it for another."""
        below = in_fit(self.trainer)
        return self._tqdm(self.validation_description, leave=not below, below=int(below))

    def init_test_tqdm(self) -> Any:
        """Return the tqdm object of a test; override it for another."""
        return self._tqdm(self.test_description, leave=True)

    def init_predict_tqdm(self) -> Any:
        """Return the tqdm object of a prediction; override it for another."""
        return self._tqdm(self.predict_description, leave=True, smoothing=0)

    def _tqdm(self, text: str, leave: bool, below: int = 0, **more: Any) -> Any:
        from leyden.callbacks.progress.tqdm_objects import Tqdm  # noqa: PLC0415  # optional

        return Tqdm(
            desc=text, position=2 * self.process_position + below, disable=self.is_disabled, leave=leave,
            dynamic_ncols=True, file=sys.stdout, bar_format=self.BAR_FORMAT, **more,
        )  # fmt: skip

    train_progress_bar = _holder("train")
    val_progress_bar = _holder("validation")
    test_progress_bar = _holder("test")
    predict_progress_bar = _holder("predict")


class LineDisplay:
    """The innermost row as one line that each draw writes over.

    Args:
        stream: Where to write.
        position: Lines further down.
        leave: Whether the lines of finished loops stay.
    """

    interval_s = 1 / HIGHEST_RATE
    draws_at_start = True

    def __init__(self, stream: TextIO, position: int = 0, leave: bool = False) -> None:
        self.keeps = leave
        self._stream = stream
        self._down, self._up = "\n" * position, f"\x1b[{position}A" if position else ""
        self._line = ""
        encoding = str(getattr(stream, "encoding", "") or "").lower()
        self._full = "█" if encoding.startswith("utf") else "#"

    def draw(self, rows: Sequence[Row]) -> None:
        """Write the row over the last one."""
        self._write(format_line(rows[-1], self._columns(), self._full) if rows else "")

    def keep(self, row: Row) -> None:
        """Write the row, and begin a new line."""
        self.draw([row])
        self.close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Take the line away, print, and write it again."""
        line = self._line
        self._write("")
        print(*args, **{"flush": True, **kwargs})
        self._write(line)

    def close(self) -> None:
        """End the line."""
        if self._line:
            self._stream.write(f"{self._down}\n")
            self._stream.flush()
            self._line = ""

    def _write(self, line: str) -> None:
        rest = " " * (len(self._line) - len(line))  # not an escape sequence: notebooks know none
        end = "\r" if not line else ""
        self._stream.write(f"{self._down}\r{line}{rest}{end}{self._up}")
        self._stream.flush()
        self._line = line

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError, AttributeError):  # not a terminal: a notebook
            return 100


def format_line(row: Row, columns: int, full: str = "█") -> str:
    """Return a row as one line of less than so many columns; the bar takes what the rest leaves, ten at least."""
    metrics = "".join(f", {name}={format_metric(value, '.3f')}" for name, value in row.metrics.items())
    total = row.finite_total
    times = f"[{format_clock(row.elapsed)}<{format_clock(row.remaining_s)}, {format_rate(row.rate)}{metrics}]"
    if total is None:
        return f"{row.description}: {row.done}/? {times}"[: columns - 1]
    part = row.done / total if total else 1.0
    left, right = f"{row.description}: {part:4.0%}|", f"| {row.done}/{total} {times}"
    width = max(10, min(40, columns - 1 - len(left) - len(right)))
    return (left + (full * int(part * width)).ljust(width) + right)[: columns - 1]

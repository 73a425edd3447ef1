# SPDX-License-Identifier: Apache-2.0
"""The bar that the Trainer uses by default: rich on a terminal and in a notebook, plain lines everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

from leyden.callbacks.progress.engine import HIGHEST_RATE, Display, DrawnProgressBar
from leyden.callbacks.progress.rows import (
    PlainDisplay,
    Row,
    format_clock,
    format_metric,
    format_rate,
    kind_of_output,
)
from leyden.types import TrainerView

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID
    from rich.style import Style
    from rich.table import Table


@dataclass
class RichProgressBarTheme:
    """The styles of the parts of a bar, in rich's notation.

    Args:
        description: The label: epoch, validation ...
        progress_bar: The part of the bar that is done.
        progress_bar_finished: The bar when it is full.
        progress_bar_pulse: The bar while the number of batches is unknown.
        batch_progress: The count of batches.
        time: The time that has passed and the time to go.
        processing_speed: The batches per second.
        metrics: The metrics.
        metrics_text_delimiter: What stands between two metrics.
        metrics_format: The format of floats; what it would show as zero though it is not is shown as ``1.23e-05``.
    """

    description: Union[str, Style] = ""
    progress_bar: Union[str, Style] = "#6206E0"
    progress_bar_finished: Union[str, Style] = "#6206E0"
    progress_bar_pulse: Union[str, Style] = "#6206E0"
    batch_progress: Union[str, Style] = ""
    time: Union[str, Style] = "dim"
    processing_speed: Union[str, Style] = "dim underline"
    metrics: Union[str, Style] = "italic"
    metrics_text_delimiter: str = " "
    metrics_format: str = ".3f"


class RichProgressBar(DrawnProgressBar):
    """Shows progress where the output goes, decided by ``sys.stdout`` alone when a run begins.

    On a terminal a live display of rich; in a notebook the same as a display that updates itself; in a file, a pipe
    or a dumb terminal plain lines, one for each epoch and one every ten seconds within it.

    Args:
        refresh_rate: Redraws per second, ten at most; 0 switches the bar off. Drawing takes about one hundredth of
            the time, so a slow terminal is redrawn less often.
        leave: Leave the bar of each epoch behind; otherwise the next epoch is drawn over it.
        theme: The styles; None means ``RichProgressBarTheme()``.
        console_kwargs: Arguments of ``rich.console.Console``; with them that console decides whether it is a terminal.
    """

    def __init__(
        self,
        refresh_rate: float = 100,
        leave: bool = False,
        theme: RichProgressBarTheme | None = None,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._refresh_rate = refresh_rate
        self._leave = leave
        self._console_kwargs = dict(console_kwargs or {})
        self._console_width = 80
        self.theme = theme if theme is not None else RichProgressBarTheme()

    @property
    def refresh_rate(self) -> float:
        """Redraws per second, as asked for."""
        return self._refresh_rate

    @property
    def is_enabled(self) -> bool:
        """Whether the bar shows anything."""
        return self._enabled and self._refresh_rate > 0

    def make_display(self, trainer: TrainerView) -> Display:
        """Return the display that suits the output as it is now."""
        kind = kind_of_output(sys.stdout)
        if kind == "plain" and not self._console_kwargs:
            return PlainDisplay()
        # rich is loaded when something is drawn with it, not with leyden
        from rich import get_console  # noqa: PLC0415
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import Progress, TextColumn  # noqa: PLC0415
        from rich.table import Column  # noqa: PLC0415

        if self._console_kwargs:
            console = Console(**self._console_kwargs)
            kind = "terminal" if console.is_terminal and not console.is_dumb_terminal else "plain"
            if kind == "plain":
                return PlainDisplay(self._console_kwargs.get("file"))
        else:
            # rich's own console, so that rich.print in the user's code comes out above the bar
            console = get_console()
        self._console_width = console.width
        metrics = TextColumn(
            "{task.fields[metrics]}",
            style=self.theme.metrics,
            markup=False,
            table_column=Column(overflow="fold"),  # metrics that are too long go on in the next line
        )
        # no refreshing thread: it would outlive a crash, and read what the training thread writes
        progress = Progress(*self.configure_columns(trainer), metrics, console=console, auto_refresh=False)
        display = NotebookDisplay if kind == "notebook" else RichDisplay
        return display(progress, self.theme, self._leave, 1 / min(self._refresh_rate, HIGHEST_RATE))

    def configure_columns(self, trainer: TrainerView) -> list[ProgressColumn]:
        """Return the columns before that of the metrics; override it to show others.

        Besides what rich knows of a task, its fields ``batches``, ``time``, ``rate`` and ``metrics`` hold text.
        """
        from rich.progress import BarColumn, TextColumn  # noqa: PLC0415 - as in make_display
        from rich.table import Column  # noqa: PLC0415

        theme = self.theme
        return [
            TextColumn(
                "{task.description}",
                style=theme.description,
                markup=False,
                # as wide as "Validation", so that the bars stay where they are when it begins
                table_column=Column(no_wrap=True, min_width=10),
            ),
            BarColumn(
                bar_width=max(10, min(40, self._console_width // 8)),
                complete_style=theme.progress_bar,
                finished_style=theme.progress_bar_finished,
                pulse_style=theme.progress_bar_pulse,
            ),
            TextColumn("{task.fields[batches]}", style=theme.batch_progress, markup=False),
            TextColumn("{task.fields[time]}", style=theme.time, markup=False),
            TextColumn("{task.fields[rate]}", style=theme.processing_speed, markup=False),
        ]


class RichDisplay:
    """Rows as a live table of rich at the bottom of a terminal; what is printed meanwhile goes above it.

    Args:
        progress: The table, with its columns and its console.
        theme: How metrics are written.
        leave: Whether the rows of finished loops stay.
        interval_s: Seconds between two draws, at least.
    """

    draws_at_start = True

    def __init__(self, progress: Progress, theme: RichProgressBarTheme, leave: bool, interval_s: float) -> None:
        self.interval_s = interval_s
        self.keeps = leave
        self._progress = progress
        self._theme = theme
        self._tasks: dict[Row, TaskID] = {}

    def draw(self, rows: Sequence[Row]) -> None:
        """Show the rows."""
        self._update(rows)
        self._progress.start()
        self._progress.refresh()

    def keep(self, row: Row) -> None:
        """Print the row above the table."""
        self._update([row])
        table = self._table()
        self._update([])
        self._progress.console.print(table)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print; rich has put itself between stdout and the terminal, and lifts the text above the table."""
        print(*args, **kwargs)

    def close(self) -> None:
        """Leave the table as it is, and give the terminal back."""
        self._progress.live.transient = not self._tasks
        self._progress.stop()

    def _update(self, rows: Sequence[Row]) -> None:
        """Make the tasks of the table those of the rows."""
        progress = self._progress
        for row in [row for row in self._tasks if row not in rows]:
            progress.remove_task(self._tasks.pop(row))
        for row in rows:
            total = "--" if row.finite_total is None else row.finite_total
            metrics = (
                f"{name}={format_metric(value, self._theme.metrics_format)}" for name, value in row.metrics.items()
            )
            now: dict[str, Any] = {
                "total": row.finite_total,
                "completed": row.done,
                "batches": f"{row.done}/{total}",
                "time": f"{format_clock(row.elapsed)}<{format_clock(row.remaining_s)}",
                "rate": format_rate(row.rate),
                "metrics": self._theme.metrics_text_delimiter.join(metrics),
            }
            if row in self._tasks:
                progress.update(self._tasks[row], **now)
            else:  # complete from the start, because adding a task draws it
                self._tasks[row] = progress.add_task(row.description, **now)

    def _table(self) -> Table:
        return self._progress.make_tasks_table(self._progress.tasks)


class NotebookDisplay(RichDisplay):
    """The same table as the output of a notebook cell, replaced in place; needs IPython only, no widgets."""

    _handle: Any = None

    def draw(self, rows: Sequence[Row]) -> None:
        """Show the rows in the output that this display has made, or make it."""
        from IPython.display import display  # noqa: PLC0415 - a notebook has it

        self._update(rows)
        if self._handle is None:
            self._handle = display(self._table(), display_id=True)
        else:
            self._handle.update(self._table())

    def keep(self, row: Row) -> None:
        """Leave the row in its output; the next one gets another."""
        self.draw([row])
        self._handle = None

    def close(self) -> None:
        """Leave the output as it is."""
        self._handle = None

# SPDX-License-Identifier: Apache-2.0
"""Turns hooks into rows, and rows into drawings, seldom enough to cost nothing.

on_*_start         a row begins                    on_*_batch_end     one comparison of integers; now and then a look
on_*_end           the row ends                                       at the clock; ten times a second a drawing
on_train_end, on_exception, teardown               the display is closed, whatever happened
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from leyden.callbacks.progress.base import ProgressBar, in_fit
from leyden.callbacks.progress.rows import Row
from leyden.runtime.ranks import output_is_gone
from leyden.types import STEP_OUTPUT, TrainerView

HIGHEST_RATE = 10
"""Draws per second, at most: more than the eye can read only costs time."""
SHARE_OF_TIME = 0.01
"""Drawing may take this part of the run ..."""
LONGEST_PAUSE_S = 0.5
"""... but never pauses longer than this for that reason."""


class Display(Protocol):
    """Where rows go. All calls come from the thread that trains."""

    interval_s: float
    """Seconds between two draws, at least."""
    draws_at_start: bool
    """Whether a loop is shown before its first batch has ended."""
    keeps: bool
    """Whether a loop that has ended leaves its row behind (``keep``), or is drawn over by the next one."""

    def draw(self, rows: Sequence[Row]) -> None:
        """Show the rows of the loops that run, the outermost first; the last drawing stays when the display closes."""

    def keep(self, row: Row) -> None:
        """Show the row of a loop that has ended, for good."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print what somebody else has to say without disturbing the display."""

    def close(self) -> None:
        """End the display; nothing of it stays active."""


class DrawnProgressBar(ProgressBar):
    """A progress bar that shows rows on a display; subclasses say which one.

    Args:
        batches_per_look: Draw at most once in so many batches.
    """

    def __init__(self, batches_per_look: int = 1) -> None:
        super().__init__()
        self._enabled = True
        self._batches_per_look = batches_per_look
        self._display: Display | None = None
        self._rows: list[Row] = []  # of the loops that run, the outermost first
        self._row = Row()  # the innermost of them; an idle one, never shown, when nothing runs
        self._evaluation = ("", False)  # label, and whether several loaders feed it
        self._paused_at = 0.0
        self._draw_at = -math.inf  # when the next drawing is due

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_display": None, "_rows": [], "_row": self._idle_row()}

    def setup(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Get to know the trainer; silent on all processes but the main one."""
        super().setup(trainer, pl_module, stage)
        self._close()

    def make_display(self, trainer: TrainerView) -> Display:
        """Return the display for a run that begins; it is closed when the run ends."""
        raise NotImplementedError(f"{type(self).__name__} must override make_display() and return a Display.")

    @property
    def is_enabled(self) -> bool:
        """Whether the bar shows anything."""
        return self._enabled

    @property
    def is_disabled(self) -> bool:
        """Whether the bar shows nothing."""
        return not self.is_enabled

    def disable(self) -> None:
        """Show nothing from now on."""
        self._enabled = False
        self._close()

    def enable(self) -> None:
        """Show the loops that begin from now on."""
        self._enabled = True
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without disturbing the display; the arguments are those of the builtin."""
        if self._display is None:
            print(*args, **kwargs)
        else:
            self._display.print(*args, **kwargs)

    # training

    def on_train_epoch_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Begin the row of the epoch."""
        self._rows.clear()
        self._begin(Row(self.train_description, self.total_train_batches) if self.is_enabled else None)

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: Any, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and draw if it is time."""
        row = self._row
        row.done = done = batch_idx + 1
        if done < row.next_look:
            return
        if not self._rows:  # an epoch that was resumed in its middle has no start
            self.on_train_epoch_start(trainer, pl_module)
            self._row.done = done
        self._look(batch_idx)

    def on_train_epoch_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """End the row of the epoch."""
        if self._rows:
            self._end(final=False)

    def on_train_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Show the end of the last epoch, and close the display."""
        if self._rows:
            self._end(final=True)
        self._close()

    # validation, test and prediction

    def on_validation_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Begin the row of a validation, under that of the epoch if there is one."""
        checking = trainer.sanity_checking
        loaders = trainer.num_sanity_val_batches if checking else trainer.num_val_batches
        self._begin_evaluation(self.sanity_check_description if checking else self.validation_description, loaders)

    def on_test_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Begin the row of a test."""
        self._begin_evaluation(self.test_description, trainer.num_test_batches)

    def on_predict_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Begin the row of a prediction."""
        self._begin_evaluation(self.predict_description, trainer.num_predict_batches)

    def on_validation_batch_end(
        self,
        trainer: TrainerView,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch, begin another row if another loader feeds it, and draw if it is time."""
        row = self._row
        if dataloader_idx != row.loader and self._rows:
            if not self._keep(time.monotonic()):
                self._drop(row)
            row = self._begin_loader(dataloader_idx)
        row.done = done = batch_idx + 1
        if done >= row.next_look and self._rows:
            self._look(batch_idx)

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """End the row of a validation; within fit that of the epoch goes on, without the time it took."""
        self.reset_dataloader_idx_tracker()
        if not self._rows:
            return
        self._end(final=not in_fit(trainer))
        self._drop(self._row)
        if self._rows:
            self._row.pause(time.monotonic() - self._paused_at)
            self._draw_if_due()
        if not in_fit(trainer):
            self._close()

    on_test_end = on_validation_end
    on_predict_end = on_validation_end

    # the end, good or bad

    def on_exception(self, trainer: TrainerView, pl_module: Any, exception: BaseException) -> None:
        """Close the display, so that the traceback is printed on a normal terminal."""
        self._close()

    def teardown(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Close the display."""
        self._close()

    # rows

    def _idle_row(self) -> Row:
        return Row(next_look=0 if self.is_enabled else math.inf)

    def _begin(self, row: Row | None) -> None:
        """Make a row the innermost one; None while disabled."""
        if row is None:
            return
        if self._display is None:
            self._display = self.make_display(self.trainer)
            self._draw_at = row.started + (0 if self._display.draws_at_start else self._display.interval_s)
        self._rows.append(row)
        self._row = row
        if callable(begin := getattr(self._display, "begin", None)):  # some make something of their own for each row
            self._show(begin, row)
        elif self._display.draws_at_start:
            self._draw_if_due()

    def _begin_evaluation(self, label: str, loaders: Sequence[int | float]) -> None:
        self._evaluation = (label, len(loaders) > 1)
        self._paused_at = time.monotonic()
        if self.is_enabled:
            self._begin_loader(0)

    def _begin_loader(self, index: int) -> Row:
        self.has_dataloader_changed(index)
        trainer = self.trainer
        if trainer.testing:
            total = self.total_test_batches_current_dataloader
        elif trainer.predicting:
            total = self.total_predict_batches_current_dataloader
        else:
            total = self.total_val_batches_current_dataloader
        label, several = self._evaluation
        description = f"{label} DataLoader {index}" if several else label
        row = Row(description, total, loader=index, main=not in_fit(trainer))
        self._begin(row)
        return row

    def _look(self, batch_idx: int) -> None:
        """Look at the clock after a batch; draw if it is time."""
        row = self._row
        if row.skipped is None:
            row.skipped = batch_idx
        now = time.monotonic()
        row.look(now, self._batches_per_look)
        if now >= self._draw_at:
            self._draw(now)

    def _draw_if_due(self) -> None:
        now = time.monotonic()
        if now >= self._draw_at:
            self._draw(now)

    def _draw(self, now: float) -> None:
        """Draw all rows, and set the time of the next drawing by what this one has cost."""
        display = self._display
        if display is None:
            return
        self._read_metrics()
        if not self._show(display.draw, self._rows):
            return
        after = time.monotonic()
        self._draw_at = now + max(display.interval_s, min((after - now) / SHARE_OF_TIME, LONGEST_PAUSE_S))

    def _read_metrics(self) -> None:
        trainer = self.trainer
        if in_fit(trainer) and not trainer.sanity_checking:
            self._rows[0].metrics = self.get_metrics(trainer, trainer.lightning_module)

    def _end(self, final: bool) -> None:
        """The innermost row is complete: leave it behind, or draw it in any case if it is the final state."""
        now = time.monotonic()
        if not self._keep(now) and (final or now >= self._draw_at):
            self._row.look(now)
            self._draw(now)

    def _keep(self, now: float) -> bool:
        """Leave the innermost row behind if the display does such things, and say so."""
        row, display = self._row, self._display
        if display is None or not display.keeps or not row.main:
            return False
        row.look(now)
        self._read_metrics()
        self._drop(row)
        if self._show(display.keep, row):
            self._draw_at = now + display.interval_s
        return True

    def _show(self, verb: Callable[..., None], *args: Any) -> bool:
        """Call a verb of the display; return False if the output is gone, after which the run goes on without it."""
        try:
            verb(*args)
        except (OSError, ValueError) as error:
            if not output_is_gone(error):
                raise
            self.disable()
            return False
        return True

    def _drop(self, row: Row) -> None:
        """Take a row off the display; the one around it, if any, is the innermost again."""
        if row in self._rows:
            self._rows.remove(row)
            if callable(end := getattr(self._display, "end", None)):
                self._show(end, row)
        self._row = self._rows[-1] if self._rows else self._idle_row()

    def _close(self) -> None:
        """Close the display and forget the rows; safe to call at any time."""
        self._rows.clear()
        self._row = self._idle_row()
        display, self._display = self._display, None
        if display is not None:
            self._show(display.close)

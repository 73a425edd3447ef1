# SPDX-License-Identifier: Apache-2.0
"""Measures how long training, validation and testing take, and ends training when its time is up."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import timedelta
from enum import Enum
from typing import Any

from leyden.callback import Callback
from leyden.config import parse_duration
from leyden.errors import MisconfigurationException, did_you_mean
from leyden.hooks import is_written
from leyden.runtime.ranks import rank_zero_info
from leyden.types import STEP_OUTPUT, RunningStage, TrainerView

_SELDOM = 50
"""After how many batches, at most, several processes agree on the time."""


class Interval(str, Enum):
    """When the time is checked: after each batch, or after each epoch."""

    step = "step"
    epoch = "epoch"

    def __str__(self) -> str:
        return str(self.value)


class Timer(Callback):
    """Tracks the time of each stage; with a ``duration``, training stops gracefully once it has lasted that long.

    The time of training counts across resumes: what earlier runs used is in the checkpoint.

    Args:
        duration: ``"DD:HH:MM:SS"``, a timedelta, or a dict of arguments of timedelta; None only measures.
        interval: ``"step"`` checks after each batch, ``"epoch"`` after each epoch.
        verbose: Say so when the time is up.

    Raises:
        MisconfigurationException: if ``duration`` or ``interval`` is none of these.
    """

    def __init__(
        self,
        duration: str | timedelta | Mapping[str, int] | None = None,
        interval: str = Interval.step,
        verbose: bool = True,
    ) -> None:
        limit = parse_duration(duration, "Timer(duration)")
        choices = [choice.value for choice in Interval]
        if interval not in choices:
            raise MisconfigurationException(
                f"`Timer(interval={interval!r})`: must be one of {choices}.{did_you_mean(str(interval), choices)}"
            )
        self._duration = None if limit is None else limit.total_seconds()
        self._interval = Interval(interval)
        self._verbose = verbose
        self._start_time: dict[RunningStage, float | None] = dict.fromkeys(RunningStage)
        self._end_time: dict[RunningStage, float | None] = dict.fromkeys(RunningStage)
        self._offset = 0.0  # seconds of training before this process began
        self._batches, self._asks_at = 0, 1  # of this fit, and when several processes ask the first one again
        self._deadline = math.inf  # when the time is up, by the monotonic clock: all that a step has to look at

    def unused_hooks(self, trainer: TrainerView) -> frozenset[str]:
        """Return the hooks that this instance does not need in this run."""
        unused = ["on_train_batch_end", "on_train_epoch_end"]
        if self._duration is not None:
            unused.remove("on_train_batch_end" if self._interval is Interval.step else "on_train_epoch_end")
        return frozenset(name for name in unused if not is_written(self, name, Timer))

    def start_time(self, stage: str = RunningStage.TRAINING) -> float | None:
        """Return when ``stage`` last started, in seconds of the monotonic clock; None if it has not."""
        return self._start_time[RunningStage(stage)]

    def end_time(self, stage: str = RunningStage.TRAINING) -> float | None:
        """Return when ``stage`` last ended, in seconds of the monotonic clock; None if it has not."""
        return self._end_time[RunningStage(stage)]

    def time_elapsed(self, stage: str = RunningStage.TRAINING) -> float:
        """Return the seconds of the last (or current) run of ``stage``; training includes those before the resume."""
        start, end = self.start_time(stage), self.end_time(stage)
        offset = self._offset if stage == RunningStage.TRAINING else 0.0
        if start is None:
            return offset
        return (time.monotonic() if end is None else end) - start + offset

    def time_remaining(self, stage: str = RunningStage.TRAINING) -> float | None:
        """Return how many seconds of ``duration`` are left for ``stage``; None without a ``duration``."""
        return None if self._duration is None else self._duration - self.time_elapsed(stage)

    def on_fit_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Stop at once if the time was used up before the resume."""
        self._check_time_remaining(trainer)

    def on_train_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Start the clock of training."""
        self._start(RunningStage.TRAINING)
        self._batches, self._asks_at = 0, 1
        if self._duration is not None:
            self._deadline = time.monotonic() + self._duration - self._offset

    def on_train_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Stop the clock of training."""
        self._end_time[RunningStage.TRAINING] = time.monotonic()

    def on_validation_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Start the clock of validation."""
        self._start(RunningStage.VALIDATING)

    def on_validation_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Stop the clock of validation."""
        self._end_time[RunningStage.VALIDATING] = time.monotonic()

    def on_test_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Start the clock of testing."""
        self._start(RunningStage.TESTING)

    def on_test_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Stop the clock of testing."""
        self._end_time[RunningStage.TESTING] = time.monotonic()

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: Any, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Stop after this batch if the time is up."""
        if self._interval is not Interval.step:
            return
        if trainer.world_size == 1:
            if time.monotonic() >= self._deadline:
                self._check_time_remaining(trainer)
            return
        # with several processes each has to ask the first one, whatever its own clock says: all after the same batches
        self._batches += 1
        if self._batches >= self._asks_at:
            self._check_time_remaining(trainer)

    def on_train_epoch_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Stop after this epoch if the time is up."""
        if self._interval is Interval.epoch:
            self._check_time_remaining(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"time_elapsed": {stage: seconds}}``."""
        return {"time_elapsed": {stage.value: self.time_elapsed(stage) for stage in RunningStage}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count the time of training from where the checkpoint left it."""
        self._offset = state_dict.get("time_elapsed", {}).get(RunningStage.TRAINING.value, 0.0)

    def _start(self, stage: RunningStage) -> None:
        self._start_time[stage] = time.monotonic()
        self._end_time[stage] = None  # a second run of this stage must not be measured against the first one's end

    def _batches_to_wait(self) -> int:
        """After how many batches to look at the clock again: seldom while there is much time, each time near the end."""
        used, left = self.time_elapsed() - self._offset, self.time_remaining() or 0.0
        if not self._batches or used <= 0.0:
            return 1
        return max(1, min(_SELDOM, int(left / 4 / (used / self._batches))))

    def _check_time_remaining(self, trainer: TrainerView) -> None:
        if self._duration is None:
            return
        is_over = self.time_elapsed() >= self._duration
        if trainer.world_size > 1:  # clocks differ: rank 0 decides, so that all stop at the same batch
            is_over, wait = trainer.strategy.broadcast((is_over, self._batches_to_wait()))
            self._asks_at = self._batches + wait
        if is_over:
            trainer.should_stop = True
            if self._verbose:
                elapsed = timedelta(seconds=int(self.time_elapsed()))
                rank_zero_info(f"The time for training is up ({elapsed} elapsed); stopping.")


__all__ = ["Interval", "Timer"]

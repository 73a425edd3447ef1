# SPDX-License-Identifier: Apache-2.0
"""Pure questions on counters: how long is this window, when is the next row, the next validation, the end?

``batch`` counts batches of the epoch that are done, ``batches`` those of the whole fit. No function here has a side
effect, and none reads anything but its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from leyden.config import TrainerConfig, ValInterval
from leyden.errors import MisconfigurationException
from leyden.progress import Progress


def window_length(batch_idx: int, accumulate: int, num_batches: int | float) -> int:
    """How many batches the window of gradient accumulation around ``batch_idx`` has: fewer at the end of the epoch."""
    if accumulate == 1 or num_batches == math.inf:
        return accumulate
    start = batch_idx - batch_idx % accumulate
    return min(accumulate, int(num_batches) - start)


def row_due(batches_that_stepped: int, every: int) -> bool:
    """Whether the batch that is about to be counted ends with a row for the loggers."""
    return every > 0 and (batches_that_stepped + 1) % every == 0


def validation_batches(
    interval: ValInterval, num_batches: int | float, across_epochs: bool, turns: int = 1
) -> tuple[float, bool]:
    """Return ``(n, across)``: validate after every n batches, counted over epochs if ``across``.

    n is infinity when validation runs at the end of the epoch only, or goes by another unit. ``interval`` counts ``turns``
    batches as one.

    Raises:
        MisconfigurationException: for a fraction of an epoch whose length is not known.
    """
    if interval.unit == "batch":
        # more batches than an epoch has: the count simply goes on over epochs
        return interval.value * turns, across_epochs or interval.value * turns > num_batches
    if interval.unit == "epoch":
        if num_batches == math.inf:
            if interval.value == 1.0:
                return math.inf, False
            raise MisconfigurationException(
                f"Trainer(val_check_interval={interval.value}) is a fraction of an epoch, but the training loader has no"
                " length. Give a number of batches (int), '500 steps', a duration, or 1.0 for the end of the epoch."
            )
        return max(1, int(num_batches // turns * interval.value)) * turns, False
    return math.inf, False


def epoch_validates(config: TrainerConfig, epoch: int) -> bool:
    """Whether validation may run in epoch ``epoch`` (counted from 0)."""
    every = config.check_val_every_n_epoch
    return every is None or (epoch + 1) % every == 0


def validation_due(
    progress: Progress,
    interval: ValInterval,
    every: float,
    across: bool,
    *,
    last: bool,
    early: bool,
    stepped: int,
    elapsed: float,
) -> bool:
    """Whether validation runs after the batch that has just been counted in ``progress``.

    Args:
        progress: With ``batch_idx`` and ``batches`` already increased.
        interval: As the user gave it.
        every: From ``validation_batches``.
        across: From ``validation_batches``.
        last: Whether it was the last batch of the epoch.
        early: Whether the epoch ended with it before its last batch was expected.
        stepped: How many updates were made in it.
        elapsed: Seconds since the last validation.
    """
    if interval.unit == "time":
        return elapsed >= interval.value
    if interval.unit == "step":
        every_step = int(interval.value)
        return progress.global_step // every_step > (progress.global_step - stepped) // every_step
    if every == math.inf:
        return last
    if every == 0:
        return False
    if early and interval.unit == "epoch":
        return True  # a fraction of an epoch also ends where the epoch ends
    count = progress.batches if across else progress.batch_idx
    return count % int(every) == 0


def next_check(progress: Progress, config: TrainerConfig, interval: ValInterval, every: float, across: bool) -> float:
    """The number of batches at which something may be due next: never too late, sometimes too early."""
    ahead: float = math.inf
    if config.fast_dev_run:
        return progress.batches + 1
    if config.log_every_n_steps > 0:
        ahead = config.log_every_n_steps - progress.batches_that_stepped % config.log_every_n_steps
    if config.max_steps >= 0:
        ahead = min(ahead, config.max_steps - progress.global_step)
    if interval.unit == "time":
        return progress.batches + 1
    if interval.unit == "step":
        ahead = min(ahead, interval.value - progress.global_step % interval.value)
    elif every not in (0, math.inf):
        count = progress.batches if across else progress.batch_idx
        ahead = min(ahead, every - count % every)
    return progress.batches + max(1, ahead)


def may_stop(progress: Progress, min_epochs: int | None, min_steps: int | None, epochs: int) -> bool:
    """Whether a request to stop is granted; ``epochs`` counts those whose last batch is done."""
    return (not min_epochs or epochs >= min_epochs) and (not min_steps or progress.global_step >= min_steps)


def end_reached(progress: Progress, config: TrainerConfig, max_epochs: int) -> str | None:
    """Why the fit is complete, in words; None if it is not."""
    if config.max_steps >= 0 and progress.global_step >= config.max_steps:
        return f"max_steps={config.max_steps} reached"
    if max_epochs >= 0 and progress.epoch >= max_epochs:
        return f"max_epochs={max_epochs} reached"
    return None


def who_stopped(callbacks: Iterable[Any], epochs: int) -> str:
    """Say who set ``trainer.should_stop`` in a fit that stops after so many epochs, and why if that is known."""
    for callback in callbacks:
        message = getattr(callback, "stopping_reason_message", None)
        if message and callback.stopped_epoch in (epochs - 1, epochs):
            name = type(callback).__name__
            # a callback that is verbose has said why
            return f"by {name}" if callback.verbose else f"{name}: {message.removesuffix(' Stopping.').rstrip('.')}"
    return "trainer.should_stop was set"

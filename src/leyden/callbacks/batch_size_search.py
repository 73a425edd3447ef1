# SPDX-License-Identifier: Apache-2.0
"""Searches for the largest batch size that memory is enough for."""

from __future__ import annotations

from typing import Any

from leyden.callbacks.settings import get_setting, set_setting
from leyden.errors import MisconfigurationException
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.types import TrainerView

MODES = ("power", "binsearch")
"""How sizes are tried."""


def check_margin(margin: float) -> None:
    """Check that a margin is a part.

    Raises:
        MisconfigurationException: (a ValueError) unless it is in [0, 1).
    """
    if not 0.0 <= margin < 1.0:
        raise MisconfigurationException(f"margin={margin!r}: `margin` should be between 0 and 1, 1 excluded.")


class _Trials:
    """Runs batches of one size after the other.

    Args:
        rehearsal: Runs them.
        module: Of the run.
        name: The setting that holds the size.
        largest: The largest size.
        settings: What bounds a trial.
    """

    def __init__(self, rehearsal: Any, module: Any, name: str, largest: int, settings: dict[str, Any]) -> None:
        self.rehearsal, self.module, self.name, self.largest = rehearsal, module, name, largest
        self.settings = settings

    def fits(self, size: int) -> bool:
        """Whether memory is enough for batches of this size."""
        set_setting(self.module, self.name, size)
        enough = bool(self.rehearsal.fits_in_memory(**self.settings))
        rank_zero_info(f"Batch size {size} {'fits in' if enough else 'is too large for the'} memory.")
        if not enough and size <= 1:
            raise MisconfigurationException(
                f"Not even batches of 1 fit in memory ({self.name}={size}). Use a smaller model, a lower precision, or more"
                " devices that share it."
            )
        return enough

    def is_enough(self, size: int) -> bool:
        """Whether there is no reason to try more than ``size``, of which batches were just run."""
        samples = self.rehearsal.num_samples()
        if samples is not None and size >= samples:
            rank_zero_info(f"The batch size {size} is greater or equal than the length of your dataset: {samples}.")
            return True
        if size >= self.largest:
            rank_zero_info(f"The batch size {size} is the largest that was asked for (max_val).")
        return size >= self.largest

    def doubled(self, size: int) -> int:
        """Twice the size, but not more than the largest."""
        return min(2 * size, self.largest)


def _power(trials: _Trials, size: int, max_trials: int) -> int:
    """Double until memory is not enough; where it is not from the beginning, halve until it is."""
    best = None
    failed: int | None = None
    for number in range(1, max_trials + 1):
        if trials.fits(size):
            best = size
            if number == max_trials or trials.is_enough(size) or trials.doubled(size) == failed:
                break
            size = trials.doubled(size)
        elif best is not None:
            return best
        else:
            failed, size = size, size // 2
    return size


def _binsearch(trials: _Trials, size: int, max_trials: int) -> int:
    """Double until memory is not enough, then halve the distance between what was enough and what was not."""
    low, high, successes = 1, None, 0
    while True:
        if trials.fits(size):
            low, successes = size, successes + 1
            if successes >= max_trials or trials.is_enough(size) or (high is not None and high - low <= 1):
                return size
            size = trials.doubled(size) if high is None else (high + low) // 2
        else:
            high = size
            if successes and high - low <= 1:
                return low
            size = (high + low) // 2


def find_batch_size(
    trainer: TrainerView,
    module: Any,
    mode: str = "power",
    steps_per_trial: int = 3,
    init_val: int = 2,
    max_trials: int = 25,
    batch_arg_name: str = "batch_size",
    margin: float = 0.05,
    max_val: int = 8192,
    alone: bool = False,
) -> int | None:
    """Find the batch size inside a hook of a run; arguments as of :meth:`leyden.tuning.Tuner.scale_batch_size`.

    The setting holds it afterwards, and the run has loaders that are made from it.

    Args:
        trainer: Whose run it is.
        module: Of the run.
        mode: See there, like those below.
        steps_per_trial: Updates, or batches of an evaluation.
        init_val: The first size.
        max_trials: How many sizes are tried.
        batch_arg_name: The setting.
        margin: For ``"binsearch"``.
        max_val: The largest size.
        alone: Whether the run ends with this: its loaders are then only looked at.

    Returns:
        The size, the same on all processes; None with ``fast_dev_run``, which skips the search.

    Raises:
        MisconfigurationException: for several loaders of an evaluation, or where not even a batch of 1 fits.
    """
    check_margin(margin)
    if trainer.fast_dev_run:
        rank_zero_warn("Skipping batch size scaler since `fast_dev_run` is enabled.")
        return None
    rehearsal, former = trainer.rehearsal(), get_setting(module, batch_arg_name)
    if not rehearsal.fits and len(rehearsal.loader().flattened) > 1:
        raise MisconfigurationException(
            f"The Batch size finder cannot be used with multiple {rehearsal.prefix} dataloaders. Give one, or find the size"
            " of each by itself."
        )
    if rehearsal.world_size > 1:
        rehearsal.on_its_own()
    if rehearsal.fits:
        settings: dict[str, Any] = {
            "limit_train_batches": 1.0,
            "limit_val_batches": steps_per_trial if trainer.enable_validation else 0,
            "max_steps": trainer.global_step + steps_per_trial, "max_time": None,
        }  # fmt: skip
    else:
        settings = {f"limit_{rehearsal.prefix}_batches": steps_per_trial}
    size = min(init_val, max_val)
    samples = rehearsal.num_samples()
    if samples is not None and former >= samples:
        size = former
    try:
        with rehearsal:
            trials = _Trials(rehearsal, module, batch_arg_name, max_val, settings)
            size = (_power if mode == "power" else _binsearch)(trials, size, max_trials)
    except BaseException:
        set_setting(module, batch_arg_name, former)
        raise
    if mode == "binsearch":
        size = max(1, int(size * (1 - margin)))
    set_setting(module, batch_arg_name, size)
    rehearsal.reload(always=alone)
    rank_zero_info(f"The batch size is {size}.")
    return size

# SPDX-License-Identifier: Apache-2.0
"""Stops training when a monitored metric stops improving, reaches a goal, diverges or is no longer finite."""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor

from leyden.callback import Callback
from leyden.errors import MisconfigurationException, did_you_mean
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.types import TrainerFn, TrainerView
from leyden.vintage import signature

log = logging.getLogger(__name__)


class EarlyStoppingReason(Enum):
    """Why EarlyStopping stopped the training."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(Callback):
    """Looks at ``monitor`` after each epoch or validation and stops the training when it has seen enough.

    Args:
        monitor: The name under which the metric is logged.
        min_delta: An improvement by this much or less is none.
        patience: How many checks (not epochs) in a row may pass without improvement; the last of them stops.
        verbose: Say why it stops, and when the metric improves.
        mode: ``"min"`` or ``"max"``: which way is better.
        strict: Raise if the metric was not logged when it is checked; else go on.
        check_finite: Stop when the metric is NaN or infinite.
        stopping_threshold: Stop as soon as the metric is better than this.
        divergence_threshold: Stop as soon as the metric is worse than this.
        check_on_train_epoch_end: Check at the end of each training epoch (True) or of each validation (False). None:
            the former if validation runs once in each epoch, at its end.
        log_rank_zero_only: With several processes, only the first one speaks.

    Attributes:
        stopped_epoch: The epoch in which training was stopped; 0 if it was not.
        stopping_reason: An :class:`EarlyStoppingReason`.
        stopping_reason_message: The same in words; None if training was not stopped.
        wait_count: How many checks in a row have brought no improvement.
        best_score: The best value so far.

    Raises:
        MisconfigurationException: if ``mode`` is neither.
        RuntimeError: during training, if ``strict`` and ``monitor`` was not logged.
    """

    monitors: ClassVar[bool] = True
    mode_dict: ClassVar[dict[str, Callable[..., Tensor]]] = {"min": torch.lt, "max": torch.gt}
    order_dict: ClassVar[dict[str, str]] = {"min": "<", "max": ">"}

    @signature
    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:
        if mode not in self.mode_dict:
            raise MisconfigurationException(
                f"EarlyStopping(mode={mode!r}): `mode` can be 'min' or 'max'.{did_you_mean(str(mode), self.mode_dict)}"
            )
        self.monitor = monitor
        self.mode = mode
        self.min_delta = min_delta if mode == "max" else -min_delta
        self.patience = patience
        self.verbose = verbose
        self.strict = strict
        self.check_finite = check_finite
        self.stopping_threshold = stopping_threshold
        self.divergence_threshold = divergence_threshold
        self.log_rank_zero_only = log_rank_zero_only
        self.wait_count = 0
        self.stopped_epoch = 0
        self.stopping_reason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None
        self.best_score = torch.tensor(torch.inf if mode == "min" else -torch.inf)
        self._check_on_train_epoch_end = check_on_train_epoch_end
        self._decides_when = check_on_train_epoch_end is None

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint."""
        return self.make_state_key(monitor=self.monitor, mode=self.mode)

    @property
    def monitor_op(self) -> Callable[..., Tensor]:
        """``torch.lt`` or ``torch.gt``: whether the first value is better than the second."""
        return self.mode_dict[self.mode]

    def setup(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Settle when to check, if the user left it open."""
        if self._decides_when:
            once_an_epoch = trainer.val_check_interval in (1.0, None) and trainer.check_val_every_n_epoch == 1
            self._check_on_train_epoch_end = once_an_epoch

    def on_train_epoch_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Check, if this is the moment."""
        # where no validation ever runs, the end of the epoch is the only moment left
        nothing_else = self._decides_when and not trainer.enable_validation
        if self._check_on_train_epoch_end or nothing_else:
            self._run_early_stopping_check(trainer)

    def on_validation_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Check, if this is the moment."""
        if not self._check_on_train_epoch_end:
            self._run_early_stopping_check(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, the best score and the reason for stopping."""
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "patience": self.patience,
            "stopping_reason": self.stopping_reason.value,
            "stopping_reason_message": self.stopping_reason_message,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned (older files have less in it)."""
        self.wait_count = state_dict["wait_count"]
        self.stopped_epoch = state_dict.get("stopped_epoch", 0)
        self.best_score = state_dict.get("best_score", self.best_score)
        self.patience = state_dict.get("patience", self.patience)
        self.stopping_reason = EarlyStoppingReason(state_dict.get("stopping_reason", 0))
        self.stopping_reason_message = state_dict.get("stopping_reason_message")

    def _run_early_stopping_check(self, trainer: TrainerView) -> None:
        if trainer.fast_dev_run or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            self._complain(metrics)
            return
        current = metrics[self.monitor].detach().squeeze()
        should_stop, message = self._evaluate_stopping_criteria(current)
        # one process that has to stop stops all
        should_stop = trainer.strategy.reduce_boolean_decision(should_stop, all=False)
        trainer.should_stop = trainer.should_stop or should_stop
        if should_stop:
            self.stopped_epoch = trainer.current_epoch
            self.stopping_reason_message = message
        if message and self.verbose:
            self._say(trainer, message)

    def _complain(self, metrics: dict[str, Tensor]) -> None:
        available = ", ".join(map(repr, metrics)) or "nothing"
        message = (
            f"Early stopping conditioned on metric `{self.monitor}` which is not available; logged so far: {available}."
            f"{did_you_mean(self.monitor, metrics)} Log it with `self.log({self.monitor!r}, value)`, change `monitor`,"
            " or pass `strict=False` if it may be missing."
        )
        if self.strict:
            raise RuntimeError(message)
        if self.verbose:
            rank_zero_warn(message, category=RuntimeWarning)

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        """Return whether to stop, and what to say; keeps count of the checks."""
        value, best = f"{self.monitor} = {float(current):.6g}", f"{float(self.best_score):.6g}"
        is_better = self.monitor_op
        if self.check_finite and not torch.isfinite(current):
            self.stopping_reason = EarlyStoppingReason.NON_FINITE_METRIC
            return True, f"{value} is not finite; the best value so far is {best}. Stopping."
        if self.stopping_threshold is not None and is_better(current, self.stopping_threshold):
            self.stopping_reason = EarlyStoppingReason.STOPPING_THRESHOLD
            return True, (
                f"Stopping threshold reached: {value} {self.order_dict[self.mode]} {self.stopping_threshold}. Stopping."
            )
        if self.divergence_threshold is not None and is_better(-current, -self.divergence_threshold):
            self.stopping_reason = EarlyStoppingReason.DIVERGENCE_THRESHOLD
            sign = self.order_dict["max" if self.mode == "min" else "min"]
            return True, f"Divergence threshold reached: {value} {sign} {self.divergence_threshold}. Stopping."
        if is_better(current - self.min_delta, self.best_score.to(current.device)):
            # a copy: what is logged next may be written into the same tensor
            self.best_score, self.wait_count = current.clone(), 0
            return False, f"{value} improved (best before: {best}, min_delta: {abs(self.min_delta)})."
        self.wait_count += 1
        if self.wait_count >= self.patience:
            self.stopping_reason = EarlyStoppingReason.PATIENCE_EXHAUSTED
            return True, (
                f"{value} did not improve in the last {self.wait_count} checks; the best value is {best}. Stopping."
            )
        return False, None

    def _say(self, trainer: TrainerView, message: str) -> None:
        if trainer.world_size == 1 or self.log_rank_zero_only:
            rank_zero_info(message)
        else:
            log.info("[rank: %d] %s", trainer.global_rank, message)


__all__ = ["EarlyStopping", "EarlyStoppingReason"]

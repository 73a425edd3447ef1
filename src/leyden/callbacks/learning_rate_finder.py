# SPDX-License-Identifier: Apache-2.0
"""Finds a learning rate when a fit begins, or in any other hook of it."""

from __future__ import annotations

from typing import Any, ClassVar

from leyden.callback import Callback
from leyden.callbacks.rate_search import MODES, LRFinder, find_rate
from leyden.errors import EndOfRun
from leyden.runtime.seed import isolate_rng
from leyden.types import TrainerView


class LearningRateFinder(Callback):
    """Makes a learning-rate range test ahead of a fit, and begins the fit with the rate that it suggests.

    To make it at other moments, derive a class::

        class AtMilestones(LearningRateFinder):
            def on_fit_start(self, trainer, pl_module):
                return

            def on_train_epoch_start(self, trainer, pl_module):
                if trainer.current_epoch in (0, 5, 10):
                    self.lr_find(trainer, pl_module)

    Args:
        min_lr: The lowest rate.
        max_lr: The highest.
        num_training_steps: How many rates are tried, an update each.
        mode: ``"exponential"`` or ``"linear"``.
        early_stop_threshold: Stop where the loss is so many times the best; None never.
        update_attr: Begin the fit with the suggestion, and set the attribute that holds the rate.
        attr_name: Its name; empty is ``lr`` or ``learning_rate``.

    Attributes:
        optimal_lr: What was found, an :class:`~leyden.callbacks.rate_search.LRFinder`; None before.

    Raises:
        ValueError: for another mode.
        MisconfigurationException: in the fit, for more than one optimizer.
    """

    SUPPORTED_MODES: ClassVar[tuple[str, ...]] = MODES
    order: ClassVar[int] = -100  # others shall see the rate that is found

    def __init__(
        self,
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training_steps: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> None:
        mode = mode.lower()
        if mode not in self.SUPPORTED_MODES:
            raise ValueError(f"LearningRateFinder(mode={mode!r}): `mode` should be either of {self.SUPPORTED_MODES}.")
        self._min_lr, self._max_lr, self._num_training_steps = min_lr, max_lr, num_training_steps
        self._mode, self._early_stop_threshold = mode, early_stop_threshold
        self._update_attr, self._attr_name = update_attr, attr_name
        self._early_exit = False
        self.optimal_lr: LRFinder | None = None

    def lr_find(self, trainer: TrainerView, pl_module: Any) -> None:
        """Make the test now, in a hook of a fit."""
        with isolate_rng():
            self.optimal_lr = find_rate(
                trainer, pl_module, self._min_lr, self._max_lr, self._num_training_steps, self._mode,
                self._early_stop_threshold, self._update_attr, self._attr_name,
            )  # fmt: skip
        if self._early_exit:
            raise EndOfRun

    def on_fit_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Make the test."""
        self.lr_find(trainer, pl_module)

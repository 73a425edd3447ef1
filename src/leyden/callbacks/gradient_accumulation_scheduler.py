# SPDX-License-Identifier: Apache-2.0
"""Changes the number of batches per optimizer step from one epoch to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leyden.callback import Callback
from leyden.errors import MisconfigurationException
from leyden.hooks import is_written
from leyden.module import LightningModule
from leyden.runtime.ranks import rank_zero_warn
from leyden.types import TrainerView


class GradientAccumulationScheduler(Callback):
    """Sets ``trainer.accumulate_grad_batches`` by a schedule: ``{4: 2}`` is 2 batches a step from the fifth epoch on.

    Args:
        scheduling: From the epoch (counted from 0) at which a factor begins to the factor; before the first it is 1.

    Raises:
        TypeError: if ``scheduling`` is empty.
        MisconfigurationException: if an epoch is no int >= 0, or a factor no int >= 1.
    """

    def __init__(self, scheduling: Mapping[int, int]) -> None:
        if not scheduling:
            raise TypeError("`scheduling` is empty; give at least one {epoch: factor}, such as {4: 2}.")
        if any(not _is_int(epoch, least=0) for epoch in scheduling):
            raise MisconfigurationException(f"Each epoch in `scheduling` must be an int >= 0; got {list(scheduling)}.")
        if any(not _is_int(factor, least=1) for factor in scheduling.values()):
            raise MisconfigurationException(
                f"Each accumulation factor in `scheduling` must be an int >= 1; got {list(scheduling.values())}."
            )
        self.scheduling = {0: 1, **scheduling}
        self.epochs = sorted(self.scheduling)
        self._factor_set = 1  # what this callback last gave the trainer: a second fit must not take it for the user's

    def going_to_accumulate_grad_batches(self) -> bool:
        """Return whether any epoch accumulates."""
        return any(factor > 1 for factor in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """Return the factor of ``epoch`` (counted from 0)."""
        return self.scheduling[max((begin for begin in self.epochs if begin <= epoch), default=0)]

    def on_train_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Refuse what cannot work, and set the factor of the epoch in which training starts."""
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                "GradientAccumulationScheduler cannot work with manual optimization: the module decides there when to"
                " step. Remove the callback, or set `automatic_optimization = True`."
            )
        if trainer.accumulate_grad_batches not in (1, self._factor_set):
            raise ValueError(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) and GradientAccumulationScheduler"
                " were both given; keep one of them."
            )
        overridden = [
            name for name in ("optimizer_step", "optimizer_zero_grad") if is_written(pl_module, name, LightningModule)
        ]
        if overridden and self.going_to_accumulate_grad_batches():
            rank_zero_warn(
                f"`{type(pl_module).__name__}` overrides {' and '.join(f'`{name}`' for name in overridden)}, and"
                " gradients are accumulated: the hooks run once per optimizer step, not once per batch."
            )
        # a run that resumes within an epoch has no start of that epoch
        self._set(trainer)

    def on_train_epoch_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Set the factor of this epoch."""
        self._set(trainer)

    def _set(self, trainer: TrainerView) -> None:
        self._factor_set = self.get_accumulate_grad_batches(trainer.current_epoch)
        trainer.accumulate_grad_batches = self._factor_set


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and value >= least


__all__ = ["GradientAccumulationScheduler"]

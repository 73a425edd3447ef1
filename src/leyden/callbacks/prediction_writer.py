# SPDX-License-Identifier: Apache-2.0
"""The base of callbacks that store predictions while, or after, ``Trainer.predict`` makes them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Literal

from leyden.callback import Callback
from leyden.errors import MisconfigurationException, did_you_mean
from leyden.hooks import is_written
from leyden.types import TrainerView


class WriteInterval(str, Enum):
    """When a prediction writer writes."""

    BATCH = "batch"
    EPOCH = "epoch"
    BATCH_AND_EPOCH = "batch_and_epoch"

    def __str__(self) -> str:
        return str(self.value)

    @property
    def on_batch(self) -> bool:
        """Whether each batch is written when it is predicted."""
        return self is not WriteInterval.EPOCH

    @property
    def on_epoch(self) -> bool:
        """Whether all predictions are written together at the end."""
        return self is not WriteInterval.BATCH


class BasePredictionWriter(Callback):
    """Override ``write_on_batch_end`` or ``write_on_epoch_end`` (or both) to store predictions.

    Pass ``return_predictions=False`` to ``Trainer.predict`` to keep no predictions in memory when each batch is
    written on its own. With several processes each one writes its own share: put ``trainer.global_rank`` in the name.

    Args:
        write_interval: ``"batch"``, ``"epoch"`` or ``"batch_and_epoch"``.

    Raises:
        MisconfigurationException: if ``write_interval`` is none of these.
    """

    def __init__(self, write_interval: Literal["batch", "epoch", "batch_and_epoch"] = "batch") -> None:
        allowed = [interval.value for interval in WriteInterval]
        if write_interval not in allowed:
            raise MisconfigurationException(
                f"`write_interval` is {write_interval!r}; it must be one of {allowed}."
                f"{did_you_mean(str(write_interval), allowed)}"
            )
        self.interval = WriteInterval(write_interval)

    def unused_hooks(self, trainer: TrainerView) -> frozenset[str]:
        """Return the hooks that this instance does not need in this run."""
        unused = [] if self.interval.on_batch else ["on_predict_batch_end"]
        unused += [] if self.interval.on_epoch else ["on_predict_epoch_end"]
        return frozenset(name for name in unused if not is_written(self, name, BasePredictionWriter))

    def write_on_batch_end(
        self,
        trainer: TrainerView,
        pl_module: Any,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch: ``prediction`` is what ``predict_step`` returned.

        ``batch_indices`` are the positions of its samples in the data set; empty where the sampler does not tell.
        """
        raise NotImplementedError(
            f"{type(self).__name__}(write_interval={self.interval.value!r}) must override `write_on_batch_end`."
        )

    def write_on_epoch_end(
        self, trainer: TrainerView, pl_module: Any, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write all predictions and the indices of their samples: per loader (if there are several) and batch."""
        raise NotImplementedError(
            f"{type(self).__name__}(write_interval={self.interval.value!r}) must override `write_on_epoch_end`."
        )

    def on_predict_batch_end(
        self, trainer: TrainerView, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the batch, if batches are written one by one."""
        if self.interval.on_batch:
            indices = trainer.predict_loop.current_batch_indices
            self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Write everything, if it is written at the end."""
        if self.interval.on_epoch:
            loop = trainer.predict_loop
            self.write_on_epoch_end(trainer, pl_module, loop.predictions, loop.epoch_batch_indices)


__all__ = ["BasePredictionWriter", "WriteInterval"]

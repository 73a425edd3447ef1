# SPDX-License-Identifier: Apache-2.0
"""The base class of callbacks: one typed no-op for each hook; override the ones you need.

Hooks that are not overridden cost nothing. Within one event callbacks run in the order in which they were given, before
the module's own hook; callbacks with ``order`` below zero run first, those above zero last (checkpoints have 100).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from leyden.types import STEP_OUTPUT, TrainerView


class Callback:
    """Extends the training loop without touching the module.

    Every hook gets the trainer and the module. While a run lasts, ``self.log`` and ``self.log_dict`` are those of the
    module and follow the rules of the hook in which they are called.
    """

    order: ClassVar[int] = 0
    """Callbacks are sorted by this number (stable): negative first, positive last."""
    monitors: ClassVar[bool] = False
    """True for a callback that reads a metric: its ``on_train_epoch_end`` runs after the module's own and sees its values."""

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint; must differ between two callbacks of one class."""
        return type(self).__qualname__

    def make_state_key(self, **arguments: Any) -> str:
        """Return a ``state_key`` made of the class name and the arguments that tell two instances apart."""
        return f"{type(self).__qualname__}{arguments!r}"

    def _generate_state_key(self, **kwargs: Any) -> str:
        """The name under which subclasses written for Lightning call ``make_state_key``."""
        return self.make_state_key(**kwargs)

    def setup(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Called when fit, validate, test or predict begins; ``stage`` is the name of the entry point."""

    def teardown(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Called when fit, validate, test or predict ends."""

    def on_fit_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called when fit begins, after all set-up."""

    def on_fit_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called when fit ends."""

    def on_sanity_check_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called before the few validation batches that run ahead of training."""

    def on_sanity_check_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called after the few validation batches that run ahead of training."""

    def on_train_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called once, before the first training epoch."""

    def on_train_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called once, after the last training epoch."""

    def on_train_epoch_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called when a training epoch begins."""

    def on_train_epoch_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called when a training epoch ends, after its validation."""

    def on_train_batch_start(self, trainer: TrainerView, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Called before a training step."""

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: Any, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Called after a training step and its update; ``outputs`` is what the step returned, as a dict, ``loss`` detached."""

    def on_validation_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called when a validation run begins."""

    def on_validation_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called when a validation run ends, after its metrics were reduced."""

    def on_validation_epoch_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called before the first validation batch."""

    def on_validation_epoch_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called after the last validation batch."""

    def on_validation_batch_start(
        self, trainer: TrainerView, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before a validation step."""

    def on_validation_batch_end(
        self,
        trainer: TrainerView,
        pl_module: Any,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called after a validation step."""

    def on_test_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called when a test run begins."""

    def on_test_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called when a test run ends, after its metrics were reduced."""

    def on_test_epoch_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called before the first test batch."""

    def on_test_epoch_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called after the last test batch."""

    def on_test_batch_start(
        self, trainer: TrainerView, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before a test step."""

    def on_test_batch_end(
        self,
        trainer: TrainerView,
        pl_module: Any,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called after a test step."""

    def on_predict_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called when a prediction run begins."""

    def on_predict_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called when a prediction run ends."""

    def on_predict_epoch_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called before the first prediction batch."""

    def on_predict_epoch_end(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called after the last prediction batch."""

    def on_predict_batch_start(
        self, trainer: TrainerView, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before a prediction step."""

    def on_predict_batch_end(
        self, trainer: TrainerView, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called after a prediction step."""

    def on_before_zero_grad(self, trainer: TrainerView, pl_module: Any, optimizer: Optimizer) -> None:
        """Called before the gradients of ``optimizer`` are cleared."""

    def on_before_backward(self, trainer: TrainerView, pl_module: Any, loss: Tensor) -> None:
        """Called before ``loss.backward()``; the loss is already divided by the number of accumulated batches."""

    def on_after_backward(self, trainer: TrainerView, pl_module: Any) -> None:
        """Called after ``loss.backward()``, before the optimizer step."""

    def on_before_optimizer_step(self, trainer: TrainerView, pl_module: Any, optimizer: Optimizer) -> None:
        """Called before ``optimizer.step()``, before the gradients are clipped."""

    def on_exception(self, trainer: TrainerView, pl_module: Any, exception: BaseException) -> None:
        """Called when any exception, a KeyboardInterrupt too, ends the run; the exception goes on afterwards."""

    def state_dict(self) -> dict[str, Any]:
        """Return what this callback needs to resume: plain data and tensors only."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""

    def on_save_checkpoint(self, trainer: TrainerView, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Called with the complete checkpoint before it is written; add to it in place."""

    def on_load_checkpoint(self, trainer: TrainerView, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Called with the complete checkpoint after it was read."""

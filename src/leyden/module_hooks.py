# SPDX-License-Identifier: Apache-2.0
"""The hooks that a module may write, as typed no-ops: those of the data (shared with data modules), those of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from leyden.errors import MisconfigurationException
from leyden.tree import move_to
from leyden.types import STEP_OUTPUT


class DataHooks:
    """The hooks that deliver and move data; a module and a data module have the same ones."""

    prepare_data_per_node: bool = True
    """Whether ``prepare_data`` runs once on each node (True) or once in all (False)."""
    allow_zero_length_dataloader_with_multiple_devices: bool = False
    """Whether a loader that is empty on one of several devices is accepted."""

    def prepare_data(self) -> None:
        """Download or prepare data, on one process; set no state here."""

    def setup(self, stage: str) -> None:
        """Called on every process when an entry point begins; ``stage`` is 'fit', 'validate', 'test' or 'predict'."""

    def teardown(self, stage: str) -> None:
        """Called on every process when an entry point ends."""

    def train_dataloader(self) -> Any:
        """Return the iterable(s) of training batches."""
        raise self._no_loader("train_dataloader", "fit")

    def val_dataloader(self) -> Any:
        """Return the iterable(s) of validation batches."""
        raise self._no_loader("val_dataloader", "validate")

    def test_dataloader(self) -> Any:
        """Return the iterable(s) of test batches."""
        raise self._no_loader("test_dataloader", "test")

    def predict_dataloader(self) -> Any:
        """Return the iterable(s) of batches to predict."""
        raise self._no_loader("predict_dataloader", "predict")

    def _no_loader(self, name: str, entry: str) -> MisconfigurationException:
        return MisconfigurationException(
            f"{type(self).__name__} has no {name}(): write one, or pass the loader to Trainer.{entry}()."
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch before it moves to the device; return it."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to ``device``; return it. Override for types that have no ``to`` method."""
        return move_to(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch after it moved to the device; return it."""
        return batch


class CheckpointHooks:
    """The hooks with which a module has its say in a checkpoint."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called with the complete checkpoint before it is written; add to it in place."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called with the complete checkpoint before the weights are taken from it."""


class ModelHooks(CheckpointHooks):
    """The hooks of training, validation, test and predict, in the order in which they run within each."""

    def configure_model(self) -> None:
        """Build large layers here, on the device and in the dtype of the run; may be called more than once."""

    def configure_sharded_model(self) -> None:
        """The former name of ``configure_model``."""

    def on_fit_start(self) -> None:
        """Called when fit begins, after all set-up."""

    def on_fit_end(self) -> None:
        """Called when fit ends."""

    def on_train_start(self) -> None:
        """Called once, before the first training epoch."""

    def on_train_end(self) -> None:
        """Called once, after the last training epoch."""

    def on_train_epoch_start(self) -> None:
        """Called when a training epoch begins."""

    def on_train_epoch_end(self) -> None:
        """Called when a training epoch ends, after its validation."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Called before a training step; return -1 to end the epoch here."""

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        """Called after a training step and its optimizer step."""

    def on_validation_start(self) -> None:
        """Called when a validation run begins."""

    def on_validation_end(self) -> None:
        """Called when a validation run ends."""

    def on_validation_epoch_start(self) -> None:
        """Called before the first validation batch."""

    def on_validation_epoch_end(self) -> None:
        """Called after the last validation batch."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before a validation step."""

    def on_validation_batch_end(
        self, outputs: STEP_OUTPUT, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called after a validation step."""

    def on_test_start(self) -> None:
        """Called when a test run begins."""

    def on_test_end(self) -> None:
        """Called when a test run ends."""

    def on_test_epoch_start(self) -> None:
        """Called before the first test batch."""

    def on_test_epoch_end(self) -> None:
        """Called after the last test batch."""

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before a test step."""

    def on_test_batch_end(self, outputs: STEP_OUTPUT, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after a test step."""

    def on_predict_start(self) -> None:
        """Called when a prediction run begins."""

    def on_predict_end(self) -> None:
        """Called when a prediction run ends."""

    def on_predict_epoch_start(self) -> None:
        """Called before the first prediction batch."""

    def on_predict_epoch_end(self) -> None:
        """Called after the last prediction batch."""

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called before a prediction step."""

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Called after a prediction step."""

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Called before the gradients of ``optimizer`` are cleared."""

    def on_before_backward(self, loss: Tensor) -> None:
        """Called before backward; the loss is already divided by the number of accumulated batches."""

    def on_after_backward(self) -> None:
        """Called after backward; gradients are not unscaled yet."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Called before ``optimizer.step()``, with unscaled gradients, before they are clipped."""

    def on_validation_model_zero_grad(self) -> None:
        """Called before validation inside fit, to free the memory of gradients."""
        self.zero_grad()  # type: ignore[attr-defined]

    def on_validation_model_eval(self) -> None:
        """Put the model into eval mode for validation."""
        self.eval()  # type: ignore[attr-defined]

    def on_validation_model_train(self) -> None:
        """Put the model back after validation; only called when overridden: else each submodule gets its own former mode."""
        self.train()  # type: ignore[attr-defined]

    def on_test_model_eval(self) -> None:
        """Put the model into eval mode for test."""
        self.eval()  # type: ignore[attr-defined]

    def on_test_model_train(self) -> None:
        """Put the model back after test; only called when overridden: else each submodule gets its own former mode."""
        self.train()  # type: ignore[attr-defined]

    def on_predict_model_eval(self) -> None:
        """Put the model into eval mode for predict."""
        self.eval()  # type: ignore[attr-defined]

    def on_predict_model_train(self) -> None:
        """Put the model back after predict; only called when overridden: else each submodule gets its own former mode."""
        self.train()  # type: ignore[attr-defined]

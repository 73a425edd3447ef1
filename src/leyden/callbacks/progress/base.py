# SPDX-License-Identifier: Apache-2.0
"""The base of progress bars: what they may ask of the run, and the metrics they show."""

from __future__ import annotations

import weakref
from typing import Any

from leyden.callback import Callback
from leyden.runtime.ranks import rank_zero_warn
from leyden.types import TrainerFn, TrainerView


class ProgressBar(Callback):
    """Extend this class, and override hooks, to show progress in a way of your own.

    While a run lasts ``self.trainer`` is its trainer. Call ``super().__init__()`` and, if you override it,
    ``super().setup(...)``.
    """

    monitors = True  # so that the last line of an epoch has what the module logs when the epoch ends

    def __init__(self) -> None:
        self._trainer_ref: weakref.ref[Any] | None = None  # weak: a callback must not keep a trainer alive
        self._current_eval_dataloader_idx: int | None = None
        self._warned_of_duplicates = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer_ref": None}

    @property
    def trainer(self) -> TrainerView:
        """The trainer of the present run.

        Raises:
            TypeError: If no run has set up this bar yet.
        """
        trainer = self._trainer_ref() if self._trainer_ref is not None else None
        if trainer is None:
            raise TypeError(
                f"{type(self).__name__}.trainer is known only during a run: pass the bar to Trainer(callbacks=[...]) "
                "and use it inside hooks, after setup."
            )
        view: TrainerView = trainer
        return view

    @property
    def sanity_check_description(self) -> str:
        """The label of the sanity check."""
        return "Sanity Checking"

    @property
    def train_description(self) -> str:
        """The label of training: the epoch, counted from 1, and how many there will be if that is known."""
        epochs = self.trainer.max_epochs
        of = f"/{epochs}" if epochs is not None and epochs > 0 else ""
        return f"Epoch {self.trainer.current_epoch + 1}{of}"

    @property
    def validation_description(self) -> str:
        """The label of validation."""
        return "Validation"

    @property
    def test_description(self) -> str:
        """The label of testing."""
        return "Testing"

    @property
    def predict_description(self) -> str:
        """The label of prediction."""
        return "Predicting"

    @property
    def total_train_batches(self) -> int | float:
        """Training batches of this epoch: fewer than the loader has if ``max_steps`` ends it; ``inf`` if unknown."""
        trainer = self.trainer
        if trainer.max_epochs in (None, -1) and trainer.max_steps > 0:
            remaining_steps = trainer.max_steps - trainer.global_step
            return min(trainer.num_training_batches, remaining_steps * trainer.batches_per_update)
        return trainer.num_training_batches

    @property
    def total_val_batches_current_dataloader(self) -> int | float:
        """Batches of the validation loader that runs, in a sanity check those of the check; ``inf`` if unknown."""
        trainer = self.trainer
        return self._of_current_loader(
            trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        )

    @property
    def total_test_batches_current_dataloader(self) -> int | float:
        """Batches of the test loader that runs; ``inf`` if unknown."""
        return self._of_current_loader(self.trainer.num_test_batches)

    @property
    def total_predict_batches_current_dataloader(self) -> int | float:
        """Batches of the prediction loader that runs; ``inf`` if unknown."""
        return self._of_current_loader(self.trainer.num_predict_batches)

    @property
    def total_val_batches(self) -> int | float:
        """Batches of all validation loaders together; 0 if this epoch has no validation."""
        trainer = self.trainer
        every = trainer.check_val_every_n_epoch
        if not trainer.enable_validation or (every is not None and (trainer.current_epoch + 1) % every != 0):
            return 0
        return sum(trainer.num_val_batches)

    def _of_current_loader(self, batches: list[int | float]) -> int | float:
        index = self._current_eval_dataloader_idx or 0
        return batches[index] if index < len(batches) else float("inf")

    def has_dataloader_changed(self, dataloader_idx: int) -> bool:
        """Take note of the loader that runs, and return whether it is another one than at the last call."""
        changed = self._current_eval_dataloader_idx != dataloader_idx
        self._current_eval_dataloader_idx = dataloader_idx
        return changed

    def reset_dataloader_idx_tracker(self) -> None:
        """Forget which loader runs."""
        self._current_eval_dataloader_idx = None

    def disable(self) -> None:
        """Show nothing from now on; called on all processes but the main one."""
        raise NotImplementedError(f"{type(self).__name__} must override disable(), so that other ranks can be silent.")

    def enable(self) -> None:
        """Undo ``disable``."""
        raise NotImplementedError(f"{type(self).__name__} must override enable().")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without disturbing the display; the arguments are those of the builtin."""
        print(*args, **kwargs)

    def setup(self, trainer: TrainerView, pl_module: Any, stage: str) -> None:
        """Get to know the trainer; silent on all processes but the main one."""
        self._trainer_ref = weakref.ref(trainer)
        if not trainer.is_global_zero:
            self.disable()

    def get_metrics(self, trainer: TrainerView, pl_module: Any) -> dict[str, Any]:
        """Return what is shown next to the bar: the version of the logger, and what was logged with ``prog_bar=True``.

        Override it to show more or less. It is called only when something is about to be drawn.
        """
        standard = get_standard_metrics(trainer)
        logged = trainer.progress_bar_metrics
        duplicates = sorted(standard.keys() & logged.keys())
        if duplicates and not self._warned_of_duplicates:
            self._warned_of_duplicates = True
            rank_zero_warn(
                f"self.log({duplicates[0]!r}, ..., prog_bar=True) hides the value that the progress bar shows under "
                "this name by itself; use another name, or override get_metrics() of the bar."
            )
        return {**standard, **logged}


def get_standard_metrics(trainer: TrainerView) -> dict[str, int | str]:
    """Return ``{"v_num": version}`` of the loggers, the last four characters if it is a text; empty without one."""
    versions = list(dict.fromkeys(logger.version for logger in trainer.loggers if logger.version not in ("", None)))
    if not versions:
        return {}
    version = versions[0] if len(versions) == 1 else "_".join(map(str, versions))
    return {"v_num": version[-4:] if isinstance(version, str) else version}


def in_fit(trainer: TrainerView) -> bool:
    """Whether the entry point that runs is ``fit``: then validation is an aside."""
    return trainer.state.fn is TrainerFn.FITTING

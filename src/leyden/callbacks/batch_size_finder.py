# SPDX-License-Identifier: Apache-2.0
"""Finds the largest batch size that fits in memory, when a run begins or in any other hook of it."""

from __future__ import annotations

from typing import Any, ClassVar

from leyden.callback import Callback
from leyden.callbacks.batch_size_search import MODES, check_margin, find_batch_size
from leyden.callbacks.settings import has_setting
from leyden.errors import EndOfRun, MisconfigurationException
from leyden.runtime.ranks import rank_zero_warn
from leyden.types import TrainerFn, TrainerView


class BatchSizeFinder(Callback):
    """Tries larger and larger batches ahead of a run, and begins it with the largest that memory is enough for.

    The loaders must be made by the module or the data module, from an attribute that holds the batch size. With several
    processes (``"ddp"``) each tries by itself, and what is too large for one is too large for all.

    To find it at other moments, derive a class::

        class ForTest(BatchSizeFinder):
            def on_fit_start(self, trainer, pl_module):
                return

            def on_test_start(self, trainer, pl_module):
                self.scale_batch_size(trainer, pl_module)

    Args:
        mode: ``"power"`` doubles until memory is not enough; ``"binsearch"`` then searches between the last two.
        steps_per_trial: Updates, or batches of an evaluation, with each size.
        init_val: The first size.
        max_trials: How many sizes are tried.
        batch_arg_name: The attribute that holds the size, of the module, the data module, or their hparams.
        margin: By which part the result of ``"binsearch"`` is lowered, for safety.
        max_val: The largest size.

    Attributes:
        optimal_batch_size: What was found; ``init_val`` before, None with ``fast_dev_run``.

    Raises:
        ValueError: for another mode, or a margin outside of [0, 1).
        MisconfigurationException: when the run begins, where the size cannot be changed.
    """

    SUPPORTED_MODES: ClassVar[tuple[str, ...]] = MODES
    order: ClassVar[int] = -100  # others shall see the loaders that there will be

    def __init__(
        self,
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> None:
        mode = mode.lower()
        if mode not in self.SUPPORTED_MODES:
            raise ValueError(f"BatchSizeFinder(mode={mode!r}): `mode` should be either of {self.SUPPORTED_MODES}.")
        check_margin(margin)
        self.optimal_batch_size: int | None = init_val
        self._mode, self._steps_per_trial, self._init_val, self._max_trials = (
            mode,
            steps_per_trial,
            init_val,
            max_trials,
        )
        self._batch_arg_name, self._margin, self._max_val = batch_arg_name, margin, max_val
        self._early_exit = False

    def setup(self, trainer: TrainerView, pl_module: Any, stage: str | None = None) -> None:
        """Check that the size can be changed.

        Raises:
            MisconfigurationException: if it cannot.
        """
        name, rehearsal = self._batch_arg_name, trainer.rehearsal()
        if rehearsal.given:
            raise MisconfigurationException(
                "The Batch size finder cannot be used with dataloaders passed directly to"
                f" `.{trainer.state.fn}()`, since it cannot make others. Write them in the module or in a data module, from"
                f" self.{name}."
            )
        if rehearsal.world_size > 1:
            rehearsal.on_its_own()
        if not has_setting(pl_module, name):
            raise MisconfigurationException(
                f"Field {name} not found in `model`, `datamodule`, nor their `hparams` attributes: it holds the batch size,"
                " and the loaders are made from it. Name another by batch_arg_name=."
            )
        if hasattr(pl_module, name) and name in pl_module.hparams:
            rank_zero_warn(
                f"Field `model.{name}` and `model.hparams.{name}` are mutually exclusive! Both are set to the batch size that"
                " is found; remove the one from which no loader is made."
            )

    def scale_batch_size(self, trainer: TrainerView, pl_module: Any) -> None:
        """Find the size now, in a hook of a run."""
        self.optimal_batch_size = find_batch_size(
            trainer, pl_module, self._mode, self._steps_per_trial, self._init_val, self._max_trials,
            self._batch_arg_name, self._margin, self._max_val, self._early_exit,
        )  # fmt: skip
        if self._early_exit:
            raise EndOfRun

    def on_fit_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Find the size for a fit."""
        self.scale_batch_size(trainer, pl_module)

    def on_validation_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Find the size for ``Trainer.validate``; not for the validation of a fit."""
        if not trainer.sanity_checking and trainer.state.fn is TrainerFn.VALIDATING:
            self.scale_batch_size(trainer, pl_module)

    def on_test_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Find the size for a test."""
        self.scale_batch_size(trainer, pl_module)

    def on_predict_start(self, trainer: TrainerView, pl_module: Any) -> None:
        """Find the size for a prediction."""
        self.scale_batch_size(trainer, pl_module)

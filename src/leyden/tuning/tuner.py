# SPDX-License-Identifier: Apache-2.0
"""``Tuner``: finds a learning rate or a batch size for a Trainer, and leaves everything else as it was."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from leyden.callbacks.batch_size_finder import BatchSizeFinder
from leyden.callbacks.batch_size_search import check_margin
from leyden.callbacks.learning_rate_finder import LearningRateFinder
from leyden.callbacks.rate_search import LRFinder
from leyden.errors import MisconfigurationException, did_you_mean
from leyden.loggers.base import DummyLogger
from leyden.runtime.seed import isolate_rng
from leyden.trainer import Trainer

_METHODS = ("fit", "validate", "test", "predict")


class Tuner:
    """Finds settings ahead of a run of ``trainer``.

    A search begins a run and ends it as soon as it has found what it looks for. The module, its optimizers, the random
    generators, the Trainer, its callbacks and its counters are afterwards what they were, nothing is logged, and no file is
    written: a fit that follows gives the numbers that it would have given. What changes is the setting that was looked for.

    Args:
        trainer: Whose devices, precision, callbacks and bounds count.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def lr_find(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        method: str = "fit",
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> LRFinder | None:
        """Make a learning-rate range test: train while the rate rises, and look where the loss falls fastest.

        Args:
            model: As in ``Trainer.fit``, like the next two and ``datamodule``.
            train_dataloaders: See ``model``.
            val_dataloaders: See ``model``.
            dataloaders: Must be None.
            datamodule: See ``model``.
            method: Must be ``"fit"``.
            min_lr: The lowest rate.
            max_lr: The highest.
            num_training: How many rates are tried, an update each.
            mode: The rate is multiplied (``"exponential"``) for each update, or added to (``"linear"``).
            early_stop_threshold: Stop where the smoothed loss is so many times the best; None never.
            update_attr: Set the attribute that holds the rate to the suggestion.
            attr_name: That attribute, of the module, the data module, or their hparams; empty is ``lr`` or
                ``learning_rate``.

        Returns:
            The rates and losses, with ``suggestion()`` and ``plot()``; None with ``fast_dev_run``. The same on all ranks.

        Raises:
            MisconfigurationException: for another method, or more than one optimizer.
            AttributeError: where the attribute is not found.
            ValueError: for another mode, or a Trainer that has a LearningRateFinder already.
        """
        if method != "fit":
            raise MisconfigurationException(
                f"lr_find(method={method!r}): method='fit' is the only valid configuration to run lr finder."
            )
        _check_loaders(train_dataloaders, val_dataloaders, dataloaders, method)
        self._check_alone(LearningRateFinder)
        finder = LearningRateFinder(min_lr, max_lr, num_training, mode, early_stop_threshold, update_attr, attr_name)
        self._run(finder, method, model, train_dataloaders, val_dataloaders, datamodule=datamodule)
        return finder.optimal_lr

    def scale_batch_size(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        method: str = "fit",
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> int | None:
        """Find the largest batch size that memory is enough for, and set the attribute that holds it.

        Args:
            model: As in the entry point, like ``datamodule``. One of the two makes the loaders, from the attribute.
            train_dataloaders: Must be None: loaders that are given cannot be made anew.
            val_dataloaders: See ``train_dataloaders``.
            dataloaders: See ``train_dataloaders``.
            datamodule: See ``model``.
            method: The entry point: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
            mode: ``"power"`` doubles until memory is not enough; ``"binsearch"`` then searches between the last two.
            steps_per_trial: Updates, or batches of an evaluation, with each size.
            init_val: The first size.
            max_trials: How many sizes are tried; with ``"binsearch"``, how many that fit.
            batch_arg_name: The attribute, of the module, the data module, or their hparams.
            margin: By which part the result of ``"binsearch"`` is lowered, for safety.
            max_val: The largest size; on a CPU memory may never run out.

        Returns:
            The size; None with ``fast_dev_run``. Of several processes (``"ddp"``) each tries by itself, and all get the
            smallest: what is too large for one is too large for all.

        Raises:
            MisconfigurationException: where the size cannot be changed, or not even a batch of 1 fits.
            ValueError: for another mode or method, or a Trainer that has a BatchSizeFinder already.
        """
        _check_loaders(train_dataloaders, val_dataloaders, dataloaders, method)
        check_margin(margin)
        self._check_alone(BatchSizeFinder)
        finder = BatchSizeFinder(mode, steps_per_trial, init_val, max_trials, batch_arg_name, margin, max_val)
        loaders = (train_dataloaders, val_dataloaders) if method == "fit" else (dataloaders,)
        self._run(finder, method, model, *loaders, datamodule=datamodule)
        return finder.optimal_batch_size

    def _check_alone(self, kind: type) -> None:
        if any(isinstance(callback, kind) for callback in self._trainer.callbacks):
            raise ValueError(
                f"Trainer is already configured with a `{kind.__name__}` callback, which does the same when the run begins."
                " Remove it to use the Tuner."
            )

    def _run(self, finder: Any, method: str, model: Any, *loaders: Any, datamodule: Any) -> None:
        """Begin a run in which ``finder`` comes first, and ends it."""
        trainer = self._trainer
        vars(finder)["_early_exit"] = True
        callbacks, loggers, wished = trainer.callbacks, trainer.loggers, trainer.should_stop
        with isolate_rng(), _unchanged(callbacks):
            trainer.callbacks = [finder, *callbacks]
            trainer.loggers = [DummyLogger() for _ in loggers]
            try:
                getattr(trainer, method)(model, *loaders, datamodule=datamodule)
            finally:
                trainer.callbacks, trainer.loggers, trainer.should_stop = callbacks, loggers, wished


def _check_loaders(train: Any, val: Any, other: Any, method: str) -> None:
    if method not in _METHODS:
        raise ValueError(
            f"method {method!r} is invalid. Should be one of {_METHODS}.{did_you_mean(str(method), _METHODS)}"
        )
    if method == "fit" and other is not None:
        raise MisconfigurationException(
            "In tuner with method='fit', `dataloaders` argument should be None: a fit has `train_dataloaders` and"
            " `val_dataloaders`."
        )
    if method != "fit" and (train is not None or val is not None):
        raise MisconfigurationException(
            f"In tuner with `method`={method!r}, `train_dataloaders` and `val_dataloaders` arguments should be None: it has"
            " `dataloaders`."
        )


@contextmanager
def _unchanged(callbacks: list[Any]) -> Iterator[None]:
    """Keep the attributes of callbacks as they are: the set-up of a run settles folders, and remembers the Trainer."""
    kept = [(vars(callback), _remembered(vars(callback))) for callback in callbacks]
    try:
        yield
    finally:
        for own, attributes in kept:
            own.clear()
            own.update(attributes)


def _remembered(attributes: Mapping[str, Any]) -> dict[str, Any]:
    collections = (dict, list, set, deque)
    return {name: copy.copy(value) if type(value) in collections else value for name, value in attributes.items()}

# SPDX-License-Identifier: Apache-2.0
"""The read-only face of the Trainer: where a run stands, what it uses, what it measured; and the knobs it can be set by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Generic, TypeVar, overload

from torch import Tensor
from torch.optim import Optimizer

from leyden.config import TrainerConfig
from leyden.data.combined import CombinedLoader
from leyden.loops.batches import has_source
from leyden.loops.evaluate import EvaluationLoop
from leyden.loops.fit import FitLoop
from leyden.loops.predict import PredictLoop
from leyden.loops.session import Session
from leyden.progress import Progress
from leyden.results import Results, to_floats
from leyden.signals import Interrupt
from leyden.strategies import Strategy
from leyden.trainer_tools import TrainerTools
from leyden.types import RunningStage, TrainerFn, TrainerState, TrainerStatus
from leyden.vintage import VintageTrainer

T = TypeVar("T")


class Knob(Generic[T]):
    """An attribute of the Trainer that lives in its config: setting it checks the value like the constructor does."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, trainer: None, owner: type) -> Knob[T]: ...

    @overload
    def __get__(self, trainer: TrainerFace, owner: type) -> T: ...

    def __get__(self, trainer: TrainerFace | None, owner: type) -> Any:
        return self if trainer is None else getattr(trainer.config, self.name)

    def __set__(self, trainer: TrainerFace, value: T) -> None:
        trainer.config = trainer.config.replace(**{self.name: value})


class TrainerFace(TrainerTools, VintageTrainer):
    """Everything that can be read of a Trainer."""

    config: TrainerConfig
    state: TrainerState
    progress: Progress
    results: Results
    fit_loop: FitLoop
    validate_loop: EvaluationLoop
    test_loop: EvaluationLoop
    predict_loop: PredictLoop
    default_root_dir: str
    should_stop: bool
    _strategy: Strategy
    _callbacks: list[Any]
    _loggers: list[Any]
    _profiler: Any
    _accelerator: Any
    _datamodule: Any
    _session: Session | None
    _recorder: Any
    _interrupt: Interrupt
    _ckpt_path: Any

    accumulate_grad_batches = Knob[int]()
    gradient_clip_val = Knob["int | float | None"]()
    gradient_clip_algorithm = Knob["str | None"]()
    fast_dev_run = Knob["int | bool"]()
    overfit_batches = Knob["int | float"]()
    limit_train_batches = Knob["int | float"]()
    limit_val_batches = Knob["int | float"]()
    limit_test_batches = Knob["int | float"]()
    limit_predict_batches = Knob["int | float"]()
    val_check_interval = Knob[Any]()
    check_val_every_n_epoch = Knob["int | None"]()
    num_sanity_val_steps = Knob["int | float"]()
    log_every_n_steps = Knob[int]()
    reload_dataloaders_every_n_epochs = Knob[int]()
    enable_autolog_hparams = Knob[bool]()
    barebones = Knob[bool]()

    # ------------------------------------------------------------------ where the run stands

    @property
    def interrupted(self) -> bool:
        """Whether the last run was ended by an exception or Ctrl-C."""
        return self.state.status is TrainerStatus.INTERRUPTED

    def _is_stage(self, stage: RunningStage) -> bool:
        return self.state.stage is stage

    def _set_stage(self, stage: RunningStage, on: bool) -> None:
        if on:
            self.state.stage = stage
        elif self.state.stage is stage:
            self.state.stage = None

    @property
    def training(self) -> bool:
        """Whether the training loop runs at this moment."""
        return self._is_stage(RunningStage.TRAINING)

    @training.setter
    def training(self, on: bool) -> None:
        self._set_stage(RunningStage.TRAINING, on)

    @property
    def validating(self) -> bool:
        """Whether a validation runs at this moment."""
        return self._is_stage(RunningStage.VALIDATING)

    @validating.setter
    def validating(self, on: bool) -> None:
        self._set_stage(RunningStage.VALIDATING, on)

    @property
    def testing(self) -> bool:
        """Whether a test runs at this moment."""
        return self._is_stage(RunningStage.TESTING)

    @testing.setter
    def testing(self, on: bool) -> None:
        self._set_stage(RunningStage.TESTING, on)

    @property
    def predicting(self) -> bool:
        """Whether a prediction runs at this moment."""
        return self._is_stage(RunningStage.PREDICTING)

    @predicting.setter
    def predicting(self, on: bool) -> None:
        self._set_stage(RunningStage.PREDICTING, on)

    @property
    def sanity_checking(self) -> bool:
        """Whether the few validation batches ahead of training run at this moment."""
        return self._is_stage(RunningStage.SANITY_CHECKING)

    @sanity_checking.setter
    def sanity_checking(self, on: bool) -> None:
        self._set_stage(RunningStage.SANITY_CHECKING, on)

    @property
    def evaluating(self) -> bool:
        """Whether validation, test or the sanity check runs at this moment."""
        return self.state.stage is not None and self.state.stage.evaluating

    @property
    def received_sigterm(self) -> bool:
        """Whether a signal asked the process to end, in this run: SIGTERM, or SIGUSR1 or SIGUSR2, which announce it."""
        return self._interrupt.terminates

    def has_loaders(self, prefix: str) -> bool:
        """Whether the run that goes on has loaders of this kind ("train", "val", "test", "predict"), from whoever gave them."""
        return self._session is not None and has_source(self._session, prefix)

    @property
    def global_step(self) -> int:
        """Updates of the model so far."""
        return self.progress.global_step

    @property
    def current_epoch(self) -> int:
        """Epochs completed so far; the index of the one that runs."""
        return self.progress.epoch

    @property
    def batches_that_stepped(self) -> int:
        """Training batches that ended with an update: the x-axis of the loggers."""
        return self.progress.batches_that_stepped

    @property
    def is_last_batch(self) -> bool:
        """Whether the training batch that runs now is the last of its epoch."""
        return self.fit_loop.last

    @property
    def max_epochs(self) -> int | None:
        """Bound on epochs; -1 is none. Before the first fit, as it was given."""
        return self.fit_loop.max_epochs if self._bounds_known else self.config.max_epochs

    @property
    def min_epochs(self) -> int | None:
        """Epochs that run whatever asks to stop."""
        return self.fit_loop.min_epochs if self._bounds_known else self.config.min_epochs

    _bounds_known = False
    _ckpt_path_named = False
    _ckpt_wish: Any = None
    """What ``ckpt_path`` was set to; it holds until it is reset."""

    @property
    def max_steps(self) -> int:
        """Bound on updates of the model; -1 is none."""
        return self.config.max_steps

    @property
    def min_steps(self) -> int | None:
        """Updates that are made whatever asks to stop."""
        return self.config.min_steps

    @property
    def enable_validation(self) -> bool:
        """Whether a fit validates: there are a validation step, its loaders, and batches to take."""
        session = self._session
        return session is not None and session.validates and self.config.limit_val_batches > 0

    @property
    def estimated_stepping_batches(self) -> int | float:
        """How many updates this fit makes; infinity if nothing bounds it. Reading it changes nothing.

        Raises:
            RuntimeError: outside fit, when the training loaders are not known.
        """
        max_epochs, max_steps = self.max_epochs, self.config.max_steps
        if max_epochs is None or max_epochs == -1:
            return math.inf if max_steps == -1 else max_steps
        if self.fit_loop.loader is None:
            if self._session is None:
                raise RuntimeError(
                    "Trainer.estimated_stepping_batches is known inside fit (in configure_optimizers, say): before, the"
                    " length of the training data is not."
                )
            from leyden.loops.position import ask_ahead  # noqa: PLC0415  # a run has loaded it

            ask_ahead(self.fit_loop, self._session)
        batches = self.fit_loop.num_batches
        if batches == math.inf:
            return math.inf if max_steps == -1 else max_steps
        factors = [self.batches_per_update] * max_epochs
        for callback in self._callbacks:
            scheduled = getattr(callback, "get_accumulate_grad_batches", None)
            if scheduled is not None:
                factors = [scheduled(epoch) * self.fit_loop.turns for epoch in range(max_epochs)]
        total = sum(max(math.ceil(batches / factor), 1) for factor in factors)
        return total if max_steps == -1 else min(total, max_steps)

    def validation_due(self) -> bool:
        """In ``on_train_batch_end``: whether validation runs right after this batch."""
        return self._session is not None and self.fit_loop.validation_is_due(self._session)

    # ------------------------------------------------------------------ data

    @property
    def batches_per_update(self) -> int:
        """Batches of this process in one update: more than ``accumulate_grad_batches`` where it stands in for others."""
        return self.config.accumulate_grad_batches * self.fit_loop.turns

    @property
    def num_training_batches(self) -> int | float:
        """Training batches of an epoch; infinity if not known."""
        return self.fit_loop.num_batches

    @property
    def num_val_batches(self) -> list[int | float]:
        """Validation batches of each loader."""
        loop = self.validate_loop if self.state.fn is TrainerFn.VALIDATING else self.fit_loop.validation
        return loop.max_batches

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        """Validation batches of each loader in the sanity check."""
        most = self.config.num_sanity_val_steps
        return [min(math.inf if most == -1 else most, count) for count in self.fit_loop.validation.max_batches]

    @property
    def num_test_batches(self) -> list[int | float]:
        """Test batches of each loader."""
        return self.test_loop.max_batches

    @property
    def num_predict_batches(self) -> list[int | float]:
        """Prediction batches of each loader."""
        return self.predict_loop.max_batches

    @property
    def val_check_batch(self) -> int | float | None:
        """Validation follows every so many batches: infinity at the end of an epoch only, None if it goes by time."""
        loop = self.fit_loop
        return None if loop.interval.unit == "time" else loop.val_every

    @property
    def train_dataloader(self) -> Any:
        """The training loaders, as they were given."""
        return _given(self.fit_loop.loader)

    @property
    def val_dataloaders(self) -> Any:
        """The validation loaders, as they were given."""
        return _given(self.fit_loop.validation.loader or self.validate_loop.loader)

    @property
    def test_dataloaders(self) -> Any:
        """The test loaders, as they were given."""
        return _given(self.test_loop.loader)

    @property
    def predict_dataloaders(self) -> Any:
        """The prediction loaders, as they were given."""
        return _given(self.predict_loop.loader)

    @property
    def datamodule(self) -> Any:
        """The data module of the run, or None."""
        return self._datamodule

    # ------------------------------------------------------------------ metrics

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """All metrics that callbacks can monitor, as 0-d tensors."""
        self.results.collect()
        return self.results.callback

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """All metrics that go to loggers, as 0-d tensors."""
        self.results.collect()
        return self.results.logged

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """All metrics for the progress bar, read back from the device."""
        self.results.collect()
        return to_floats(self.results.bar)

    @property
    def loggers(self) -> list[Any]:
        """All loggers."""
        return self._loggers

    @loggers.setter
    def loggers(self, loggers: list[Any] | None) -> None:
        self._loggers = list(loggers or [])

    @property
    def logger(self) -> Any:
        """The first logger, or None."""
        return self._loggers[0] if self._loggers else None

    @logger.setter
    def logger(self, logger: Any) -> None:
        self._loggers = [logger] if logger else []

    @property
    def log_dir(self) -> str | None:
        """The folder of this run: the first logger's, else ``default_root_dir``."""
        if not self._loggers:
            return self.default_root_dir
        first = self._loggers[0]
        found = getattr(first, "log_dir", None)
        return found if found is not None else getattr(first, "save_dir", None)

    # ------------------------------------------------------------------ parts

    @property
    def strategy(self) -> Strategy:
        """Where the module lives and how it steps."""
        return self._strategy

    @property
    def accelerator(self) -> Any:
        """The kind of device."""
        return self._accelerator

    @property
    def lightning_module(self) -> Any:
        """The module of the run, or None before the first."""
        return self._strategy.module

    @property
    def model(self) -> Any:
        """The module of the run, as the strategy wraps it."""
        wrapped = getattr(self._strategy, "model", None)
        return self._strategy.module if wrapped is None else wrapped

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers of the fit."""
        return self._strategy.optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Optimizer]) -> None:
        self._strategy.exchange_optimizers(list(optimizers))
        self.progress.optimizer_steps = [0] * len(optimizers)

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        """The learning-rate schedules of the fit."""
        return self._strategy.lr_scheduler_configs

    @property
    def precision_plugin(self) -> Any:
        """How numbers are stored."""
        return self._strategy.precision

    @property
    def precision(self) -> str:
        """The name of the number format, such as ``"32-true"``."""
        return self._strategy.precision.precision

    @property
    def scaler(self) -> Any:
        """The gradient scaler of 16-bit mixed precision, or None."""
        return getattr(self._strategy.precision, "scaler", None)

    @property
    def callbacks(self) -> list[Any]:
        """All callbacks, in the order in which they run."""
        return self._callbacks

    @callbacks.setter
    def callbacks(self, callbacks: list[Any]) -> None:
        self._callbacks = callbacks

    def _of_type(self, name: str) -> list[Any]:
        return [item for item in self._callbacks if any(cls.__name__ == name for cls in type(item).__mro__)]

    @property
    def checkpoint_callbacks(self) -> list[Any]:
        """All callbacks that write checkpoints."""
        return self._of_type("Checkpoint")

    @property
    def checkpoint_callback(self) -> Any:
        """The first callback that writes checkpoints, or None."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[Any]:
        """All EarlyStopping callbacks."""
        return self._of_type("EarlyStopping")

    @property
    def early_stopping_callback(self) -> Any:
        """The first EarlyStopping, or None."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def progress_bar_callback(self) -> Any:
        """The progress bar, or None."""
        return next(iter(self._of_type("ProgressBar")), None)

    @property
    def profiler(self) -> Any:
        """What measures the run, or None."""
        return self._profiler

    @property
    def ckpt_path(self) -> Any:
        """The checkpoint that the last run began from; set it to begin the next ones from there, None to stop that."""
        return self._ckpt_path

    @ckpt_path.setter
    def ckpt_path(self, path: Any) -> None:
        self._ckpt_path = self._ckpt_wish = path

    @property
    def named_ckpt_path(self) -> Any:
        """``ckpt_path``, if it is a path that the user gave; None if the Trainer looked for it (``"last"``, ``"best"``)."""
        return self._ckpt_path if self._ckpt_path_named else None

    # ------------------------------------------------------------------ what callbacks may say

    def record(self, metrics: Mapping[str, float], step: int) -> None:
        """Send a row of a callback's own to all loggers, without waiting for them.

        Args:
            metrics: Numbers by name; not to be changed afterwards.
            step: The row's place on the x-axis.
        """
        if self._recorder is not None and self._loggers:
            self._recorder.put(metrics, step)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank 0, without disturbing the progress bar."""
        if not self.is_global_zero:
            return
        bar = self.progress_bar_callback
        if bar is not None and getattr(bar, "is_enabled", True):
            bar.print(*args, **kwargs)
        else:
            print(*args, **kwargs)

    # ------------------------------------------------------------------ devices

    @property
    def global_rank(self) -> int:
        """Index of this process among all."""
        return self._strategy.global_rank

    @property
    def local_rank(self) -> int:
        """Index of this process on its node."""
        return self._strategy.local_rank

    @property
    def node_rank(self) -> int:
        """Index of this node."""
        return self._strategy.node_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._strategy.world_size

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return int(getattr(self._strategy, "num_nodes", 1))

    @property
    def num_devices(self) -> int:
        """Devices used on this node."""
        return int(getattr(self._strategy, "num_processes", 1))

    @property
    def device_ids(self) -> list[int]:
        """Their indices."""
        devices = getattr(self._strategy, "parallel_devices", None)
        if devices is None:
            return [self._strategy.root_device.index or 0]
        return [index if device.index is None else device.index for index, device in enumerate(devices)]

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that writes."""
        return self._strategy.is_global_zero

    @property
    def _accelerator_connector(self) -> Any:
        """What was chosen, as libraries ask it of Lightning: ``trainer._accelerator_connector.is_distributed``."""
        from leyden.loops.lightning_names import Connector  # noqa: PLC0415  # only when such a name is asked for

        return Connector(self._strategy, self._accelerator)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """Arguments of a distributed sampler; None on one device."""
        return getattr(self._strategy, "distributed_sampler_kwargs", None)


def _given(loader: CombinedLoader | None) -> Any:
    return None if loader is None else loader.iterables

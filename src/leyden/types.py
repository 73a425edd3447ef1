# SPDX-License-Identifier: Apache-2.0
"""The words that all floors share: type aliases, the states of a run, and what a callback may know of the Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, TypeAlias, Union, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

PathLike: TypeAlias = Union[str, Path]
STEP_OUTPUT: TypeAlias = Union[Tensor, Mapping[str, Any], None]
"""What a step may return: the loss, a mapping with the key ``"loss"``, or None to skip the batch."""
Metric: TypeAlias = Union[Tensor, float, int]
TRAIN_DATALOADERS: TypeAlias = Any
"""One iterable of batches, or a list, tuple or dict (nested too) of them."""
EVAL_DATALOADERS: TypeAlias = Any
"""One iterable of batches, or a list or dict of them."""
LRScheduler: TypeAlias = Union[torch.optim.lr_scheduler.LRScheduler, torch.optim.lr_scheduler.ReduceLROnPlateau]
OptimizerLRScheduler: TypeAlias = Union[
    Optimizer,
    Sequence[Optimizer],
    Sequence[Mapping[str, Any]],
    tuple[Sequence[Optimizer], Sequence[Any]],
    Mapping[str, Any],
    None,
]
"""What ``configure_optimizers`` may return; ``optim.py`` turns each form into one."""
Interval: TypeAlias = Union[int, float, str, timedelta, Mapping[str, int], None]


class _Word(str, Enum):
    """A string with a fixed set of values; compares equal to its lower-case value."""

    def __str__(self) -> str:
        return str(self.value)


class TrainerFn(_Word):
    """Which entry point runs."""

    FITTING = "fit"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"


class RunningStage(_Word):
    """Which loop runs at this moment; within ``fit`` it alternates between training and validating."""

    TRAINING = "train"
    SANITY_CHECKING = "sanity_check"
    VALIDATING = "validate"
    TESTING = "test"
    PREDICTING = "predict"

    @property
    def evaluating(self) -> bool:
        return self in (RunningStage.VALIDATING, RunningStage.TESTING, RunningStage.SANITY_CHECKING)

    @property
    def dataloader_prefix(self) -> str | None:
        """The prefix of the method that gives the loaders: ``"train"``, ``"val"``, ``"test"``, ``"predict"``."""
        if self in (RunningStage.VALIDATING, RunningStage.SANITY_CHECKING):
            return "val"
        return str(self.value)


class TrainerStatus(_Word):
    """How the last entry point ended, or that it still runs."""

    INITIALIZING = "initializing"
    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"

    @property
    def stopped(self) -> bool:
        return self in (TrainerStatus.FINISHED, TrainerStatus.INTERRUPTED)


class TrainerState:
    """Where a Trainer stands: which entry point (``fn``), which loop (``stage``), how it goes (``status``)."""

    def __init__(
        self,
        status: TrainerStatus = TrainerStatus.INITIALIZING,
        fn: TrainerFn | None = None,
        stage: RunningStage | None = None,
    ) -> None:
        self.status, self.fn, self.stage = status, fn, stage

    def __repr__(self) -> str:
        return f"TrainerState(status={self.status!r}, fn={self.fn!r}, stage={self.stage!r})"

    @property
    def finished(self) -> bool:
        return self.status is TrainerStatus.FINISHED

    @property
    def stopped(self) -> bool:
        return self.status.stopped


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state goes into a checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@runtime_checkable
class MetricLike(Protocol):
    """A metric object in the sense of torchmetrics: accumulates by ``update`` or call, answers by ``compute``."""

    def compute(self) -> Any: ...

    def reset(self) -> None: ...

    def update(self, *args: Any, **kwargs: Any) -> Any: ...


class StrategyView(Protocol):
    """What callbacks and modules may ask of the strategy."""

    @property
    def root_device(self) -> torch.device: ...

    @property
    def world_size(self) -> int: ...

    @property
    def is_global_zero(self) -> bool: ...

    @property
    def checkpoint_io(self) -> Any: ...

    def barrier(self, name: str | None = None) -> None: ...

    def broadcast(self, obj: Any, src: int = 0) -> Any: ...

    def reduce(self, tensor: Any, group: Any = None, reduce_op: str | None = "mean") -> Any: ...

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool: ...

    def all_gather(self, tensor: Any, group: Any = None, sync_grads: bool = False) -> Any: ...

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None: ...

    def remove_checkpoint(self, filepath: PathLike) -> None: ...


class LoggerView(Protocol):
    """What the Trainer and callbacks may ask of a logger."""

    @property
    def name(self) -> str | None: ...

    @property
    def version(self) -> int | str | None: ...

    @property
    def save_dir(self) -> str | None: ...

    @property
    def log_dir(self) -> str | None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    def log_graph(self, model: torch.nn.Module, input_array: Tensor | None = None) -> None: ...

    def save(self) -> None: ...

    def finalize(self, status: str) -> None: ...

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None: ...


class TrainerView(Protocol):
    """What a module, a callback or a logger may know of the Trainer: read-only names, and three verbs.

    Counts: ``current_epoch`` epochs completed, ``global_step`` updates of the model, ``num_*_batches`` batches per epoch.
    """

    should_stop: bool
    accumulate_grad_batches: int
    fast_dev_run: int | bool
    default_root_dir: str
    state: TrainerState
    barebones: bool

    @property
    def current_epoch(self) -> int: ...

    @property
    def global_step(self) -> int: ...

    @property
    def max_epochs(self) -> int | None: ...

    @property
    def min_epochs(self) -> int | None: ...

    @property
    def max_steps(self) -> int: ...

    @property
    def min_steps(self) -> int | None: ...

    @property
    def estimated_stepping_batches(self) -> int | float: ...

    @property
    def is_last_batch(self) -> bool: ...

    @property
    def num_training_batches(self) -> int | float: ...

    @property
    def num_val_batches(self) -> list[int | float]: ...

    @property
    def num_sanity_val_batches(self) -> list[int | float]: ...

    @property
    def num_test_batches(self) -> list[int | float]: ...

    @property
    def num_predict_batches(self) -> list[int | float]: ...

    @property
    def callback_metrics(self) -> dict[str, Tensor]: ...

    @property
    def logged_metrics(self) -> dict[str, Tensor]: ...

    @property
    def progress_bar_metrics(self) -> dict[str, float]: ...

    @property
    def log_every_n_steps(self) -> int: ...

    @property
    def batches_per_update(self) -> int: ...
    @property
    def check_val_every_n_epoch(self) -> int | None: ...

    @property
    def val_check_interval(self) -> Interval: ...

    @property
    def val_check_batch(self) -> int | float | None: ...

    @property
    def enable_validation(self) -> bool: ...

    @property
    def callbacks(self) -> list[Any]: ...

    @property
    def checkpoint_callbacks(self) -> list[Any]: ...

    @property
    def checkpoint_callback(self) -> Any: ...

    @property
    def ckpt_path(self) -> PathLike | None: ...

    @property
    def named_ckpt_path(self) -> PathLike | None: ...

    @property
    def logger(self) -> Any: ...

    @property
    def loggers(self) -> list[Any]: ...

    @property
    def log_dir(self) -> str | None: ...

    @property
    def strategy(self) -> Any: ...

    @property
    def accelerator(self) -> Any: ...

    @property
    def lightning_module(self) -> Any: ...

    @property
    def datamodule(self) -> Any: ...

    @property
    def optimizers(self) -> list[Optimizer]: ...

    @property
    def lr_scheduler_configs(self) -> list[Any]: ...

    @property
    def train_dataloader(self) -> Any: ...

    @property
    def val_dataloaders(self) -> Any: ...

    @property
    def test_dataloaders(self) -> Any: ...

    @property
    def predict_dataloaders(self) -> Any: ...

    @property
    def fit_loop(self) -> Any: ...

    @property
    def predict_loop(self) -> Any: ...

    @property
    def global_rank(self) -> int: ...

    @property
    def local_rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def is_global_zero(self) -> bool: ...

    @property
    def sanity_checking(self) -> bool: ...

    @property
    def training(self) -> bool: ...

    @property
    def validating(self) -> bool: ...

    @property
    def testing(self) -> bool: ...

    @property
    def predicting(self) -> bool: ...

    @property
    def interrupted(self) -> bool: ...

    @property
    def profiler(self) -> Any: ...

    @property
    def batches_that_stepped(self) -> int: ...

    def save_checkpoint(
        self, filepath: PathLike, weights_only: bool | None = None, storage_options: Any = None
    ) -> None: ...

    def validation_due(self) -> bool: ...

    def rehearsal(self) -> Any: ...

    def record(self, metrics: Mapping[str, float], step: int) -> None: ...

    def print(self, *args: Any, **kwargs: Any) -> None: ...


__all__ = [
    "EVAL_DATALOADERS",
    "STEP_OUTPUT",
    "TRAIN_DATALOADERS",
    "Interval",
    "LRScheduler",
    "LoggerView",
    "Metric",
    "MetricLike",
    "OptimizerLRScheduler",
    "PathLike",
    "RunningStage",
    "Stateful",
    "StrategyView",
    "TrainerFn",
    "TrainerState",
    "TrainerStatus",
    "TrainerView",
]

# SPDX-License-Identifier: Apache-2.0
"""The public names of the logger family, each imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leyden.loggers.base import DummyLogger, Logger, rank_zero_experiment
    from leyden.loggers.comet import CometLogger
    from leyden.loggers.csv import CSVLogger
    from leyden.loggers.experiment import Experiment
    from leyden.loggers.gone import LitLogger, NeptuneLogger
    from leyden.loggers.history import History
    from leyden.loggers.mlflow import MLFlowLogger
    from leyden.loggers.recorder import Recorder
    from leyden.loggers.tensorboard import TensorBoardLogger
    from leyden.loggers.wandb import WandbLogger

_HOMES = {
    "CSVLogger": "csv",
    "CometLogger": "comet",
    "DummyLogger": "base",
    "Experiment": "experiment",
    "History": "history",
    "LitLogger": "gone",
    "Logger": "base",
    "MLFlowLogger": "mlflow",
    "NeptuneLogger": "gone",
    "Recorder": "recorder",
    "TensorBoardLogger": "tensorboard",
    "WandbLogger": "wandb",
    "rank_zero_experiment": "base",
}

__all__ = [
    "CSVLogger",
    "CometLogger",
    "DummyLogger",
    "Experiment",
    "History",
    "LitLogger",
    "Logger",
    "MLFlowLogger",
    "NeptuneLogger",
    "Recorder",
    "TensorBoardLogger",
    "WandbLogger",
    "rank_zero_experiment",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

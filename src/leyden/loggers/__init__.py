# SPDX-License-Identifier: Apache-2.0
"""The public names of the logger family, each imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leyden.loggers.base import DummyLogger, Logger, rank_zero_experiment
    from leyden.loggers.csv import CSVLogger
    from leyden.loggers.experiment import Experiment
    from leyden.loggers.history import History
    from leyden.loggers.recorder import Recorder
    from leyden.loggers.tensorboard import TensorBoardLogger

_HOMES = {
    "CSVLogger": "csv",
    "DummyLogger": "base",
    "Experiment": "experiment",
    "History": "history",
    "Logger": "base",
    "Recorder": "recorder",
    "TensorBoardLogger": "tensorboard",
    "rank_zero_experiment": "base",
}

__all__ = [
    "CSVLogger",
    "DummyLogger",
    "Experiment",
    "History",
    "Logger",
    "Recorder",
    "TensorBoardLogger",
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
